"""How does what is asked in words become what is asked in tokens?

In the decoder's replica, where the tokenizer and the chat template are, and off its event loop.
"""

from collections.abc import Sequence
from dataclasses import replace

from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import said_as
from serve_apps.api.grammar_fields import AskedGrammar
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.replica.bad_words import token_sequences
from serve_apps.streaming.tool_call_formats import FORMS, call_grammar
from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import encode_chat, turn_end_id
from tidar_core.artifacts.text.grammar import GrammarConstraint, compile_constraint
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.decoding import logit_rules
from tidar_core.decoding.request import Request
from tidar_core.decoding.stop_strings import stop_tokens

__all__ = ["PromptEncoder"]


class PromptEncoder:
    """Reads prompts for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        end_ids: Sequence[int] = (),
        vocab_size: int,
        context_len: int,
        tool_form: str | None,
    ) -> None:
        """end_ids    tokens that end any text, besides the tokenizer's end-of-text token
        template   None for a model that knows no conversations
        tool_form  how it writes calls; None where it knows none
        """
        self._tokenizer, self._template, self._end_ids = tokenizer, template, tuple(end_ids)
        self._vocab_size, self._context_len = vocab_size, context_len
        self.tool_form = tool_form
        self._turn_end = None if template is None else turn_end_id(template, tokenizer)

    def request(self, asked: GenerationRequest) -> Request:
        """What is asked, in tokens. Raises RequestError."""
        self.check_ids("stop_token_ids", asked.sampling.eos_ids)
        prompt = self.tokens(asked.prompt, framed=asked.framed)
        grammar = self.grammar(asked)
        named = stop_tokens(asked.stop, self._tokenizer.special_ids)
        sampling = replace(
            asked.sampling,
            eos_ids=tuple(dict.fromkeys([*self._ends(asked, grammar), *asked.sampling.eos_ids, *named])),
            bad_words=token_sequences(asked.bad_words, self._tokenizer.encode_behind),
        )
        if asked.to_the_end:
            sampling = replace(sampling, max_tokens=max(self._context_len - len(prompt), sampling.max_tokens))
        with said_as():
            logit_rules.check(sampling, self._vocab_size)
        constraint: GrammarConstraint | None = None
        if grammar is not None:
            with said_as(grammar.param):
                compiled = compile_constraint(grammar.kind, grammar.content, self._tokenizer)
            constraint = compiled.constraint(self._vocab_size, sampling.eos_ids)
        return Request(
            request_id=asked.request_id, prompt=prompt, sampling=sampling,
            constraint=constraint, speculative=asked.speculative,
        )  # fmt: skip

    def check_ids(self, field: str, tokens: Sequence[int]) -> None:
        """Raise ParameterError for the first of `tokens` that the model does not have."""
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise ParameterError(f"{field} names token {token}; ids are 0..{self._vocab_size - 1}; drop it", field)

    def _ends(self, asked: GenerationRequest, grammar: AskedGrammar | None) -> list[int]:
        """The model's tokens that end this text; with a grammar, which knows its own end, special tokens alone."""
        if asked.ignore_eos:
            return []
        special = self._tokenizer.special_ids.values()
        ends = [token for token in self._end_ids if grammar is None or token in special]
        if isinstance(asked.prompt, Chat) and self._turn_end is not None:
            ends.append(self._turn_end)
        return [self._tokenizer.eos_id, *ends]

    def tokens(self, prompt: str | tuple[int, ...] | Chat, *, framed: bool = False) -> tuple[int, ...]:
        """The ids of a prompt. Raises RequestError."""
        if isinstance(prompt, tuple):
            self.check_ids("prompt", prompt)
            return prompt
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode_batch([prompt], framed=framed)[0])
        if self._template is None:
            raise ParameterError(
                "this model has no chat template; ask /v1/completions, or serve it with one", "messages"
            )
        if prompt.tools is not None and self.tool_form is None:
            raise ParameterError(
                "this model's chat template knows no tools, or calls in a form unknown here; drop tools",
                "tools",
                "unsupported_parameter",
            )
        with said_as("messages"):
            ids = encode_chat(
                self._template,
                self._tokenizer,
                prompt.messages,
                tools=prompt.tools,
                add_generation_prompt=prompt.add_generation_prompt,
                leave_open=prompt.leave_open,
                variables=prompt.variables,
            )
        return tuple(ids)

    def grammar(self, asked: GenerationRequest) -> AskedGrammar | None:
        """What the text must keep to."""
        if asked.grammar is not None or asked.tools is None or self.tool_form is None:
            return asked.grammar
        return call_grammar(FORMS[self.tool_form], asked.tools)

    def check_grammar(self, asked: GenerationRequest, wanted: Request) -> None:
        """Raise ParameterError if a text ended because its grammar asks for too much work."""
        if not isinstance(wanted.constraint, GrammarConstraint):
            return
        wanted.constraint.allowed([])  # a failure that was met beside drafts went with them; it is met again
        if wanted.constraint.failure is not None:
            grammar = self.grammar(asked)
            assert grammar is not None
            raise ParameterError(
                f"{grammar.param} cannot be followed to its end: {wanted.constraint.failure}; simplify it",
                grammar.param,
            )

"""The encoder of requests: prompt, grammar, stop tokens and bad words become tokens.

It runs in the engine, which has the tokenizer and the chat template.
"""

from collections.abc import Sequence
from dataclasses import replace

from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import as_parameter_error
from serve_apps.messages.generation_request import Chat, GenerationRequest, RequestedGrammar
from serve_apps.replica.bad_words import token_sequences
from serve_apps.streaming.tool_call_formats import FORMS, call_grammar
from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import encode_chat, require_variables_read, turn_end_id
from tidar_core.artifacts.text.grammar import GrammarConstraint, compile_constraint
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.decoding import logit_rules
from tidar_core.decoding.request import Request
from tidar_core.decoding.stop_strings import stop_tokens

__all__ = ["PromptEncoder"]


class PromptEncoder:
    """Encoder of requests for one model."""

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
        template   chat template; `None` for a model without conversations
        tool_form  form in which the model writes calls; `None` for a model without calls
        """
        self._tokenizer, self._template, self._end_ids = tokenizer, template, tuple(end_ids)
        self._vocab_size, self._context_len = vocab_size, context_len
        self.tool_form = tool_form
        self._turn_end = None if template is None else turn_end_id(template, tokenizer)

    def request(self, request: GenerationRequest) -> Request:
        """The request in tokens. Raises RequestError."""
        self.check_ids("stop_token_ids", request.sampling.eos_ids)
        prompt = self.tokens(request.prompt, framed=request.framed)
        grammar = self.grammar(request)
        named = stop_tokens(request.stop, self._tokenizer.special_ids)
        sampling = replace(
            request.sampling,
            eos_ids=tuple(dict.fromkeys([*self._ends(request, grammar), *request.sampling.eos_ids, *named])),
            bad_words=token_sequences(request.bad_words, self._tokenizer.encode_continuation),
        )
        if request.to_the_end:
            sampling = replace(sampling, max_tokens=max(self._context_len - len(prompt), sampling.max_tokens))
        with as_parameter_error():
            logit_rules.check(sampling, self._vocab_size)
        constraint: GrammarConstraint | None = None
        if grammar is not None:
            with as_parameter_error(grammar.param):
                compiled = compile_constraint(grammar.kind, grammar.content, self._tokenizer)
            constraint = compiled.constraint(self._vocab_size, sampling.eos_ids)
        return Request(
            request_id=request.request_id, prompt=prompt, sampling=sampling,
            constraint=constraint, speculative=request.speculative,
        )  # fmt: skip

    def check_ids(self, field: str, tokens: Sequence[int]) -> None:
        """Raise ParameterError for the first of `tokens` that is not in the vocabulary."""
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise ParameterError(f"{field} names token {token}; ids are 0..{self._vocab_size - 1}; drop it", field)

    def _ends(self, request: GenerationRequest, grammar: RequestedGrammar | None) -> list[int]:
        """Tokens of the model that end this text. With a grammar, which has its own end, only special tokens end it."""
        if request.ignore_eos:
            return []
        special = self._tokenizer.special_ids.values()
        ends = [token for token in self._end_ids if grammar is None or token in special]
        if isinstance(request.prompt, Chat) and self._turn_end is not None:
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
                "this model has no chat template; use /v1/completions, or serve the model with a template", "messages"
            )
        if prompt.tools is not None and self.tool_form is None:
            raise ParameterError(
                "this model's chat template knows no tools, or calls in a form unknown here; drop tools",
                "tools",
                "unsupported_parameter",
            )
        with as_parameter_error("chat_template_kwargs"):
            require_variables_read(self._template, prompt.variables, prompt.tools)
        with as_parameter_error("messages"):
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

    def grammar(self, request: GenerationRequest) -> RequestedGrammar | None:
        """Grammar of the text."""
        if request.grammar is not None or request.tools is None or self.tool_form is None:
            return request.grammar
        return call_grammar(FORMS[self.tool_form], request.tools)

    def check_grammar(self, request: GenerationRequest, encoded: Request) -> None:
        """Raise ParameterError if a text ended because its grammar takes too much work."""
        if not isinstance(encoded.constraint, GrammarConstraint):
            return
        encoded.constraint.allowed([])  # a failure beside drafts was dropped with them; this call repeats it
        if encoded.constraint.failure is not None:
            grammar = self.grammar(request)
            assert grammar is not None
            raise ParameterError(
                f"{grammar.param} cannot be followed to its end: {encoded.constraint.failure}; simplify it",
                grammar.param,
            )

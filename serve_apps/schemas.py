"""What may a client ask of /v1/completions?

OpenAI's fields with vLLM's extensions. How a body becomes a request, or is refused: `reading`.
"""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.grammars import AskedGrammar, Choices, ResponseFormat, Schema, StructuredOutputs, asked_grammar
from tidar_core.config import COLDEST, MOST_LOGPROBS, SamplingConfig

__all__ = ["CompletionRequest", "PromptRequest", "StreamOptions"]

SEED_BITS = 63
LONGEST_VOCABULARY = 2**31 - 1
MOST_CHOICES = 128
"""As OpenAI has it."""
MOST_TOP_LOGPROBS = 5
"""As OpenAI's completions have it."""
MOST_STOP_STRINGS = 64
"""OpenAI takes 4; each costs a little with every character that is written."""
MOST_BAD_WORDS = 256

Words = Annotated[str, Field(min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One text to be written, as it is asked of a decoder replica."""

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingConfig
    """Its eos_ids are the request's own stop tokens; the replica adds the tokenizer's end-of-text token, and the tokens
    of bad words. Its logprobs are the most that any part of the answer wants."""
    ignore_eos: bool = False
    pieces: bool = True
    """Text is wanted as it comes; otherwise all at the end."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """The stop string, or the stop token's text, is part of the text."""
    bad_words: tuple[str, ...] = ()
    grammar: AskedGrammar | None = None
    echo: bool = False
    """The prompt is the beginning of the text."""
    prompt_alone: bool = False
    """max_tokens was 0: nothing is written after the prompt."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told for each token of the text."""
    prompt_logprobs: int | None = None
    """And for each token of the prompt."""


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False
    """A last chunk without choices says what the request cost."""
    continuous_usage_stats: bool = False
    """Every chunk says what the request has cost so far."""


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    prompt: Annotated[list[str | tuple[int, ...]], Field(min_length=1)]
    max_tokens: int = 16
    """0 with echo alone: the prompt, and how likely it is."""
    min_tokens: int = 0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    best_of: int | None = None
    """Accepted where it equals n, so that there is nothing to choose from."""
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[TokenId, float] = {}
    bad_words: Annotated[list[Words], Field(max_length=MOST_BAD_WORDS)] = []
    stop: Annotated[list[Words], Field(max_length=MOST_STOP_STRINGS)] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    """Accepted for the client's own books; changes nothing."""

    def prompts(self, completion_id: str) -> list[PromptRequest]:
        """One request per choice: the n choices of the first prompt, then those of the next.

        As in vLLM the i-th choice of a prompt has the seed plus i. Without a seed each gets a fresh one.
        """
        grammar = self.grammar()
        return [
            PromptRequest(
                request_id=f"{completion_id}-{place * self.n + choice}",
                prompt=prompt,
                sampling=self.sampling(self._seed(choice)),
                ignore_eos=self.ignore_eos,
                pieces=self.stream,
                stop=tuple(self.stop),
                include_stop=self.include_stop_str_in_output,
                bad_words=tuple(self.bad_words),
                grammar=grammar,
                echo=self.echo,
                prompt_alone=self.max_tokens == 0,
                logprobs=self.logprobs,
                prompt_logprobs=self.prompt_logprobs,
            )
            for place, prompt in enumerate(self.prompt)
            for choice in range(self.n)
        ]

    def sampling(self, seed: int) -> SamplingConfig:
        """What is asked of the sampler. Raises RequestError, whose first word is the field's name."""
        wanted = [count for count in (self.logprobs, self.prompt_logprobs) if count is not None]
        return SamplingConfig(
            max_tokens=1 if self.echo and self.max_tokens == 0 else self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0 if 0 <= self.temperature < COLDEST else self.temperature,  # as in vLLM
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else min(self.top_k, LONGEST_VOCABULARY),  # vLLM writes "off" as -1
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            seed=seed,
            eos_ids=tuple(self.stop_token_ids),
            logprobs=max(wanted, default=None),
            prompt_logprobs=self.prompt_logprobs is not None or (self.echo and self.logprobs is not None),
        )

    def grammar(self) -> AskedGrammar | None:
        """What the texts must keep to. Raises ParameterError if that is asked for twice."""
        guided: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name.startswith("guided_")
        }
        return asked_grammar(self.response_format, self.structured_outputs, guided)

    def _seed(self, choice: int) -> int:
        if self.seed is None:
            return secrets.randbits(SEED_BITS)
        seed = self.seed + choice
        return seed if seed < 2**SEED_BITS else seed - 2 ** (SEED_BITS + 1) + 1  # beyond the last comes the first

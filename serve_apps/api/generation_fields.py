"""Which fields do completions and chats have in common, and what do they ask of the sampler?

OpenAI's with vLLM's extensions. How a body becomes a request, or is refused: `reading`.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve_apps.api import bounds
from serve_apps.api.errors import ParameterError
from serve_apps.api.grammar_fields import (
    AskedGrammar,
    Choices,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    asked_grammar,
)
from serve_apps.api.parsing import Body, null_is_nothing
from tidar_core.config import COLDEST, MOST_LOGPROBS, SamplingConfig
from tidar_core.errors import RequestError

__all__ = ["GenerationFields", "StreamOptions", "said_as", "shown"]

LONGEST_VOCABULARY = 2**31 - 1

Name = Annotated[str, Field(max_length=bounds.NAME_CHARS)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


def shown(**limits: float) -> Any:
    """Limits for the OpenAPI document alone: `SamplingConfig` is who refuses, in its own words."""
    return Field(json_schema_extra={**limits})


def _no_number(value: Any) -> Any:
    """0 equals False in Python, not in JSON."""
    return value if isinstance(value, bool) else str(value)


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=null_is_nothing)

    include_usage: bool = False
    """A last chunk without choices says what the request cost."""
    continuous_usage_stats: bool = False
    """Every chunk says what the request has cost so far."""
    include_obfuscation: Annotated[Literal[False], BeforeValidator(_no_number)] = False
    """Chunks are not padded here."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_null(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _without_nothing(value: Any) -> Any:
    """What is null or false asks for nothing here."""
    return {k: v for k, v in value.items() if v is not None and v is not False} if isinstance(value, dict) else value


StopWord = Annotated[str, Field(min_length=1, max_length=bounds.STOP_CHARS)]
StopWords = Annotated[list[StopWord], Field(max_length=bounds.STOP_STRINGS)]
ONE_OR_MORE = BeforeValidator(_as_list, json_schema_input_type=StopWord | StopWords)
BadWord = Annotated[str, Field(min_length=1, max_length=bounds.BAD_WORD_CHARS)]


class GenerationFields(Body):
    """What a request for text may say."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_token_ids": ([],),
        "cache_salt": ("",),
        "extra_body": ({},),
        "length_penalty": (1,),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "priority": (0,),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "prompt_cache_retention": ("in_memory", "24h"),
        "reasoning": ({}, {"effort": "none"}, {"enabled": False}),
        "reasoning_effort": ("none",),
        "return_tokens_as_token_ids": (False,),
        "service_tier": ("auto", "default"),
        "spaces_between_special_tokens": (True,),
        "store": (False,),
        "thinking": ({"type": "disabled"},),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
    }

    model: Name
    min_tokens: Annotated[int, shown(minimum=0)] = 0
    n: Annotated[int, Field(ge=1, le=bounds.CHOICES)] = 1
    seed: int | None = None
    temperature: Annotated[float, shown(minimum=0, maximum=100)] = 1.0
    top_p: Annotated[float, shown(exclusiveMinimum=0, maximum=1)] = 1.0
    top_k: Annotated[int, shown(minimum=-1)] = 0
    min_p: Annotated[float, shown(minimum=0, maximum=1)] = 0.0
    repetition_penalty: Annotated[float, shown(exclusiveMinimum=0)] = 1.0
    presence_penalty: Annotated[float, shown(minimum=-2, maximum=2)] = 0.0
    frequency_penalty: Annotated[float, shown(minimum=-2, maximum=2)] = 0.0
    logit_bias: Annotated[dict[TokenId, float], Field(max_length=bounds.LOGIT_BIASES, default_factory=dict)]
    bad_words: Annotated[list[BadWord], Field(max_length=bounds.BAD_WORDS, default_factory=list)]
    stop: Annotated[StopWords, ONE_OR_MORE, Field(default_factory=list)]
    stop_token_ids: Annotated[list[int], Field(max_length=bounds.STOP_TOKEN_IDS, default_factory=list)]
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    response_format: Annotated[ResponseFormat, BeforeValidator(_without_null)] | None = None
    structured_outputs: Annotated[StructuredOutputs, BeforeValidator(_without_nothing)] | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_token_ids: bool = False
    """The ids of the tokens read and written are told."""
    speculative: bool = True
    """False: written without drafts, one token per forward, which changes no text; where nobody else's text is drafted
    at the time, this is the plain autoregressive mode."""
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_without_null)] = StreamOptions()
    request_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The answer's id is made of it."""
    user: Name | None = None
    """Accepted for the client's own books; changes nothing."""
    safety_identifier: Name | None = None
    """As `user`."""
    prompt_cache_key: Name | None = None
    """As `user`: common beginnings of prompts are found without it."""
    metadata: Annotated[dict[str, Any], Field(max_length=bounds.METADATA_ENTRIES)] | None = None
    """As `user`."""

    @property
    def choices(self) -> int:
        """Texts that are to be written."""
        return self.n

    @property
    def copies(self) -> int:
        """Times that each prompt is read."""
        return self.n

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields that are right alone do not go together."""
        if self.stream_options != StreamOptions() and not self.stream:
            raise ParameterError(
                "stream_options is given and stream is false; set stream to true or drop it", "stream_options"
            )
        with said_as():
            self.sampling(seed=self.seed or 0)
        self.grammar()

    @abstractmethod
    def sampling(self, seed: int) -> SamplingConfig:
        """What is asked of the sampler. Raises RequestError, whose first word is the field's name."""

    def grammar(self) -> AskedGrammar | None:
        """What the texts must keep to. Raises ParameterError if that is asked for twice."""
        guided: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name.startswith("guided_")
        }
        return asked_grammar(self.response_format, self.structured_outputs, guided)

    def _sampling(self, *, max_tokens: int, seed: int, logprobs: int | None, of_prompt: bool) -> SamplingConfig:
        wanted = [count for count in (logprobs, self.prompt_logprobs) if count is not None]
        return SamplingConfig(
            max_tokens=max_tokens,
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
            prompt_logprobs=self.prompt_logprobs is not None or of_prompt,
        )


@contextmanager
def said_as(param: str | None = None) -> Iterator[None]:
    """RequestErrors of what stands within become ParameterErrors: of `param`, or of the field that they begin with."""
    try:
        yield
    except ParameterError:
        raise
    except RequestError as error:
        raise ParameterError(str(error), param or str(error).split()[0]) from error

"""Fields that bodies of completions and chats share, and their settings of the sampler.

They are OpenAI's fields with vLLM's extensions. `parsing` turns a body into a request, or refuses it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve_apps.api import bounds
from serve_apps.api.errors import ParameterError
from serve_apps.api.grammar_fields import Choices, ResponseFormat, Schema, StructuredOutputs, requested_grammar
from serve_apps.api.parsing import Body, allow_null
from serve_apps.messages.generation_request import RequestedGrammar
from tidar_core.config import COLDEST, MOST_LOGPROBS, SamplingConfig
from tidar_core.errors import RequestError

__all__ = ["GenerationFields", "StreamOptions", "as_parameter_error", "openapi_limits"]

LONGEST_VOCABULARY = 2**31 - 1

Name = Annotated[str, Field(max_length=bounds.NAME_CHARS)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


def openapi_limits(**limits: float) -> Any:
    """Limits for the OpenAPI document alone; `SamplingConfig` checks them and words the error."""
    return Field(json_schema_extra={**limits})


def _no_number(value: Any) -> Any:
    """0 equals False in Python, not in JSON."""
    return value if isinstance(value, bool) else str(value)


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=allow_null)

    include_usage: bool = False
    """A last chunk without choices holds the usage of the request."""
    continuous_usage_stats: bool = False
    """Every chunk holds the usage of the request so far."""
    include_obfuscation: Annotated[Literal[False], BeforeValidator(_no_number)] = False
    """Chunks are not padded here."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_null(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _without_null_or_false(value: Any) -> Any:
    """The fields that request something: null and false request nothing here."""
    return {k: v for k, v in value.items() if v is not None and v is not False} if isinstance(value, dict) else value


StopWord = Annotated[str, Field(min_length=1, max_length=bounds.STOP_CHARS)]
StopWords = Annotated[list[StopWord], Field(max_length=bounds.STOP_STRINGS)]
ONE_OR_MORE = BeforeValidator(_as_list, json_schema_input_type=StopWord | StopWords)
BadWord = Annotated[str, Field(min_length=1, max_length=bounds.BAD_WORD_CHARS)]


class GenerationFields(Body):
    """Fields of a request for text."""

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
    min_tokens: Annotated[int, openapi_limits(minimum=0)] = 0
    """No end token comes before. A grammar comes first: it may end the text earlier."""
    n: Annotated[int, Field(ge=1, le=bounds.CHOICES)] = 1
    seed: int | None = None
    temperature: Annotated[float, openapi_limits(minimum=0, maximum=100)] = 1.0
    top_p: Annotated[float, openapi_limits(exclusiveMinimum=0, maximum=1)] = 1.0
    top_k: Annotated[int, openapi_limits(minimum=-1)] = 0
    min_p: Annotated[float, openapi_limits(minimum=0, maximum=1)] = 0.0
    repetition_penalty: Annotated[float, openapi_limits(exclusiveMinimum=0)] = 1.0
    presence_penalty: Annotated[float, openapi_limits(minimum=-2, maximum=2)] = 0.0
    frequency_penalty: Annotated[float, openapi_limits(minimum=-2, maximum=2)] = 0.0
    logit_bias: Annotated[dict[TokenId, float], Field(max_length=bounds.LOGIT_BIASES, default_factory=dict)]
    """Added to the logits of the tokens that a grammar allows. A bias of -100 bans no token where no other is left."""
    bad_words: Annotated[list[BadWord], Field(max_length=bounds.BAD_WORDS, default_factory=list)]
    """Texts that are not completed. A grammar comes first: it may leave no other token."""
    stop: Annotated[StopWords, ONE_OR_MORE, Field(default_factory=list)]
    stop_token_ids: Annotated[list[int], Field(max_length=bounds.STOP_TOKEN_IDS, default_factory=list)]
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    response_format: Annotated[ResponseFormat, BeforeValidator(_without_null)] | None = None
    structured_outputs: Annotated[StructuredOutputs, BeforeValidator(_without_null_or_false)] | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_token_ids: bool = False
    """The response holds the ids of prompt tokens and generated tokens."""
    return_decoding: bool = False
    """Each choice reports which forward produced each token, and which tokens were accepted drafts."""
    speculative: bool = True
    """False: generated without drafts, one token per forward, which does not change the text. If no other request is
    drafted at the same time, this is the plain autoregressive mode."""
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_without_null)] = StreamOptions()
    request_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The id of the response is derived from it."""
    user: Name | None = None
    """Accepted for the client's own records; changes nothing."""
    safety_identifier: Name | None = None
    """Accepted like `user`; changes nothing."""
    prompt_cache_key: Name | None = None
    """Accepted like `user`; the prefix cache needs no key."""
    metadata: Annotated[dict[str, Any], Field(max_length=bounds.METADATA_ENTRIES)] | None = None
    """Accepted like `user`; changes nothing."""

    @property
    def choices(self) -> int:
        """Texts to generate."""
        return self.n

    @property
    def copies(self) -> int:
        """Number of copies of each prompt."""
        return self.n

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields contradict each other."""
        if self.stream_options != StreamOptions() and not self.stream:
            raise ParameterError(
                "stream_options is given and stream is false; set stream to true or drop it", "stream_options"
            )
        with as_parameter_error():
            self.sampling(seed=self.seed or 0)
        self.grammar()

    @abstractmethod
    def sampling(self, seed: int) -> SamplingConfig:
        """Settings of the sampler. Raises RequestError, whose first word is the field's name."""

    def grammar(self) -> RequestedGrammar | None:
        """Grammar that the texts must follow. Raises ParameterError if the body requests two."""
        guided: dict[str, Any] = {
            name: getattr(self, name) for name in type(self).model_fields if name.startswith("guided_")
        }
        return requested_grammar(self.response_format, self.structured_outputs, guided)

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
def as_parameter_error(param: str | None = None) -> Iterator[None]:
    """Turn a RequestError into a ParameterError of `param`, by default of the field that its message begins with."""
    try:
        yield
    except ParameterError:
        raise
    except RequestError as error:
        raise ParameterError(str(error), param or str(error).split()[0]) from error

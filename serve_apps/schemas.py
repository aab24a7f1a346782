"""What may a client ask of /v1/completions, and what does it get back?

OpenAI's shapes with vLLM's extensions. A field is honoured or refused, never passed over: one that is known but not
honoured here may only have the value that asks for nothing.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_apps.errors import ParameterError
from tidar_core.config import COLDEST, SamplingConfig
from tidar_core.errors import RequestError

__all__ = [
    "Choice",
    "Completion",
    "CompletionRequest",
    "Metrics",
    "ModelCard",
    "ModelList",
    "PromptRequest",
    "SpeculativeDecoding",
    "Usage",
    "read_request",
]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop": ([], ""),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
}
"""Fields of OpenAI and vLLM that are not honoured, and the values, beside null, that ask for nothing."""

SEED_BITS = 63
LONGEST_VOCABULARY = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One prompt of a request, as it goes to a decoder replica."""

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingConfig
    """Its eos_ids are the request's own stop tokens; the replica adds the tokenizer's end-of-text token."""
    ignore_eos: bool = False
    pieces: bool = True
    """Text is wanted as it comes; otherwise all at the end."""


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
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    user: str | None = None
    """Accepted for the client's own books; changes nothing."""

    def prompts(self, completion_id: str) -> list[PromptRequest]:
        """One request per prompt. Without a seed each prompt gets a fresh one."""
        return [
            PromptRequest(
                request_id=f"{completion_id}-{index}",
                prompt=prompt,
                sampling=self.sampling(secrets.randbits(SEED_BITS) if self.seed is None else self.seed),
                ignore_eos=self.ignore_eos,
                pieces=self.stream,
            )
            for index, prompt in enumerate(self.prompt)
        ]

    def sampling(self, seed: int) -> SamplingConfig:
        """What is asked of the sampler."""
        return SamplingConfig(
            max_tokens=self.max_tokens,
            temperature=0.0 if 0 <= self.temperature < COLDEST else self.temperature,  # as in vLLM
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else min(self.top_k, LONGEST_VOCABULARY),  # vLLM writes "off" as -1
            seed=seed,
            eos_ids=tuple(self.stop_token_ids),
        )


class Usage(BaseModel):
    """Tokens read and written; an end-of-text token that was generated counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SpeculativeDecoding(BaseModel):
    """How drafts fared, under vLLM's names. Of the K tokens of a block K - 1 are speculative: its first is final."""

    mean_acceptance_length: float
    """Tokens per decode step, the AR token (vLLM's bonus token) included."""
    draft_acceptance_rate: float
    """Share of the speculative tokens that stood."""
    acceptance_histogram: list[int]
    """At index j, the decode steps in which j speculative tokens stood."""
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    """Speculative tokens in a draft block: K - 1."""


class Metrics(BaseModel):
    """What a response says beyond OpenAI's fields."""

    speculative_decoding: SpeculativeDecoding


class Choice(BaseModel):
    """The text of one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """A whole response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None
    metrics: Metrics | None = None


class ModelCard(BaseModel):
    """The model that is served."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tidar"
    max_model_len: int
    block_len: int
    bundle_hash: str
    mode: str

    @property
    def fingerprint(self) -> str:
        """Same weights, same way of decoding: same string."""
        return f"{self.bundle_hash[:12]}-{self.mode}-{self.block_len}"


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def read_request(body: bytes) -> CompletionRequest:
    """The request in a JSON body. Raises ParameterError, which names the first parameter that is wrong."""
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()  # JSON can spell half a character, which no text holds
    except UnicodeEncodeError as error:
        raise ParameterError(f"the body spells half a character: {error}; send whole ones") from error
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"the body is not JSON: {error}; send one JSON object") from error
    if not isinstance(fields, dict):
        raise ParameterError(f"the body is a JSON {type(fields).__name__}; send one JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        _refuse_unsupported(name, value)
    fields = {name: value for name, value in fields.items() if name not in NEUTRAL}
    if "prompt" in fields:
        fields["prompt"] = _prompts(fields["prompt"])
    try:
        request = CompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise _parameter_error(error.errors()[0]) from error
    if "stream_options" in fields and not request.stream:
        raise ParameterError(
            "stream_options is given and stream is false; set stream to true or drop it", "stream_options"
        )
    try:
        request.sampling(seed=request.seed or 0)
    except RequestError as error:
        raise ParameterError(str(error), str(error).split()[0]) from error  # our messages begin with the field's name
    return request


def _refuse_unsupported(name: str, value: Any) -> None:
    if name in CompletionRequest.model_fields:
        return
    if name not in NEUTRAL:
        raise ParameterError(
            f"parameter {name!r} is not known here; known are {', '.join(CompletionRequest.model_fields)}; drop it",
            name,
            "unsupported_parameter",
        )
    if value not in NEUTRAL[name] or (isinstance(value, bool) and not _has_bool(NEUTRAL[name])):
        raise ParameterError(
            f"{name} is {_shortened(value)}; this server does not support it; drop it", name, "unsupported_parameter"
        )


def _has_bool(values: Sequence[Any]) -> bool:
    return any(isinstance(value, bool) for value in values)


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """The four forms of `prompt` as one: a list whose members are a text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_ids(value):
            return [tuple(value)]
        if all(isinstance(item, list) and _is_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise ParameterError(
        f"prompt is {_shortened(value)}; it must be a string, a list of strings, a list of token ids, or a list of "
        "lists of token ids, none of the lists empty",
        "prompt",
    )


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int for item in value)


def _parameter_error(error: Any) -> ParameterError:
    """Pydantic's first complaint, in our words."""
    unknown = error["type"] == "extra_forbidden"
    known = CompletionRequest.model_fields | StreamOptions.model_fields
    param = ".".join(part for part in error["loc"] if unknown or part in known)
    if error["type"] == "missing":
        return ParameterError(f"{param} is missing; give it", param)
    if unknown:
        return ParameterError(f"{param} is not known here; drop it", param, "unsupported_parameter")
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return ParameterError(f"{param} is {_shortened(error['input'])}; it {message}", param)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

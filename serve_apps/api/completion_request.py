"""Body of POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from serve_apps.api.bounds import PROMPTS, check_ids_len, check_text_len
from serve_apps.api.errors import ParameterError, shortened
from serve_apps.api.generation_fields import GenerationFields, openapi_limits
from tidar_core.config import SamplingConfig

__all__ = ["CompletionRequest"]

MOST_TOP_LOGPROBS = 5
"""OpenAI's bound for completions."""

Text = str | list[str] | list[int] | list[list[int]]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]


FALSE_IS_NONE = BeforeValidator(
    lambda value: None if value is False else value, json_schema_input_type=TopLogprobs | Literal[False] | None
)


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """The four forms of `prompt` as a list whose members are texts or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > PROMPTS and not isinstance(value[0], int):
            raise ParameterError(f"prompt holds {len(value)} texts; at most {PROMPTS} are read; send fewer", "prompt")
        if all(isinstance(item, str) for item in value):
            return value
        if _is_ids(value):
            return [tuple(value)]
        if all(isinstance(item, list) and _is_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise ParameterError(
        f"prompt is {shortened(value)}; it must be a string, token ids, or a list of either, and no list may be empty",
        "prompt",
    )


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int for item in value)


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {**GenerationFields.NEUTRAL, "suffix": ("",)}

    prompt: Annotated[list[str | tuple[int, ...]], BeforeValidator(_prompts, json_schema_input_type=Text)]
    max_tokens: Annotated[int, openapi_limits(minimum=0)] = 16
    """0 is allowed with echo alone: it returns the prompt with its log probabilities."""
    best_of: int | None = None
    """Accepted if it equals n, so that there is nothing to choose from."""
    echo: bool = False
    logprobs: Annotated[TopLogprobs | None, FALSE_IS_NONE] = None
    add_special_tokens: bool = False
    """Text prompts are encoded with the special tokens that the tokenizer adds around texts."""

    @property
    def choices(self) -> int:
        """Texts to generate: n for each prompt."""
        return self.n * len(self.prompt)

    def check_context(self, context_len: int) -> None:
        """Raise ParameterError if a prompt cannot fit into the context."""
        for prompt in self.prompt:
            check = check_text_len if isinstance(prompt, str) else check_ids_len
            check(len(prompt), context_len, "prompt")

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields contradict each other."""
        if self.best_of not in (None, self.n):
            raise ParameterError(
                f"best_of is {self.best_of} and n is {self.n}; this server generates no texts only to discard them; "
                "drop best_of",
                "best_of",
                "unsupported_parameter",
            )
        super().check(given)

    def sampling(self, seed: int) -> SamplingConfig:
        """Settings of the sampler. Raises RequestError, whose first word is the field's name."""
        return self._sampling(
            max_tokens=1 if self.echo and self.max_tokens == 0 else self.max_tokens,
            seed=seed,
            logprobs=self.logprobs,
            of_prompt=self.echo and self.logprobs is not None,
        )

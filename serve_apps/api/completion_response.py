"""Responses of /v1/completions and /v1/models, in OpenAI's shapes with vLLM's extensions."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from serve_apps.messages.text_delta import FinishReason, UsageCounts
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import Logprobs, PromptScores

__all__ = [
    "Answer",
    "Choice",
    "Completion",
    "Metrics",
    "ModelCard",
    "ModelList",
    "PromptTokensDetails",
    "SpeculativeDecoding",
    "Usage",
    "metrics_of",
    "usage_of",
]


class PromptTokensDetails(BaseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int
    """Tokens that were in the cache already, from prompts with the same prefix."""


class Usage(BaseModel):
    """Counts of prompt tokens and generated tokens; a generated end-of-text token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class SpeculativeDecoding(BaseModel):
    """Acceptance of drafts, under vLLM's names.

    A block of K tokens has K - 1 speculative tokens: its first token is final.
    """

    mean_acceptance_length: float
    """Tokens per decode step, the AR token (vLLM's bonus token) included."""
    draft_acceptance_rate: float
    """Accepted share of the speculative tokens."""
    acceptance_histogram: list[int]
    """At index j, the number of decode steps that accepted j speculative tokens."""
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    """Speculative tokens in a draft block: K - 1."""


class Metrics(BaseModel):
    """Metrics of a response beyond OpenAI's fields."""

    speculative_decoding: SpeculativeDecoding


class Choice(BaseModel):
    """A text, or its next delta in a stream."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    """Stop string, or id of the stop token, that ended the text; None for the end-of-text token."""
    prompt_logprobs: PromptScores | None = None
    prompt_token_ids: list[int] | None = None
    """Present if requested; a stream has it in its first chunk."""
    token_ids: list[int] | None = None
    decoding: Decoding | None = None
    """Present if requested."""


class Answer(BaseModel):
    """Fields that every response and every chunk of a stream has."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """The same string for the same weights and the same method of decoding."""
    usage: Usage | None = None
    metrics: Metrics | None = None


class Completion(Answer):
    """A whole response, or one chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]


class ModelCard(BaseModel):
    """Description of the model that is served."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tidar"
    max_model_len: int
    block_len: int
    bundle_hash: str
    mode: str


class ModelList(BaseModel):
    """List of all models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def usage_of(counts: UsageCounts) -> Usage:
    """Tokens of prompts and texts."""
    return Usage(
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        total_tokens=counts.prompt_tokens + counts.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.cached_tokens),
    )


def metrics_of(counts: UsageCounts) -> Metrics | None:
    """Statistics of the drafts; None in the autoregressive mode, which has no drafts."""
    if not counts.drafts_per_step:
        return None
    steps, drafted, accepted = counts.decode_steps, counts.drafted_tokens, counts.accepted_tokens
    return Metrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=1 + accepted / steps if steps else 1.0,
            draft_acceptance_rate=accepted / drafted if drafted else 0.0,
            acceptance_histogram=list(counts.histogram),
            num_spec_steps=steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=drafted,
            num_spec_tokens=counts.drafts_per_step,
        )
    )

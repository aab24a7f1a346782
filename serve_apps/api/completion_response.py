"""Responses of /v1/completions and /v1/models, in OpenAI's shapes with vLLM's extensions."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from serve_apps.api.token_origins import Decoding

__all__ = [
    "Answer",
    "Choice",
    "Completion",
    "FinishReason",
    "Logprobs",
    "Metrics",
    "ModelCard",
    "ModelList",
    "PromptScores",
    "PromptTokensDetails",
    "SpeculativeDecoding",
    "TokenScore",
    "Usage",
]

FinishReason = Literal["stop", "length"]
"""Reason why a text ended."""


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


class Logprobs(BaseModel):
    """Log probabilities of tokens; each list has an entry for each token."""

    text_offset: list[int] = []
    """Character of the text where the token begins. Tokens of a removed stop string have the offset without removal."""
    token_logprobs: list[float | None] = []
    """`None` for the first token of an echoed prompt, which has no prefix."""
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []
    """The most likely tokens, and the token itself if it is not among them."""


class TokenScore(BaseModel):
    """Log probability and rank of a token, in vLLM's shape."""

    logprob: float
    rank: int | None
    """1 for the most likely token; None for a token that is not among the requested most likely tokens."""
    decoded_token: str


PromptScores = list[dict[int, TokenScore] | None]
"""Scores of the tokens of a prompt: the token and the most likely tokens at its position, by id; `None` for the first
token."""


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

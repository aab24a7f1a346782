"""What does a client get back?

OpenAI's shapes with vLLM's extensions.
"""

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
"""How a text ends."""


class PromptTokensDetails(BaseModel):
    """What became of the tokens read."""

    cached_tokens: int
    """In the cache already, from prompts that begin alike."""


class Usage(BaseModel):
    """Tokens read and written; an end-of-text token that was generated counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


class Logprobs(BaseModel):
    """How likely tokens were, one entry of each list for each token."""

    text_offset: list[int] = []
    """Where the token begins in the text; that of a stop string which was cut off, where it would."""
    token_logprobs: list[float | None] = []
    """None for the first token of an echoed prompt: nothing stands before it."""
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []
    """The likeliest tokens, and the token itself where it is none of them."""


class TokenScore(BaseModel):
    """How likely one token was, in vLLM's words."""

    logprob: float
    rank: int | None
    """1 for the likeliest; None for a token that is not among those asked for."""
    decoded_token: str


PromptScores = list[dict[int, TokenScore] | None]
"""For each token of a prompt, it and the likeliest tokens there, by id; None for the first."""


class Choice(BaseModel):
    """One text, or a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    """The stop string or the stop token's id that ended the text; None for the end-of-text token."""
    prompt_logprobs: PromptScores | None = None
    prompt_token_ids: list[int] | None = None
    """Where asked for; with the first piece of a stream."""
    token_ids: list[int] | None = None
    decoding: Decoding | None = None
    """Where asked for."""


class Answer(BaseModel):
    """What every answer has, and every chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    """Same weights, same way of decoding: same string."""
    usage: Usage | None = None
    metrics: Metrics | None = None


class Completion(Answer):
    """A whole response, or one chunk of a stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]


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


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]

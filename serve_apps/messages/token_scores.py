"""Log probabilities of tokens. A replica makes them in the forms of the responses, and the ingress passes them on."""

from pydantic import BaseModel

__all__ = ["ChatLogprob", "ChatTokenLogprob", "Logprobs", "PlainScores", "PromptScores", "TokenScore"]


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

PlainScores = list[dict[int, tuple[float, int | None, str]] | None]
"""`PromptScores` before they are models: log probability, rank and text of tokens, by id. A prompt can have 10**5 of
them, and models take 20 times as long to build and to send as tuples do."""


class ChatLogprob(BaseModel):
    """Log probability of a token."""

    token: str
    logprob: float
    bytes: list[int]
    """UTF-8 bytes that the token adds to the text."""


class ChatTokenLogprob(ChatLogprob):
    """A token of the text, with the most likely tokens at its position."""

    top_logprobs: list[ChatLogprob]

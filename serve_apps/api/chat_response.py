"""Responses of POST /v1/chat/completions, in OpenAI's shapes with vLLM's extensions.

A delta holds only the fields that have a value, as OpenAI's do.
"""

from typing import Literal

from pydantic import BaseModel

from serve_apps.api.completion_response import Answer
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import ChatTokenLogprob, PromptScores

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatFinishReason",
    "ChatLogprobs",
    "ChatMessage",
    "Delta",
    "ToolCall",
    "ToolCallDelta",
]

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatLogprobs(BaseModel):
    """Log probabilities of the tokens of a message."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """Function that the model calls, with its arguments."""

    name: str
    arguments: str
    """JSON object as the text that the model generated."""


class ToolCall(BaseModel):
    """Call of a function."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """Message of the assistant."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """`None` if the message holds calls alone."""
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class FunctionDelta(BaseModel):
    """Delta of a call's function; the first delta has the name."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """Delta of a call; the first delta has the id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """Delta of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    """A message, with its reason to end."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None = None
    """Stop string, or id of the stop token, that ended the text; `None` for the end of a turn."""
    token_ids: list[int] | None = None
    decoding: Decoding | None = None
    """Present if requested."""


class ChatChunkChoice(BaseModel):
    """Delta of a choice's message."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    decoding: Decoding | None = None
    """Present if requested."""


class ChatCompletion(Answer):
    """A whole response."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptScores | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(Answer):
    """Chunk of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | None = None

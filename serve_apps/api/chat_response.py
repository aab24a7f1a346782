"""What does a client of chats get back?

OpenAI's shapes with vLLM's extensions. Of a piece of a message only what is there is said, as OpenAI does.
"""

from typing import Literal

from pydantic import BaseModel

from serve_apps.api.completion_response import Answer, PromptScores

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatFinishReason",
    "ChatLogprob",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "Delta",
    "ToolCall",
    "ToolCallDelta",
]

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatLogprob(BaseModel):
    """How likely one token was."""

    token: str
    logprob: float
    bytes: list[int]
    """What it adds to the text, in UTF-8."""


class ChatTokenLogprob(ChatLogprob):
    """A token of the text, and the likeliest there."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    """How likely the tokens of a message were."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """What is called, and with what."""

    name: str
    arguments: str
    """A JSON object as text, as the model wrote it."""


class ToolCall(BaseModel):
    """A call."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """None where there are calls alone."""
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class FunctionDelta(BaseModel):
    """A piece of a call's function; the name comes first."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A piece of a call; its id comes first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """A piece of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    """One message."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None = None
    """The stop string or the stop token's id that ended the text; None for the end of a turn."""
    token_ids: list[int] | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one message."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """A whole response."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptScores | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(Answer):
    """One chunk of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | None = None

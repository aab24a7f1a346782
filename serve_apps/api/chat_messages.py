"""Models of the messages of a conversation, which hold text alone.

`tidar_core.artifacts.text.conversation` turns them into variables of a chat template.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import as_parameter_error
from serve_apps.api.parsing import allow_null
from tidar_core.artifacts.text.conversation import joined_text, read_messages
from tidar_core.errors import RequestError

__all__ = ["CacheControl", "Message", "template_messages", "without_nulls"]


TEXT_TYPES = ("text", "refusal")

CacheControl = Annotated[Any, Field(exclude=True)]
"""Accepted and ignored: the prefix cache needs no marks."""


class Part(BaseModel):
    """Base class of messages and their parts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=allow_null)

    cache_control: CacheControl = None


class TextPart(Part):
    """Part of a message that holds text."""

    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """Part of an assistant's message that holds its refusal."""

    type: Literal["refusal"]
    refusal: str


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    try:
        return joined_text(content)
    except RequestError as error:
        known = all(isinstance(part, dict) and part.get("type") in TEXT_TYPES for part in content)
        raise ParameterError(str(error), "messages", None if known else "unsupported_value") from error


Content = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart | RefusalPart])]


class FunctionCalled(Part):
    """Function that an assistant called, with its arguments."""

    name: str
    arguments: str | dict[str, Any] | None = None
    """A JSON object or its text; nothing for a call without arguments."""


class ToolCalled(Part):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCalled
    index: int | None = None
    """Left over in calls that a client joined from a stream; changes nothing."""


class SystemMessage(Part):
    """Instructions for the assistant."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Part):
    """Message of the user."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Part):
    """Earlier message of the assistant."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    """Text of the assistant if the content is empty."""
    tool_calls: list[ToolCalled] | None = None
    function_call: FunctionCalled | None = None
    """A single call, in OpenAI's older form."""
    annotations: list[Any] = []
    """Notes on the text, as other services send them; they change nothing."""
    name: str | None = None


class ToolMessage(Part):
    """Result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


class FunctionMessage(Part):
    """Result of a call, in OpenAI's older form."""

    role: Literal["function"]
    content: Content
    name: str


KINDS = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "function",
}  # fmt: skip


def _kind(message: Any) -> str | None:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return f"<{KINDS[role]}>" if isinstance(role, str) and role in KINDS else None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")]
    | Annotated[FunctionMessage, Tag("<function>")],
    Discriminator(
        _kind,
        custom_error_type="role",
        custom_error_message=f"must be an object whose role is one of {', '.join(KINDS)}",
    ),
]


def without_nulls(value: Any) -> Any:
    """Messages without null fields, which clients copy from responses; nulls inside `arguments` stay."""
    if isinstance(value, dict):
        given = {name: item for name, item in value.items() if item is not None}
        return {name: item if name == "arguments" else without_nulls(item) for name, item in given.items()}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def template_messages(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Messages for a chat template. Raises ParameterError if well-formed messages make no conversation."""
    with as_parameter_error():
        return tuple(read_messages([message.model_dump(exclude_none=True) for message in messages]))

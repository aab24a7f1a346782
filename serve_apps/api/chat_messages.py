"""What may a message of a conversation say?

Text alone. What a chat template is shown of it: `tidar_core.artifacts.text.conversation`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import said_as
from serve_apps.api.parsing import null_is_nothing
from tidar_core.artifacts.text.conversation import joined_text, read_messages
from tidar_core.errors import RequestError

__all__ = ["CacheControl", "Message", "as_template_reads", "without_nulls"]


TEXT_TYPES = ("text", "refusal")

CacheControl = Annotated[Any, Field(exclude=True)]
"""Accepted and dropped: common beginnings of prompts are found without it."""


class Part(BaseModel):
    """What the messages' parts have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=null_is_nothing)

    cache_control: CacheControl = None


class TextPart(Part):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """A piece of a message in which an assistant refused."""

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
    """What an assistant called, and with what."""

    name: str
    arguments: str | dict[str, Any] | None = None
    """A JSON object, or its text; of a call without arguments nothing."""


class ToolCalled(Part):
    """One call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCalled
    index: int | None = None
    """Of a streamed call that was put together without taking it out; changes nothing."""


class SystemMessage(Part):
    """How the assistant shall behave."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Part):
    """What a user said."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Part):
    """What the assistant said before."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    """The assistant's words where the content has none."""
    tool_calls: list[ToolCalled] | None = None
    function_call: FunctionCalled | None = None
    """A single call, in OpenAI's older form."""
    annotations: list[Any] = []
    """Notes on the words, as other services send them; they change nothing."""
    name: str | None = None


class ToolMessage(Part):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


class FunctionMessage(Part):
    """What a call gave, in OpenAI's older form."""

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
    """Messages as clients send back what they were told: a null is as good as nothing, but in arguments."""
    if isinstance(value, dict):
        given = {name: item for name, item in value.items() if item is not None}
        return {name: item if name == "arguments" else without_nulls(item) for name, item in given.items()}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def as_template_reads(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Messages for a chat template. ParameterError for what is well formed and no conversation."""
    with said_as():
        return tuple(read_messages([message.model_dump(exclude_none=True) for message in messages]))

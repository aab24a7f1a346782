"""What may a message of a conversation say, and what does a chat template read of it?

Text alone; parts of a text are joined by line breaks, as in vLLM.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from serve_apps.errors import ParameterError, shortened
from serve_apps.reading import null_is_nothing

__all__ = ["Message", "as_template_reads", "without_nulls"]


class Part(BaseModel):
    """What the messages' parts have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=null_is_nothing)


class TextPart(Part):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ParameterError(
                f"messages hold the part {shortened(part)}; this model reads parts of type 'text' alone",
                "messages",
                "unsupported_value",
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ParameterError(
                f"messages hold the part {shortened(part)}; it must have a type and a text", "messages"
            )
    return "\n".join(part["text"] for part in content)


Content = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class FunctionCalled(Part):
    """What an assistant called, and with what."""

    name: str
    arguments: str
    """A JSON object, as text."""


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
    refusal: str | None = None
    tool_calls: list[ToolCalled] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    name: str | None = None


class ToolMessage(Part):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


KINDS = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def _kind(message: Any) -> str | None:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return f"<{KINDS[role]}>" if isinstance(role, str) and role in KINDS else None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        _kind,
        custom_error_type="role",
        custom_error_message=f"must be an object whose role is one of {', '.join(KINDS)}",
    ),
]


def without_nulls(value: Any) -> Any:
    """Messages as clients send back what they were told: a null is as good as nothing."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def as_template_reads(messages: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Messages for a chat template, which wants the arguments of calls as objects. ParameterError if they are none."""
    read = []
    for place, message in enumerate(messages):
        fields = message.model_dump(exclude_none=True, exclude={"annotations", "refusal"})
        for called in fields.get("tool_calls", []):
            called.pop("index", None)
            called["function"]["arguments"] = _arguments(called["function"]["arguments"], place)
        read.append(fields)
    return tuple(read)


def _arguments(written: str, place: int) -> dict[str, Any]:
    try:
        arguments = json.loads(written or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ParameterError(
            f"arguments of a call in messages.{place} are {shortened(written)}; they must be a JSON object as text",
            f"messages.{place}.tool_calls",
        )
    return arguments

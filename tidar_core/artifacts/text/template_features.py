"""Features of chat templates: the message forms that some templates support and others do not.

A template is rendered with short probes. The text shows whether the template supports them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidar_core.errors import RequestError

__all__ = ["DEVELOPER", "TemplateFeatures", "features_of"]

PROBE = "zqprobeqz"
"""A word that no template contains. It is as long as a call's id must be for Mistral's templates."""
DEVELOPER = "developer"
USER = {"role": "user", "content": "a"}
CALL = {"id": PROBE, "type": "function", "function": {"name": PROBE, "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "b", "description": "c", "parameters": {"type": "object"}}}
NO_CONTENT: tuple[Mapping[str, Any], ...] = ({}, {"content": ""}, {"content": None})
"""Fields of a message that has calls and no content; the first form for which the calls are shown is used."""

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
"""Renders messages and tools to text; raises RequestError."""


@dataclass(frozen=True, slots=True)
class TemplateFeatures:
    """Message forms that a template supports."""

    developer: bool = False
    """Whether the template has a branch for the role `developer`."""
    no_content: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a message that has calls and no content, so that the template shows the calls."""
    hides_calls: bool = False
    """Whether the template accepts messages with calls but omits the calls."""


def features_of(render: Render, source: str) -> TemplateFeatures:
    """The features of one template.

    source  its text; a template that writes the name of any role has no branch for a role that it does not name
    """
    developer = DEVELOPER in source and PROBE in (
        _rendered(render, [{"role": DEVELOPER, "content": PROBE}, USER]) or ""
    )
    texts = [_rendered(render, [USER, {"role": "assistant", **form, "tool_calls": [CALL]}]) for form in NO_CONTENT]
    shown = next((form for form, text in zip(NO_CONTENT, texts) if text and PROBE in text), None)
    if shown is None:
        return TemplateFeatures(developer, hides_calls=any(text is not None for text in texts))
    return TemplateFeatures(developer, shown)


def _rendered(render: Render, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of `messages`, with a tool or else without; None if the template accepts neither."""
    for tools in ([TOOL], None):
        try:
            return render(messages, tools)
        except RequestError:
            continue
    return None

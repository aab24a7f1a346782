"""Which forms of messages does a chat template know, of those that not every template knows?

A template is rendered with short probes, and its text shows what it does with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidar_core.errors import RequestError

__all__ = ["DEVELOPER", "Habits", "habits_of"]

SIGN = "zqprobeqz"
"""A word that no template holds; as long as an id of a call must be for Mistral's."""
DEVELOPER = "developer"
USER = {"role": "user", "content": "a"}
CALL = {"id": SIGN, "type": "function", "function": {"name": SIGN, "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "b", "description": "c", "parameters": {"type": "object"}}}
NO_WORDS: tuple[Mapping[str, Any], ...] = ({}, {"content": ""}, {"content": None})
"""Spellings of a message that has calls and no words; the first that shows the calls is used."""

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
"""From messages and tools to text; raises RequestError."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What a template does with forms of messages."""

    developer: bool = False
    """The template has a branch for the role `developer`."""
    no_words: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a message that has calls and no words, such that the template shows the calls."""
    hides_calls: bool = False
    """The template writes messages with calls, and none of the calls."""


def habits_of(render: Render, source: str) -> Habits:
    """The habits of one template.

    source  its text; a template that writes any role's name has no branch for a role that it does not name
    """
    developer = DEVELOPER in source and SIGN in (_tried(render, [{"role": DEVELOPER, "content": SIGN}, USER]) or "")
    texts = [_tried(render, [USER, {"role": "assistant", **said, "tool_calls": [CALL]}]) for said in NO_WORDS]
    shown = next((said for said, text in zip(NO_WORDS, texts) if text and SIGN in text), None)
    if shown is None:
        return Habits(developer, hides_calls=any(text is not None for text in texts))
    return Habits(developer, shown)


def _tried(render: Render, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of `messages`, with a tool or without; None where the template takes neither."""
    for tools in ([TOOL], None):
        try:
            return render(messages, tools)
        except RequestError:
            continue
    return None

"""The forms in which models call functions.

Hermes' (Qwen2.5, Qwen3, Hermes): <tool_call>{"name": .., "arguments": {..}}</tool_call>, words before it allowed.
Llama 3's: {"name": .., "parameters": {..}} is the whole text; several are separated by "; ".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_apps.messages.generation_request import RequestedGrammar, ToolUse

if TYPE_CHECKING:
    from tidar_core.artifacts.text.chat_template import ChatTemplate

__all__ = ["FORMS", "ToolForm", "call_grammar", "form_of"]

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"


@dataclass(frozen=True, slots=True)
class ToolForm:
    """Form of calls."""

    arguments: str
    """Key of the arguments."""
    opening: str = ""
    """Mark before a call; empty if a call begins the text."""
    closing: str = ""
    """Mark after a call."""
    between: str = ""
    """Text between two calls."""


FORMS = {
    "hermes": ToolForm("arguments", "<tool_call>", "</tool_call>", "\n"),
    "llama3": ToolForm("parameters", between="; "),
}


def form_of(template: "ChatTemplate", setting: str) -> str | None:
    """Name of the form that a template teaches; None if the template knows no tools, or uses another form.

    setting  `auto`, or the name of the form
    """
    if not template.mentions("tools"):
        return None
    if setting != "auto":
        return setting
    if template.mentions("<function="):  # XML inside <tool_call>
        return None
    if template.mentions("<tool_call>"):
        return "hermes"
    return "llama3" if template.mentions('"parameters"') else None


def call_grammar(form: ToolForm, use: ToolUse) -> RequestedGrammar | None:
    """Grammar of texts that call functions as requested; None if any text is allowed.

    If no call is required and arguments must be strict, any text is allowed, but every call in it must be valid.
    """
    if not use.required and not use.strict:
        return None
    calls = " | ".join(f"call_{place}" for place in range(len(use.functions)))
    lines = [f"calls: {calls}"]
    for place, function in enumerate(use.functions):
        free = not use.required and not function.get("strict")
        lines += [
            f"call_{place}: {_quoted(_head(form, function['name']))} arguments_{place} {_quoted(_tail(form))}",
            f"arguments_{place}: %json {json.dumps(_schema(function, free=free))}",
        ]
    return RequestedGrammar("tools", "grammar", "\n".join([*_start(form, use), *lines]))


def _start(form: ToolForm, use: ToolUse) -> list[str]:
    opening, between = _quoted(form.opening), _quoted(form.between)
    if use.required:
        first = f"{opening} calls" if form.opening else "calls"
        return [f"start: {first} ({between} {first})*" if use.parallel else f"start: {first}"]
    if not form.opening:
        more = f" ({between} calls)*" if use.parallel else ""
        return [f"start: calls{more} | TEXT", r"TEXT: /(\s*[^\s{](?s:.*))?/"]
    return [
        "start: (lead calls)* TEXT" if use.parallel else "start: (lead calls)? TEXT",
        f"lead[lazy]: /(?s:.*){form.opening}/",
        f"TEXT: /(?s:.*)/ & ~/(?s:.*){form.opening}(?s:.*)/",
    ]


def _head(form: ToolForm, name: str) -> str:
    line = "\n" if form.opening else ""
    return f'{line}{{"name": {json.dumps(name)}, "{form.arguments}": '


def _tail(form: ToolForm) -> str:
    return "}" + (f"\n{form.closing}" if form.closing else "")


def _schema(function: Mapping[str, Any], *, free: bool) -> dict[str, Any]:
    """JSON schema of a function's arguments, which are always an object.

    free  every object is allowed
    """
    schema = {} if free else dict(function.get("parameters") or {})
    return {"type": "object", "x-guidance": {"whitespace_pattern": WHITE_SPACE}} | schema


def _quoted(text: str) -> str:
    return json.dumps(text)

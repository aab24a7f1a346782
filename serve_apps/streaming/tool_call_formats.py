"""In what form does a model call a function?

Hermes' (Qwen2.5, Qwen3, Hermes): <tool_call>{"name": .., "arguments": {..}}</tool_call>, words before it allowed.
Llama 3's: {"name": .., "parameters": {..}} is the whole text; several are separated by "; ".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve_apps.api.grammar_fields import AskedGrammar
from serve_apps.messages.generation_request import ToolUse

if TYPE_CHECKING:
    from tidar_core.artifacts.text.chat_template import ChatTemplate

__all__ = ["FORMS", "ToolForm", "call_grammar", "form_of"]

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How calls are written."""

    arguments: str
    """The key of the arguments."""
    opening: str = ""
    """Before a call; empty where a call begins the text."""
    closing: str = ""
    """After a call."""
    between: str = ""
    """Between two calls."""


FORMS = {
    "hermes": ToolForm("arguments", "<tool_call>", "</tool_call>", "\n"),
    "llama3": ToolForm("parameters", between="; "),
}


def form_of(template: "ChatTemplate", setting: str) -> str | None:
    """The name of the form that a template teaches; None where it knows no tools, or another form.

    setting  `auto`, or the name of the form
    """
    if not template.speaks_of("tools"):
        return None
    if setting != "auto":
        return setting
    if template.speaks_of("<function="):  # XML inside <tool_call>
        return None
    if template.speaks_of("<tool_call>"):
        return "hermes"
    return "llama3" if template.speaks_of('"parameters"') else None


def call_grammar(form: ToolForm, use: ToolUse) -> AskedGrammar | None:
    """What a text must keep to so that functions are called as asked; None where anything may be said.

    Where no call is required but arguments must be strict: any text, in which what begins as a call is a right one.
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
    return AskedGrammar("tools", "grammar", "\n".join([*_start(form, use), *lines]))


def _start(form: ToolForm, use: ToolUse) -> list[str]:
    opening, between = _quoted(form.opening), _quoted(form.between)
    if use.required:
        first = f"{opening} calls" if form.opening else "calls"
        return [f"start: {first} ({between} {first})*" if use.parallel else f"start: {first}"]
    if not form.opening:
        more = f" ({between} calls)*" if use.parallel else ""
        return [f"start: calls{more} | SAID", r"SAID: /(\s*[^\s{](?s:.*))?/"]
    return [
        "start: (lead calls)* SAID" if use.parallel else "start: (lead calls)? SAID",
        f"lead[lazy]: /(?s:.*){form.opening}/",
        f"SAID: /(?s:.*)/ & ~/(?s:.*){form.opening}(?s:.*)/",
    ]


def _head(form: ToolForm, name: str) -> str:
    line = "\n" if form.opening else ""
    return f'{line}{{"name": {json.dumps(name)}, "{form.arguments}": '


def _tail(form: ToolForm) -> str:
    return "}" + (f"\n{form.closing}" if form.closing else "")


def _schema(function: Mapping[str, Any], *, free: bool) -> dict[str, Any]:
    """Of a function's arguments: an object, whatever else it says.

    free  any object will do
    """
    schema = {} if free else dict(function.get("parameters") or {})
    return {"type": "object", "x-guidance": {"whitespace_pattern": WHITE_SPACE}} | schema


def _quoted(text: str) -> str:
    return json.dumps(text)

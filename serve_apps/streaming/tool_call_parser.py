"""The parser of function calls in a text that is still being generated.

Text that calls no offered function stays as it is. The name of a call is sent once its arguments begin. The arguments
follow as they come, so that all deltas join to the model's text.
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_apps.streaming.tool_call_formats import FORMS, ToolForm

__all__ = ["CallDelta", "ParsedText", "ToolCallParser"]

NOTHING = "{}"
"""Arguments of a call without arguments."""
HEAD_KEYS = frozenset({"name", "type"})
ARGUMENT_KEYS = tuple(form.arguments for form in FORMS.values())
"""Keys of arguments in all forms: models mix the forms up, and no arguments may be lost."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """New text of one call."""

    index: int
    """Index of the call in its message."""
    arguments: str
    name: str | None = None
    """Set in the first delta of the call."""
    call_id: str | None = None
    """Set in the first delta of the call."""


@dataclass(slots=True)
class ParsedText:
    """Content and calls in a delta of the text."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolCallParser:
    """Parser of one text."""

    def __init__(self, form: ToolForm, names: Collection[str], *, parallel: bool = True) -> None:
        """names     names of the offered functions
        parallel  False: calls after the first are dropped
        """
        self._form, self._names, self._parallel = form, names, parallel
        key = re.escape(form.arguments)
        self._head = re.compile(rf'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{key}"\s*:\s*(?=\{{)')
        self._unread = ""
        self._state = self._in_text if form.opening else self._at_call
        self._opened = ""
        """Text before the call that is being parsed. It is content if there is no call."""
        self._object = _JsonObject()
        self._name: str | None = None
        self._parsed = ParsedText()
        self.count = 0
        """Number of calls so far."""

    def push(self, text: str) -> ParsedText:
        """Add text. Returns content and calls that are certain now."""
        self._unread += text
        while self._state():
            pass
        parsed, self._parsed = self._parsed, ParsedText()
        return parsed

    def end(self) -> ParsedText:
        """Content that was held back: the text has ended."""
        if self._state == self._in_call and self._name is None:
            self._give_up(self._object.text)
        elif self._state == self._at_call:
            self._give_up("")
        if self._state == self._in_text and (self._unread.strip() or not self.count):
            self._parsed.content += self._unread
        self._unread = ""
        parsed, self._parsed = self._parsed, ParsedText()
        return parsed

    def _in_text(self) -> bool:
        """Parse content up to a possible mark of a call. White space around calls is dropped."""
        opening = self._form.opening
        if opening and (found := self._unread.find(opening)) >= 0:
            end, content = found + len(opening), self._unread[:found].rstrip()
            self._parsed.content += content
            self._opened, self._unread = self._unread[len(content) : end], self._unread[end:]
            self._state = self._at_call
            return True
        held = max((n for n in range(1, len(opening)) if self._unread.endswith(opening[:n])), default=0)
        sure = self._unread[: len(self._unread) - held]
        sure = sure.rstrip() if opening else sure
        self._parsed.content, self._unread = self._parsed.content + sure, self._unread[len(sure) :]
        return False

    def _at_call(self) -> bool:
        """Parse the begin of a call."""
        bare = self._unread.lstrip()
        if not bare:
            return False
        if not bare.startswith("{"):
            self._give_up("")
            return True
        self._opened += self._unread[: len(self._unread) - len(bare)]
        self._unread, self._object, self._name = bare, _JsonObject(), None
        self._state = self._in_call
        return True

    def _in_call(self) -> bool:
        read = self._object
        self._unread = read.push(self._unread)
        if self._name is None:
            self._begin()
        if self._name is not None and (arguments := read.take_inner()):
            self._add_arguments(arguments)
        if not read.ended:
            return False
        if self._name is None:
            self._read_whole()
        else:
            self._state = self._after_call
        return True

    def _begin(self) -> None:
        """Start the call as soon as the object has named its function."""
        head = self._head.match(self._object.text)
        if head is None:
            return
        name = _text(head[1])
        if name is not None and name in self._names:
            self._object.follow(head.end())
            self._start(name)

    def _read_whole(self) -> None:
        """Parse a whole object: a call may have its keys in another order, or no arguments."""
        call = _object(self._object.text)
        name, arguments = call.get("name"), self._arguments(call)
        if not isinstance(name, str) or name not in self._names or arguments is None:
            self._give_up(self._object.text)
            return
        self._start(name)
        self._add_arguments(arguments)
        self._state = self._after_call

    def _arguments(self, call: Mapping[str, Any]) -> str | None:
        """Arguments of a call as JSON text, `{}` if the call has no arguments; None if the object is no call.

        Marks identify an object as a call. Without marks an object with other keys is content.
        """
        key = next((key for key in ARGUMENT_KEYS if key in call), None)
        if key is None:
            return NOTHING if self._form.opening or call.keys() <= HEAD_KEYS else None
        arguments = call[key]
        if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
            return NOTHING
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    def _after_call(self) -> bool:
        """Parse the end of a call, and the text before the next."""
        bare = self._unread.lstrip()
        sign = self._form.closing or self._form.between.strip()
        if len(bare) < len(sign) and sign.startswith(bare):
            return False
        if bare.startswith(sign):
            self._unread, self._opened = bare[len(sign) :], ""
            self._state = self._in_text if self._form.opening else self._at_call
        else:
            self._state = self._in_text
        return True

    def _start(self, name: str) -> None:
        self._name = name
        self.count += 1
        if self._wanted:
            self._parsed.calls.append(CallDelta(self.count - 1, "", name, f"call_{secrets.token_hex(12)}"))

    def _add_arguments(self, arguments: str) -> None:
        if self._wanted:
            self._parsed.calls.append(CallDelta(self.count - 1, arguments))

    @property
    def _wanted(self) -> bool:
        return self._parallel or self.count == 1

    def _give_up(self, read: str) -> None:
        """Treat the parsed text as content: there is no call."""
        self._parsed.content += self._opened + read
        self._opened = ""
        self._state = self._in_text


class _JsonObject:
    """A JSON object that comes in parts: it finds the end of the object, and of an object inside."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._inner_from: int | None = None
        self._inner_to: int | None = None
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> str:
        """Add text up to the end of the object. Returns the text after the end."""
        before = len(self.text)
        for place, sign in enumerate(text, 1):
            self._read(sign)
            if self._depth == 1 and self._inner_from is not None and self._inner_to is None:
                self._inner_to = before + place
            if self.ended:
                self.text += text[:place]
                return text[place:]
        self.text += text
        return ""

    def follow(self, start: int) -> None:
        """Note the begin of the object inside. `take_inner` returns its text as it comes."""
        inner = _JsonObject()
        rest = inner.push(self.text[start:])
        self._inner_from = start
        self._inner_to = len(self.text) - len(rest) if inner.ended else None

    def take_inner(self) -> str:
        """Text of the object inside since the last call."""
        assert self._inner_from is not None
        end = len(self.text) if self._inner_to is None else self._inner_to
        taken, self._inner_from = self.text[self._inner_from : end], end
        return taken

    def _read(self, sign: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif sign == "\\":
                self._escaped = True
            elif sign == '"':
                self._in_string = False
        elif sign == '"':
            self._in_string = True
        elif sign in "{[":
            self._depth += 1
        elif sign in "}]":
            self._depth -= 1
            self.ended = self._depth == 0


def _text(written: str) -> str | None:
    try:
        return json.loads(written)
    except ValueError:
        return None


def _object(written: str) -> Mapping[str, Any]:
    """The JSON object in a text; empty where the text holds none."""
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

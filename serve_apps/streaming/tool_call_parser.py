"""Which parts of a text are calls of functions, as it comes?

What is no call of an offered function is told as it stands. The name of a call is told once its arguments begin, and
these as they come, so that all the pieces join to what the model wrote.
"""

import json
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_apps.streaming.tool_call_formats import FORMS, ToolForm

__all__ = ["CallPiece", "Said", "ToolCallReader"]

NOTHING = "{}"
"""Arguments of a call that has none."""
HEAD_KEYS = frozenset({"name", "type"})
ARGUMENT_KEYS = tuple(form.arguments for form in FORMS.values())
"""Models mix the forms up; whichever key a call has, its arguments are not lost."""


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of one call."""

    index: int
    """Of the call in its message."""
    arguments: str
    name: str | None = None
    """With the first piece."""
    call_id: str | None = None
    """With the first piece."""


@dataclass(slots=True)
class Said:
    """What a piece of text has brought."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class ToolCallReader:
    """Reads one text."""

    def __init__(self, form: ToolForm, names: Collection[str], *, parallel: bool = True) -> None:
        """names  of the functions that are offered
        parallel  False: calls after the first are dropped
        """
        self._form, self._names, self._parallel = form, names, parallel
        key = re.escape(form.arguments)
        self._head = re.compile(rf'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{key}"\s*:\s*(?=\{{)')
        self._unread = ""
        self._state = self._in_text if form.opening else self._at_call
        self._opened = ""
        """What came before the call that is being read: content, if it is none."""
        self._object = _JsonObject()
        self._name: str | None = None
        self._said = Said()
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> Said:
        """What is certain now."""
        self._unread += text
        while self._state():
            pass
        said, self._said = self._said, Said()
        return said

    def end(self) -> Said:
        """What was held back of a text that has ended."""
        if self._state == self._in_call and self._name is None:
            self._give_up(self._object.text)
        elif self._state == self._at_call:
            self._give_up("")
        if self._state == self._in_text and (self._unread.strip() or not self.count):
            self._said.content += self._unread
        self._unread = ""
        said, self._said = self._said, Said()
        return said

    def _in_text(self) -> bool:
        """Content, up to what may open a call; white space around calls belongs to none of them."""
        opening = self._form.opening
        if opening and (found := self._unread.find(opening)) >= 0:
            end, content = found + len(opening), self._unread[:found].rstrip()
            self._said.content += content
            self._opened, self._unread = self._unread[len(content) : end], self._unread[end:]
            self._state = self._at_call
            return True
        held = max((n for n in range(1, len(opening)) if self._unread.endswith(opening[:n])), default=0)
        sure = self._unread[: len(self._unread) - held]
        sure = sure.rstrip() if opening else sure
        self._said.content, self._unread = self._said.content + sure, self._unread[len(sure) :]
        return False

    def _at_call(self) -> bool:
        """Where a call must begin."""
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
            self._tell(arguments)
        if not read.ended:
            return False
        if self._name is None:
            self._read_whole()
        else:
            self._state = self._after_call
        return True

    def _begin(self) -> None:
        """See whether the object has said which function it calls."""
        head = self._head.match(self._object.text)
        if head is None:
            return
        name = _text(head[1])
        if name is not None and name in self._names:
            self._object.follow(head.end())
            self._start(name)

    def _read_whole(self) -> None:
        """An object that did not begin as calls do may be a call: in another order, or without arguments."""
        call = _object(self._object.text)
        name, arguments = call.get("name"), self._arguments(call)
        if not isinstance(name, str) or name not in self._names or arguments is None:
            self._give_up(self._object.text)
            return
        self._start(name)
        self._tell(arguments)
        self._state = self._after_call

    def _arguments(self, call: Mapping[str, Any]) -> str | None:
        """The arguments of a call as JSON text, `{}` where the call has none; None: the object is no call.

        Marks say that an object is a call; without marks an object with other keys is an answer.
        """
        key = next((key for key in ARGUMENT_KEYS if key in call), None)
        if key is None:
            return NOTHING if self._form.opening or call.keys() <= HEAD_KEYS else None
        arguments = call[key]
        if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
            return NOTHING
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    def _after_call(self) -> bool:
        """The rest of a call, and what comes between it and the next."""
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
        if self._spoken:
            self._said.calls.append(CallPiece(self.count - 1, "", name, f"call_{secrets.token_hex(12)}"))

    def _tell(self, arguments: str) -> None:
        if self._spoken:
            self._said.calls.append(CallPiece(self.count - 1, arguments))

    @property
    def _spoken(self) -> bool:
        return self._parallel or self.count == 1

    def _give_up(self, read: str) -> None:
        """It was no call."""
        self._said.content += self._opened + read
        self._opened = ""
        self._state = self._in_text


class _JsonObject:
    """A JSON object that comes in pieces: where it ends, and where an object inside it does."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._inner_from: int | None = None
        self._inner_to: int | None = None
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> str:
        """Read up to the end of the object; what comes after it is given back."""
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
        """The object inside begins there; `take_inner` gives it as it comes."""
        inner = _JsonObject()
        rest = inner.push(self.text[start:])
        self._inner_from = start
        self._inner_to = len(self.text) - len(rest) if inner.ended else None

    def take_inner(self) -> str:
        """What has come of the object inside since the last time."""
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

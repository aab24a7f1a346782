"""Prompts: the conversations of a corpus without their answers.

An entry has `messages`, as for training, or a prompt under one of the keys of the public data sets. Several user turns
are several questions; each is answered after the answers before it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.conversation import read_messages, read_tools
from tidar_core.artifacts.text.prompts import FIELDS
from tidar_core.errors import RequestError

__all__ = ["ASSISTANT", "Prompt", "prompt_columns", "prompt_of", "questions"]

ASSISTANT, USER, TOOL, SYSTEM = "assistant", "user", "tool", "system"
IDS = ("id", "question_id", "task_id")
"""Keys of an entry's name, in the public data sets."""
WEIGHT = "weight"
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation with questions that are to be answered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    name: str | None = None
    """The entry's own name; it decides nothing."""

    @property
    def key(self) -> str:
        """Hash of the conversation; equal prompts have equal answers."""
        return hashlib.sha256(locations.canonical_json([self.messages, self.tools]).encode()).hexdigest()

    @property
    def json(self) -> str:
        """One line of JSON, which `from_json` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(line: str | bytes) -> "Prompt":
        """The prompt in a line that `json` made."""
        return Prompt(**json.loads(line))


def prompt_columns(field: str | None) -> list[str]:
    """Columns of Parquet that a prompt may use.

    field  the column that holds the prompt; None: any of the known columns
    """
    return [*IDS, "tools", "functions", *(("messages", *FIELDS) if field is None else (field,))]


def prompt_of(values: Any, *, field: str | None, system: str | None, keep_answers: bool) -> Prompt:
    """The prompt of an entry. Raises ValueError with the cause.

    field         key that holds the prompt; None: the first of the known keys that the entry has
    system        system message, if the entry has none
    keep_answers  leave the assistant's messages in place, untrained
    """
    if not isinstance(values, dict):
        raise ValueError("has no prompt, it is no object; each line must be one object")
    try:
        messages = read_messages(_written(values, field))
        tools = read_tools(values.get("functions") if values.get("tools") is None else values["tools"])
    except RequestError as error:
        raise ValueError(f"holds no prompt that can be read: {error}") from error
    messages = [dict(sorted(message.items())) for message in messages]
    messages = _without_weight(messages) if keep_answers else _without_answers(messages)
    if system is not None and not any(message["role"] in (SYSTEM, "developer") for message in messages):
        messages = [{"content": system, "role": SYSTEM}, *messages]
    for message in messages:
        if message["role"] == USER and not str(message.get("content", "")).strip():
            raise ValueError("has a question without text; put a text there, or remove the entry")
    if not any(answered for _, answered in questions(messages)):
        raise ValueError("has no question that is to be answered; a prompt needs a message of the user without answer")
    name = next((str(values[key]) for key in IDS if isinstance(values.get(key), str | int)), None)
    prompt = Prompt(messages, tools, name)
    try:
        prompt.json.encode()
    except UnicodeEncodeError:
        raise ValueError("has half a surrogate pair, which no text can hold; repair it") from None
    except TypeError as error:  # Parquet has dates and bytes
        raise ValueError(f"holds a value that JSON does not have ({error}); make it text") from error
    return prompt


def questions(messages: Sequence[Message]) -> Iterator[tuple[Message, bool]]:
    """Each message, and whether the model answers after it: no answer of the assistant and no tool's result follows."""
    for message, following in zip(messages, [*messages[1:], None]):
        answered = following is not None and following["role"] in (ASSISTANT, TOOL)
        yield message, message["role"] in (USER, TOOL) and not answered


def _written(values: Mapping[str, Any], field: str | None) -> Sequence[Any]:
    """The messages of an entry as they were written."""
    fields = ("messages", *FIELDS) if field is None else (field,)
    key = next((name for name in fields if values.get(name) not in (None, "", [])), None)
    if key is None:
        raise ValueError(f"has no prompt under {' or '.join(map(repr, fields))}; set prompt_field to the key of it")
    given = values[key]
    if key == "messages" and isinstance(given, str):
        given = _parsed(given)
    if isinstance(given, str):
        return [{"role": USER, "content": given}]
    if not isinstance(given, list):
        raise ValueError(f"has a prompt under {key!r} that is no text and no list; put a text or messages there")
    if all(isinstance(turn, str) for turn in given):
        return [{"role": USER, "content": turn} for turn in given]
    return given


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("has messages that are no list of objects with a role and a content") from None


def _without_answers(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if any(message["role"] == TOOL or message.get("tool_calls") for message in messages):
        raise ValueError("has calls of functions, which cannot be answered anew; set given_answers to keep")
    return [dict(message) for message in messages if message["role"] != ASSISTANT]


def _without_weight(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(message) | ({WEIGHT: 0} if message["role"] == ASSISTANT else {}) for message in messages]

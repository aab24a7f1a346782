"""JSON that people and clients write: an object may not give a key twice, because one of the values would be lost."""

import json
from collections import Counter
from typing import Any

from tidar_core.errors import RequestError

__all__ = ["RepeatedKeyError", "object_of_option", "unrepeated"]


class RepeatedKeyError(ValueError):
    """A key with two values; the message is a predicate whose subject is the text."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for `object_pairs_hook`. Raises RepeatedKeyError."""
    values = dict(pairs)
    if len(values) != len(pairs):
        key = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RepeatedKeyError(f"gives the key {key[:64]!r} twice; give each key once")
    return values


def object_of_option(option: str, text: str, example: str) -> dict[str, Any]:
    """The JSON object that an option of a command has as its value. Raises RequestError."""
    try:
        values = json.loads(text, object_pairs_hook=unrepeated)
    except RepeatedKeyError as error:
        raise RequestError(f"{option} {error}") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise RequestError(f"{option} is {text}; it must be a JSON object such as '{example}'")
    return values

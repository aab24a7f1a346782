"""Parser of JSON from clients, with bounds on its values and its depth.

`json.loads` holds the interpreter until all values are made, and other requests wait. So values and depth are counted
first, by operations on the whole text that take milliseconds for megabytes.
"""

import json
import re
from itertools import accumulate
from typing import Any

from serve_apps.api.bounds import DEPTH
from serve_apps.api.errors import BodyTooLargeError, ParameterError
from tidar_core.given_json import RepeatedKeyError, unrepeated

__all__ = ["count_values", "parse"]

NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
LEVELS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str | bytes, most: int, param: str | None = None) -> Any:
    """Value of a JSON text. Raises ParameterError of `param`, or BodyTooLargeError for more than `most` values."""
    what = "the body" if param is None else param
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        if count_values(text, most, param) > most:
            raise BodyTooLargeError(
                f"{what} holds more than {most} JSON values and keys; at most that many are read; send less"
            )
        value = json.loads(text, object_pairs_hook=unrepeated)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # raises for half a character, which JSON can spell
    except UnicodeEncodeError as error:
        raise ParameterError(f"{what} spells half a character: {error}; send whole ones", param) from error
    except RepeatedKeyError as error:
        raise ParameterError(f"{what} {error}", param) from error
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{what} is not JSON: {error}; send one JSON object", param) from error
    return value


def count_values(text: str, most: int, param: str | None = None) -> int:
    """Number of values and keys in a JSON text; an empty list counts as two. Raises ParameterError if it is too deep.

    The number is exact up to `most`. In a text that is not JSON, the part before the first mistake is counted exactly,
    and a parser reads no further.
    """
    bare = text.replace("\\\\", "").replace('\\"', "")  # from now on each quote begins or ends a string
    if (strings := bare.count('"') // 2) > most:
        return strings
    outside = "".join(bare.split('"')[::2])
    if (count := 1 + sum(map(outside.count, ",:[{"))) > most:
        return count
    brackets = outside.encode(errors="replace").translate(None, NO_BRACKETS)
    depth = max(accumulate(map(LEVELS.__getitem__, brackets)), default=0)
    if depth > DEPTH:
        what = "the body" if param is None else param
        raise ParameterError(f"{what} is JSON of depth {depth}; at most {DEPTH} is read here; send it flatter", param)
    return count

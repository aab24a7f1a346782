"""The parser of lines in a JSON lines file."""

import codecs
import json
from typing import Any

__all__ = ["is_blank", "value_in"]


def is_blank(line: bytes) -> bool:
    """Whether a line is empty, apart from white space and a byte order mark."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def value_in(line: bytes) -> Any:
    """The value in a line. Raises ValueError; its message is a predicate whose subject is the line."""
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; convert the file") from None
    except RecursionError:
        raise ValueError("is JSON nested too deeply to be read; remove what is nested, or the line") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}); each line must be one object") from None

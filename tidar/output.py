"""Output of a command: facts on standard output, notes on standard error."""

import json
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["note", "print_facts"]


def print_facts(values: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Print a JSON object, or text for a person: by `show`, or as plain names and values."""
    if as_json:
        print(json.dumps(values))
        return
    from pipelines.evaluation.tables import print_values

    (show or print_values)(values)


def note(text: str) -> None:
    """Print a line for a person."""
    print(text, file=sys.stderr)

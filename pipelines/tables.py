"""How does a person read results at a terminal?"""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_latency", "print_modes", "print_values"]


def print_values(values: dict[str, Any]) -> None:
    """Names beside values; what is not a plain value as JSON."""
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict | list | tuple) else str(value))
    Console().print(table)


def print_modes(facts: dict[str, Any]) -> None:
    """The modes that a bench compared, a row each."""
    title = f"{facts['prompts']} prompts, {facts['batch']} at a time, K = {facts['block_len']}"
    table = Table("mode", "tokens/s", "spread", "per forward", "per round", "first, ms", "equal to AR", title=title)
    for name, mode in facts["modes"].items():
        low, high = mode["tokens_per_second_spread"]
        table.add_row(
            name,
            f"{mode['tokens_per_second']:.1f}",
            f"{low:.0f}-{high:.0f}",
            f"{mode['tokens_per_forward']:.2f}",
            f"{mode['tokens_per_round']:.2f}",
            f"{1000 * mode['time_to_first_token_seconds']:.1f}",
            "yes" if mode["equal_to_ar"] else "NO",
        )
    Console().print(table)


def print_latency(facts: dict[str, Any]) -> None:
    """Milliseconds of a forward: rows down, batch and context across."""
    points = {(p["rows"], p["batch"], p["context"]): p["seconds"] for p in facts["points"]}
    shapes = sorted({(batch, context) for _, batch, context in points})
    table = Table("rows", *(f"batch {b}, context {c}" for b, c in shapes), title="milliseconds of a forward")
    for rows in sorted({rows for rows, _, _ in points}):
        table.add_row(str(rows), *(f"{1000 * points[rows, b, c]:.2f}" for b, c in shapes))
    Console().print(table)
    Console().print(f"free up to {facts['knee_rows']} rows on {facts['device']} in {facts['dtype']}")

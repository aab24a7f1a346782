"""How does a person read results at a terminal?"""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_latency", "print_models", "print_modes", "print_steps", "print_values"]


def print_values(values: dict[str, Any]) -> None:
    """Names beside values; what is not a plain value as JSON."""
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict | list | tuple) else str(value))
    Console().print(table)


def print_models(facts: dict[str, Any]) -> None:
    """Registered versions, a row each, with what they were measured to be."""
    table = Table("model", "version", "status", "hash", "gates", "bundle")
    for one in facts["models"]:
        gates = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in one["gates"].items())  # fmt: skip
        table.add_row(one["name"], str(one["version"]), one["status"], one["bundle_hash"][:12], gates, one["bundle"])
    Console().print(table)


def print_modes(facts: dict[str, Any]) -> None:
    """The modes that a bench compared, a row each."""
    title = f"{facts['prompts']} prompts, {facts['batch']} at a time, K = {facts['block_len']}"
    columns = ("mode", "tokens/s", "spread", "over AR", "per forward", "per round", "first, ms", "equal to AR")
    table = Table(*columns, title=title)
    for name, mode in facts["modes"].items():
        low, high = mode["tokens_per_second_spread"]
        table.add_row(
            name,
            f"{mode['tokens_per_second']:.1f}",
            f"{low:.0f}-{high:.0f}",
            f"{mode['over_ar']:.2f}",
            f"{mode['tokens_per_forward']:.2f}",
            f"{mode['tokens_per_round']:.2f}",
            f"{1000 * mode['time_to_first_token_seconds']:.1f}",
            "yes" if mode["equal_to_ar"] else "NO",
        )
    Console().print(table)
    if rival := facts.get("transformers"):
        ratio = facts["modes"]["autoregressive"]["tokens_per_second"] / rival["tokens_per_second"]
        Console().print(
            f"transformers {rival['tokens_per_second']:.1f} tokens/s; our AR mode is {ratio:.2f} times that"
        )
    for name, mode in facts["modes"].items():
        for parted in mode["divergences"]:
            Console().print(
                f"{name}: prompt {parted['prompt']} parts at token {parted['token']}, where the two likeliest tokens "
                f"are {parted['top_2_gap']:.2g} apart"
            )


def print_steps(facts: dict[str, Any]) -> None:
    """Milliseconds of each step: steps down, batch and context across; beside it, the time over the AR step's."""
    shapes = sorted({(step["context"], step["batch"]) for step in facts["steps"]})
    costs = {(step["step"], step["context"], step["batch"]): step for step in facts["steps"]}
    title = f"{facts['shape']}, {facts['dtype']}, {facts['device']}: ms (over AR)"
    table = Table("step", "rows", *(f"context {c}, batch {b}" for c, b in shapes), title=title)
    for name, rows in dict.fromkeys((step["step"], step["rows"]) for step in facts["steps"]):
        cells = [costs[name, c, b] for c, b in shapes]
        table.add_row(name, str(rows), *(f"{1000 * cell['seconds']:.2f} ({cell['over_ar']:.2f})" for cell in cells))
    floors = [costs["autoregressive", c, b]["floor_share"] for c, b in shapes]
    table.add_row("AR: share of the floor", "", *(f"{share:.2f}" for share in floors))
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

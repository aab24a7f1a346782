"""Results as people read them at a terminal: names beside values, and tables."""

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from rich.table import Table

from pipelines.cluster.console import figure, size, stdout

__all__ = [
    "print_latency",
    "print_memory",
    "print_models",
    "print_modes",
    "print_plans",
    "print_prompts",
    "print_steps",
    "print_values",
]

UNITS = {"_bytes": "bytes", "_gib": "GiB", "_seconds": "s"}
"""Ends of names, and the unit that the value is shown with. Bytes are shown in GiB or MiB."""
NOT_KNOWN = "not known"


def print_values(values: Mapping[str, Any]) -> None:
    """Print each name beside its value, a line each; lines of a longer text follow its name.

    A value inside another has the outer name before its own. Figures are rounded.
    """
    entries = [entry for name, value in values.items() for entry in _entries(name, value)]
    width = max((len(name) for name, text in entries if "\n" not in text), default=0)
    for name, text in entries:
        lines = text.splitlines()
        shown = f"{name:{width}}  {text}" if len(lines) < 2 else "\n".join([name, *(f"    {line}" for line in lines)])
        stdout.print(shown.rstrip(), markup=False, highlight=False, soft_wrap=True)


def print_memory(facts: Mapping[str, Any]) -> None:
    """Print a replica's memory: the values are bytes, shown in GiB or MiB."""
    print_values({name: size(value) if isinstance(value, int) else value for name, value in facts.items()})


def print_models(facts: dict[str, Any]) -> None:
    """Print registered versions, an entry each, with the figures that their gates measured."""
    table = Table("model", "version", "status", "hash", "base", "gates", "bundle")
    for version in facts["models"]:
        gates = ", ".join(f"{name} {_text(value)}" for name, value in version["gates"].items())
        table.add_row(
            version["name"], str(version["version"]), version["status"], version["bundle_hash"][:12],
            version["base_hash"][:12], gates, version["bundle"],
        )  # fmt: skip
    stdout.print(table)


def print_modes(facts: dict[str, Any]) -> None:
    """Print the modes that a bench compared, an entry each."""
    title = _prompts_title(facts)
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
    stdout.print(table)
    if baseline := facts.get("transformers"):
        texts = "equal" if baseline["equal_to_ar"] else "NOT equal"
        stdout.print(
            f"transformers {baseline['tokens_per_second']:.1f} tokens/s; our AR mode is {baseline['ar_over']:.2f} "
            f"times as fast, its texts are {texts}"
        )
    if baseline := facts.get("llama_cpp"):
        stdout.print(
            f"llama.cpp {baseline['tokens_per_second']:.1f} tokens/s with {baseline['file']}; our AR mode is "
            f"{baseline['ar_over']:.2f} times as fast"
        )
    for name, mode in facts["modes"].items():
        for divergence in mode["divergences"]:
            stdout.print(
                f"{name}: prompt {divergence['prompt']} differs at token {divergence['token']}, where the two "
                f"likeliest tokens are {divergence['top_2_gap']:.2g} apart"
            )


def print_steps(facts: dict[str, Any]) -> None:
    """Print the milliseconds of each decode step: steps down, batch and context across; in parentheses, over AR."""
    shapes = sorted({(step["context"], step["batch"]) for step in facts["steps"]})
    costs = {(step["step"], step["context"], step["batch"]): step for step in facts["steps"]}
    title = f"{facts['shape']}, {facts['dtype']}, {facts['device']}: ms (over AR)"
    columns = (f"context {context}, batch {batch}" for context, batch in shapes)
    table = Table("step", "query tokens", *columns, title=title)
    for name, tokens in dict.fromkeys((step["step"], step["rows"]) for step in facts["steps"]):
        cells = [costs[name, context, batch] for context, batch in shapes]
        table.add_row(name, str(tokens), *(f"{1000 * cell['seconds']:.2f} ({cell['over_ar']:.2f})" for cell in cells))
    floors = [costs["autoregressive", context, batch]["floor_share"] for context, batch in shapes]
    table.add_row("AR: share of the floor", "", *(f"{share:.2f}" for share in floors))
    stdout.print(table)


def print_plans(facts: dict[str, Any]) -> None:
    """Print `auto` and the fastest fixed plans, an entry each, and how near `auto` came to the best."""
    title = f"{len(facts['tried'])} plans tried on a few of {_prompts_title(facts)}; {_title(facts)}"
    table = Table("plan", "tokens/s", "spread", "tokens/s when tried", title=title)
    for name, speeds in facts["finals"].items():
        tried = facts["tried"].get(name)
        spread = f"{min(speeds):.1f}-{max(speeds):.1f}"
        table.add_row(name, f"{median(speeds):.1f}", spread, "" if tried is None else f"{tried:.1f}")
    stdout.print(table)
    for words, ratios in ((f"the best fixed plan: {facts['best']}", "auto_over_best"), ("AR", "auto_over_ar")):
        low, middle, high = min(facts[ratios]), median(facts[ratios]), max(facts[ratios])
        stdout.print(f"auto has {middle:.3f} ({low:.3f} to {high:.3f}) of the speed of {words}")


def print_prompts(facts: dict[str, Any]) -> None:
    """Print the times of long prompts, an entry each."""
    columns = [
        "prompt", "first token, s", "tokens/s", "first, last chunk, ms", "step behind, ms",
        "gap beside, steps", "at 95 %", "memory",
    ]  # fmt: skip
    beside = "transformers_seconds" in facts["prompts"][0]
    table = Table(*columns, *(["transformers, s", "ratio"] if beside else []), title=_title(facts))
    for cost in facts["prompts"]:
        chunks = f"{1000 * cost['first_chunk_seconds']:.1f}, {1000 * cost['last_chunk_seconds']:.1f}"
        theirs = [f"{cost['transformers_seconds']:.2f}", f"{cost['over_transformers']:.2f}"] if beside else []
        table.add_row(
            f"{cost['prompt_tokens']:,}", figure(cost["first_token_seconds"]), f"{cost['tokens_per_second']:,.0f}",
            chunks, f"{1000 * cost['step_seconds']:.2f}", f"{cost['gap_steps']:.2f}",
            f"{cost['longest_gap_steps']:.2f}", size(cost["peak_bytes"]), *theirs,
        )  # fmt: skip
    stdout.print(table)


def _prompts_title(facts: dict[str, Any]) -> str:
    shortened = f" ({count} without their beginning, for the context)" if (count := facts["prompts_shortened"]) else ""
    return f"{facts['prompts']} prompts{shortened}, {facts['batch']} at a time, K = {facts['block_len']}"


def _title(facts: dict[str, Any]) -> str:
    shape = f"{facts['shape']}, " if "shape" in facts else ""
    return f"{shape}{facts['weights']}, {facts['device']}, {facts['threads']} threads"


def print_latency(facts: dict[str, Any]) -> None:
    """Print the milliseconds of a forward: query tokens down, batch and context across."""
    points = {(p["rows"], p["batch"], p["context"]): p["seconds"] for p in facts["points"]}
    shapes = sorted({(batch, context) for _, batch, context in points})
    columns = (f"batch {batch}, context {context}" for batch, context in shapes)
    table = Table("query tokens", *columns, title="milliseconds of a forward")
    for tokens in sorted({tokens for tokens, _, _ in points}):
        cells = (f"{1000 * points[tokens, batch, context]:.2f}" for batch, context in shapes)
        table.add_row(str(tokens), *cells)
    stdout.print(table)
    stdout.print(f"free up to {facts['knee_rows']} query tokens on {facts['device']} in {facts['dtype']}")


def _entries(name: str, value: Any, unit: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts of a value: an entry for each value inside a mapping, and for each item that is no figure.

    unit   of the mapping or list that holds the value
    """
    for ending, own in UNITS.items():
        if name.endswith(ending):
            name, unit = name.removesuffix(ending), own
    name = name.replace("_", " ")
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _entries(f"{name} {key}", item, unit)
    elif isinstance(value, list | tuple) and any(isinstance(item, str | Mapping | list | tuple) for item in value):
        for number, item in enumerate(value, 1):
            yield from _entries(f"{name} {number}", item, unit)
    elif isinstance(value, list | tuple):
        yield name, ", ".join(_text(item, unit) for item in value)
    else:
        yield name, _text(value, unit)


def _text(value: Any, unit: str = "") -> str:
    if value is None:
        return NOT_KNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    return size(value) if unit == "bytes" else f"{figure(value)} {unit}".rstrip()

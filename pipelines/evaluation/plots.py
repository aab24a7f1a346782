"""Plots of reports, benchmarks and experiments. Only this file imports matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

__all__ = ["acceptance_plot", "bench_plot", "experiment_plot", "latency_plot", "quality_plot", "speed_plot"]


def acceptance_plot(
    histogram: Sequence[int], by_position: Sequence[float] | None, draft_accuracy: Sequence[float | None]
) -> bytes:
    """PNG: how many drafts were accepted at once, and how likely each position of the block was accepted.

    A figure that was not measured, `None`, is not drawn.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = range(1, len(histogram) + 1)
    left.bar(lengths, [100 * count / max(1, sum(histogram)) for count in histogram])
    left.set(xlabel="tokens that a verification kept", ylabel="share of verifications, per cent",
             title="Accepted length", ylim=(0, None))  # fmt: skip
    if by_position is not None:
        right.plot(lengths, [100 * share for share in by_position], marker="o", label="kept when decoding")
    accuracy = [math.nan if share is None else 100 * share for share in draft_accuracy]
    right.plot(lengths, accuracy, marker="s", label="likeliest = held-out token")
    right.set(xlabel="position in the block", ylabel="drafts, per cent", ylim=(0, 105), title="Acceptance by position")
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _png(figure)


def speed_plot(modes: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG: tokens per second of each mode, with the spread over repeats."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    _speeds(axes, modes)
    return _png(figure)


def quality_plot(tasks: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: the score of each task against tokens per forward, from the parent's 1 token per forward, if measured.

    tasks  task entries of a report whose answers were generated
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, entry in enumerate(tasks):
        points = sorted((mode["tokens_per_forward"], 100 * mode["score"]) for mode in entry["modes"].values())
        if entry["parent"]:
            start = (1.0, 100 * entry["parent"]["score"])
            axes.plot(*zip(start, points[0]), color=f"C{number}", linestyle="--")
            axes.plot(*start, color=f"C{number}", marker="s", markerfacecolor="white")
        axes.plot(*zip(*points), color=f"C{number}", marker="o", label=entry["title"])
        axes.annotate(f"{points[-1][1]:.1f}", points[-1], xytext=(6, 4), textcoords="offset points")
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    reached = [mode["tokens_per_forward"] for entry in tasks for mode in entry["modes"].values()]
    axes.set(xlim=(0.8 * min(1.0, *reached), 1.1 * max(2.0, *reached)), ylim=(0, 105))
    axes.set(xlabel="tokens per forward", ylabel="score, per cent", title="Quality against tokens per forward")
    of_parent = [Line2D([], [], color="grey", marker="s", linestyle="--", markerfacecolor="white", label="parent (AR)")]
    handles = axes.get_legend_handles_labels()[0] + of_parent * any(entry["parent"] for entry in tasks)
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _png(figure)


def bench_plot(modes: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG: tokens per second of each mode, and acceptance by position for modes that draft."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    _speeds(left, modes)
    for name, mode in modes.items():
        by_position = mode["acceptance_by_position"]
        if any(by_position):
            right.plot(range(1, len(by_position) + 1), by_position, marker="o", label=name)
    right.set(xlabel="position in the block", ylabel="share accepted", ylim=(0, 1.05), title="Acceptance by position")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if right.lines:  # there are no lines if a block is one token
        right.legend()
    return _png(figure)


def experiment_plot(title: str, runs: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: quality against tokens per forward, a dot for each run, and how often drafts are right by position.

    runs  with variant, ar_loss, tokens_per_forward by block length, and draft_accuracy
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, variant in enumerate(dict.fromkeys(run["variant"] for run in runs)):
        own = [run for run in runs if run["variant"] == variant]
        points = [(speed, run["ar_loss"]) for run in own for speed in run["tokens_per_forward"].values()]
        left.scatter(*zip(*points), color=f"C{number}", label=variant)
        for run in own:
            accuracy = run["draft_accuracy"]
            right.plot(range(1, len(accuracy) + 1), accuracy, marker=".", color=f"C{number}")
    left.set(xlabel="tokens per forward", ylabel="held-out AR loss, nats", title=title)
    left.legend()
    right.set(xlabel="position in the block", ylabel="likeliest draft = held-out token", title="Drafts by position")
    return _png(figure)


def latency_plot(points: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: time of a forward over that of one query token, by query tokens; a line for each batch and context.

    points  entries of rows (query tokens), batch, context and seconds, as `tidar profile --json` prints them
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for batch, context in sorted({(p["batch"], p["context"]) for p in points}):
        curve = sorted((p["rows"], p["seconds"]) for p in points if (p["batch"], p["context"]) == (batch, context))
        rows, seconds = zip(*curve)
        axes.plot(rows, [s / seconds[0] for s in seconds], marker="o", label=f"batch {batch}, context {context}")
    axes.set(
        xscale="log", yscale="log", xlabel="query tokens of a sequence", ylabel="time over that of one query token"
    )
    axes.legend()
    return _png(figure)


def _speeds(axes: Any, modes: Mapping[str, Mapping[str, Any]]) -> None:
    names, speeds = list(modes), [mode["tokens_per_second"] for mode in modes.values()]
    low, high = zip(*(mode["tokens_per_second_spread"] for mode in modes.values()))
    errors = [[s - slow for s, slow in zip(speeds, low)], [fast - s for s, fast in zip(speeds, high)]]
    axes.barh(names, speeds, xerr=errors, capsize=4)
    axes.set(xlabel="tokens per second", title="Speed, same prompts, one run")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()

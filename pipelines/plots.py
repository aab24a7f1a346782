"""What do people want to see of a report? The only home of matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["acceptance_plot", "bench_plot", "latency_plot", "speed_plot"]


def acceptance_plot(histogram: Sequence[int], by_position: Sequence[float], draft_accuracy: Sequence[float]) -> bytes:
    """PNG: how many drafts stood at once, and how likely each position of the block was to stand."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = range(1, len(histogram) + 1)
    left.bar(lengths, [count / max(1, sum(histogram)) for count in histogram])
    left.set(xlabel="accepted length n", ylabel="share of verifications", title="Acceptance histogram")
    right.plot(lengths, by_position, marker="o", label="stood when decoding")
    right.plot(lengths, draft_accuracy, marker="s", label="likeliest token = held-out token")
    right.set(xlabel="position in the block", ylim=(0, 1.05), title="By position")
    right.legend()
    return _png(figure)


def speed_plot(modes: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG: tokens per second of each mode, with the spread over repeats."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    _speeds(axes, modes)
    return _png(figure)


def bench_plot(modes: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG: tokens per second of each mode, and how far drafts stood in those that draft."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    _speeds(left, modes)
    for name, mode in modes.items():
        by_position = mode["acceptance_by_position"]
        if any(by_position):
            right.plot(range(1, len(by_position) + 1), by_position, marker="o", label=name)
    right.set(xlabel="position in the block", ylabel="share that stood", ylim=(0, 1.05), title="Acceptance by position")
    right.legend()
    return _png(figure)


def latency_plot(points: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: what a forward costs against rows, over one row; a line for each batch and context.

    points  with rows, batch, context and seconds, as `tidar profile` prints them
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for batch, context in sorted({(p["batch"], p["context"]) for p in points}):
        curve = sorted((p["rows"], p["seconds"]) for p in points if (p["batch"], p["context"]) == (batch, context))
        rows, seconds = zip(*curve)
        axes.plot(rows, [s / seconds[0] for s in seconds], marker="o", label=f"batch {batch}, context {context}")
    axes.set(xscale="log", yscale="log", xlabel="rows of a sequence", ylabel="time over that of one row")
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

"""What do people want to see of a report? The only home of matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tidar_core.latency import LatencyPoint

__all__ = ["acceptance_plot", "latency_plot", "speed_plot"]


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
    names, speeds = list(modes), [mode["tokens_per_second"] for mode in modes.values()]
    low, high = zip(*(mode["tokens_per_second_spread"] for mode in modes.values()))
    errors = [[s - slow for s, slow in zip(speeds, low)], [fast - s for s, fast in zip(speeds, high)]]
    axes.barh(names, speeds, xerr=errors, capsize=4)
    axes.set(xlabel="tokens per second", title="Speed, same prompts, one run")
    return _png(figure)


def latency_plot(points: Sequence[LatencyPoint]) -> bytes:
    """PNG: what a forward costs against rows, over one row; a line for each batch and context."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for batch, context in sorted({(p.batch, p.context) for p in points}):
        curve = sorted((p.rows, p.seconds) for p in points if (p.batch, p.context) == (batch, context))
        rows, seconds = zip(*curve)
        axes.plot(rows, [s / seconds[0] for s in seconds], marker="o", label=f"batch {batch}, context {context}")
    axes.set(xscale="log", yscale="log", xlabel="rows of a sequence", ylabel="time over that of one row")
    axes.legend()
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()

"""Bars that a report must meet before its bundle is released."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.job import PublishJob

__all__ = ["Bar", "bars"]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a release."""

    name: str
    met: bool
    words: str
    """The measured figure and the bar, in words."""


def bars(job: PublishJob, report: Mapping[str, Any]) -> list[Bar]:
    """Every bar of the job, compared with the report. A figure that is missing or not finite meets no bar."""
    return [*_speeds(job, report), *_losses(job, report), *_tasks(job, report)]


def _losses(job: PublishJob, report: Mapping[str, Any]) -> Iterator[Bar]:
    for name, bar in (("ar_loss", job.max_ar_loss), ("diffusion_loss", job.max_diffusion_loss)):
        if bar is not None:
            yield _bar(name, report.get(name) or None, bar, "pack more held-out rows")  # 0.0: a mean over no labels
    if (most := job.max_ar_loss_over_parent) is not None:
        own, parent = report.get("ar_loss") or None, (report.get("parent") or {}).get("ar_loss") or None
        if own is not None and parent is not None:
            words = f"ar_loss is {own - parent:.4f} above the parent's {parent:.4f}, the bar {most}"
            yield Bar("ar_loss_over_parent", _within(own - parent, most), words)
        else:
            yield _unmeasured("ar_loss_over_parent", most, "name the parent in the evaluate job")


def _speeds(job: PublishJob, report: Mapping[str, Any]) -> Iterator[Bar]:
    if job.require_greedy_equal:
        prompts = report.get("prompts") or 0
        words = f"greedy texts equal the AR mode's on {report.get('prompts_equal', 0)} of {prompts} prompts"
        yield Bar("greedy_equal", prompts > 0 and report.get("greedy_equal") is True, words)
    per_forward, bar = report.get("tokens_per_forward"), job.min_tokens_per_forward
    if per_forward is None:
        yield _unmeasured("tokens per forward", bar, "give the evaluate job more prompts and max_tokens")
    else:
        words = f"tokens per forward is {per_forward:.3f}, the bar {bar}"
        yield Bar("tokens_per_forward", _within(bar, per_forward), words)


def _tasks(job: PublishJob, report: Mapping[str, Any]) -> Iterator[Bar]:
    entries = {entry["task"]: entry for entry in report.get("tasks", ())}
    for figure, pick, wanted in (
        ("score", min, job.min_scores),
        ("tokens_per_forward", max, job.min_task_tokens_per_forward),  # of the mode that would serve
    ):
        for task, bar in wanted.items():
            name = f"{figure} of {task}"
            modes = entries[task]["modes"].values() if task in entries else ()
            if values := [mode[figure] for mode in modes if mode[figure] is not None]:
                found = pick(values) if all(map(math.isfinite, values)) else math.nan
                yield Bar(name, _within(bar, found), f"{name} is {found:.4f}, the bar {bar}")
            else:
                yield _unmeasured(name, bar, "add the task to the evaluate job")
    if (most := job.max_score_drop) is not None:
        measured = {task: entry for task, entry in entries.items() if entry["parent"]}
        for task, entry in measured.items():
            scores, before = [mode["score"] for mode in entry["modes"].values()], entry["parent"]["score"]
            score = min(scores) if all(map(math.isfinite, scores)) else math.nan
            words = f"score of {task} is {score:.4f}, {before - score:.4f} below the parent's, the bar {most}"
            yield Bar(f"score_drop of {task}", _within(before - score, most), words)
        if not measured:
            yield _unmeasured("score_drop", most, "name the parent and tasks in the evaluate job")


def _bar(name: str, value: float | None, most: float, remedy: str) -> Bar:
    if value is None:
        return _unmeasured(name, most, remedy)
    return Bar(name, _within(value, most), f"{name} is {value:.4f}, the bar {most}")


def _within(low: float, high: float) -> bool:
    return math.isfinite(low) and math.isfinite(high) and low <= high


def _unmeasured(name: str, bar: float, remedy: str) -> Bar:
    return Bar(name, False, f"{name} was not measured, the bar is {bar}: {remedy}")

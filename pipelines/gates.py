"""Which bars must a report meet before its bundle is released, and which does it miss?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.jobs import PublishJob

__all__ = ["Bar", "bars"]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a release."""

    name: str
    met: bool
    words: str
    """What was measured, and the bar."""


def bars(job: PublishJob, report: Mapping[str, Any]) -> list[Bar]:
    """Every bar of the job, held against the report. What was not measured is not met."""
    return [*_speeds(job, report), *_losses(job, report), *_tasks(job, report)]


def _losses(job: PublishJob, report: Mapping[str, Any]) -> Iterator[Bar]:
    for name, bar in (("ar_loss", job.max_ar_loss), ("diffusion_loss", job.max_diffusion_loss)):
        if bar is not None:
            yield Bar(name, report[name] <= bar, f"{name} is {report[name]:.4f}, the bar {bar}")
    if (most := job.max_ar_loss_over_parent) is not None:
        if parent := report.get("parent"):
            over = report["ar_loss"] - parent["ar_loss"]
            words = f"ar_loss is {over:.4f} above the parent's {parent['ar_loss']:.4f}, the bar {most}"
            yield Bar("ar_loss_over_parent", over <= most, words)
        else:
            yield _unmeasured("ar_loss_over_parent", most, "name the parent in the evaluate job")


def _speeds(job: PublishJob, report: Mapping[str, Any]) -> Iterator[Bar]:
    if job.require_greedy_equal:
        equal = f"greedy texts equal the AR mode's on {report['prompts_equal']} of {report['prompts']} prompts"
        yield Bar("greedy_equal", report["greedy_equal"], equal)
    per_forward, bar = report["tokens_per_forward"], job.min_tokens_per_forward
    words = f"tokens per forward is {per_forward:.3f}, the bar {bar}"
    yield Bar("tokens_per_forward", per_forward >= bar, words)


def _tasks(job: PublishJob, report: Mapping[str, Any]) -> Iterator[Bar]:
    rows = {row["task"]: row for row in report.get("tasks", ())}
    for figure, pick, wanted in (
        ("score", min, job.min_scores),
        ("tokens_per_forward", max, job.min_task_tokens_per_forward),  # of the mode that would serve
    ):
        for task, bar in wanted.items():
            name = f"{figure} of {task}"
            modes = rows[task]["modes"].values() if task in rows else ()
            if values := [mode[figure] for mode in modes if mode[figure] is not None]:
                found = pick(values)
                yield Bar(name, found >= bar, f"{name} is {found:.4f}, the bar {bar}")
            else:
                yield _unmeasured(name, bar, "add the task to the evaluate job")
    if (most := job.max_score_drop) is not None:
        measured = {task: row for task, row in rows.items() if row["parent"]}
        for task, row in measured.items():
            score, before = min(mode["score"] for mode in row["modes"].values()), row["parent"]["score"]
            words = f"score of {task} is {score:.4f}, {before - score:.4f} below the parent's, the bar {most}"
            yield Bar(f"score_drop of {task}", before - score <= most, words)
        if not measured:
            yield _unmeasured("score_drop", most, "name the parent and tasks in the evaluate job")


def _unmeasured(name: str, bar: float, remedy: str) -> Bar:
    return Bar(name, False, f"{name} was not measured, the bar is {bar}: {remedy}")

"""Scores of a job's tasks: a bundle in each mode, the bundle as it is served, and its parent."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.job import EvaluateJob, TaskJob
from pipelines.evaluation.paper_tasks import PAPER_TASKS, TABLE_3
from tidar_core.artifacts.model.bundle import Bundle
from tidar_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.evaluation.lm_eval_model import LmEvalModel
    from pipelines.evaluation.lm_eval_service import ServiceModel
    from pipelines.evaluation.lm_eval_tasks import TaskScore

__all__ = ["PARENT", "SERVICE", "scores", "service_model", "service_scores", "task_entries", "tasks_in_mode"]

PARENT = "parent"
"""Name of the AR checkpoint in the place of a mode."""
SERVICE = "service"
"""Name of the served bundle in the place of a mode."""


def tasks_in_mode(job: EvaluateJob, mode: str) -> list[TaskJob]:
    """The tasks to run in a mode of the job. Tasks that no mode changes run only in the first mode."""
    return [task for task in job.tasks if mode == job.task_modes[0] or task.task not in TABLE_3]


def scores(
    job: EvaluateJob, bundle: Bundle, mode: str, tasks: Sequence[TaskJob], advance: Callable[[], None]
) -> "list[TaskScore]":
    """Scores of the bundle on `tasks` in `mode`.

    advance  called after each task
    """
    if not tasks:
        return []
    with _lm_eval_needed():
        from pipelines.evaluation.lm_eval_model import LmEvalModel
    model = LmEvalModel(bundle, mode=mode, batch_size=job.task_batch, context_len=job.task_context)
    return _scores_of(model, tasks, advance)


def service_model(job: EvaluateJob) -> "ServiceModel | None":
    """The service that the job names, or None. Raises ConfigError if it serves another bundle."""
    if job.service is None:
        return None
    with _lm_eval_needed():
        from pipelines.evaluation.lm_eval_service import ServiceModel
    return ServiceModel(job)


def service_scores(job: EvaluateJob, service: "ServiceModel", advance: Callable[[], None]) -> "list[TaskScore]":
    """Scores of the service on the job's tasks."""
    return _scores_of(service, job.tasks, advance)


def task_entries(found: "Mapping[str, Sequence[TaskScore]]") -> list[dict[str, Any]]:
    """An entry for each task: its facts, the figures of each mode, and the parent's if there is a parent.

    `equal_to_parent` counts the generated texts that are the parent's in every mode; None without a parent. Drafts of a
    frozen checkpoint leave all texts as they are.
    """
    entries: dict[str, dict[str, Any]] = {}
    texts: dict[str, set[tuple[str, ...]]] = {}
    of_parent = {score.task: score.texts for score in found.get(PARENT, ())}
    for mode, of_mode in found.items():
        for score in of_mode:
            known = PAPER_TASKS.get(score.task)
            facts = {name: getattr(score, name) for name in ("task", "metric", "documents", "shots", "isolation")}
            new = facts | {"title": known.title if known else score.task, "modes": {}, "parent": None}
            entry = entries.setdefault(score.task, new)
            if mode == PARENT:
                entry["parent"] = score.figures()
            else:
                entry["modes"][mode] = score.figures()
                texts.setdefault(score.task, set()).add(score.texts)
    return [
        entry
        | {
            "modes_say_the_same": len(texts[name]) == 1,
            "texts": max(map(len, texts[name])),
            "equal_to_parent": _equal_texts([*texts[name], of_parent[name]]) if name in of_parent else None,
        }
        for name, entry in entries.items()
    ]


def _equal_texts(sides: Sequence[Sequence[str]]) -> int:
    """Places at which all sides have the same text."""
    return sum(len({*place}) == 1 for place in zip(*sides))


def _scores_of(
    model: "LmEvalModel | ServiceModel", tasks: Sequence[TaskJob], advance: Callable[[], None]
) -> "list[TaskScore]":
    from pipelines.evaluation.lm_eval_tasks import run_task

    found = []
    for task in tasks:
        found.append(run_task(model, task))
        advance()
    return found


@contextmanager
def _lm_eval_needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"tasks need lm-eval, which is not installed ({error}); pip install 'tidar[eval]'") from error

"""What do a job's tasks say of a bundle, mode by mode and as it is served, and of its parent?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.paper_tasks import PAPER_TASKS, TABLE_3
from pipelines.jobs import EvaluateJob, TaskJob
from tidar_core.artifacts.model.bundle import Bundle
from tidar_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.evaluation.lm_eval_model import LmEvalModel
    from pipelines.evaluation.lm_eval_service import ServiceModel
    from pipelines.evaluation.lm_eval_tasks import TaskScore

__all__ = ["PARENT", "SERVICE", "scores", "service_model", "service_scores", "task_rows", "tasks_in_mode"]

PARENT = "parent"
"""Stands where a mode would, for the AR checkpoint."""
SERVICE = "service"
"""Stands where a mode would, for the bundle as it is served."""


def tasks_in_mode(job: EvaluateJob, mode: str) -> list[TaskJob]:
    """The tasks to be run in one of the job's modes: those that no mode changes, in the first alone."""
    return [task for task in job.tasks if mode == job.task_modes[0] or task.task not in TABLE_3]


def scores(
    job: EvaluateJob, bundle: Bundle, mode: str, tasks: Sequence[TaskJob], advance: Callable[[], None]
) -> "list[TaskScore]":
    """What the bundle scores on `tasks` in `mode`.

    advance  called after each task
    """
    if not tasks:
        return []
    with _lm_eval_needed():
        from pipelines.evaluation.lm_eval_model import LmEvalModel
    model = LmEvalModel(bundle, mode=mode, batch_size=job.task_batch, context_len=job.task_context)
    return _scores_of(model, tasks, advance)


def service_model(job: EvaluateJob) -> "ServiceModel | None":
    """The service that the job asks; None where it names none. Raises ConfigError if that serves something else."""
    if job.service is None:
        return None
    with _lm_eval_needed():
        from pipelines.evaluation.lm_eval_service import ServiceModel
    return ServiceModel(job)


def service_scores(job: EvaluateJob, service: "ServiceModel", advance: Callable[[], None]) -> "list[TaskScore]":
    """What the service scores on the job's tasks."""
    return _scores_of(service, job.tasks, advance)


def task_rows(found: "Mapping[str, Sequence[TaskScore]]") -> list[dict[str, Any]]:
    """A row for each task: what it is, what each mode made of it, and the parent where there is one."""
    rows: dict[str, dict[str, Any]] = {}
    texts: dict[str, set[tuple[str, ...]]] = {}
    for mode, of_mode in found.items():
        for one in of_mode:
            known = PAPER_TASKS.get(one.task)
            facts = {name: getattr(one, name) for name in ("task", "metric", "documents", "shots", "isolation")}
            new = facts | {"title": known.title if known else one.task, "modes": {}, "parent": None}
            row = rows.setdefault(one.task, new)
            if mode == PARENT:
                row["parent"] = one.figures()
            else:
                row["modes"][mode] = one.figures()
                texts.setdefault(one.task, set()).add(one.texts)
    return [row | {"modes_say_the_same": len(texts[name]) == 1} for name, row in rows.items()]


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

"""Scores of a model on lm-eval's tasks. Only this file imports lm-eval's tasks and datasets."""

import ast
import logging
import math
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from pipelines.evaluation.job import TaskJob
from pipelines.evaluation.lm_eval_model import GeneratedTexts, LmEvalModel
from pipelines.evaluation.lm_eval_service import ServiceModel
from pipelines.evaluation.paper_tasks import PAPER_TASKS, program, read_entries
from pipelines.evaluation.sandbox.runner import isolation, run_program
from tidar_core.artifacts.store import locations
from tidar_core.errors import ConfigError

__all__ = ["TaskScore", "run_task"]

FEWSHOT_SEED = 1234
"""Seed of lm-eval's own."""
TASK_FOLDER = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Score of a model on one task, in one mode."""

    task: str
    metric: str
    score: float
    stderr: float
    """Standard error of a share of right answers; 0 if the metric is no share."""
    documents: int
    shots: int
    tokens: int
    """New tokens, up to the stop string."""
    forwards: int
    acceptance_histogram: tuple[int, ...]
    isolation: str | None
    """Isolation of the programs, if the task ran programs."""
    texts: tuple[str, ...]
    """Generated texts, for a comparison of modes."""

    @property
    def tokens_per_forward(self) -> float | None:
        """T/NFE; None if nothing was generated."""
        return self.tokens / self.forwards if self.forwards else None

    def figures(self) -> dict[str, Any]:
        """Figures that depend on the mode, for a report."""
        names = ("score", "stderr", "tokens_per_forward", "tokens", "forwards", "acceptance_histogram")
        return {name: getattr(self, name) for name in names}


def run_task(model: LmEvalModel | ServiceModel, job: TaskJob) -> TaskScore:
    """Run a task of a job; returns the model's score. Raises ConfigError if the task cannot be run."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="tidar-tasks-") as cache:
        return _run(model, job, _built(job, cache))


def _run(model: LmEvalModel | ServiceModel, job: TaskJob, built: list[ConfigurableTask]) -> TaskScore:
    tasks = {task.config.task: task for task in built}
    model.generated = defaultdict(GeneratedTexts)
    try:
        found = evaluator.evaluate(
            model, {"tasks": tasks}, limit=job.limit, bootstrap_iters=0, log_samples=False, confirm_run_unsafe_code=True
        )
    except (KeyError, ValueError) as error:  # an entry lacks a field, or there are too few examples
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"task {job.task} cannot be run ({reason}); look at the rows of {job.data}") from error
    known = PAPER_TASKS.get(job.task)
    metric = known.metric if known else _first_metric(found["results"][next(iter(tasks))])
    sizes = {name: found["n-samples"][name]["effective"] for name in tasks}
    documents = sum(sizes.values())
    mean = float(sum(found["results"][name][metric] * size for name, size in sizes.items())) / documents
    histogram: Counter[int] = sum((texts.accepted for texts in model.generated.values()), Counter())
    return TaskScore(
        task=job.task if known else Path(job.task).stem,
        metric=metric.removesuffix(",none"),
        score=mean,
        stderr=math.sqrt(mean * (1 - mean) / documents) if 0 <= mean <= 1 else 0.0,
        documents=documents,
        shots=next(iter(tasks.values())).config.num_fewshot,
        tokens=sum(texts.tokens for texts in model.generated.values()),
        forwards=sum(texts.forwards for texts in model.generated.values()),
        acceptance_histogram=tuple(histogram[n] for n in range(1, model.block_len + 1)),
        isolation=isolation() if known and known.runs_code else None,
        texts=tuple(text for texts in model.generated.values() for text in texts.texts),
    )


def _built(job: TaskJob, cache: str) -> list[ConfigurableTask]:
    """lm-eval's tasks of a task of a job: one task, or one for each subject."""
    known = PAPER_TASKS.get(job.task)
    if known and known.runs_code:
        isolation()  # raises an error before anything is generated
    paths = sorted(TASK_FOLDER.glob(known.files)) if known else [locations.local_path(job.task)]
    entries = read_entries(job.data) if job.data else None
    if entries is not None:
        paths = paths[:1]  # a file is not divided into subjects
    return [_built_one(path, job, entries, cache) for path in paths if path is not None]


def _built_one(path: Path, job: TaskJob, entries: list[dict[str, Any]] | None, cache: str) -> ConfigurableTask:
    known = PAPER_TASKS.get(job.task)
    runs_code = known is not None and known.runs_code
    config = {k: v for k, v in load_yaml(path, resolve_func=not runs_code).items() if k not in ("tag", "group")}
    if runs_code:
        config |= _sandboxed(path)
    if job.data is not None:
        name = config.pop("dataset_name", None)
        if entries is not None and not (known.shots if known else job.shots):
            config.pop("training_split", None)  # lm-eval would look for examples there
        config["custom_dataset"] = lambda **_: _data(job.data, name, entries, cache)
    try:
        task = ConfigurableTask(config=config)
    except (KeyError, FileNotFoundError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        whole = f"; give a whole copy of {known.data}" if known else ""
        raise ConfigError(f"task {job.task} cannot be read from {job.data or path}: {reason}{whole}") from error
    shots = job.shots if job.shots is not None else known.shots if known else config.get("num_fewshot") or 0
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if max_tokens := job.max_tokens or (known and known.max_tokens):
        task.set_config("generation_kwargs", {"max_gen_toks": max_tokens}, update=True)
    return task


def _data(uri: str, name: str | None, entries: list[dict[str, Any]] | None, cache: str) -> Any:
    """All splits of a folder in the hub's layout; a file becomes the splits that are evaluated."""
    if entries is None:
        return datasets.load_dataset(str(locations.local_copy(uri)), name, cache_dir=cache)
    held = datasets.Dataset.from_list(entries)
    return datasets.DatasetDict({"test": held, "validation": held})


def _sandboxed(path: Path) -> dict[str, Any]:
    """Settings of a code task that replace lm-eval's scorer, which runs programs in this process, by the sandbox."""

    def process_results(doc: dict[str, Any], completions: list[str]) -> dict[str, float]:
        return {"pass@1": float(run_program(program(doc, completions[0])).passed)}

    changed: dict[str, Any] = {
        "process_results": process_results,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": None,
        "unsafe_code": False,
    }
    if path.parent.name == "mbpp":
        changed["fewshot_config"] = {"sampler": "first_n", "samples": _examples(path.with_name("utils.py"))}
    return changed


def _examples(path: Path) -> list[dict[str, Any]]:
    """The few-shot examples that a file of lm-eval lists; importing it would fetch a scorer from the hub."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            answer = node.body[-1]
            assert isinstance(answer, ast.Return), "all that it does is return a list"
            return list(ast.literal_eval(ast.unparse(answer.value or node)))
    raise AssertionError(f"{path} lists no few-shot examples")


def _first_metric(results: dict[str, Any]) -> str:
    """The first metric in the outcome of a user's task."""
    return next(key for key in results if "," in key and "_stderr" not in key)

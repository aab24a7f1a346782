"""Answers of a checkpoint to prompts, the same for any number of workers.

1. The driver lists the prompts' files and cuts them into pieces.
2. Tasks read the pieces and write units of equally many prompts beside the output; only counts come back.
3. A pool of actors, each with the model, answers the units (`answerer`); only counts come back.
4. Tasks write the files of the output, in the order of the prompts, and the driver puts the folder in place.

The work folder is named after the identity of the job. A job that was killed finds its finished units there and does
the rest (`answer_tasks`).
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pipelines.answers.answer_tasks import (
    AnsweredUnit,
    PromptUnit,
    UnitAnswers,
    WorkFolder,
    plan_files,
    read_prompts,
    write_file,
)
from pipelines.answers.job import OUTPUT_NEUTRAL, AnswersJob
from pipelines.cluster.connection import connect, require_room
from pipelines.cluster.console import stderr
from pipelines.cluster.progress import job_progress
from pipelines.cluster.work_items import ActorPool, actor_outcomes, task_outcomes
from pipelines.packing.answers_manifest import (
    ANSWERS_JSON,
    FORMAT_VERSION,
    AnswersManifest,
    read_manifest,
    write_manifest,
)
from pipelines.packing.corpus import JSON_LINES, PARQUET, list_corpus, work_units
from pipelines.packing.skipped_entries import LeftOut
from tidar_core.artifacts.model.bundle_info import hf_location, model_config
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.store import locations, output_folder
from tidar_core.artifacts.store.file_names import format_of
from tidar_core.artifacts.store.locations import FileEntry
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.artifacts.store.provenance import made_by, write_made_by
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.config import AUTOREGRESSIVE, mode_of
from tidar_core.errors import CorpusError, ShardError, TokenizerError

__all__ = ["answer"]


Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class _Model:
    """The model that answers."""

    uri: str
    hash: str


@dataclass(frozen=True, slots=True)
class _Read:
    """Units of prompts in their order."""

    units: list[PromptUnit]
    left_out: LeftOut


def answer(job: AnswersJob) -> AnswersManifest:
    """Write the answers of `job` to `job.output`; if the same job completed them before, only return the manifest.

    Raises CorpusError if there is no prompt that can be answered, and TokenizerError for a model without chat template.
    Raises ConfigError for a mode that needs drafts if the model does not draft.
    """
    files = _prompt_files(job)
    found = model_registry.find_bundle(model_registry.absolute_tracking_uri(job.tracking_uri), job.model)
    model = _Model(found.uri, found.info.bundle_hash)
    if load_chat_template(hf_location(model.uri)) is None:
        raise TokenizerError(
            f"{job.model} has no chat template, so it knows no conversations; put chat_template.jinja into its folder"
        )
    mode_of(model_config(model.uri), job.mode, default=AUTOREGRESSIVE)
    identity = _identity(job, files, model)
    output = locations.absolute(job.output)
    work = output_folder.work_folder(output, identity[: output_folder.KEY_LEN])
    folder = WorkFolder(work, job.unit_bytes, job.unit_prompts)
    if (done := _completed(output, identity)) and not locations.exists(work):
        return done
    with output_lock(output, ANSWERS_JSON):
        done = _completed(output, identity)
        if not done:
            output_folder.remove_other_work(output, work)
            try:
                done = _answered(job, files, model, identity, folder)
            except CorpusError:  # the prompts must change, which makes another job
                locations.remove(work)
                raise
            output_folder.put_in_place(folder.output, output, ANSWERS_JSON)
        locations.remove(work)
        return done


def _answered(
    job: AnswersJob, files: Sequence[FileEntry], model: _Model, identity: str, folder: WorkFolder
) -> AnswersManifest:
    """Write all files of the output into the work folder."""
    connect()
    require_room(job.cpus_per_worker, job.gpus_per_worker)
    read = _read_units(job, files, folder)
    outcomes = _answer_units(job, read.units, model, folder)
    by_name = {outcome.unit: outcome for outcome in outcomes}
    ordered = [by_name[unit.name] for unit in read.units]
    left_out = _merged([read.left_out, *(outcome.left_out for outcome in ordered)])
    unfinished = _merged([outcome.unfinished for outcome in ordered])
    if not sum(outcome.conversations for outcome in ordered):
        if not left_out.rows:
            chosen = f"greedy {job.greedy} and sampled {job.sampled}"
            raise CorpusError(f"{chosen} choose none of the prompts in {job.prompts}; raise them, or give more prompts")
        raise CorpusError(f"no entry of {job.prompts} can be answered: {left_out}; change them")
    for line, count in (("left out", left_out), ("left questions unanswered in", unfinished)):
        if count.rows:
            stderr.print(f"{line} {count.rows} entries of {job.prompts}: {count}", soft_wrap=True, markup=False)
    plans = plan_files([(outcome.unit, outcome.conversations) for outcome in ordered], job)
    written = _stage("write answers", "files", plans, partial(write_file, folder=folder), job.workers)
    manifest = AnswersManifest(
        identity=identity,
        model=model.hash,
        finish_reasons=dict(sorted(sum((Counter(outcome.finish_reasons) for outcome in ordered), Counter()).items())),
        left_out=left_out.rows,
        unfinished=unfinished.rows,
        named=tuple(left_out.named + unfinished.named),
        files=tuple(sorted(written, key=lambda entry: entry.file)),
        **{
            name: sum(getattr(outcome, name) for outcome in ordered)
            for name in ("prompts", "conversations", "greedy", "answers", "tokens")
        },
    )
    write_made_by(
        folder.output, made_by(job.model_dump(mode="json"), {"prompts": _listing_hash(files), "model": model.hash})
    )
    write_manifest(folder.output, manifest)
    return manifest


def _prompt_files(job: AnswersJob) -> list[FileEntry]:
    files = list_corpus(job.prompts, job.include, job.exclude, key="prompts")
    for file in files:
        if format_of(file.uri) not in (*JSON_LINES, PARQUET):
            raise CorpusError(
                f"{file.uri} is neither JSON lines nor Parquet; prompts need one of them; rename the file"
            )
    return files


def _read_units(job: AnswersJob, files: Sequence[FileEntry], folder: WorkFolder) -> _Read:
    pieces = list(enumerate(work_units(files, job.unit_bytes)))
    done = _stage("read prompts", "units", pieces, partial(read_prompts, job=job, folder=folder), job.workers)
    done.sort(key=lambda outcome: outcome.ordinal)
    units = [unit for outcome in done for unit in outcome.units]
    left_out = _merged([outcome.left_out for outcome in done])
    if not units:
        cause = str(left_out) or "all lines are blank"
        raise CorpusError(f"no entry of {job.prompts} can be answered: {cause}; change them")
    return _Read(units, left_out)


def _answer_units(
    job: AnswersJob, units: Sequence[PromptUnit], model: _Model, folder: WorkFolder
) -> list[AnsweredUnit]:
    pool = ActorPool(
        actors=job.workers,
        cpus=job.cpus_per_worker,
        gpus=job.gpus_per_worker,
        in_flight=math.ceil(job.batch / job.unit_prompts) + 1,  # while the last answers of a unit are made
    )
    make_work = partial(UnitAnswers, job, folder, model.uri, model.hash)
    done, pace = [], _Pace(sum(unit.prompts for unit in units))
    with job_progress("answer", total=pace.total, unit="prompts") as show:
        for outcome in actor_outcomes(units, make_work, pool):
            done.append(outcome)
            figures = pace.add(outcome)
            show(pace.prompts, figures)
    return done


@dataclass(slots=True)
class _Pace:
    """Speed of the actors, and the time left."""

    total: int
    prompts: int = 0
    fresh: int = 0
    """Prompts that were answered by this run; the others were answered before the job was killed."""
    speeds: dict[str, float] = field(default_factory=dict)
    """Latest tokens a second of each actor."""
    began: float = field(default_factory=time.monotonic)

    def add(self, outcome: AnsweredUnit) -> dict[str, float]:
        """Count a unit; returns figures for the progress."""
        self.prompts += outcome.prompts
        speed = outcome.speed
        if speed is not None and speed.seconds:
            self.fresh += outcome.prompts
            self.speeds[speed.actor] = speed.tokens / speed.seconds
        if not self.fresh:
            return {}
        left = (time.monotonic() - self.began) * (self.total - self.prompts) / self.fresh
        return {"tokens/s": sum(self.speeds.values()), "eta_seconds": left}


def _stage(title: str, unit: str, items: Sequence[Any], work: Callable[[Any], Outcome], workers: int) -> list[Outcome]:
    """Do the work of each item in tasks, and show the progress; returns the outcomes in any order."""
    done: list[Outcome] = []
    with job_progress(title, total=len(items), unit=unit) as show:
        for outcome in task_outcomes(items, work, workers):
            done.append(outcome)
            show(len(done), {})
    return done


def _merged(counts: Sequence[LeftOut]) -> LeftOut:
    merged = LeftOut(sum(count.rows for count in counts), [name for count in counts for name in count.named])
    return LeftOut(merged.rows, merged.named[:3])


def _completed(output: str, identity: str) -> AnswersManifest | None:
    if not locations.exists(locations.join(output, ANSWERS_JSON)):
        return None
    try:
        manifest = read_manifest(output)
    except ShardError:  # damaged; this job repairs it
        return None
    return manifest if manifest.identity == identity else None


def _identity(job: AnswersJob, files: Sequence[FileEntry], model: _Model) -> str:
    decides = job.model_dump(mode="json", exclude=OUTPUT_NEUTRAL)
    return _hash([FORMAT_VERSION, decides, model.hash, _listing_hash(files)])


def _listing_hash(files: Sequence[FileEntry]) -> str:
    return _hash([[file.name, file.size, file.version] for file in files])


def _hash(value: Any) -> str:
    return hashlib.sha256(locations.canonical_json(value).encode()).hexdigest()

"""Evaluation of a model on held-out text, and comparison of its texts with its autoregressive mode.

Bundle + held-out rows -> report.json, report.md and plots. Losses are means over labels, in nats. Texts are greedy, in
fp32. They are compared token for token with the plain one-token-at-a-time loop, which shares no cache and no layout
with the decoder. A checkpoint does not draft, so only its AR figures are measured. If the job names the AR checkpoint
that the bundle was converted from, this parent is measured on the same rows, prompts and tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
import torch

from pipelines.cluster.connection import connect, original_error
from pipelines.cluster.console import stderr
from pipelines.cluster.remote_progress import remote_progress, report_progress
from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.measure import BenchPrompts, bench_prompts
from pipelines.evaluation.paper_tasks import check_tasks
from pipelines.evaluation.report import REPORT, report_metrics, write_report
from pipelines.evaluation.task_scores import (
    PARENT,
    SERVICE,
    scores,
    service_model,
    service_scores,
    task_entries,
    tasks_in_mode,
)
from tidar_core.artifacts.model.bundle import Bundle, load_bundle, load_for_decoding
from tidar_core.artifacts.model.bundle_info import model_config, model_info, no_drafts_note
from tidar_core.artifacts.model.finite import FINITE_NEEDED
from tidar_core.artifacts.model.report_figures import not_finite
from tidar_core.artifacts.registry import model_registry, runs
from tidar_core.artifacts.shards import ShardReader, verify_shards
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.config import AUTOREGRESSIVE, ModelConfig, SamplingConfig, mode_of
from tidar_core.decoding.autoregressive import generate_autoregressive, score
from tidar_core.decoding.step_plan import MODES
from tidar_core.errors import BundleError, ConfigError, ShardError
from tidar_core.planning.mode_benchmark import compare_modes, prompts_in_all
from tidar_core.training.losses import LossTotals
from tidar_core.training.objective import Objective
from tidar_core.transformer.layout import PADDING

if TYPE_CHECKING:
    from pipelines.evaluation.lm_eval_tasks import TaskScore

__all__ = ["REPORT", "evaluate", "held_out_losses"]

ROWS_AT_ONCE = 8

Advance = Callable[[], None]


def evaluate(job: EvaluateJob) -> dict[str, Any]:
    """Run the job on the cluster and return the report; an earlier report at the same output is replaced."""
    job = _in_modes_of_model(_absolute(job))
    check_tasks(job.tasks, allow_code_execution=job.allow_code_execution)
    with output_lock(job.output, REPORT):
        return _evaluated(job)


def _evaluated(job: EvaluateJob) -> dict[str, Any]:
    connect()
    with _mlflow_run(job) as keep:
        try:
            with remote_progress("evaluate", total=_parts(job), unit="parts") as reports:
                report = ray.get(_on_node.options(num_gpus=job.gpus, num_cpus=job.cpus).remote(job, reports))
        except Exception as error:
            original = original_error(error)
            raise original from (error if original is not error else None)
        keep(report)
    return report


@contextmanager
def _mlflow_run(job: EvaluateJob) -> Iterator[Callable[[dict[str, Any]], None]]:
    """An MLflow run that keeps the report, below the run that trained the bundle; none if the job names no server."""
    if job.tracking_uri is None:
        yield lambda report: None
        return
    tracking_uri, info = job.tracking_uri, model_info(job.bundle)
    tags = {runs.STAGE_TAG: "evaluate", "bundle": job.bundle, "bundle_hash": info.bundle_hash}
    if trained := runs.find_run(tracking_uri, "train", info.bundle_hash):
        tags |= {runs.PARENT_RUN: trained, "training_run": trained}
    settings = {name: str(value) for name, value in job.model_dump(mode="json").items()}
    name = f"evaluate {locations.name_of(job.bundle)}"
    run_id = runs.start_run(tracking_uri, job.experiment, name, settings, tags)

    def keep(report: dict[str, Any]) -> None:
        runs.log_metrics(tracking_uri, run_id, report_metrics(report), 0)
        runs.log_data(tracking_uri, run_id, job.shards, report["shards"], "evaluation")
        for path in sorted(locations.local_copy(job.output).iterdir()):
            runs.log_artifact(tracking_uri, run_id, str(path))

    try:
        yield keep
    except BaseException as error:
        runs.end_run(tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    runs.end_run(tracking_uri, run_id)


@ray.remote(max_retries=0)
def _on_node(job: EvaluateJob, reports: Any) -> dict[str, Any]:
    torch.set_num_threads(job.cpus)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report_progress(reports, done, {})

    service = service_model(job)
    verify_shards(job.shards)
    device = "cuda" if job.gpus else "cpu"
    reader = ShardReader(job.shards, "held_out")
    bundle = load_for_decoding(job.bundle, device=device, weights=job.weights)
    report = measured(job, bundle, reader, advance)
    found: dict[str, list[TaskScore]] = {
        mode: scores(job, bundle, mode, tasks_in_mode(job, mode), advance) for mode in job.task_modes
    }
    report["service"] = None
    if service is not None:
        report["service"] = {name: service.card[name] for name in ("id", "mode")} | {"address": service.service}
        found[SERVICE] = service_scores(job, service, advance)
    texts, report["parent"] = report.pop("texts"), None
    if job.parent is not None:
        parent = _parent(job.parent, bundle, device, job.weights)
        report["parent"] = _measured_parent(job, parent, bundle, reader, texts, advance)
        found[PARENT] = scores(job, parent, "autoregressive", job.tasks, advance)
    report["tasks"] = task_entries(found)
    write_report(job, report)
    return report


def _parts(job: EvaluateJob) -> int:
    """Number of progress reports of the whole job, the parent's included."""
    runs = [
        (
            len(_modes(model_config(job.bundle))),
            job.prompts + sum(len(tasks_in_mode(job, mode)) for mode in job.task_modes),
        )
    ]
    if job.parent is not None:
        runs.append((1, len(job.tasks)))
    over_http = len(job.tasks) if job.service is not None else 0
    losses = -(-job.loss_rows // ROWS_AT_ONCE)
    return over_http + sum(
        losses + own + prompts_in_all(job.prompts, modes=modes, batch=job.batch, repeats=job.repeats)
        for modes, own in runs
    )


def _modes(config: ModelConfig) -> Sequence[str]:
    """Modes that a model's greedy texts are compared in."""
    return MODES if config.drafting else (AUTOREGRESSIVE,)


def _in_modes_of_model(job: EvaluateJob) -> EvaluateJob:
    """The same job with task modes of its model. Raises ConfigError for a mode that the model does not have.

    A model that does not draft has the autoregressive mode alone; the user learns so on standard error.
    """
    config = model_config(job.bundle)
    if config.drafting:
        return job
    named = "task_modes" in job.model_fields_set
    modes = [mode_of(config, mode if named else None, default=mode) for mode in job.task_modes]
    stderr.print(no_drafts_note(job.bundle), markup=False, highlight=False, soft_wrap=True)
    return job.model_copy(update={"task_modes": tuple(dict.fromkeys(modes))})


def _absolute(job: EvaluateJob) -> EvaluateJob:
    """The same job with absolute locations, because it runs in another folder."""
    changed: dict[str, Any] = {
        name: locations.absolute(given)
        for name in ("bundle", "shards", "output", "parent", "prompts_file")
        if (given := getattr(job, name)) is not None
    }
    if job.tracking_uri is not None:
        changed["tracking_uri"] = model_registry.absolute_tracking_uri(job.tracking_uri)
    changed["tasks"] = tuple(
        task.model_copy(
            update={
                "task": locations.absolute(task.task) if task.task.endswith(".yaml") else task.task,
                "data": locations.absolute(task.data) if task.data is not None else None,
            }
        )
        for task in job.tasks
    )
    return job.model_copy(update=changed)


def measured(job: EvaluateJob, bundle: Bundle, reader: ShardReader, advance: Advance) -> dict[str, Any]:
    """The report of a loaded bundle on held-out rows."""
    if bundle.tokenizer.fingerprint != reader.manifest.tokenizer:
        raise ConfigError(f"{job.shards} were packed with another tokenizer than {job.bundle} has; pack with its own")
    block_len = bundle.info.block_len
    losses = _finite_losses(job.bundle, bundle, reader, job.loss_rows, advance, dual=bundle.model.config.drafting)
    requests = _requests(job, bundle, reader)
    prompts, sampling = requests.tokens, SamplingConfig(max_tokens=job.max_tokens, eos_ids=requests.end_ids)
    plain = []
    for prompt in prompts:
        plain.append(generate_autoregressive(bundle.model, prompt, sampling))
        advance()
    modes = compare_modes(
        bundle.model,
        prompts,
        sampling,
        block_len=block_len,
        batch=job.batch,
        repeats=job.repeats,
        context_len=max(map(len, prompts)) + job.max_tokens,
        modes=_modes(bundle.model.config),
        on_prompt=advance,
    )
    single_pass = modes.get("single-pass", modes[AUTOREGRESSIVE])
    verified = (
        block_len == 1 or sum(single_pass.acceptance_histogram) > 0
    )  # otherwise every text ended with its first token
    equal = sum(len({text, *others}) == 1 for text, *others in zip(plain, *(mode.texts for mode in modes.values())))
    return {
        "bundle": job.bundle,
        "bundle_hash": bundle.info.bundle_hash,
        "shards": reader.manifest.identity,
        "block_len": block_len,
        **losses,
        "prompts": len(prompts),
        "prompts_shortened": requests.shortened,
        "prompts_equal": equal,
        "greedy_equal": equal == len(prompts),
        "tokens_per_forward": single_pass.tokens_per_forward if verified else None,
        "tokens_per_round": single_pass.tokens_per_round if verified else None,
        "acceptance_histogram": single_pass.acceptance_histogram,
        "acceptance_by_position": single_pass.acceptance_by_position if verified else None,
        "speed_over_ar": single_pass.over_ar,
        "batch": min(job.batch, len(prompts)),
        "threads": torch.get_num_threads(),
        "modes": {name: mode.figures() for name, mode in modes.items()},
        "texts": plain,
    }


def held_out_losses(bundle: str, shards: str, *, rows: int, threads: int) -> dict[str, float]:
    """AR and diffusion loss of a bundle, measured in this process."""
    torch.set_num_threads(threads)
    found = _losses(load_bundle(bundle), ShardReader(shards, "held_out"), rows, lambda: None, dual=True)
    return {name: found[name] for name in ("ar_loss", "diffusion_loss")}


def _parent(uri: str, bundle: Bundle, device: str, weights: str | None) -> Bundle:
    """The AR checkpoint: a bundle, or a Hugging Face folder, which may lack a tokenizer; with the same tokenizer."""
    parent = load_for_decoding(uri, device=device, weights=weights, tokenizer=bundle.tokenizer)
    if parent.tokenizer.fingerprint != bundle.tokenizer.fingerprint:
        raise ConfigError(
            f"parent {uri} has another tokenizer than the bundle; give the checkpoint it was converted from"
        )
    return parent


def _measured_parent(
    job: EvaluateJob,
    parent: Bundle,
    bundle: Bundle,
    reader: ShardReader,
    texts: Sequence[tuple[int, ...]],
    advance: Advance,
) -> dict[str, Any]:
    """Figures of the parent on the bundle's rows and prompts.

    texts  continuations of the prompts by the bundle
    """
    losses = _finite_losses(str(job.parent), parent, reader, job.loss_rows, advance, dual=False)
    requests = _requests(job, bundle, reader)
    own = compare_modes(
        parent.model,
        requests.tokens,
        SamplingConfig(max_tokens=job.max_tokens, eos_ids=requests.end_ids),
        block_len=1,
        batch=job.batch,
        repeats=job.repeats,
        context_len=max(map(len, requests.tokens)) + job.max_tokens,
        modes=("autoregressive",),
        on_prompt=advance,
    )["autoregressive"]
    return {
        "location": job.parent,
        "hash": parent.info.bundle_hash,
        "is_start": bool({parent.info.bundle_hash, job.parent} & {*bundle.info.lineage.values()}),
        "ar_loss": losses["ar_loss"],
        "prompts_equal": sum(own_text == text for own_text, text in zip(own.texts, texts)),
        "logits_equal": sum(
            torch.equal(*(score(model, prompt + text).logprob_L for model in (parent.model, bundle.model)))
            for prompt, text in zip(requests.tokens, texts)
        ),
        "tokens_per_second": own.tokens_per_second,
        "tokens_per_second_spread": own.tokens_per_second_spread,
    }


def _finite_losses(
    uri: str, bundle: Bundle, reader: ShardReader, rows: int, advance: Advance, *, dual: bool
) -> dict[str, Any]:
    """The losses of the bundle at `uri`. Raises BundleError if a loss is not finite: its texts would mean nothing."""
    found = _losses(bundle, reader, rows, advance, dual=dual)
    if wrong := not_finite(found):
        raise BundleError(
            f"{uri} has no finite loss on held-out rows of {reader.uri} ({', '.join(wrong)}); {FINITE_NEEDED}"
        )
    return found


@torch.inference_mode()
def _losses(bundle: Bundle, reader: ShardReader, rows: int, advance: Advance, *, dual: bool) -> dict[str, Any]:
    """Held-out losses, and how often the likeliest draft is the held-out token, by offset in the block.

    A mean over no labels was not measured and is `None`.
    """
    block_len = bundle.info.block_len
    objectives = [Objective(bundle.model, dual=dual, block_len=block_len)]
    if dual and bundle.model.adapter is not None:  # the objective of drafts leaves the frozen checkpoint's loss out
        objectives.append(Objective(bundle.model, dual=False, block_len=block_len))
    device = bundle.model.embedding.weight.device
    rows = min(rows, len(reader))
    if not rows:
        raise ShardError(f"{reader.uri} holds no held-out rows; pack with a larger held_out")
    totals = LossTotals(block_len, device)
    for first in range(0, rows, ROWS_AT_ONCE):
        packed = reader.rows(range(first, min(first + ROWS_AT_ONCE, rows)))
        trained_BS = packed.trained_BS
        for objective in objectives:
            batch = objective.batch(
                packed.input_ids_BS.to(device),
                packed.document_ids_BS.to(device),
                None if trained_BS is None else trained_BS.to(device),
            )
            totals.add(objective(batch))
        advance()
    means = totals.means()
    return {
        "held_out_rows": rows,
        "ar_loss": means.ar_loss,
        "diffusion_loss": means.diffusion_loss,
        "draft_accuracy": means.draft_accuracy_K,
    }


def _requests(job: EvaluateJob, bundle: Bundle, reader: ShardReader) -> BenchPrompts:
    """Prompts of the job's file, or beginnings of held-out documents."""
    if job.prompts_file is None:
        return BenchPrompts(_prompts(reader, job.prompts, job.prompt_len), bundle.end_ids, chat=False)
    with locations.local_folder() as folder:
        path = locations.local_path(job.prompts_file)
        if path is None:
            path = folder / locations.name_of(job.prompts_file)
            path.write_bytes(locations.read_bytes(job.prompts_file))
        return bench_prompts(job.bundle, bundle, path, job.prompts, job.max_tokens)


def _prompts(reader: ShardReader, count: int, prompt_len: int) -> list[tuple[int, ...]]:
    """The first `prompt_len` tokens of the first held-out documents that have so many in one row."""
    prompts: list[tuple[int, ...]] = []
    last_document = PADDING
    for index in range(len(reader)):
        row = reader.rows([index])
        ids, documents = row.input_ids_BS[0].tolist(), row.document_ids_BS[0].tolist()
        for start, document in enumerate(documents):
            begins = document != PADDING and document != (documents[start - 1] if start else last_document)
            end = start + prompt_len
            if begins and end <= len(ids) and documents[end - 1] == document:
                prompts.append(tuple(ids[start:end]))
        last_document = documents[-1]
        if len(prompts) >= count:
            return prompts[:count]
    if prompts:
        return prompts
    raise ShardError(
        f"no held-out document begins with {prompt_len} tokens in one row; lower prompt_len or pack with more held_out"
    )

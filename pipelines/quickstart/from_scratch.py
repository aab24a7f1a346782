"""Quickstart: all jobs from corpus to champion, on one machine and without input.

The running Python's own standard library is the corpus. It is packed; a small autoregressive model is trained from
scratch, converted by dual-mode training, evaluated, published and promoted. A cluster runs the same jobs. Each job file
stays in the working folder. A second run reuses finished jobs and resumes the others.
"""

import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.cluster.connection import disconnect
from pipelines.cluster.console import stderr
from pipelines.evaluation.evaluate import evaluate, held_out_losses
from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.publish import publish
from pipelines.jobs import PackJob, TrainJob
from pipelines.packing.pack import pack
from pipelines.quickstart.site import MODEL_NAME, Site, steps_within
from pipelines.training.train import train
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.shards import Manifest, ShardReader
from tidar_core.errors import ConfigError
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import linked_config
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["PROMPTS", "Quickstart", "flow"]

PROMPTS = ("def main():\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")
VOCAB_SIZE = 512
BLOCK_LEN = 8
ROW_LEN = 256
ROWS_PER_STEP = 8
WARMUP = 0.1
"""Share of the steps. With the 0.03 of the paper's long runs, so small a model never recovers from the high rates."""
AR_SHARE = 0.2
"""Share of the training budget; the dual-mode phase trains the AR half as well."""
DUAL_ALPHA = 0.5
"""Below the paper's 1: with a budget of minutes drafts lag behind, and the AR half is good enough anyway."""
LINK_RANK = 256
"""Each draft depends on the draft before it. A rank of 64 gives 1.4 times the tokens per forward
(docs/experiments.md), and this rank a tenth more. Its cost is negligible with so small a vocabulary.
A rank of 512 adds nothing."""
ENGINE_OVERHEAD = 1.3
"""Time of a train step under the engine, with data and logging, over that of a bare step."""
PROBE_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Quickstart:
    """Outcomes of all jobs."""

    manifest: Manifest
    ar_phase: dict[str, float]
    """Held-out losses before the dual-mode phase."""
    report: dict[str, Any]
    report_folder: str
    bundle: str
    version: int
    tracking_uri: str

    @property
    def summary(self) -> dict[str, Any]:
        """Figures and locations for a person."""
        splits = self.manifest.splits.values()
        measured = ("ar_loss", "diffusion_loss", "tokens_per_forward", "greedy_equal", "prompts", "speed_over_ar")
        return {
            "documents": sum(split.documents for split in splits),
            "tokens": sum(split.tokens for split in splits),
            "rows": sum(split.rows for split in splits),
            "ar_loss_of_ar_phase": self.ar_phase["ar_loss"],
            "diffusion_loss_of_ar_phase": self.ar_phase["diffusion_loss"],
            **{name: self.report[name] for name in measured},
            "bundle": self.bundle,
            "report": self.report_folder,
            "registry_version": self.version,
            "alias": model_registry.CHAMPION,
        }


def flow(workdir: Path, budget_seconds: int) -> Quickstart:
    """Run every job from corpus to champion in `workdir`; training takes about `budget_seconds`."""
    if budget_seconds < 10:
        raise ConfigError(f"budget-seconds is {budget_seconds}; training needs at least 10")
    site = Site.of(workdir)
    stderr.print("[bold]1 pack[/] the standard library's sources")
    manifest = pack(_pack_job(site))
    stderr.print("[bold]2 train[/] a small autoregressive model from scratch")
    train(_train_job(site, "ar", AR_SHARE * budget_seconds, objective="ar", shape="quickstart"))
    stderr.print("[bold]3 convert[/] it by dual-mode training")
    dual = {"objective": "dual", "init_from": site.path("ar"), "alpha": DUAL_ALPHA, "link_rank": LINK_RANK}
    train(_train_job(site, "bundle", (1 - AR_SHARE) * budget_seconds, **dual))
    stderr.print("[bold]4 evaluate[/] on held-out files")
    evaluation = _evaluate_job(site)
    report = site.finished_report(evaluation) or evaluate(evaluation)
    stderr.print("[bold]5 publish[/] and promote")
    version = publish(site.publish_job())
    model_registry.promote(site.tracking_uri, MODEL_NAME, version)
    ar_phase = held_out_losses(site.path("ar"), site.path("shards"), rows=evaluation.loss_rows, threads=site.threads)
    disconnect()
    return Quickstart(
        manifest=manifest,
        ar_phase=ar_phase,
        report=report,
        report_folder=site.path("report"),
        bundle=site.path("bundle"),
        version=version,
        tracking_uri=site.tracking_uri,
    )


def _pack_job(site: Site) -> PackJob:
    return site.job(
        "pack",
        PackJob,
        corpus=sysconfig.get_path("stdlib"),
        include=["*.py"],
        exclude=["site-packages", "dist-packages", "test", "tests"],
        output=site.path("shards"),
        tokenizer={"vocab_size": VOCAB_SIZE},
        row_len=ROW_LEN,
        held_out=0.06,
        unit_bytes=4 * 2**20,
        workers=site.threads,
    )


def _train_job(site: Site, name: str, seconds: float, **start: Any) -> TrainJob:
    return site.job(
        f"train-{name}",
        TrainJob,
        **start,
        shards=site.path("shards"),
        output=site.path(name),
        block_len=BLOCK_LEN,
        steps=lambda: _steps_within(
            seconds, dual=start["objective"] == "dual", shards=site.path("shards"), threads=site.threads
        ),
        rows_per_step=ROWS_PER_STEP,
        rows_per_forward=ROWS_PER_STEP,
        learning_rate=4e-3,
        min_learning_rate=2e-4,
        warmup=WARMUP,
        precision="bf16",
        checkpoint_every=200,
        cpus_per_worker=site.threads,
        tracking_uri=site.tracking_uri,
        experiment=MODEL_NAME,
    )


def _evaluate_job(site: Site) -> EvaluateJob:
    return site.job(
        "evaluate",
        EvaluateJob,
        bundle=site.path("bundle"),
        shards=site.path("shards"),
        output=site.path("report"),
        parent=site.path("ar"),
        tracking_uri=site.tracking_uri,
        prompts=32,
        prompt_len=64,
        max_tokens=128,
        batch=1,
        repeats=2,
        cpus=site.threads,
    )


def _steps_within(seconds: float, *, dual: bool, shards: str, threads: int) -> int:
    """Train steps that fit a budget on this machine, estimated from a few timed steps."""
    torch.set_num_threads(threads)
    reader = ShardReader(shards)
    config = named_shape("quickstart", vocab_len=reader.manifest.vocab_len)
    model = TidarModel(linked_config(config, LINK_RANK) if dual else config)
    model.init_weights(0)
    objective = Objective(model.bfloat16(), dual=dual, block_len=BLOCK_LEN)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    rows = reader.rows(range(min(ROWS_PER_STEP, len(reader))))
    batch = objective.batch(rows.input_ids_BS, rows.document_ids_BS, rows.trained_BS)
    fastest = float("inf")
    for _ in range(PROBE_STEPS):
        began = time.perf_counter()
        dual_mode_loss(objective(batch), 1.0, *label_counts(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        fastest = min(fastest, time.perf_counter() - began)
    return steps_within(seconds, fastest, ENGINE_OVERHEAD)

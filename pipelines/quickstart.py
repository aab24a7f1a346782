"""How does the whole river run on one machine with no input?

The running Python's own standard library is the corpus: pack it, train a small autoregressive model from scratch,
convert it by dual-mode training, evaluate, publish, promote. Each station is the same one that a cluster runs, and its
job file is left in the working folder; a second run reuses what is finished and resumes what is not.
"""

import json
import os
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from pipelines.cluster import disconnect
from pipelines.evaluate import REPORT, evaluate, held_out_losses
from pipelines.jobs import EvaluateJob, J, PackJob, PublishJob, TrainJob, read_job
from pipelines.pack import pack
from pipelines.progress import stderr
from pipelines.publish import publish
from pipelines.train import train
from tidar_core.artifacts import registry
from tidar_core.artifacts.bundle import read_bundle_info
from tidar_core.artifacts.shards import Manifest, ShardReader
from tidar_core.errors import ConfigError
from tidar_core.losses import dual_mode_loss, label_counts
from tidar_core.model import TidarModel
from tidar_core.objective import Objective
from tidar_core.shapes import named_shape

__all__ = ["MODEL_NAME", "PROMPTS", "River", "flow"]

MODEL_NAME = "quickstart"
PROMPTS = ("def main():\n    ", "class Stack:\n    def __init__(self", "import os\nimport sys\n\n")
VOCAB_SIZE = 512
BLOCK_LEN = 8
ROW_LEN = 256
ROWS_PER_STEP = 16
AR_SHARE = 0.2
"""Of the training budget; the dual-mode phase trains the AR half as well."""
PROBE_STEPS = 4
ENGINE_OVERHEAD = 1.15
"""A train step under the engine, with data and logging, over the bare one that is probed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class River:
    """Where everything is after the last station."""

    manifest: Manifest
    ar_phase: dict[str, float]
    """Held-out losses before the dual-mode phase."""
    report: dict[str, Any]
    report_folder: str
    bundle: str
    version: int
    tracking_uri: str


def flow(workdir: Path, budget_seconds: int) -> River:
    """Run every station from corpus to champion in `workdir`; training takes about `budget_seconds`."""
    if budget_seconds < 10:
        raise ConfigError(f"budget-seconds is {budget_seconds}; training needs at least 10")
    workdir = workdir.resolve()
    (workdir / "jobs").mkdir(parents=True, exist_ok=True)
    tracking_uri = f"sqlite:///{workdir}/mlflow.db"
    threads = os.cpu_count() or 1
    shards, ar_bundle, bundle, report = (str(workdir / name) for name in ("shards", "ar", "bundle", "report"))

    def job(name: str, kind: type[J], /, **values: Any) -> J:
        return _kept_job(workdir / "jobs" / f"{name}.yaml", kind, values)

    stderr.print("[bold]1 pack[/] the standard library's sources")
    manifest = pack(job(
        "pack", PackJob, corpus=sysconfig.get_path("stdlib"), include=["*.py"], output=shards, row_len=ROW_LEN,
        exclude=["site-packages", "dist-packages", "test", "tests"], tokenizer={"vocab_size": VOCAB_SIZE},
        held_out=0.04, workers=threads,
    ))  # fmt: skip
    common: dict[str, Any] = {
        "shards": shards, "block_len": BLOCK_LEN, "rows_per_step": ROWS_PER_STEP, "rows_per_forward": ROWS_PER_STEP,
        "learning_rate": 4e-3, "min_learning_rate": 2e-4, "warmup": 0.03, "checkpoint_every": 200,
        "cpus_per_worker": threads, "tracking_uri": tracking_uri, "experiment": MODEL_NAME,
    }  # fmt: skip

    stderr.print("[bold]2 train[/] a small autoregressive model from scratch")
    steps = partial(_steps_within, shards=shards, threads=threads)
    train(job(
        "train-ar", TrainJob, output=ar_bundle, objective="ar", shape="quickstart", **common,
        steps=lambda: steps(AR_SHARE * budget_seconds, dual=False),
    ))  # fmt: skip

    stderr.print("[bold]3 convert[/] it by dual-mode training")
    train(job(
        "train-dual", TrainJob, output=bundle, objective="dual", init_from=ar_bundle, alpha=0.5, **common,
        steps=lambda: steps((1 - AR_SHARE) * budget_seconds, dual=True),
    ))  # fmt: skip

    stderr.print("[bold]4 evaluate[/] on held-out files")
    evaluation_job = job(
        "evaluate", EvaluateJob, bundle=bundle, shards=shards, output=report, prompts=32, prompt_len=64,
        max_tokens=128, batch=1, repeats=2, cpus=threads,
    )  # fmt: skip
    evaluation = _finished_report(evaluation_job) or evaluate(evaluation_job)

    stderr.print("[bold]5 publish[/] and promote")
    version = publish(job(
        "publish", PublishJob, bundle=bundle, report=report, name=MODEL_NAME, tracking_uri=tracking_uri,
    ))  # fmt: skip
    registry.promote(tracking_uri, MODEL_NAME, version)
    ar_phase = held_out_losses(ar_bundle, shards, rows=evaluation_job.loss_rows, threads=threads)
    disconnect()
    return River(
        manifest=manifest,
        ar_phase=ar_phase,
        report=evaluation,
        report_folder=report,
        bundle=bundle,
        version=version,
        tracking_uri=tracking_uri,
    )


def _kept_job(path: Path, kind: type[J], values: dict[str, Any]) -> J:
    """The job file of an earlier run, or a new one of these values; those that are functions are called for it."""
    if not path.exists():
        written = kind.model_validate({name: value() if callable(value) else value for name, value in values.items()})
        path.write_text(yaml.safe_dump(written.model_dump(mode="json"), sort_keys=False))
    return read_job(kind, path)


def _finished_report(job: EvaluateJob) -> dict[str, Any] | None:
    """The report of an earlier run, if it is about the bundle that lies there now."""
    path = Path(job.output) / REPORT
    report = json.loads(path.read_text()) if path.exists() else None
    return report if report and report["bundle_hash"] == read_bundle_info(job.bundle).bundle_hash else None


def _steps_within(seconds: float, *, dual: bool, shards: str, threads: int) -> int:
    """Train steps that fit a budget on this machine, from a few that are timed."""
    torch.set_num_threads(threads)
    reader = ShardReader(shards)
    model = TidarModel(named_shape("quickstart", vocab_len=reader.manifest.vocab_len))
    model.init_weights(0)
    objective = Objective(model.bfloat16(), dual=dual, block_len=BLOCK_LEN)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    rows = reader.rows(range(min(ROWS_PER_STEP, len(reader))))
    batch = objective.batch(rows.input_ids_BS, rows.document_ids_BS)
    fastest = float("inf")
    for _ in range(PROBE_STEPS):
        began = time.perf_counter()
        dual_mode_loss(objective(batch), 1.0, *label_counts(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        fastest = min(fastest, time.perf_counter() - began)
    return max(10, int(seconds / (fastest * ENGINE_OVERHEAD)))

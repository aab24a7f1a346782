"""An estimate of the seconds of a train step, made before any worker starts.

How long will a train step take?

On a CPU, forward and backward are timed for the model with two of its layers and few tokens. A step's arithmetic at
this rate is the estimate. The update is timed on a small vector. A GPU is not timed, because this machine may have no
GPU: there a usual share of the job's `peak_flops` gives the estimate.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pipelines.jobs import TrainJob
from pipelines.training.memory import learned_count, parameter_count
from tidar_core.artifacts.model.bundle import DTYPES
from tidar_core.config import ModelConfig
from tidar_core.training.flops import train_flops, visible_pairs
from tidar_core.training.losses import dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.transformer.draft_adapter import freeze
from tidar_core.transformer.model import TidarModel

__all__ = ["estimated_step", "sample_seconds"]

SAMPLE_TOKENS = 256
SAMPLE_PARAMETERS = 250_000_000
"""Largest model, of two layers and the tables, that is timed; a larger model would take minutes."""
SAMPLE_UPDATE = 2**22
USUAL_MFU = 0.4
GRADIENT_PASSES = 6
"""Times that DeepSpeed copies, reduces, measures or clips all gradients in fp32, at each forward or update."""


def estimated_step(job: TrainJob, model: ModelConfig, row_len: int) -> dict[str, Any]:
    """Seconds of a train step, hours of the whole job, and what they were estimated from."""
    seconds, source = _seconds(job, model, row_len)
    if seconds is None:
        return {"seconds": None, "hours_of_all_steps": None, "estimated_from": source}
    hours = seconds * job.steps / 3600
    return {"seconds": round(seconds, 3), "hours_of_all_steps": round(hours, 3), "estimated_from": source}


def _seconds(job: TrainJob, model: ModelConfig, row_len: int) -> tuple[float | None, str]:
    flops = _flops(job, model, row_len, job.rows_per_step) / job.workers
    if job.gpus_per_worker:
        if not isinstance(job.peak_flops, float):
            return None, "nothing: the workers' GPUs are not timed here; give peak_flops as a number"
        return flops / (USUAL_MFU * job.peak_flops), f"{USUAL_MFU:.0%} of peak_flops, {job.peak_flops:.3g}"
    sample = _sample(model)
    if sample is None:
        return None, "nothing: the model is too large to be timed here in seconds"
    length = min(row_len, SAMPLE_TOKENS)
    with _threads(job.cpus_per_worker):
        forward_backward = _forward_backward(job, sample, length)
        update, one_pass = _update()
    rate = _flops(job, sample, length, 1) / forward_backward
    forwards = job.rows_per_step // (job.row_groups * job.rows_per_forward)
    count = learned_count(model)
    passes = GRADIENT_PASSES * count * (forwards + 1) * one_pass
    threads = f"{job.cpus_per_worker} thread{'s' * (job.cpus_per_worker > 1)}"
    source = f"two layers, {length} tokens and an update, timed on this machine with {threads} in {job.precision}"
    return flops / rate + passes + update * count / job.workers, source


def sample_seconds(jobs: Sequence[TrainJob], model: ModelConfig, row_len: int) -> list[float] | None:
    """Seconds that each of these jobs, whose precision may differ, needs for forward and backward of a small sample.

    `None` for a model that is too large to be timed in seconds.
    """
    sample, length = _sample(model), min(row_len, SAMPLE_TOKENS // 4)
    if sample is None:
        return None
    with _threads(jobs[0].cpus_per_worker):
        return [_forward_backward(job, sample, length) for job in jobs]


def _sample(model: ModelConfig) -> ModelConfig | None:
    """The model with two layers, and with a mask token; `None` if it is still too large."""
    mask_id = model.mask_id if model.drafting else model.vocab_size - 1  # a start without a mask token gets one
    sample = replace(model, layers=min(2, model.layers), mask_id=mask_id)
    return sample if parameter_count(sample) <= SAMPLE_PARAMETERS else None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flops(job: TrainJob, model: ModelConfig, row_len: int, rows: int) -> float:
    """Arithmetic of so many rows of one document each."""
    document = torch.zeros(1, row_len, dtype=torch.long)
    dual = job.objective == "dual"
    pairs = visible_pairs(document, job.block_len) if dual else visible_pairs(document)
    return rows * train_flops(model, row_len * (2 if dual else 1), int(pairs), row_len if dual else 0)


def _forward_backward(job: TrainJob, model: ModelConfig, length: int) -> float:
    """Seconds of one row of so many tokens."""
    own = TidarModel(model)
    own.init_weights(0)
    if model.adapter is not None:
        freeze(own)
    objective = Objective(
        own.to(DTYPES[job.precision]), dual=job.objective == "dual",
        block_len=min(job.block_len, length - 1), recipe=job.recipe,
    ).train()  # fmt: skip
    ids = torch.randint(0, model.vocab_size - 1, (1, length), generator=torch.Generator().manual_seed(0))
    batch = objective.batch(ids, torch.zeros_like(ids), seed_B=[0])
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        dual_mode_loss(objective(batch), objective.recipe.alpha, *label_counts(batch)).backward()
        fastest = min(fastest, time.perf_counter() - began)
        objective.zero_grad()
    return fastest


def _update() -> tuple[float, float]:
    """Seconds of AdamW, and of one pass over a gradient, for each parameter."""
    weight = torch.zeros(SAMPLE_UPDATE, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    fastest, one_pass = float("inf"), float("inf")
    for _ in range(3):
        began = time.perf_counter()
        optimizer.step()
        updated = time.perf_counter()
        weight.grad.clone()
        fastest, one_pass = min(fastest, updated - began), min(one_pass, time.perf_counter() - updated)
    return fastest / SAMPLE_UPDATE, one_pass / SAMPLE_UPDATE

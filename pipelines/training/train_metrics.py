"""Metrics between two log lines: losses, speed, memory and time left."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.jobs import TrainJob
from pipelines.training.train_engine import TrainEngine
from tidar_core.artifacts.model.bundle import DTYPES
from tidar_core.config import ModelConfig
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.training.flops import layout_pairs, matmul_peak, train_flops
from tidar_core.training.losses import LossMeans, LossSums, LossTotals

__all__ = ["MetricsWindow", "loss_metrics", "peak_flops"]

GIB = 2**30
MEASURED_SIZE = {"cuda": 8192, "cpu": 1024}
"""Size of the matrix product that measures a peak: large, but quick."""


class MetricsWindow:
    """Sums since the last log line."""

    def __init__(self, engine: TrainEngine, job: TrainJob, model: ModelConfig, *, first_step: int) -> None:
        self.engine, self.job, self.model, self.first_step = engine, job, model, first_step
        self.peak = peak_flops(job, engine.device)
        self.began = time.perf_counter()
        self._open()

    def _open(self) -> None:
        self.losses = LossTotals(self.job.block_len, self.engine.device)
        self.pairs = torch.zeros((), dtype=torch.int64, device=self.engine.device)
        self.tokens = self.clean_tokens = 0
        self.opened, self.paused = time.perf_counter(), 0.0

    def add(self, sums: LossSums, batch: TrainBatch) -> None:
        """Add one forward and backward."""
        self.losses.add(sums)
        self.pairs += layout_pairs(batch.layout)
        self.tokens += batch.token_BL.numel()
        self.clean_tokens += batch.ar_target_BS.numel()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside the context from tokens per second and MFU."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def close(self, step: int, rate: float, skipped: int) -> dict[str, float]:
        """Metrics of the window over all workers, after `step` steps; begins the next one. Every worker must call."""
        metrics = loss_metrics(self.losses.means(self.engine.total(self.losses.parts)))  # waits for the device
        now = time.perf_counter()
        seconds = now - self.opened - self.paused
        metrics |= {
            "learning_rate": rate,
            "grad_norm": self.engine.grad_norm(),
            "skipped_updates": skipped,
            "tokens_per_second": self.clean_tokens * self.engine.world_size / seconds,
            "flops_per_second": train_flops(self.model, self.tokens, int(self.pairs), self.tokens - self.clean_tokens)
            / seconds,
            "memory_gib": self.engine.largest(_peak_memory(self.engine.device)) / GIB,
            "eta_seconds": (now - self.began) / (step - self.first_step) * (self.job.steps - step),
        }
        if self.peak is not None:
            metrics["mfu"] = metrics["flops_per_second"] / self.peak
        self._open()
        return metrics


def loss_metrics(means: LossMeans) -> dict[str, float]:
    """Metrics of mean losses by name. A mean over no labels is left out, because it was not measured."""
    named = {"ar_loss": means.ar_loss, "diffusion_loss": means.diffusion_loss}
    named |= {f"draft_accuracy_{offset:02d}": share for offset, share in enumerate(means.draft_accuracy_K)}
    return {name: value for name, value in named.items() if value is not None}


def peak_flops(job: TrainJob, device: torch.device) -> float | None:
    """Peak operations per second for MFU: given by the job, or measured here; None if the job gives nothing."""
    if job.peak_flops != "measure":
        return job.peak_flops
    dtype = DTYPES[job.precision]
    return matmul_peak(device, dtype, size=MEASURED_SIZE[device.type])


def _peak_memory(device: torch.device) -> float:
    """Most bytes held so far: on the accelerator, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

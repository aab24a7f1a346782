"""What does one training worker do from start to end?

Rows -> objective -> engine, step after step, from wherever the checkpoint's cursor stands; then the bundle. It knows no
Ray: what it needs of its surroundings is handed in.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.jobs import TrainJob
from pipelines.train_engine import TrainEngine, learning_rate
from tidar_core.artifacts import locations
from tidar_core.artifacts.bundle import BUNDLE_JSON, read_bundle_info, save_bundle
from tidar_core.artifacts.hf_weights import load_model, with_mask_token
from tidar_core.artifacts.made_by import made_by
from tidar_core.artifacts.shards import TOKENIZER, Manifest, ShardReader
from tidar_core.artifacts.tokenizer import load_tokenizer
from tidar_core.errors import ShardError
from tidar_core.losses import LossSums, dual_mode_loss, label_counts
from tidar_core.model import TidarModel
from tidar_core.objective import Objective
from tidar_core.row_order import rows_of_step
from tidar_core.shapes import named_shape

__all__ = ["Surroundings", "starting_model", "train_worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a worker is told, and whom it tells."""

    rank: int
    world_size: int
    resume_from: Path | None
    """Folder of the checkpoint to go on from."""
    checkpoint: Callable[[dict[str, float], Path], None]
    """Keep a folder as the checkpoint; every worker calls it with its part."""
    log: Callable[[dict[str, float], int], None]
    """Metrics after so many train steps; called on rank 0 only."""


def train_worker(job: TrainJob, around: Surroundings) -> None:
    """Train to the job's last step and, on rank 0, write the bundle."""
    torch.set_num_threads(job.cpus_per_worker)
    reader = ShardReader(job.shards)
    model, parent = starting_model(job, reader.manifest)
    config = model.config
    objective = Objective(model, dual=job.objective == "dual", block_len=job.block_len)
    engine = TrainEngine(objective.train(), job)
    done = 0
    if around.resume_from is not None:
        cursor = engine.load(around.resume_from)
        if cursor["shards"] != reader.manifest.identity:
            raise ShardError(f"the checkpoint of {job.output} was trained on other shards than {job.shards} holds now; "
                             "give the job another output, or the shards it began with")  # fmt: skip
        done = cursor["step"]
    window = _Window(job.block_len, engine.device)
    for step in range(done, job.steps):
        _train_step(job, engine, objective, reader, step, around, window)
        last = step + 1 == job.steps
        if last or (step + 1) % job.log_every == 0:
            metrics = window.close(engine, job, learning_rate(job, step))
            if around.rank == 0:
                around.log(metrics, step + 1)
        if last or (step + 1) % job.checkpoint_every == 0:
            with tempfile.TemporaryDirectory(prefix="tidar-checkpoint-") as folder:
                engine.save(Path(folder), {"step": step + 1, "shards": reader.manifest.identity})
                around.checkpoint({"step": step + 1}, Path(folder))
    weights = engine.gathered_weights()
    if around.rank == 0:
        trained = TidarModel(config).to(next(iter(weights.values())).dtype)
        trained.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
        _write_bundle(job, trained.to("cpu"), reader.manifest, parent)


def starting_model(job: TrainJob, manifest: Manifest) -> tuple[TidarModel, str]:
    """The model that training starts from, mask token included, in fp32; and the identity of where it came from."""
    if job.shape is not None:
        model = TidarModel(named_shape(job.shape, vocab_len=manifest.vocab_len))
        model.init_weights(job.seed)
        return model, f"random weights of shape {job.shape}, seed {job.seed}"
    assert job.init_from is not None
    folder = locations.local_copy(job.init_from)
    if (folder / BUNDLE_JSON).exists():
        info = read_bundle_info(str(folder))
        return load_model(folder, mask_id=info.mask_id), info.bundle_hash
    return with_mask_token(load_model(folder), manifest.vocab_len, seed=job.seed), job.init_from


class _Window:
    """Sums since the last log line."""

    def __init__(self, block_len: int, device: torch.device) -> None:
        self.block_len, self.device = block_len, device
        self._open()

    def _open(self) -> None:
        self.parts = torch.zeros(4 + 2 * self.block_len, dtype=torch.float64, device=self.device)
        self.tokens, self.began = 0, time.perf_counter()

    def add(self, sums: LossSums, tokens: int) -> None:
        scalars = torch.stack([sums.ar_sum, sums.diffusion_sum, sums.ar_count, sums.diffusion_count]).double()
        self.parts += torch.cat([scalars.detach(), sums.draft_hits_K.double(), sums.draft_count_K.double()])
        self.tokens += tokens

    def close(self, engine: TrainEngine, job: TrainJob, rate: float) -> dict[str, float]:
        """Metrics of the window over all workers; begins the next one."""
        parts = engine.total(self.parts).tolist()
        ar_sum, diffusion_sum, ar_count, diffusion_count, *drafts = parts
        seconds = time.perf_counter() - self.began
        metrics = {
            "ar_loss": ar_sum / max(1.0, ar_count),
            "learning_rate": rate,
            "grad_norm": engine.grad_norm(),
            "tokens_per_second": self.tokens * engine.world_size / seconds,
        }
        if job.objective == "dual":
            metrics["diffusion_loss"] = diffusion_sum / max(1.0, diffusion_count)
            hits, counts = drafts[: self.block_len], drafts[self.block_len :]
            metrics |= {f"draft_accuracy_{i:02d}": hit / max(1.0, n) for i, (hit, n) in enumerate(zip(hits, counts))}
        self._open()
        return metrics


def _train_step(job: TrainJob, engine: TrainEngine, objective: Objective, reader: ShardReader, step: int,
                around: Surroundings, window: _Window) -> None:  # fmt: skip
    rows = rows_of_step(step, rows_per_step=job.rows_per_step, rows=len(reader), seed=job.seed)
    share = job.rows_per_step // around.world_size
    rows = rows[around.rank * share : (around.rank + 1) * share]
    batches = []
    for first in range(0, share, job.rows_per_forward):
        packed = reader.rows(rows[first : first + job.rows_per_forward])
        batches.append(objective.batch(packed.input_ids_BS.to(engine.device), packed.document_ids_BS.to(engine.device)))
    counts = torch.stack([torch.stack(label_counts(batch)) for batch in batches]).sum(0)
    ar_count, diffusion_count = engine.total(counts)
    engine.set_learning_rate(learning_rate(job, step))
    for batch in batches:
        sums = engine.forward(batch)
        engine.backward(dual_mode_loss(sums, job.alpha, ar_count, diffusion_count))
        window.add(sums, batch.ar_target_BS.numel())


def _write_bundle(job: TrainJob, model: TidarModel, manifest: Manifest, parent: str) -> None:
    parents: dict[str, Any] = {"shards": manifest.identity, "start": parent}
    mask_id = model.config.mask_id
    assert mask_id is not None
    save_bundle(
        job.output,
        model,
        load_tokenizer(locations.local_copy(locations.join(job.shards, TOKENIZER))),
        block_len=job.block_len,
        mask_id=mask_id,
        objective=job.objective,
        lineage=parents,
        made_by=made_by(job.model_dump(mode="json"), parents),
    )

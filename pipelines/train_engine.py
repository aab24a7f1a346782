"""How do gradients become updates on several workers? The only home of DeepSpeed.

Its configuration is derived from the job; nothing is said twice.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.jobs import TrainJob
from tidar_core.schedule import Schedule

__all__ = ["TrainEngine", "deepspeed_config", "learning_rate"]

_TAG = "engine"


class TrainEngine:
    """A module under ZeRO: forward, backward, update, save, load, gather."""

    def __init__(self, module: nn.Module, job: TrainJob) -> None:
        """torch.distributed must be up; every worker builds one with the same job."""
        import deepspeed

        decayed = [p for p in module.parameters() if p.dim() > 1]
        plain = [p for p in module.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=job.learning_rate, betas=job.adam_betas)
        self.job, self.world_size = job, dist.get_world_size()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(job)
        )

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return self._engine.device

    def forward(self, *inputs: Any) -> Any:
        """The module's forward, under the engine."""
        return self._engine(*inputs)

    def backward(self, share: Tensor) -> None:
        """Accumulate gradients of this forward's share of the train step's loss.

        The shares of all forwards on all workers add up to the loss; the engine, which averages over both, is given
        each multiplied back.
        """
        self._engine.backward(share * (self.world_size * self._engine.gradient_accumulation_steps()))
        self._engine.step()  # updates at the end of the accumulation only

    def set_learning_rate(self, value: float) -> None:
        """For the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def total(self, values: Tensor) -> Tensor:
        """Sum over workers."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def save(self, folder: Path, cursor: dict[str, Any]) -> None:
        """Every worker writes its part and, with it, the cursor."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state={"cursor": cursor})

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore weights, optimizer and random state; give back the cursor."""
        _, state = self._engine.load_checkpoint(str(folder), tag=_TAG)
        return state["cursor"]

    def gathered_weights(self) -> dict[str, Tensor]:
        """All weights, on rank 0 (elsewhere possibly empty); every worker must call."""
        if self.job.zero_stage == 3:
            return self._engine._zero3_consolidated_16bit_state_dict() or {}
        return self._engine.module.state_dict()


def deepspeed_config(job: TrainJob) -> dict[str, Any]:
    """DeepSpeed's dictionary for a job."""
    return {
        "train_batch_size": job.rows_per_step,
        "train_micro_batch_size_per_gpu": job.rows_per_forward,
        "gradient_clipping": job.clip_norm,
        "bf16": {"enabled": job.precision == "bf16"},
        "zero_optimization": {"stage": job.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def learning_rate(job: TrainJob, step: int) -> float:
    """Rate of train step `step`."""
    schedule = Schedule(peak=job.learning_rate, minimum=job.min_learning_rate, warmup=job.warmup)
    return schedule.at_step(step, job.steps)

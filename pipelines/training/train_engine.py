"""Training engine on several workers: gradients become updates. Only this file imports DeepSpeed.

DeepSpeed's configuration is derived from the job. A checkpoint gets whole tensors by name, in fp32; each worker
contributes its share. So a checkpoint does not depend on the number of workers or the ZeRO stage.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.jobs import TrainJob
from tidar_core.artifacts.model.bundle import DTYPES
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.training.losses import LossSums
from tidar_core.training.objective import Objective
from tidar_core.training.schedule import Schedule
from tidar_core.transformer.model import TidarModel

__all__ = ["TrainEngine", "adamw", "deepspeed_config", "from_rank_0", "learning_rate", "updates_on_cpu"]

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
PERSISTENT_NUMEL = 10_000
"""ZeRO 3 keeps parameters below this size, the norms, whole on every worker."""


class TrainEngine:
    """An objective under ZeRO: forward, backward, update; checkpoints and the gathered model."""

    def __init__(self, objective: Objective, job: TrainJob) -> None:
        """torch.distributed must be up; every worker builds an engine with the same job."""
        with _unloadable("mlflow"):  # only DeepSpeed's autotuner would load it, for a second
            import deepspeed

        # DeepSpeed would compile it for inference only; a killed compiler would block all later ones.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._config = objective.model.config
        self.job, self.world_size, self.rank = job, dist.get_world_size(), dist.get_rank()
        self._gathered = deepspeed.zero.GatheredParameters
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=_Tensors(objective), optimizer=adamw(objective.parameters(), job), config=deepspeed_config(job)
        )

    @property
    def device(self) -> torch.device:
        """Device that batches must be on."""
        return self._engine.device

    def forward(self, batch: TrainBatch) -> LossSums:
        """The objective's forward, under the engine."""
        return LossSums(*self._engine(batch))

    def backward(self, share: Tensor) -> None:
        """Accumulate gradients of this forward's share of the train step's loss.

        The shares of all forwards on all workers add up to the loss. The engine averages over both, so each share is
        multiplied by their number.
        """
        self._engine.backward(share * (self.world_size * self._engine.gradient_accumulation_steps()))
        ends = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()  # updates only at the end of the accumulation
        if ends and not self.applied and self.job.offload_optimizer == "cpu" and self.job.zero_stage < 3:
            gathered = (
                self._optimizer.averaged_gradients
            )  # DeepSpeed 0.19 keeps them, and would add the gradients of the next step
            self._optimizer.averaged_gradients = dict.fromkeys(gathered)

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def total(self, values: Tensor) -> Tensor:
        """Sum over workers."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def largest(self, value: float) -> float:
        """Largest value over workers."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def grad_norm(self) -> float:
        """Global gradient norm of the last train step, before clipping; nan if its update was skipped."""
        if not self.applied:
            return math.nan
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    @property
    def applied(self) -> bool:
        """Whether the last train step updated the weights: DeepSpeed skips a gradient that is not finite."""
        return self._engine.was_step_applied()

    @property
    def updates(self) -> int:
        """Updates that the optimizer made."""
        return int(next((state["step"] for state in self._optimizer.optimizer.state.values()), 0))

    def share_of_state(self) -> dict[str, dict[str, Tensor]]:
        """This worker's share of learned weights and moments, whole tensors on the CPU; every worker must call."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._optimizer.optimizer.state:  # every update so far was skipped
            self._begin_moments(0)
        self._link_moments()
        learned = self._learned()
        owner = _owners({name: _shape(p).numel() for name, p in learned}, self.world_size)
        share = {}
        for name, parameter in learned:
            whole = {WEIGHT: safe_get_full_fp32_param(parameter)}
            whole |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if owner[name] == self.rank:
                share[name] = {key: value.to("cpu", copy=True) for key, value in whole.items()}
        return share

    def restore(
        self, parts: Sequence[tuple[str, ...]], read: Callable[[int], dict[str, dict[str, Tensor]]], updates: int
    ) -> None:
        """Load learned weights and moments; every worker must call.

        parts    names in each part of the checkpoint
        read     returns a part's tensors; one worker reads a part and sends it to all
        """
        parameters = dict(self._learned())
        assert parameters.keys() == {name for part in parts for name in part}, "the checkpoint is of another model"
        self._begin_moments(updates)
        for index, names in enumerate(parts):
            owner = index % self.world_size
            tensors = read(index) if owner == self.rank else None
            for name in names:
                for key in (WEIGHT, *MOMENTS):
                    value = torch.empty(_shape(parameters[name]), device=self.device)
                    if tensors is not None:
                        value.copy_(tensors[name][key])
                    dist.broadcast(value, owner)
                    self._set(parameters[name], key, value)

    def gathered_model(self) -> TidarModel | None:
        """The model in its precision, on rank 0's CPU; None on other ranks. Every worker must call."""
        from deepspeed.utils import safe_get_full_fp32_param

        dtype = DTYPES[self.job.precision]
        model = TidarModel(self._config).to(dtype).eval() if self.rank == 0 else None
        own = dict(model.named_parameters()) if model is not None else {}
        for name, parameter in self._parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)
            else:
                with self._gathered([parameter]):
                    whole = parameter.detach().clone()
            if model is not None:
                own[name].data.copy_(whole)
        return model

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the model, in its order; a table that is also the head comes once."""
        return list(self._engine.module.objective.model.named_parameters())

    def _learned(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that training changes: all, or the drafts of a frozen checkpoint."""
        return [(name, parameter) for name, parameter in self._parameters() if parameter.requires_grad]

    def _begin_moments(self, updates: int) -> None:
        """Create the optimizer's state, which a first update would create."""
        flat = next(getattr(self._optimizer, name) for name in FLAT_WEIGHTS if hasattr(self._optimizer, name))
        for weights in flat:
            self._optimizer.optimizer.state[weights] = {
                "step": torch.tensor(float(updates)), **{key: torch.zeros_like(weights) for key in MOMENTS}
            }  # fmt: skip
        self._link_moments()

    def _link_moments(self) -> None:
        """Link parameters to their moments; ZeRO 1 and 2 on their own link only the first of several groups."""
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if key == WEIGHT:
            with self._gathered([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        if self.job.zero_stage == 3:  # setting the whole tensor fails if the number of workers does not divide it
            part_len = parameter.ds_tensor.numel()  # pyrefly: ignore[missing-attribute]
            padded = F.pad(value.flatten(), (0, part_len * self.world_size - value.numel()))
            value = padded[self.rank * part_len : (self.rank + 1) * part_len]
            set_weight, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
        else:
            set_weight, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
        if key == WEIGHT:
            set_weight(parameter, value)
        else:
            set_moment(parameter, value, key)


FLAT_WEIGHTS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Names in DeepSpeed's optimizers (ZeRO 3; ZeRO 1 and 2; ZeRO 1 in bf16) of the fp32 weights that a worker updates."""


class _Tensors(nn.Module):
    """The objective, with its sums in a tuple, in which DeepSpeed finds the tensors of the backward pass."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: TrainBatch) -> tuple[Tensor, ...]:
        sums = self.objective.forward(batch)  # not through its hooks, which do not support dataclasses
        return tuple(getattr(sums, field.name) for field in fields(sums))


def deepspeed_config(job: TrainJob) -> dict[str, Any]:
    """DeepSpeed's dictionary for a job."""
    zero: dict[str, Any] = {"stage": job.zero_stage, "stage3_param_persistence_threshold": PERSISTENT_NUMEL}
    if job.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": job.gpus_per_worker > 0}
    return {
        "train_batch_size": job.rows_per_step * job.sequence_parallel,  # as if shared rows were each worker's own
        "train_micro_batch_size_per_gpu": job.rows_per_forward,
        "gradient_clipping": job.clip_norm,
        "bf16": {"enabled": job.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def adamw(parameters: Iterable[torch.nn.Parameter], job: TrainJob) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained. Weights of one dimension, such as norms, do not decay."""
    learned = [p for p in parameters if p.requires_grad]
    decayed, plain = [p for p in learned if p.dim() > 1], [p for p in learned if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=job.learning_rate, betas=job.adam_betas,
        fused=updates_on_cpu(job) or None,  # one pass over the weights; torch's other forms take nine
    )  # fmt: skip


def updates_on_cpu(job: TrainJob) -> bool:
    """Whether the CPU updates the weights."""
    return job.offload_optimizer == "cpu" or job.gpus_per_worker == 0


def learning_rate(job: TrainJob, step: int) -> float:
    """Learning rate of train step `step`."""
    schedule = Schedule(peak=job.learning_rate, minimum=job.min_learning_rate, warmup=job.warmup)
    return schedule.at_step(step, job.steps)


def from_rank_0(value: Any) -> Any:
    """The value of rank 0, on every worker; it must be small and picklable."""
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


@contextmanager
def _unloadable(module: str) -> Iterator[None]:
    """Make imports of this module fail here, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # pyrefly: ignore[unsupported-operation]
    try:
        yield
    finally:
        del sys.modules[module]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, which may be divided among workers."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _owners(sizes: dict[str, int], workers: int) -> dict[str, int]:
    """Worker of each tensor, so that every worker has about the same number of elements."""
    load = [0] * workers
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner

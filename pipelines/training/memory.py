"""Estimate of the memory of a training worker, made before any worker starts.

    fp32     weights 4, gradients 4, moments 8 bytes a parameter, and 4 more for the copy that ZeRO updates
    bf16     weights 2, gradients 2 and 4 more to add them up in, fp32 weights 4, moments 8

Frozen weights of a checkpoint take their 4 or 2 bytes alone, and its clean tokens keep keys and values.

ZeRO 1 divides fp32 weights and moments among the workers, ZeRO 2 also the accumulated gradients, ZeRO 3 also the
weights. Activations are the tensors that a layer keeps for its backward pass. The own memory of an attention kernel or
an allocator is not counted.
"""

from dataclasses import dataclass

import torch

from pipelines.jobs import TrainJob
from tidar_core.config import ModelConfig
from tidar_core.training.losses import LOGITS_AT_ONCE, LOGITS_AT_ONCE_CUDA
from tidar_core.transformer.draft_adapter import DRAFT_WEIGHTS
from tidar_core.transformer.model import TidarModel

__all__ = ["MemoryEstimate", "activation_bytes", "estimated_memory", "learned_count", "parameter_count"]

BUCKET_NUMEL = 500_000_000
"""Most gradients that ZeRO 2 and 3 hold before they are reduced (DeepSpeed's reduce_bucket_size)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one worker, by use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Bytes of one forward of `rows_per_forward` rows, logits included."""
    offloaded: int
    """Bytes of the optimizer that lie in the machine's memory instead of beside the weights."""

    @property
    def total(self) -> int:
        """Bytes on the worker's device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimated_memory(job: TrainJob, model: ModelConfig, row_len: int) -> MemoryEstimate:
    """Most memory that each worker of the job will hold."""
    count, learned, workers, width = parameter_count(model), learned_count(model), job.workers, _width(job)
    largest = model.vocab_size * model.hidden_size  # the table is gathered whole when it is used
    divided = {1: 1, 2: 1, 3: workers}[job.zero_stage]
    weights = width * count // divided + (width * largest if job.zero_stage == 3 else 0)
    whole = width * (learned if job.zero_stage == 1 else min(learned, BUCKET_NUMEL))
    added_up = 4 * learned // (1 if job.zero_stage == 1 else workers)
    if job.precision == "fp32" and job.zero_stage == 1:
        added_up = 0  # they are accumulated in place
    optimizer = 12 * learned // workers
    offloads = job.offload_optimizer == "cpu"
    return MemoryEstimate(
        weights=weights,
        gradients=whole + added_up,
        optimizer=0 if offloads else optimizer,
        activations=activation_bytes(job, model, row_len),
        offloaded=optimizer if offloads else 0,
    )


def activation_bytes(job: TrainJob, model: ModelConfig, row_len: int) -> int:
    """Bytes that one forward keeps for its backward pass, and logits of one chunk of tokens with their gradient."""
    halves = (job.visits if job.objective == "dual" else 0) + (model.adapter is None)
    tokens = job.rows_per_forward * row_len * halves // job.sequence_parallel
    heads = (model.heads + 2 * model.kv_heads) * model.head_size
    layer = 4 * model.hidden_size + 2 * heads + 2 * model.heads * model.head_size + 4 * model.intermediate_size
    if model.qk_norm:
        layer += (model.heads + model.kv_heads) * model.head_size
    kept = model.layers * (model.hidden_size if job.activation_checkpointing else layer)
    kept += layer if job.activation_checkpointing else 0  # the layer that is computed again
    if model.adapter is not None:
        kept += model.layers * 2 * model.kv_heads * model.head_size
    at_once = LOGITS_AT_ONCE_CUDA if job.gpus_per_worker else LOGITS_AT_ONCE
    logits = min(at_once, tokens * model.vocab_size)
    return _width(job) * tokens * (kept + 2 * model.hidden_size) + (_width(job) + 8) * logits


def parameter_count(model: ModelConfig) -> int:
    """Weights of the model; a table that is also the head is counted once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TidarModel(model).parameters())


def learned_count(model: ModelConfig) -> int:
    """Weights that training changes: all, or the drafts of a frozen checkpoint."""
    if model.adapter is None:
        return parameter_count(model)
    with torch.device("meta"):
        named = TidarModel(model).named_parameters()
    return sum(parameter.numel() for name, parameter in named if name.startswith(DRAFT_WEIGHTS))


def _width(job: TrainJob) -> int:
    """Bytes of a weight, a gradient and an activation as they are used."""
    return 2 if job.precision == "bf16" else 4

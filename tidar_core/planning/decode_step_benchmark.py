"""Benchmark of the decode steps of a model on this device.

How long does a step take by mode, batch and context, and how long must it take?

Weights and cache are random: the time of a step does not depend on their values. The floor is the time that the memory
bus needs to read all weights of the step, keys and values once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tidar_core.config import DraftConfig, ModelConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.kernels.held_linear import HeldLinear
from tidar_core.kernels.linear import weight_bytes
from tidar_core.timing import median_seconds
from tidar_core.transformer.model import TidarModel

__all__ = ["StepCost", "StepShape", "random_model", "step_costs", "step_plans"]

MEMORY_SHARE = 0.9
"""Largest share of the device's free memory that a cache may take."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """A decode step to be timed."""

    name: str
    plan: StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Time of one decode step."""

    step: str
    rows: int
    """Query tokens of one sequence."""
    batch: int
    context: int
    seconds: float
    """Median time; it includes the copy of the committed tokens to the host."""
    over_ar: float
    """Time over the autoregressive step of the same batch and context."""
    floor_share: float
    """Time that the memory bus needs for weights, keys and values, over the measured time."""


def step_plans(block_len: int) -> list[StepShape]:
    """Decode steps of every mode: autoregressive first, dense single-pass last. Only the first if K is 1."""
    K = block_len
    if K == 1:
        return [StepShape("autoregressive", StepPlan(1))]
    some = sorted({1, 2, max(1, K // 4), max(1, K // 2)} - {K})
    return [
        StepShape("autoregressive", StepPlan(1)),
        StepShape("two-pass: draft", StepPlan(1, (1,))),
        StepShape("two-pass: verify", StepPlan(K)),
        *(StepShape(f"single-pass, {m} of {K} groups", StepPlan(K, tuple(range(1, m + 1)))) for m in some),
        StepShape(f"single-pass, all {K} groups", StepPlan(K, tuple(range(1, K + 1)))),
    ]


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TidarModel:
    """Untrained model of the given shape, made on the device; on the meta device it has no values."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = TidarModel(config)
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                parameter.normal_(0, 0.02)
    return model.eval()


def step_costs(
    model: TidarModel,
    *,
    block_len: int,
    batches: Sequence[int],
    contexts: Sequence[int],
    bandwidth: float,
    page_len: int = 16,
    repeats: int = 5,
    on_step: Callable[[StepCost], None] = lambda cost: None,
) -> list[StepCost]:
    """Time the steps of every mode; batches and contexts whose cache does not fit in memory are left out.

    bandwidth  bytes per second, for the floor
    on_step    called after each timed step
    """
    costs: list[StepCost] = []
    for context in contexts:
        for batch in batches:
            if not _fits(model, batch, context + block_len):
                continue
            decoder = Decoder(
                model, DraftConfig(block_len=block_len), slots=batch, context_len=context + block_len, page_len=page_len
            )
            floor = _bytes_read(decoder, batch, context) / bandwidth
            ar_seconds = 0.0
            with decoder.rehearsal(batch, context) as step:
                for shape in step_plans(block_len):
                    (seconds,) = median_seconds([partial(step, shape.plan)], repeats)
                    ar_seconds = ar_seconds or seconds
                    cost = StepCost(
                        step=shape.name, rows=shape.plan.query_tokens(block_len), batch=batch, context=context,
                        seconds=seconds, over_ar=seconds / ar_seconds, floor_share=floor / seconds,
                    )  # fmt: skip
                    costs.append(cost)
                    on_step(cost)
            del decoder, step
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return costs


def _bytes_read(decoder: Decoder, batch: int, context: int) -> int:
    """Bytes of weights and prefixes that a step of one query token reads."""
    config, weight = decoder.model.config, decoder.model.embedding.weight
    read = weight_bytes(decoder.model)
    if not config.tied_head or isinstance(decoder.model.head, HeldLinear):
        read -= weight.numel() * weight.element_size()  # only a few entries of the table are looked up
    token = 2 * config.layers * config.kv_heads * config.head_size * weight.element_size()
    return read + batch * context * token


def _fits(model: TidarModel, batch: int, tokens: int) -> bool:
    weight, config = model.embedding.weight, model.config
    if weight.device.type != "cuda":
        return True
    need = 2 * config.layers * config.kv_heads * config.head_size * weight.element_size() * batch * (tokens + 16)
    return need < MEMORY_SHARE * torch.cuda.mem_get_info(weight.device)[0]

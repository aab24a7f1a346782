"""Functions that a decode step runs on a device.

Which implementation runs on this device?

Three sets with the same names: kernels written in Triton for CUDA devices, kernels in C for a CPU, and plain torch for
all others. Only the first set imports Triton, and only the second compiles anything, when it is first requested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from tidar_core.kernels import compiled, on_cpu, reference
from tidar_core.kernels.compiled_layers import CompiledLayers
from tidar_core.kernels.draft_maps import (
    CompiledLowRank,
    CompiledMap,
    HeldLowRank,
    HeldMap,
    PlainLowRank,
    PlainMap,
)

__all__ = ["PLAIN", "Gather", "Kernels", "c_kernels", "kernels_for", "triton_kernels"]


Gather = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer: takes queries, keys, values and the layer's pages; returns values."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of each function; `tidar_core.kernels.reference` defines them."""

    paged_attention: Callable[..., Tensor]
    gathering: Callable[[Tensor, Tensor, Tensor, int], Gather]
    """Takes page table, prefix lengths, pattern and page length; returns attention over pages for all layers of a
    forward."""
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotate_and_store: Callable[..., tuple[Tensor, Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    draft_map: Callable[[Tensor], HeldMap]
    """Holds a weight of the link."""
    low_rank: Callable[[Tensor, Tensor], HeldLowRank]
    """Holds the two maps of an adapter, and adds their product to the results of masks."""
    linked_drafts: Callable[..., Tensor] | None = None
    """All drafts of a block in one call (`on_cpu`); None where they are made one by one."""
    layers: Callable[..., CompiledLayers | None] | None = None
    """All layers in one call, made of the weights of a model; None where there is no such form."""


PLAIN = Kernels(
    reference.paged_attention,
    reference.Gathering,
    reference.add_rms_norm,
    reference.rotate_and_store,
    reference.silu_mul,
    PlainMap,
    PlainLowRank,
)
"""Plain torch, for any device."""


def kernels_for(device: torch.device | str, dtype: torch.dtype) -> Kernels:
    """Kernels for tensors of this dtype: Triton's on a CUDA device if it is installed, C's on a CPU if a compiler is.

    Otherwise plain torch.
    """
    kind = torch.device(device).type
    if kind == "cuda" and find_spec("triton") is not None:
        return triton_kernels()
    if kind == "cpu" and dtype in on_cpu.DTYPES and compiled.library() is not None:
        return c_kernels()
    return PLAIN


def c_kernels() -> Kernels:
    """Kernels in C for CPU tensors; only where `compiled.library` has them."""
    return Kernels(
        on_cpu.paged_attention, on_cpu.Gathering, on_cpu.add_rms_norm, on_cpu.rotate_and_store, on_cpu.silu_mul,
        CompiledMap, CompiledLowRank, on_cpu.linked_drafts, CompiledLayers.of,
    )  # fmt: skip


def triton_kernels() -> Kernels:
    """Triton kernels for CUDA tensors; for CPU tensors too if TRITON_INTERPRET=1 was set before triton's import."""
    from tidar_core.kernels import fused, paged_attention

    attention = paged_attention
    return Kernels(
        attention.paged_attention, attention.gathering, fused.add_rms_norm, fused.rotate_and_store, fused.silu_mul,
        PlainMap, PlainLowRank,
    )  # fmt: skip

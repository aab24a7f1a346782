"""Functions that a decode step runs on a device.

Which implementation runs on this device?

Two sets with the same names: kernels written in Triton for CUDA devices, and plain torch for all others. Only the first
set imports Triton, when it is first requested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from tidar_core.kernels import reference

__all__ = ["PLAIN", "Kernels", "kernels_for", "triton_kernels"]


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


PLAIN = Kernels(
    reference.paged_attention,
    reference.Gathering,
    reference.add_rms_norm,
    reference.rotate_and_store,
    reference.silu_mul,
)
"""Plain torch, for any device."""


def kernels_for(device: torch.device | str) -> Kernels:
    """Triton kernels on a CUDA device if Triton is installed; plain torch otherwise."""
    if torch.device(device).type == "cuda" and find_spec("triton") is not None:
        return triton_kernels()
    return PLAIN


def triton_kernels() -> Kernels:
    """Triton kernels for CUDA tensors; for CPU tensors too if TRITON_INTERPRET=1 was set before triton's import."""
    from tidar_core.kernels import fused, paged_attention

    attention = paged_attention
    return Kernels(
        attention.paged_attention, attention.gathering, fused.add_rms_norm, fused.rotate_and_store, fused.silu_mul
    )

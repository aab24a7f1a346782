"""Which functions does a decode step run on this device?

One set, by the same names: kernels written in Triton on CUDA devices, plain torch elsewhere. Triton is imported
by the first set alone, when it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from tidar_core.kernels import reference

__all__ = ["PLAIN", "Kernels", "kernels_for", "triton_kernels"]


Gather = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys, values and one layer's pages; gives values."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """`tidar_core.kernels.reference` says what each computes."""

    paged_attention: Callable[..., Tensor]
    gathering: Callable[[Tensor, Tensor, Tensor, int], Gather]
    """From page table, prefix lengths, pattern and page length: attention over pages for every layer of a forward."""
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
"""For any device."""


def kernels_for(device: torch.device | str) -> Kernels:
    """Triton's on a CUDA device where Triton is installed; the plain ones otherwise."""
    if torch.device(device).type == "cuda" and find_spec("triton") is not None:
        return triton_kernels()
    return PLAIN


def triton_kernels() -> Kernels:
    """Triton's, for CUDA tensors; for CPU ones where TRITON_INTERPRET=1 stood before the first import of triton."""
    from tidar_core.kernels import fused, paged_attention

    attention = paged_attention
    return Kernels(
        attention.paged_attention, attention.gathering, fused.add_rms_norm, fused.rotate_and_store, fused.silu_mul
    )

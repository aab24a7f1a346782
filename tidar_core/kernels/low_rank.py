"""What a draft adapter adds to a linear map, in the form that its device computes fastest.

How does a decode step add a product of low rank to the results of its masks?

With kernels in C, one call multiplies by both maps and adds to the results in place. Elsewhere torch does it, in five
calls. Maps may change, for new drafts, while steps that were captured keep their addresses.

Shape letters: B sequences, R query tokens, I inputs, O outputs, K rank of the maps.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.kernels.compiled import needed_library
from tidar_core.kernels.held_linear import panels

__all__ = ["CompiledLowRank", "HeldLowRank", "PlainLowRank"]

FUNCTIONS = {torch.float32: "low_rank_fp32", torch.bfloat16: "low_rank_bf16"}


class HeldLowRank(Protocol):
    """A product of two maps that is added to the results of masks."""

    def refresh(self, down_KI: Tensor, up_OK: Tensor) -> None:
        """Take other values of the maps, in the same memory."""
        ...

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor, clean_len: int) -> None:
        """Add the product to the results y of all tokens x from `clean_len` on, in place."""
        ...


class CompiledLowRank:
    """Maps on the CPU, in panels (`products.c`)."""

    def __init__(self, down_KI: Tensor, up_OK: Tensor) -> None:
        self._together = 4 // down_KI.element_size()
        self._down, self._up = (panels(weight.detach(), self._together) for weight in (down_KI, up_OK))
        self._arguments = (self._down.data_ptr(), self._up.data_ptr(), len(up_OK), down_KI.shape[1], len(down_KI))
        self._function = getattr(needed_library(), FUNCTIONS[down_KI.dtype])

    def refresh(self, down_KI: Tensor, up_OK: Tensor) -> None:
        self._down.copy_(panels(down_KI, self._together))
        self._up.copy_(panels(up_OK, self._together))

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor, clean_len: int) -> None:
        assert y_BRO.is_contiguous(), "results are made as one piece"
        x_BRI = x_BRI.contiguous()
        B, R, _ = x_BRI.shape
        self._function(*self._arguments, x_BRI.data_ptr(), y_BRO.data_ptr(), B, R, R - clean_len)


class PlainLowRank:
    """Maps as they are, on any device."""

    def __init__(self, down_KI: Tensor, up_OK: Tensor) -> None:
        self._down, self._up = down_KI.detach().clone(), up_OK.detach().clone()

    def refresh(self, down_KI: Tensor, up_OK: Tensor) -> None:
        self._down.copy_(down_KI)
        self._up.copy_(up_OK)

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor, clean_len: int) -> None:
        y_BRO[:, clean_len:] += F.linear(F.linear(x_BRI[:, clean_len:], self._down), self._up)

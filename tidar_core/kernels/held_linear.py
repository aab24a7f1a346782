"""Linear maps whose weights are in a form of their own.

What do all forms of a linear map share?

A form is made once of a weight [O, I], has no gradient, and states its bytes beforehand. The forms of a CPU with
kernels in C lie in memory in the order in which `products.c` reads them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_core.kernels.compiled import needed_library, words_together
from tidar_core.kernels.weight_memory import WeightMemory

__all__ = ["LANES", "CompiledLinear", "HeldLinear", "panels"]

LANES = 32
"""Output channels of a panel."""


class HeldLinear(nn.Module, ABC):
    """A linear map whose weight is in a form of its own; it has no gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight  [O, I], fp32 or bf16"""
        super().__init__()
        self._bias = None if bias is None else bias.detach()
        out, width = weight.shape
        self.weight_bytes = self.bytes_of(out, width, weight.element_size())
        """Bytes of the weight in its form."""

    @staticmethod
    @abstractmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I] in this form."""


class CompiledLinear(HeldLinear):
    """A linear map that a function in C computes. A token's results do not depend on how many tokens a call has."""

    FUNCTION: ClassVar[str]
    """Name of the function."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight  [O, I], fp32 or bf16, on the CPU"""
        super().__init__(weight, None if bias is None else bias.float().contiguous())
        self._out, self._width = weight.shape
        self._product = getattr(needed_library(), self.FUNCTION)
        self._place(self._laid_out(weight.detach()))

    def move(self, memory: WeightMemory) -> None:
        """Put the weight into a region."""
        self._place(tuple(memory.holding(tensor) for tensor in self._held))

    def _place(self, held: tuple[Tensor, ...]) -> None:
        self._held = held
        bias = None if self._bias is None else self._bias.data_ptr()
        self.addresses = (*(tensor.data_ptr() for tensor in held), bias, self._out, self._width)
        """First arguments of the function."""

    @staticmethod
    def padded(out: int, width: int, together: int) -> tuple[int, int]:
        """Channels and inputs that a form holds, fillers included; `together` inputs share a word."""
        return out + -out % LANES, width + -width % (words_together() * together)

    @abstractmethod
    def _laid_out(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """Tensors that the function reads, in the order of its arguments."""

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I] to [.., O], fp32 or bf16."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._out))
        tokens = x.numel() // self._width
        self._product(*self.addresses, x.data_ptr(), tokens, y.data_ptr(), x.dtype == torch.bfloat16, None)
        return y


def panels(weight_OI: Tensor, together: int) -> Tensor:
    """Words of panels [P, I / together, LANES, together] of a weight, filled up with zeros."""
    out, width = weight_OI.shape
    rows, columns = CompiledLinear.padded(out, width, together)
    filled = F.pad(weight_OI, (0, columns - width, 0, rows - out))
    return filled.view(-1, LANES, columns // together, together).transpose(1, 2).contiguous()

"""Maps of adapter and link, in the form that their device multiplies by fastest.

How does a decode step multiply by weights that new drafts may replace?

With kernels in C, weights lie in panels, and one call adds both maps of an adapter to the results of the masks.
Elsewhere torch multiplies. Other values go into the same memory, as steps that were captured keep its addresses.

Shape letters: B sequences, R query tokens, I inputs, O outputs, K rank of the maps.
"""

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.kernels.compiled import needed_library
from tidar_core.kernels.held_linear import panels

__all__ = ["CompiledLowRank", "CompiledMap", "HeldLowRank", "HeldMap", "PlainLowRank", "PlainMap"]


class HeldMap(Protocol):
    """A linear map whose results are added to others."""

    def refresh(self, weight_OI: Tensor, /) -> None:
        """Take other values of the weight, in the same memory."""
        ...

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor) -> None:
        """Add the results of x to y, in place."""
        ...


class HeldLowRank(Protocol):
    """A product of two maps that is added to the results of masks."""

    def refresh(self, down_KI: Tensor, up_OK: Tensor, /) -> None:
        """Take other values of the maps, in the same memory."""
        ...

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor, clean_len: int) -> None:
        """Add the product to the results y of all tokens x from `clean_len` on, in place."""
        ...


class _Panels:
    """Weights on the CPU, in panels, and a function that reads them (`products.c`)."""

    FUNCTION: ClassVar[str]

    def __init__(self, *weights: Tensor) -> None:
        self._half = weights[0].dtype == torch.bfloat16
        self._together = 2 if self._half else 1
        self._held = [panels(weight.detach(), self._together) for weight in weights]
        self._addresses = [held.data_ptr() for held in self._held]
        self._function = getattr(needed_library(), self.FUNCTION)

    def refresh(self, *weights: Tensor) -> None:
        for held, weight in zip(self._held, weights, strict=True):
            held.copy_(panels(weight.detach(), self._together))


class CompiledMap(_Panels):
    """A weight on the CPU, in panels."""

    FUNCTION = "add_product"

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__(weight_OI)
        self._width = weight_OI.shape[1]
        (self.address,) = self._addresses

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor) -> None:
        x_BRI, (B, R, out) = x_BRI.contiguous(), y_BRO.shape
        apart = 1
        if not y_BRO.is_contiguous():
            apart, rest = divmod(y_BRO.stride(0), out)
            assert (R, y_BRO.stride(2), rest) == (1, 1, 0), "results are one piece, or one row of each sequence's piece"
        self._function(self.address, out, self._width, x_BRI.data_ptr(), B * R, y_BRO.data_ptr(), apart, self._half)


class CompiledLowRank(_Panels):
    """Two maps on the CPU, in panels."""

    FUNCTION = "low_rank"

    def __init__(self, down_KI: Tensor, up_OK: Tensor) -> None:
        super().__init__(down_KI, up_OK)
        self._sizes = len(up_OK), down_KI.shape[1], len(down_KI)
        self.addresses = (*self._addresses, len(down_KI))
        """Addresses of both maps, and their rank."""

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor, clean_len: int) -> None:
        assert y_BRO.is_contiguous(), "results are made as one piece"
        x_BRI = x_BRI.contiguous()
        B, R, _ = x_BRI.shape
        self._function(
            *self._addresses, *self._sizes, x_BRI.data_ptr(), y_BRO.data_ptr(), B, R, R - clean_len, self._half
        )


class _Plain:
    """Copies of the weights, on any device. They are counted where the memory of a decoder is bounded."""

    def __init__(self, *weights: Tensor) -> None:
        self._held = [weight.detach().clone() for weight in weights]

    def refresh(self, *weights: Tensor) -> None:
        for held, weight in zip(self._held, weights, strict=True):
            held.copy_(weight)


class PlainMap(_Plain):
    """A weight as it is, on any device."""

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor) -> None:
        y_BRO += F.linear(x_BRI, self._held[0])


class PlainLowRank(_Plain):
    """Two maps as they are, on any device."""

    def add_to(self, y_BRO: Tensor, x_BRI: Tensor, clean_len: int) -> None:
        down_KI, up_OK = self._held
        y_BRO[:, clean_len:] += F.linear(F.linear(x_BRI[:, clean_len:], down_KI), up_OK)

"""Linear maps with weights of 8 or 4 bits, for decoding on a CPU.

Which numbers does a quantised map compute?

Weights are rounded to the nearest step when a model is loaded. A token's results do not depend on how many tokens a
product has, bit for bit. So all modes of a model share one rounded model. Attention is computed as for other models.

int8  Each output channel of a weight has a scale, and so has each token, from its largest absolute value. Products and
      sums are integers, which have no rounding and no order.
int4  Each run of 32 inputs of an output channel has a scale and a least value, like a block Q4_1 of GGUF. Activations
      are rounded to bf16. Sums are floats, in the same order for every number of tokens. The head has int8 weights.

Shape letters: T tokens, I features in, O features out, N groups of a channel.
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tidar_core.errors import ConfigError

__all__ = ["WEIGHTS", "HeldLinear", "Int4Linear", "Int8Linear", "require_exact_sums"]

WEIGHTS = ("int8", "int4")
STEPS = 127
"""Steps of an int8 value on each side of 0."""
TINY = 1e-30
"""Least scale, so that zeros are divided by no zero."""


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


class Int8Linear(HeldLinear):
    """Weights of 8 bits with a scale for each output channel; activations of 8 bits with a scale for each token."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight  [O, I], fp32 or bf16, on the CPU"""
        super().__init__(weight, None if bias is None else bias.float())
        operations: Any = torch.ops.onednn
        weight_OI = weight.detach().float()
        largest_O = weight_OI.abs().amax(1).clamp_min_(TINY)
        quantised_OI = (weight_OI * (STEPS / largest_O)[:, None]).round_().to(torch.int8)
        self._packed = operations.qlinear_prepack(quantised_OI, None)
        self._scale_O, self._zero_O = largest_O / STEPS**2, torch.zeros(len(weight), dtype=torch.long)
        self._steps = torch.tensor(float(STEPS))
        self._product = operations.qlinear_pointwise.default

    @staticmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I] and its scales."""
        return out * (width + 4)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I] to [.., O]."""
        x_TI = x.reshape(-1, x.shape[-1])
        largest_T1 = x_TI.abs().amax(-1, keepdim=True).float().clamp_min(TINY)
        quantised_TI = (x_TI * (self._steps / largest_T1)).round_().to(torch.int8)
        y_TO: Tensor = self._product(
            quantised_TI, 1.0, 0, self._packed, self._scale_O, self._zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y_TO.mul_(largest_T1)
        if self._bias is not None:
            y_TO.add_(self._bias)
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)


class Int4Linear(HeldLinear):
    """Weights of 4 bits with a scale and a least value for each group of inputs; activations in bf16."""

    GROUP = 32
    """Inputs of a group."""
    OUT = 16
    """Divisor of the output channels that the product takes."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight  [O, I], fp32 or bf16, on the CPU"""
        super().__init__(weight, None if bias is None else bias.float())
        operations: Any = torch.ops.aten
        weight_ONG = weight.detach().float().unflatten(1, (-1, self.GROUP))
        least_ON1, most_ON1 = weight_ONG.amin(-1, True), weight_ONG.amax(-1, True)
        step_ON1 = ((most_ON1 - least_ON1) / 15).clamp_min_(TINY)
        quantised_ONG = ((weight_ONG - least_ON1) / step_ON1).round_().clamp_(0, 15).int()
        self._packed = operations._convert_weight_to_int4pack_for_cpu(quantised_ONG.flatten(1), 1)
        middle_ON1 = least_ON1 + 8 * step_ON1  # the product counts steps from the ninth value
        self._scales_NO2 = torch.cat([step_ON1, middle_ON1], -1).bfloat16().transpose(0, 1).contiguous()
        self._product = operations._weight_int4pack_mm_for_cpu.default

    @staticmethod
    def holds(out: int, width: int) -> bool:
        """Whether a weight [O, I] can be held."""
        return width % Int4Linear.GROUP == 0 and out % Int4Linear.OUT == 0

    @staticmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I], its scales and its least values."""
        return out * (width // 2 + 4 * (width // Int4Linear.GROUP))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I] to [.., O]."""
        x_TI = x.reshape(-1, x.shape[-1]).bfloat16()
        y_TO: Tensor = self._product(x_TI, self._packed, self.GROUP, self._scales_NO2)
        if self._bias is not None:
            y_TO = y_TO + self._bias
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)


@cache
def require_exact_sums() -> None:
    """Raise ConfigError if this processor's int8 product saturates, as it may without VNNI instructions."""
    largest = torch.full((16, 64), float(STEPS))
    expected = float(64 * STEPS**2)
    if not torch.allclose(Int8Linear(largest, None)(largest), torch.full((16, 16), expected), rtol=1e-6, atol=0):
        raise ConfigError(
            "weights is int8 or int4; int8 products of this processor are not exact; leave weights out, or use a "
            "processor with VNNI"
        )

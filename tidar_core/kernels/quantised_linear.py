"""Linear maps with weights of 8 or 4 bits, for decoding on a CPU.

Which numbers does a quantised map compute?

Weights are rounded to the nearest step when a model is loaded. A token's results do not depend on how many tokens a
product has, bit for bit. So all modes of a model share one rounded model. Attention is computed as for other models.

int8  Each output channel of a weight has a scale, and so has each run of 64 inputs of a token, from its largest
      absolute value. Products within a run are integers. Their sums over runs are in fp32, in one order.
int4  Each group of 32 inputs of an output channel has a step and a least value in bf16, like a block Q4_1 of GGUF.
      Each group of 32 inputs of a token has a scale. Products and sums are as with int8. The head has int8 weights.

Both need the kernels in C (`products.c`, which states how words are laid out).

Shape letters: O features out, I features in, P panels of 32 features out, N groups of 32 features in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.kernels.held_linear import LANES, CompiledLinear, panels

__all__ = ["WEIGHTS", "Int4Linear", "Int8Linear"]

WEIGHTS = ("int8", "int4")
STEPS = 127
"""Steps of an int8 value on each side of 0."""
TINY = 1e-30
"""Least scale, so that zeros are divided by no zero."""


class Int8Linear(CompiledLinear):
    """Weights of 8 bits with a scale for each output channel.

    Activations have 8 bits and a scale for each 64 inputs.
    """

    FUNCTION = "product_int8"

    @staticmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I] and its scales."""
        rows, columns = CompiledLinear.padded(out, width, 4)
        return rows * (columns + 4)

    def _laid_out(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        weight_OI = weight_OI.float()
        largest_O = weight_OI.abs().amax(1).clamp_min_(TINY)
        quantised_OI = (weight_OI * (STEPS / largest_O)[:, None]).round_().add_(128).to(torch.uint8)
        spare = -len(weight_OI) % LANES
        return panels(quantised_OI, 4), F.pad(largest_O / STEPS, (0, spare))


class Int4Linear(CompiledLinear):
    """Weights of 4 bits with a step and a least value for each group of inputs.

    Activations have 8 bits and a scale for each group.
    """

    FUNCTION = "product_int4"
    GROUP = 32
    """Inputs of a group."""

    @staticmethod
    def holds(out: int, width: int) -> bool:
        """Whether a weight [O, I] can be held."""
        return width % Int4Linear.GROUP == 0

    @staticmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I], its steps and its least values."""
        return (out + -out % LANES) * (width // 2 + 4 * (width // Int4Linear.GROUP))

    def _laid_out(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        weight_ONG = weight_OI.float().unflatten(1, (-1, self.GROUP))
        least_ON = weight_ONG.amin(-1).bfloat16()
        step_ON = ((weight_ONG.amax(-1) - least_ON.float()) / 15).clamp_min_(TINY).bfloat16()
        levels_ONG = ((weight_ONG - least_ON.float()[..., None]) / step_ON.float()[..., None]).round_().clamp_(0, 15)
        places = torch.arange(8, dtype=torch.int64) * 4
        words_ON4 = (levels_ONG.long().unflatten(-1, (4, 8)) << places).sum(-1)
        of_group_ON1 = (step_ON.view(torch.int16).long() << 16 | least_ON.view(torch.int16).long() & 0xFFFF)[..., None]
        words_ON5 = torch.cat([of_group_ON1, words_ON4], -1).to(torch.int32)
        spare = -len(weight_OI) % LANES
        return (F.pad(words_ON5, (0, 0, 0, 0, 0, spare)).unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).contiguous(),)

"""Linear maps of a model that only decodes, in the form that its device multiplies by fastest.

How does a CPU hold the weights of a decoder?

On an x86 processor, oneDNN's product takes weights that were laid out for it once. Otherwise each product lays them out
anew, which costs more than a decode step's few query tokens do. The results are the same: bit for bit in bf16, up to
the order of sums in fp32. A GPU holds weights as they are.

Shape letters: R query tokens, I features in, O features out.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn

from tidar_core.transformer.model import TidarModel

__all__ = ["PackedLinear", "packs", "prepare_for_decoding", "weight_bytes"]

PACKED_ENTRIES = {torch.float32: 786_432, torch.bfloat16: 0}
"""Fewest entries of a weight that is packed, by dtype. In the packed form, one query token costs a tenth more in fp32,
and eight cost two thirds or less. Where weights are smaller, eight gain nothing. Measured with AMX and without. A fixed
bound keeps fp32 results the same from start to start, which a choice by timing would not."""


class PackedLinear(nn.Module):
    """A linear map whose only copy of the weight is laid out for oneDNN. It has no gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight  [O, I], fp32 or bf16, on the CPU"""
        super().__init__()
        operations: Any = torch.ops.mkldnn
        self._packed, self._bias = operations._reorder_linear_weight(weight.detach()), bias
        self._product = operations._linear_pointwise.default
        self.weight_bytes = weight.numel() * weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I] to [.., O]."""
        product: Tensor = self._product(x, self._packed, self._bias, "none", [], "")
        return product


def packs(entries: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a decoder on a device of the kind `device` holds a weight of so many entries packed."""
    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype not in PACKED_ENTRIES or entries < PACKED_ENTRIES[dtype]:
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def prepare_for_decoding(model: TidarModel) -> None:
    """Lay the weights of a model out for decoding on its device, in place. It can neither be trained nor saved then.

    Each weight exists once, and each replaced parameter is freed. Only a tied head becomes a second copy of the
    embedding table, whose entries must still be looked up.
    """
    model.requires_grad_(False)
    for layer in model.layers:
        for owner, name in _places(layer):
            setattr(owner, name, _held(getattr(owner, name)))
    weight: Tensor = model.head.weight
    if _packs(weight):
        model.head = PackedLinear(weight, model.head.mask_bias(weight))  # type: ignore[assignment]


def weight_bytes(model: TidarModel) -> int:
    """Bytes of all weights that a model holds, in whatever form."""
    held = sum(module.weight_bytes for module in model.modules() if isinstance(module, PackedLinear))
    return held + sum(p.numel() * p.element_size() for p in model.parameters())


def _places(layer: Any) -> list[tuple[nn.Module, str]]:
    """Owners and names of the linear maps of a layer."""
    return [(layer.attention, "qkv"), (layer.attention, "output"), (layer.mlp, "gate_up"), (layer.mlp, "down")]


def _held(linear: Any) -> nn.Module:
    return PackedLinear(linear.weight, linear.bias) if _packs(linear.weight) else linear


def _packs(weight: Tensor) -> bool:
    return packs(weight.numel(), weight.dtype, weight.device.type)

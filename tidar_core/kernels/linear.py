"""Linear maps of a model that only decodes, in the form that its device multiplies by fastest.

How does a CPU hold the weights of a decoder?

With kernels in C (`compiled`), weights lie in the order in which those read them. A token's results have the same bits
whatever the number of tokens. Without them, and on an x86 processor, oneDNN's product takes weights that were laid out
for it once. Otherwise each product lays them out anew, which costs more than a decode step's few query tokens do. The
results are the same: bit for bit in bf16, up to the order of sums in fp32. A GPU holds weights as they are.
`quantised_linear` holds weights in fewer bits.
"""

import platform
from typing import Any

import torch
from torch import Tensor

from tidar_core.errors import ConfigError
from tidar_core.kernels.compiled import library
from tidar_core.kernels.held_linear import CompiledLinear, HeldLinear, panels
from tidar_core.kernels.quantised_linear import Int4Linear, Int8Linear
from tidar_core.kernels.weight_memory import WeightMemory
from tidar_core.transformer.model import TidarModel

__all__ = ["Bf16Linear", "Fp32Linear", "PackedLinear", "held_bytes", "prepare_for_decoding", "weight_bytes"]

PACKED_ENTRIES = {torch.float32: 786_432, torch.bfloat16: 0}
"""Fewest entries of a weight that is packed, by dtype. In fp32 the packed form costs a tenth more or worse for one
query token, and about two thirds for eight. In smaller weights eight query tokens gain nothing. Measured with AMX and
without. A fixed rule keeps fp32 results the same from start to start, bit for bit. With and without drafts, those of a
checkpoint are the same too."""


class Fp32Linear(CompiledLinear):
    """A linear map with weights and activations in fp32."""

    FUNCTION = "product_fp32"

    @staticmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I]."""
        rows, columns = CompiledLinear.padded(out, width, 4 // itemsize)
        return rows * columns * itemsize

    def _laid_out(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        return (panels(weight_OI, 4 // weight_OI.element_size()),)


class Bf16Linear(Fp32Linear):
    """A linear map with weights and activations in bf16; sums are in fp32."""

    FUNCTION = "product_bf16"


COMPILED = {torch.float32: Fp32Linear, torch.bfloat16: Bf16Linear}


class PackedLinear(HeldLinear):
    """A linear map whose only copy of the weight is laid out for oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight  [O, I], fp32 or bf16, on the CPU"""
        super().__init__(weight, bias)
        operations: Any = torch.ops.mkldnn
        self._packed = operations._reorder_linear_weight(weight.detach())
        self._product = operations._linear_pointwise.default

    @staticmethod
    def bytes_of(out: int, width: int, itemsize: int) -> int:
        """Bytes of a weight [O, I]."""
        return out * width * itemsize

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I] to [.., O]."""
        product: Tensor = self._product(x, self._packed, self._bias, "none", [], "")
        return product


@torch.no_grad()
def prepare_for_decoding(model: TidarModel, weights: str | None = None) -> None:
    """Lay the weights of a model out for decoding on its device, in place. It can neither be trained nor saved then.

    Each weight exists once, and each replaced parameter is freed. Only a tied head becomes a second copy of the
    embedding table, whose entries must still be looked up.

    weights  int8 or int4 (see `quantised_linear`); by default weights keep their values. Raises ConfigError where the
             device or a width does not allow it.
    """
    device = model.embedding.weight.device.type
    if weights is not None:
        if device != "cpu":
            raise ConfigError(f"weights is {weights} on {device}; {weights} needs a CPU; leave weights out")
        if library() is None:
            raise ConfigError(
                f"weights is {weights}; {weights} needs Linux and a C compiler, and none works here; install gcc or "
                "leave weights out"
            )
        if weights == "int4":
            _require_groups(model)
    model.requires_grad_(False)
    model.weights = weights
    forms = _forms(model, device, weights)
    moved = (x for x in forms if issubclass(x[2], CompiledLinear))
    size = sum(_bytes_of(form, getattr(owner, name).weight) for owner, name, form in moved)
    memory = WeightMemory(size, 2 * len(forms))
    for owner, name, form in forms:
        linear: Any = getattr(owner, name)
        bias = linear.mask_bias(linear.weight) if owner is model else linear.bias
        held = form(linear.weight, bias)
        setattr(owner, name, held)
        del linear  # the parameter is freed before the weight is copied
        if isinstance(held, CompiledLinear):
            held.move(memory)


def weight_bytes(model: TidarModel) -> int:
    """Bytes of all weights that a model holds, in whatever form."""
    held = sum(module.weight_bytes for module in model.modules() if isinstance(module, HeldLinear))
    return held + sum(p.numel() * p.element_size() for p in model.parameters())


def held_bytes(model: TidarModel, device: str, weights: str | None) -> int:
    """`weight_bytes` of a model after `prepare_for_decoding`; the model itself may lie on no device.

    device  kind of the device that decodes, such as cpu
    """
    total = weight_bytes(model)
    for owner, name, form in _forms(model, device, weights):
        weight = getattr(owner, name).weight
        total += _bytes_of(form, weight)
        if weight is not model.embedding.weight:  # the table of a tied head stays
            total -= weight.numel() * weight.element_size()
    return total


def _bytes_of(form: type[HeldLinear], weight: Tensor) -> int:
    out, width = weight.shape
    return form.bytes_of(out, width, weight.element_size())


def _forms(model: TidarModel, device: str, weights: str | None) -> list[tuple[Any, str, type[HeldLinear]]]:
    """Owner, name and form of the linear maps that a device of this kind holds in a form of its own."""
    places = [(owner, name, weights) for owner, name in _places(model)]
    found = []
    for owner, name, bits in [*places, (model, "head", weights and "int8")]:
        form = _form(getattr(owner, name).weight, device, bits)
        if form is not None:
            found.append((owner, name, form))
    return found


def _places(model: TidarModel) -> list[tuple[Any, str]]:
    """Owners and names of the linear maps of all layers."""
    found: list[tuple[Any, str]] = []
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        found += [(attention, "qkv"), (attention, "output"), (mlp, "gate_up"), (mlp, "down")]
    return found


def _form(weight: Tensor, device: str, weights: str | None) -> type[HeldLinear] | None:
    """Form in which a device of this kind holds a weight; None: as it is."""
    if weights is not None:
        return Int8Linear if weights == "int8" else Int4Linear
    if device == "cpu" and weight.dtype in COMPILED and library() is not None:
        return COMPILED[weight.dtype]
    return PackedLinear if _packs(weight.numel(), weight.dtype, device) else None


def _packs(entries: int, dtype: torch.dtype, device: str) -> bool:
    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype not in PACKED_ENTRIES or entries < PACKED_ENTRIES[dtype]:
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _require_groups(model: TidarModel) -> None:
    """Raise ConfigError if a linear map has a width that int4 cannot hold."""
    for owner, name in _places(model):
        out, width = getattr(owner, name).weight.shape
        if not Int4Linear.holds(out, width):
            raise ConfigError(
                f"weights is int4, and the model has a map from {width} to {out} features; int4 needs a multiple of "
                f"{Int4Linear.GROUP} features in; give int8"
            )

"""All layers of a forward on a CPU, in one call of C.

What does a decode step run between embedding and head?

`layers.c` calls the functions behind `on_cpu`, `held_linear` and `draft_maps` in the order of `decode_forward`, with
the same results. A step of 30 layers has one call from Python instead of 300.

Shape letters: E embedding.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tidar_core.config import ModelConfig
from tidar_core.kernels.compiled import needed_library
from tidar_core.kernels.draft_maps import CompiledLowRank
from tidar_core.kernels.held_linear import CompiledLinear
from tidar_core.kernels.on_cpu import HALF

__all__ = ["CompiledLayers"]

P, N, B, X = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
FORMS = ("product_fp32", "product_bf16", "product_int8", "product_int4")
"""Names of the functions by the number of their form."""


class CompiledLayers:
    """The layers of a model and its last norm."""

    @classmethod
    def of(
        cls, layers: Sequence[Any], norm: Tensor, config: ModelConfig, dtype: torch.dtype
    ) -> "CompiledLayers | None":
        """The layers; None if a linear map has no form in C, as in a model that is not prepared for decoding.

        layers  weights of each layer (`decode_forward`)
        norm    weight of the last norm
        dtype   dtype of embeddings and cache
        """
        linears = [place.linear for layer in layers for place in _places(layer)]
        compiled = all(isinstance(linear, CompiledLinear) for linear in linears)
        return cls(layers, norm, config, dtype) if compiled else None

    def __init__(self, layers: Sequence[Any], norm: Tensor, config: ModelConfig, dtype: torch.dtype) -> None:
        self._kept = layers, norm  # structures hold addresses alone
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._model = _Model(
            self._layers, len(layers), config.hidden_size, config.heads, config.kv_heads, config.head_size,
            norm.data_ptr(), config.norm_eps, dtype == HALF, norm.dtype == HALF,
        )  # fmt: skip
        self._run = needed_library().layers

    def __call__(
        self, x: Tensor, residual: Tensor | None, parts: Sequence[Any], pages: Tensor, first: int, after: int
    ) -> tuple[Tensor, Tensor]:
        """Take tokens through the layers first..after - 1; both tensors are overwritten.

        Returns the new `x` and `residual`. After the last layer, x holds the hidden states after the last norm.

        x         embeddings [.., E] of the tokens of all parts, part after part; later what the layer before added
        residual  sum of what was added before; None before the first layer
        parts     parts of the forward (`decode_forward`); their keys and values of clean tokens are stored
        pages     the cache, [layers, ..]
        """
        x = x.contiguous()
        residual, hidden = torch.empty_like(x) if residual is None else residual, torch.empty_like(x)
        held = (_Part * len(parts))(*(_part(part) for part in parts))
        apart = pages.stride(0) * pages.element_size()
        self._run(
            ctypes.byref(self._model), first, after, x.data_ptr(), residual.data_ptr(), pages.data_ptr(), apart,
            ctypes.byref(held), len(held), hidden.data_ptr(),
        )  # fmt: skip
        return (hidden if after == len(self._layers) else x), residual


def _part(part: Any) -> "_Part":
    page_len, table, table_stride, table_len, prefix_len, visible, sequences, per_sequence = part.gather.shared
    return _Part(
        part.cos.data_ptr(), part.sin.data_ptr(), part.page_slot_BC.data_ptr(), table, prefix_len, visible,
        sequences, per_sequence, part.clean_len, page_len, table_stride, table_len,
    )  # fmt: skip


def _layer(layer: Any) -> "_Layer":
    norm = None if layer.norm is None else layer.norm.data_ptr()
    return _Layer(
        layer.attention_norm.data_ptr(), norm, layer.mlp_norm.data_ptr(),
        *(_map(place) for place in _places(layer)),
    )  # fmt: skip


def _places(layer: Any) -> tuple[Any, ...]:
    """Maps of a layer, in the order of `_Layer`."""
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _map(each: Any) -> "_Map":
    linear: CompiledLinear = each.linear
    weight, *scales, bias, out, width = linear.addresses
    (scale,) = scales or (None,)
    adapter = each.added.addresses if isinstance(each.added, CompiledLowRank) else (None, None, 0)
    return _Map(FORMS.index(linear.FUNCTION), weight, scale, bias, out, width, *adapter)


class _Map(ctypes.Structure):
    _fields_ = (
        ("form", N), ("weight", P), ("scale", P), ("bias", P), ("out", N), ("width", N),
        ("down", P), ("up", P), ("rank", N),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", P), ("head_norm", P), ("mlp_norm", P),
        ("qkv", _Map), ("output", _Map), ("gate_up", _Map), ("down", _Map),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)), ("count", N), ("width", N), ("heads", N), ("kv_heads", N), ("size", N),
        ("norm", P), ("eps", X), ("half", B), ("half_norm", B),
    )  # fmt: skip


class _Part(ctypes.Structure):
    _fields_ = (
        ("cosine", P),
        ("sine", P),
        ("slot", P),
        ("table", P),
        ("prefix_len", P),
        ("visible", P),
        *((name, N) for name in ("sequences", "per_sequence", "clean", "page_len", "table_stride", "table_len")),
    )

"""Adapter that drafts for a checkpoint whose own weights stay as they are.

Mask tokens are query tokens of their own kind. Their embeddings are vectors of the adapter, and maps of low rank are
added to the linear maps of each layer. Clean tokens pass by both, so that the autoregressive distribution is the
checkpoint's, bit for bit (gated LoRA: arXiv 2507.11851, section 3). The adapter is never merged into the weights.

Shape letters: B sequences, M mask tokens, K block length, E embedding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_core.config import AdapterConfig, ModelConfig
from tidar_core.errors import WeightsError

__all__ = [
    "ADAPTER_SCALE",
    "DRAFT_WEIGHTS",
    "DraftAdapter",
    "LayerAdapter",
    "LowRank",
    "exchange_drafts",
    "freeze",
    "require_same_shapes",
]

DRAFT_WEIGHTS = ("adapter.", "link.")
"""Beginnings of the names of a model's weights that draft; all others are the checkpoint's."""

ADAPTER_SCALE = 2.0
"""Factor on each product of low rank; its `up` is zero at the start, so the factor acts as a learning rate."""


class Shaped(Protocol):
    """A tensor, or the description of a stored tensor."""

    @property
    def shape(self) -> Sequence[int]:
        """Entries along each axis."""
        ...


class DraftAdapter(nn.Module):
    """Embeddings of mask tokens, and low-rank maps for each layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.adapter is not None, "the config names no adapter"
        self.shifted = config.adapter.shifted
        self.mask = nn.Parameter(torch.empty(config.hidden_size))
        self.offset = nn.Parameter(torch.empty(config.adapter.block_len, config.hidden_size))
        self.layers = nn.ModuleList(LayerAdapter(config, config.adapter) for _ in range(config.layers))

    def turned(self, position_BL: Tensor, clean_len: int) -> Tensor:
        """Rotary positions [B, L] of tokens at these positions, of which the first `clean_len` are clean."""
        if not self.shifted:
            return position_BL
        return torch.cat([position_BL[:, :clean_len], (position_BL[:, clean_len:] - 1).clamp(min=0)], 1)

    def forward(self, offset_BM: Tensor) -> Tensor:
        """Embeddings [B, M, E] of mask tokens with these offsets in their blocks.

        Offsets beyond the trained block length take the last vector.
        """
        return self.mask + F.embedding(offset_BM.clamp(max=len(self.offset) - 1), self.offset)

    @torch.no_grad()
    def start(self, table: Tensor, generator: torch.Generator) -> None:
        """Set weights with which a mask token passes the layers as a token of the mean embedding does.

        table  embedding table of the checkpoint [V, E]
        """
        self.mask.copy_(table.float().mean(0))
        self.offset.zero_()
        for name, weight in self.named_parameters():
            if name.endswith(".down"):
                bound = 1 / math.sqrt(weight.shape[1])
                weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
            elif name.endswith(".up"):
                weight.zero_()


class LayerAdapter(nn.Module):
    """Low-rank maps of one layer, at the places that the config names; `None` at the others."""

    def __init__(self, config: ModelConfig, adapter: AdapterConfig) -> None:
        super().__init__()
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.heads * config.head_size
        kv = 2 * config.kv_heads * config.head_size
        widths = {"qkv": (hidden, heads + kv), "output": (heads, hidden), "gate_up": (hidden, 2 * inner),
                  "down": (inner, hidden)}  # fmt: skip
        maps = {place: LowRank(*widths[place], adapter.rank) for place in widths if place in adapter.places}
        self.qkv, self.output = maps.get("qkv"), maps.get("output")
        self.gate_up, self.down = maps.get("gate_up"), maps.get("down")


class LowRank(nn.Module):
    """Product of two thin matrices."""

    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width_in))
        self.up = nn.Parameter(torch.empty(width_out, rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [.., width_out] plus the product with x [.., width_in]."""
        thin = F.linear(x, self.down) * ADAPTER_SCALE
        return torch.addmm(y.flatten(0, -2), thin.flatten(0, -2), self.up.T).view_as(y)


def exchange_drafts(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of adapter and link into those of `model`. Raises WeightsError, and changes nothing, if names or
    shapes differ."""
    held = {name: weight for name, weight in model.named_parameters() if name.startswith(DRAFT_WEIGHTS)}
    require_same_shapes("drafts", weights, held)
    for name, weight in held.items():
        weight.copy_(weights[name])


def require_same_shapes(where: object, given: Mapping[str, Shaped], wanted: Mapping[str, Shaped]) -> None:
    """Raise WeightsError if drafts have other names or shapes than a model's adapter and link.

    where   place of the drafts, for the error
    given   weights that were found, by name
    wanted  weights of the model, by name
    """
    found, needed = ({name: tuple(x.shape) for name, x in weights.items()} for weights in (given, wanted))
    differing = sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
    if differing:
        name = differing[0]
        raise WeightsError(
            f"{where} has {name} of shape {found.get(name)}; its checkpoint needs {needed.get(name)}; use the drafts "
            "that were trained for this checkpoint"
        )


def freeze(model: nn.Module) -> None:
    """Let a model learn its adapter and its link alone; all other weights get no gradient."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(DRAFT_WEIGHTS))

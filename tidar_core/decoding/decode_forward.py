"""Computes the hidden states of the query tokens of one decoder forward.

A forward may have several parts: the sequences of a decode step, and chunks of prompts. They share each product, so
that weights are read once for all of them. Chunks may pass the layers in several forwards, some layers in each.

It is the transformer of `model`, in the order that suits a decode step. Each residual sum is computed together with the
norm that follows it. Keys and values go straight to their pages, and one gathering serves all layers. The functions it
runs come from `kernels`, so that a CPU and a GPU differ in nothing else. Where all of them are in C, one call runs all
layers, with the same results.

A draft adapter acts on the query tokens behind the clean ones. So what a token is, and not its id, decides: a text may
hold any id.

Shape letters: B sequences, C clean tokens, R query tokens, K block length, N pages of a sequence, H query heads,
D head width, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.config import ADAPTER_PLACES, ModelConfig
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.kernels import Gather, Kernels, kernels_for
from tidar_core.kernels.draft_maps import HeldLowRank
from tidar_core.transformer.draft_adapter import ADAPTER_SCALE, LowRank
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["DecodeForward", "Passage", "QueryTokens"]


@dataclass(frozen=True, slots=True)
class QueryTokens:
    """Query tokens of sequences that have the same pattern."""

    page_table_BN: Tensor
    """Pages of each sequence, with room for the prefix and the clean tokens."""
    prefix_len_B: Tensor
    """Clean tokens read before."""
    clean_BC: Tensor
    pattern: QueryPattern
    used_pages: int
    """Leading pages that hold all of every prefix."""


class DecodeForward:
    """A model ready to read tokens: the rotation of every position, and the weights in the order of use.

    So a decode step looks up no module. Of the weights, only an adapter's may change, followed by `refresh_adapter`.
    """

    def __init__(
        self, model: TidarModel, cache: KVCache, *, positions: int, block_len: int, kernels: Kernels | None = None
    ) -> None:
        """positions  number of positions that a token may have, from 0
        block_len  most mask tokens of a block
        kernels    the kernels of the cache's device by default
        """
        self.model, self.cache = model, cache
        position_1L = torch.arange(positions, device=cache.pages.device)[None]
        self._cos_LD, self._sin_LD = (half[0, :, 0] for half in model.rotation(position_1L, cache.pages.dtype))
        self.kernels = kernels or kernels_for(cache.pages.device, cache.pages.dtype)
        self._masks_KE = _mask_embeddings(model, block_len)
        adapters = model.adapter.layers if model.adapter else [None] * model.config.layers
        self._layers = [_LayerWeights.of(*both, model.config, self.kernels) for both in zip(model.layers, adapters)]
        made, norm = self.kernels.layers, model.norm.weight
        self.one_call = None if made is None else made(self._layers, norm, model.config, cache.pages.dtype)
        """All layers in one call; None where not all of their functions are in C."""

    @torch.no_grad()
    def refresh_adapter(self) -> None:
        """Compute anew, in the same memory, all that was computed of the adapter's weights."""
        if self.model.adapter is None:
            return
        self._masks_KE.copy_(_mask_embeddings(self.model, len(self._masks_KE)))
        for layer, adapter in zip(self._layers, self.model.adapter.layers):
            for place in ADAPTER_PLACES:
                getattr(layer, place).refresh(getattr(adapter, place))

    def __call__(self, *parts: QueryTokens) -> list[Tensor]:
        """Compute hidden states [B, R, E] of the query tokens of each part: the clean tokens, then the masks.

        Every query token sees the whole prefix of its sequence, since no horizon lies before the prefix's end. Among
        the query tokens of a part, visibility is the same for all sequences. Afterwards the cache holds keys and
        values of the clean tokens; keys and values of masks are not kept. No sequence may be in two parts.
        """
        return self.finish(self.enter(*parts))

    def enter(self, *parts: QueryTokens) -> "Passage":
        """Query tokens before the first layer."""
        placed = _placed([self._prepared(tokens) for tokens in parts])
        return Passage(placed, _joined([part.embedded for part in placed]))

    def finish(self, passage: "Passage") -> list[Tensor]:
        """Take query tokens through all layers that they have not passed; returns the hidden states of each part."""
        self._advance(passage, self.model.config.layers)
        return passage.hidden

    def step(self, tokens: QueryTokens, beside: "Passage | None" = None, layers: int = 0) -> Tensor:
        """Hidden states [B, R, E] of the query tokens of a decode step.

        beside  chunks of prompts, which pass their next `layers` layers, or all that are left, in the same products
        """
        own = self.enter(tokens)
        if beside is not None and layers:
            self._advance(own, beside.passed)
            both = own.joined(beside)
            self._advance(both, min(beside.passed + layers, self.model.config.layers))
            both.divide(own, beside)
        return self.finish(own)[0]

    def _advance(self, passage: "Passage", after: int) -> None:
        """Take query tokens through the layers before number `after`; after the last layer, through the last norm."""
        x, residual, parts, first = passage.x, passage.residual, passage.parts, passage.passed
        if first == after:
            return
        if self.one_call is not None:
            passage.x, passage.residual = self.one_call(x, residual, parts, self.cache.pages, first, after)
            passage.passed = after
            return
        config, kernels, eps = self.model.config, self.kernels, self.model.config.norm_eps
        for layer, pages in zip(self._layers[first:after], self.cache.pages[first:after].unbind()):
            x, residual = kernels.add_rms_norm(x, residual, layer.attention_norm, eps)
            qkv, gathered = layer.qkv(x, parts), []
            for part in parts:
                q, k, v = kernels.rotate_and_store(
                    part.of(qkv), layer.norm, part.cos, part.sin, pages, part.page_slot_BC, eps=eps, heads=config.heads
                )
                gathered.append(part.gather(q, k, v, pages).flatten(2))
            x = layer.output(_joined(gathered), parts)
            x, residual = kernels.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(kernels.silu_mul(layer.gate_up(x, parts)), parts)
        if after == config.layers:
            x, residual = kernels.add_rms_norm(x, residual, self.model.norm.weight, eps)
        passage.x, passage.residual, passage.passed = x, residual, after

    def _prepared(self, tokens: QueryTokens) -> "_Part":
        """Make what all layers share."""
        page_len, pattern, clean_BC = self.cache.page_len, tokens.pattern, tokens.clean_BC
        table_BN, prefix_len_B, clean_len = tokens.page_table_BN, tokens.prefix_len_B, clean_BC.shape[1]
        position_BR = prefix_len_B[:, None] + pattern.position_R
        clean_position_BC = position_BR[:, :clean_len]
        x = F.embedding(clean_BC, self.model.embedding.weight)
        if pattern.masks:
            masks_ME = F.embedding(pattern.offset_M, self._masks_KE)
            x = torch.cat([x, masks_ME.expand(len(x), -1, -1)], 1)
        turned_BR = position_BR if self.model.adapter is None else self.model.adapter.turned(position_BR, clean_len)
        return _Part(
            embedded=x,
            clean_len=clean_len,
            masks=pattern.masks,
            gather=self.kernels.gathering(table_BN[:, : tokens.used_pages], prefix_len_B, pattern.visible_RR, page_len),
            page_slot_BC=table_BN.gather(1, clean_position_BC // page_len) * page_len + clean_position_BC % page_len,
            cos=F.embedding(turned_BR, self._cos_LD),
            sin=F.embedding(turned_BR, self._sin_LD),
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Query tokens with what all layers share."""

    embedded: Tensor
    """Embeddings [B, R, E]."""
    clean_len: int
    masks: int
    """Masks of a sequence."""
    gather: Gather
    page_slot_BC: Tensor
    """Places of the clean tokens in the cache."""
    cos: Tensor
    sin: Tensor
    rows: slice | None = None
    """Place of the tokens among those of the forward; None: they are all there are."""

    def of(self, x: Tensor) -> Tensor:
        """The part's entries [B, R, N] of a tensor of all tokens, as a view."""
        return x if self.rows is None else x[self.rows].view(*self.embedded.shape[:2], -1)


@dataclass(slots=True)
class Passage:
    """Query tokens on their way through the layers."""

    parts: list[_Part]
    x: Tensor
    """Embeddings [.., E], then what the last layer added, in the end the hidden states."""
    residual: Tensor | None = None
    """Sum [.., E] of what was added before; None before the first layer."""
    passed: int = 0
    """Layers that the tokens have passed."""

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states [B, R, E] of each part, after the last layer."""
        return [part.of(self.x) for part in self.parts]

    def joined(self, beside: "Passage") -> "Passage":
        """Both, for layers that they pass together."""
        residual = None
        if self.residual is not None and beside.residual is not None:
            residual = _joined([self.residual, beside.residual])
        return Passage(_placed([*self.parts, *beside.parts]), _joined([self.x, beside.x]), residual, self.passed)

    def divide(self, own: "Passage", beside: "Passage") -> None:
        """Give two passages that were joined what became of theirs."""
        assert self.residual is not None, "no layer was passed together"
        count = own.x.shape[:-1].numel()
        for passage, rows in ((own, slice(count)), (beside, slice(count, None))):
            shape = passage.x.shape
            passage.x, passage.residual = self.x[rows].view(shape), self.residual[rows].view(shape)
            passage.passed = self.passed


def _placed(parts: Sequence[_Part]) -> list[_Part]:
    """The parts with their places among the tokens of all."""
    if len(parts) == 1:
        return [parts[0] if parts[0].rows is None else replace(parts[0], rows=None)]
    placed, first = [], 0
    for part in parts:
        after = first + part.embedded.shape[:2].numel()
        placed.append(replace(part, rows=slice(first, after)))
        first = after
    return placed


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of the entries [.., N] of all parts: [tokens, N], if there are several."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, -2) for part in parts])


@dataclass(frozen=True, slots=True)
class _Product:
    """A linear map, and what a draft adapter adds to it for masks."""

    linear: Any
    added: HeldLowRank | None
    """Holds the adapter's scale."""

    @staticmethod
    def of(linear: Any, adapter: LowRank | None, kernels: Kernels) -> "_Product":
        added = None if adapter is None else kernels.low_rank(adapter.down, adapter.up * ADAPTER_SCALE)
        return _Product(linear, added)

    def refresh(self, adapter: LowRank | None) -> None:
        if adapter is not None and self.added is not None:
            self.added.refresh(adapter.down, adapter.up * ADAPTER_SCALE)

    def __call__(self, x: Tensor, parts: list[_Part]) -> Tensor:
        y: Tensor = self.linear.forward(x)
        if self.added is not None:
            for part in parts:
                if part.masks:
                    self.added.add_to(part.of(y), part.of(x), part.clean_len)
        return y


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    attention_norm: Tensor
    qkv: _Product
    norm: Tensor | None
    """Weights of the norms of query and key heads."""
    output: _Product
    mlp_norm: Tensor
    gate_up: _Product
    down: _Product

    @staticmethod
    def of(layer: Any, adapter: Any, config: ModelConfig, kernels: Kernels) -> "_LayerWeights":
        attention, mlp, norm = layer.attention, layer.mlp, None
        if attention.q_norm is not None:
            of_heads = ((attention.q_norm, config.heads), (attention.k_norm, config.kv_heads))
            norm = torch.cat([of_head.weight.expand(heads, -1) for of_head, heads in of_heads])
        return _LayerWeights(
            attention_norm=layer.attention_norm.weight,
            qkv=_Product.of(attention.qkv, adapter and adapter.qkv, kernels),
            norm=norm,
            output=_Product.of(attention.output, adapter and adapter.output, kernels),
            mlp_norm=layer.mlp_norm.weight,
            gate_up=_Product.of(mlp.gate_up, adapter and adapter.gate_up, kernels),
            down=_Product.of(mlp.down, adapter and adapter.down, kernels),
        )


@torch.no_grad()
def _mask_embeddings(model: TidarModel, block_len: int) -> Tensor:
    """Embeddings [K, E] of the masks of a block; none for a model without mask tokens."""
    if model.adapter is not None:
        offset_K: Tensor = torch.arange(block_len, device=model.embedding.weight.device)
        return model.adapter(offset_K)
    weight, mask_id = model.embedding.weight, model.config.mask_id
    return weight[:0] if mask_id is None else weight[mask_id].expand(block_len, -1)

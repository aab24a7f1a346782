"""Computes the hidden states of the query tokens of one decoder forward.

A forward may have several parts: the sequences of a decode step, and chunks of prompts. They share each product, so
that weights are read once for all of them.

It is the transformer of `model`, in the order that suits a decode step. Each residual sum is computed together with the
norm that follows it. Keys and values go straight to their pages, and one gathering serves all layers. The functions it
runs come from `kernels`, so that a CPU and a GPU differ in nothing else. Where all of them are in C, one call runs all
layers, with the same results.

A draft adapter acts on the query tokens behind the clean ones. So what a token is, and not its id, decides: a text may
hold any id.

Shape letters: B sequences, C clean tokens, R query tokens, K block length, N pages of a sequence, H query heads,
D head width, E embedding.
"""

from dataclasses import dataclass
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

__all__ = ["DecodeForward", "QueryTokens"]


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
        config, kernels = self.model.config, self.kernels
        prepared, first = [], 0
        for tokens in parts:
            prepared.append(self._prepared(tokens, first if len(parts) > 1 else None))
            first += len(tokens.prefix_len_B) * len(tokens.pattern.position_R)
        x = _joined([part.embedded for part in prepared])
        if self.one_call is not None:
            hidden = self.one_call(x, prepared, self.cache.pages)
            return [part.of(hidden) for part in prepared]
        eps, residual = config.norm_eps, None
        for layer, pages in zip(self._layers, self.cache.pages.unbind()):
            x, residual = kernels.add_rms_norm(x, residual, layer.attention_norm, eps)
            qkv, gathered = layer.qkv(x, prepared), []
            for part in prepared:
                q, k, v = kernels.rotate_and_store(
                    part.of(qkv), layer.norm, part.cos, part.sin, pages, part.page_slot_BC, eps=eps, heads=config.heads
                )
                gathered.append(part.gather(q, k, v, pages).flatten(2))
            x = layer.output(_joined(gathered), prepared)
            x, residual = kernels.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(kernels.silu_mul(layer.gate_up(x, prepared)), prepared)
        hidden = kernels.add_rms_norm(x, residual, self.model.norm.weight, eps)[0]
        return [part.of(hidden) for part in prepared]

    def _prepared(self, tokens: QueryTokens, first: int | None) -> "_Part":
        """Make what all layers share.

        first  number of query tokens of the parts before; None: the forward has one part
        """
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
            rows=None if first is None else slice(first, first + position_BR.numel()),
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
    rows: slice | None
    """Place of the tokens among those of the forward; None: they are all there are."""
    gather: Gather
    page_slot_BC: Tensor
    """Places of the clean tokens in the cache."""
    cos: Tensor
    sin: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The part's entries [B, R, N] of a tensor of all tokens, as a view."""
        return x if self.rows is None else x[self.rows].view(*self.embedded.shape[:2], -1)


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of the entries [B, R, N] of all parts: [tokens, N], if there are several."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])


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

"""Computes the hidden states of the query tokens of one decoder forward.

It is the transformer of `model`, in the order that suits a decode step. Each residual sum is computed together with the
norm that follows it. Keys and values go straight to their pages, and one gathering serves all layers. The functions it
runs come from `kernels`, so that a CPU and a GPU differ in nothing else.

Shape letters: B sequences, C clean tokens, R query tokens, N pages of a sequence, H query heads, D head width,
E embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.config import ModelConfig
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.kernels import Kernels, kernels_for
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["DecodeForward"]


class DecodeForward:
    """A model ready to read tokens: the rotation of every position, and the weights in the order of use.

    So a decode step looks up no module. The weights are final.
    """

    def __init__(self, model: TidarModel, cache: KVCache, *, positions: int, kernels: Kernels | None = None) -> None:
        """positions  number of positions that a token may have, from 0
        kernels    the kernels of the cache's device by default
        """
        self.model, self.cache = model, cache
        position_1L = torch.arange(positions, device=cache.pages.device)[None]
        self._cos_LD, self._sin_LD = (half[0, :, 0] for half in model.rotation(position_1L, cache.pages.dtype))
        self._kernels = kernels or kernels_for(cache.pages.device)
        self._layers = [_LayerWeights.of(layer, model.config) for layer in model.layers]

    def __call__(
        self,
        page_table_BN: Tensor,
        prefix_len_B: Tensor,
        clean_BC: Tensor,
        pattern: QueryPattern,
        used_pages: int,
    ) -> Tensor:
        """Compute hidden states [B, R, E] of the query tokens of the pattern: the clean tokens, then the masks.

        Every query token sees the whole prefix of its sequence, since no horizon lies before the prefix's end. Among
        the query tokens of the forward, visibility is the same for all sequences. Afterwards the cache holds keys and
        values of the clean tokens; keys and values of masks are not kept.

        page_table_BN  pages of each sequence, with room for the prefix and the clean tokens
        prefix_len_B   clean tokens read before
        used_pages     leading pages that hold all of every prefix
        """
        config, kernels, page_len = self.model.config, self._kernels, self.cache.page_len
        clean_len = clean_BC.shape[1]
        position_BR = prefix_len_B[:, None] + pattern.position_R
        gather = kernels.gathering(page_table_BN[:, :used_pages], prefix_len_B, pattern.visible_RR, page_len)
        clean_position_BC = position_BR[:, :clean_len]
        page_slot_BC = page_table_BN.gather(1, clean_position_BC // page_len) * page_len + clean_position_BC % page_len
        x = F.embedding(_with_masks(clean_BC, pattern.masks, config.mask_id), self.model.embedding.weight)
        cos, sin = F.embedding(position_BR, self._cos_LD), F.embedding(position_BR, self._sin_LD)
        eps, residual = config.norm_eps, None
        for layer, pages in zip(self._layers, self.cache.pages.unbind()):
            x, residual = kernels.add_rms_norm(x, residual, layer.attention_norm, eps)
            q, k, v = kernels.rotate_and_store(
                F.linear(x, layer.qkv, layer.qkv_bias), layer.norm, cos, sin, pages, page_slot_BC,
                eps=eps, heads=config.heads,
            )  # fmt: skip
            x = F.linear(gather(q, k, v, pages).flatten(2), layer.output, layer.output_bias)
            x, residual = kernels.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = F.linear(kernels.silu_mul(F.linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
        return kernels.add_rms_norm(x, residual, self.model.norm.weight, eps)[0]


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    norm: Tensor | None
    """Weights of the norms of query and key heads."""
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @staticmethod
    def of(layer: Any, config: ModelConfig) -> "_LayerWeights":
        attention, mlp, norm = layer.attention, layer.mlp, None
        if attention.q_norm is not None:
            of_heads = ((attention.q_norm, config.heads), (attention.k_norm, config.kv_heads))
            norm = torch.cat([of_head.weight.expand(heads, -1) for of_head, heads in of_heads])
        return _LayerWeights(
            attention_norm=layer.attention_norm.weight,
            qkv=attention.qkv.weight,
            qkv_bias=attention.qkv.bias,
            norm=norm,
            output=attention.output.weight,
            output_bias=attention.output.bias,
            mlp_norm=layer.mlp_norm.weight,
            gate_up=mlp.gate_up.weight,
            gate_up_bias=mlp.gate_up.bias,
            down=mlp.down.weight,
            down_bias=mlp.down.bias,
        )


def _with_masks(clean_BC: Tensor, masks: int, mask_id: int | None) -> Tensor:
    if not masks:
        return clean_BC
    return torch.cat([clean_BC, clean_BC.new_full((len(clean_BC), masks), mask_id or 0)], 1)

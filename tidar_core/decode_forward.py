"""What are the hidden states of the rows of one decoder forward?

The transformer of `model`, read in the order that suits a decode step: each residual sum is made together with the norm
that follows it, keys and values go straight to their pages, and one gathering serves all layers. The functions it runs
come from `kernels`, so that a CPU and a GPU differ in nothing else.

Shape letters: B sequences, C clean rows, R rows, N pages of a sequence, H query heads, D head width, E embedding.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tidar_core.kernels import Kernels
from tidar_core.kv_cache import KVCache
from tidar_core.layout import decode_layout, decode_rows
from tidar_core.model import TidarModel
from tidar_core.visibility import dense_visibility

__all__ = ["decode_forward"]


def decode_forward(
    model: TidarModel,
    kernels: Kernels,
    cache: KVCache,
    page_table_BN: Tensor,
    prefix_len_B: Tensor,
    clean_BC: Tensor,
    groups: tuple[int, ...],
    block_len: int,
    used_pages: int,
) -> Tensor:
    """Hidden states [B, R, E] of clean rows, then of a block of masks for each group, as `decode_layout` lays them out.

    Every row sees all of its sequence's prefix, since no horizon lies before the prefix's end; among the rows of the
    forward, who sees whom is the same for all sequences. Keys and values of the clean rows are in the cache afterwards,
    those of the masks nowhere.

    page_table_BN  pages of each sequence, with room for the prefix and the clean rows
    prefix_len_B   clean tokens read before
    used_pages     leading pages that hold all of every prefix
    """
    clean_len, page_len = clean_BC.shape[1], cache.page_len
    position_BR = decode_layout(prefix_len_B, clean_len, groups, block_len).position
    own_RR = _own_visibility(clean_len, groups, block_len, clean_BC.device)
    gather = kernels.gathering(page_table_BN[:, :used_pages], prefix_len_B, own_RR, page_len)
    clean_position_BC = position_BR[:, :clean_len]
    slot_BC = page_table_BN.gather(1, clean_position_BC // page_len) * page_len + clean_position_BC % page_len
    x = model.embedding(_with_masks(clean_BC, len(groups) * block_len, model.config.mask_id))
    cos, sin = (half[:, :, 0] for half in model.rotation(position_BR, x.dtype))
    eps, heads = model.config.norm_eps, model.config.heads
    residual = None
    layer: Any
    for index, layer in enumerate(model.layers):
        pages, attention = cache.pages[index], layer.attention
        x, residual = kernels.add_rms_norm(x, residual, layer.attention_norm.weight, eps)
        norms = (None, None) if attention.q_norm is None else (attention.q_norm.weight, attention.k_norm.weight)
        q, k, v = kernels.rotate_and_store(attention.qkv(x), *norms, cos, sin, pages, slot_BC, eps=eps, heads=heads)
        x = attention.output(gather(q, k, v, pages).flatten(2))
        x, residual = kernels.add_rms_norm(x, residual, layer.mlp_norm.weight, eps)
        x = layer.mlp.down(kernels.silu_mul(layer.mlp.gate_up(x)))
    return kernels.add_rms_norm(x, residual, model.norm.weight, eps)[0]


@lru_cache(maxsize=256)
def _own_visibility(clean_len: int, groups: tuple[int, ...], block_len: int, device: torch.device) -> Tensor:
    """The rule among the rows of one forward [R, R]."""
    rows = decode_rows(clean_len, groups, block_len, device)
    return dense_visibility(rows, rows)


def _with_masks(clean_BC: Tensor, masks: int, mask_id: int | None) -> Tensor:
    if not masks:
        return clean_BC
    return torch.cat([clean_BC, clean_BC.new_full((len(clean_BC), masks), mask_id or 0)], 1)

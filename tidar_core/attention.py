"""How do query rows gather values under a visibility?

`DenseAttention` is the plain form and the oracle. `DualModeAttention` gives the same numbers for the doubled training
row without looking at the 2S x 2S square: clean rows take one fused call over the clean half; mask rows see the clean
half and, of the mask half, only the three chunks that their block can touch.

Shape letters: B sequences, L tokens, S clean tokens of a row, H heads, D head width, N chunks, C chunk length.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.layout import PADDING, TokenLayout
from tidar_core.visibility import dense_visibility

__all__ = ["Attention", "DenseAttention", "DualModeAttention", "attend"]


class Attention(Protocol):
    """What a transformer layer asks of its surroundings: values gathered for its rows."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        """Gathered values [B, L, H, D]; k and v may have fewer heads, each serving a run of query heads."""
        ...


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, visible_BQK: Tensor) -> Tensor:
    """Softmax attention [B, H, Q, D]; every query must see at least one key."""
    grouped = q_BHQD.shape[1] != k_BHKD.shape[1]
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=visible_BQK[:, None], enable_gqa=grouped)


class DenseAttention:
    """Every row against every row, under the rule."""

    def __init__(self, layout: TokenLayout) -> None:
        self.visible_BLL = dense_visibility(layout, layout)

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        return attend(q, k, v, self.visible_BLL).transpose(1, 2)


class DualModeAttention:
    """The doubled training row, split by rows. Equal to DenseAttention up to rounding, forward and backward."""

    def __init__(self, layout: TokenLayout, block_len: int, dtype: torch.dtype = torch.float32) -> None:
        """layout     from `training_layout`
        block_len  K of that layout
        dtype      of the attention scores
        """
        self.row_len = S = layout.position.shape[-1] // 2
        self.chunk_len = block_len
        clean, masks = layout[..., :S], layout[..., S:]
        self.clean_visible_BSS = dense_visibility(clean, clean)
        columns = masks.apply(lambda fact: self._pad(fact[..., None], PADDING))
        queries = columns.apply(lambda fact: self._chunked(fact)[..., 0])
        keys = columns.apply(lambda fact: self._neighbours(fact, PADDING)[..., 0])
        own_BS3C = dense_visibility(queries, keys).flatten(1, 2)[:, :S]
        visible_BSK = torch.cat([dense_visibility(masks, clean), own_BS3C], -1)
        self.bias_B1SK = torch.zeros_like(visible_BSK, dtype=dtype).masked_fill_(~visible_BSK, float("-inf"))[:, None]

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        S, repeat = self.row_len, q_BLHD.shape[2] // k_BLHD.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        clean = attend(q[:, :, :S], k[:, :, :S], v[:, :, :S], self.clean_visible_BSS)
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        masks = self._mask_rows(q[:, :, S:], k[:, :, :S], v[:, :, :S], k[:, :, S:], v[:, :, S:])
        return torch.cat([clean, masks], 2).transpose(1, 2)

    def _mask_rows(self, q: Tensor, clean_k: Tensor, clean_v: Tensor, mask_k: Tensor, mask_v: Tensor) -> Tensor:
        """All arguments [B, H, S, D]; one softmax over the clean half and the chunks around each row."""
        S = self.row_len
        q = q * q.shape[-1] ** -0.5
        own_k, own_v = (self._neighbours(self._pad(x)) for x in (mask_k, mask_v))
        own_scores = self._chunked(self._pad(q)) @ own_k.transpose(-1, -2)
        scores = torch.cat([q @ clean_k.transpose(-1, -2), own_scores.flatten(2, 3)[:, :, :S]], -1)
        weight = torch.softmax(scores + self.bias_B1SK, -1)
        own = (self._chunked(self._pad(weight[..., S:])) @ own_v).flatten(2, 3)[:, :, :S]
        return weight[..., :S] @ clean_v + own

    def _pad(self, x: Tensor, value: int = 0) -> Tensor:
        """[.., S, D] -> [.., N * C, D]."""
        return F.pad(x, (0, 0, 0, -self.row_len % self.chunk_len), value=value)

    def _chunked(self, x: Tensor) -> Tensor:
        """[.., N * C, D] -> [.., N, C, D]."""
        return x.unflatten(-2, (-1, self.chunk_len))

    def _neighbours(self, x: Tensor, value: int = 0) -> Tensor:
        """[.., N * C, D] -> [.., N, 3C, D]: the chunk before, the chunk itself, the chunk after; `value` at the ends.

        A block is no longer than a chunk, so it touches no other.
        """
        chunks = self._chunked(F.pad(x, (0, 0, self.chunk_len, self.chunk_len), value=value))
        return torch.cat([chunks[..., :-2, :, :], chunks[..., 1:-1, :, :], chunks[..., 2:, :, :]], -2)

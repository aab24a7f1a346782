"""What does a model remember of the clean tokens it has read?

Keys and values lie in pages of equal length, allocated once; a table per sequence says which page holds its tokens
i * page_len onwards. Mask tokens never enter a page: their keys and values live for one forward. Rejected drafts are
not erased: they lie at and beyond the prefix's end, where nothing looks until they are overwritten.

Shape letters: B sequences, R rows of a forward, C clean rows, N pages of a sequence, T tokens they hold, H query heads,
G key heads, D head width.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.config import ModelConfig
from tidar_core.layout import decode_rows
from tidar_core.visibility import dense_visibility

__all__ = ["KVCache", "PagedAttention"]

NEVER = float("-inf")
"""Added to the score of a key that a row does not see."""


class KVCache:
    """Keys and values of `pages` pages and of page 0, which belongs to nobody."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        page_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_len = page_len
        shape = (config.layers, 1 + pages, page_len, 2, config.kv_heads, config.head_size)
        self.pages = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        """Memory held, known before the first request."""
        return self.pages.numel() * self.pages.element_size()

    def clean(self, pages: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, length, G, D] of the first clean tokens of a sequence that holds `pages`."""
        tokens = self.pages[:, pages].flatten(1, 2)[:, :length]
        return tokens[:, :, 0], tokens[:, :, 1]


class PagedAttention:
    """Rows of one decoder forward against the prefixes in their pages, and against each other.

    Every row sees all of its sequence's prefix, since no horizon lies before the prefix's end; among the rows of the
    forward, who sees whom is the same for all sequences.
    """

    def __init__(
        self,
        cache: KVCache,
        page_table_BN: Tensor,
        prefix_len_B: Tensor,
        *,
        used_pages: int,
        clean_len: int,
        groups: tuple[int, ...],
        block_len: int,
    ) -> None:
        """page_table_BN  pages of each sequence, with room for the prefix and the clean rows
        prefix_len_B   clean tokens read before; the rows follow
        used_pages     leading pages that hold all of every prefix
        clean_len, groups, block_len   rows of the forward, as `decode_layout` lays them out
        """
        self.cache, self.clean_len = cache, clean_len
        device, page_len = page_table_BN.device, cache.page_len
        rows = decode_rows(clean_len, groups, block_len, device)
        position_BC = prefix_len_B[:, None] + rows.position[:clean_len]
        page_BC = page_table_BN.gather(1, position_BC // page_len)
        self.write_slot_C = (page_BC * page_len + position_BC % page_len).flatten()
        self.read_page_N = page_table_BN[:, :used_pages].flatten()
        after_BT = torch.arange(used_pages * page_len, device=device) >= prefix_len_B[:, None]
        bias_BT = torch.zeros(after_BT.shape, dtype=cache.pages.dtype, device=device).masked_fill_(after_BT, NEVER)
        own_RR = _own_bias(clean_len, groups, block_len, cache.pages.dtype, device)
        batch, row_len = len(prefix_len_B), len(own_RR)
        bias_BRK = torch.cat([bias_BT[:, None].expand(-1, row_len, -1), own_RR.expand(batch, -1, -1)], -1)
        self.bias_B1RK = bias_BRK[:, None]

    def __call__(self, layer: int, q_BRHD: Tensor, k_BRGD: Tensor, v_BRGD: Tensor) -> Tensor:
        pages = self.cache.pages[layer]
        own = torch.stack([k_BRGD, v_BRGD], 2)
        pages.view(-1, *pages.shape[2:])[self.write_slot_C] = own[:, : self.clean_len].flatten(0, 1)
        prefix = pages.index_select(0, self.read_page_N).view(len(own), -1, *pages.shape[2:])
        k, v = torch.cat([prefix, own], 1).unbind(2)
        return _attend(q_BRHD, k, v, self.bias_B1RK)


@lru_cache(maxsize=256)
def _own_bias(
    clean_len: int, groups: tuple[int, ...], block_len: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The rule among the rows of one forward [R, R], as what is added to scores."""
    rows = decode_rows(clean_len, groups, block_len, device)
    visible_RR = dense_visibility(rows, rows)
    return torch.zeros(visible_RR.shape, dtype=dtype, device=device).masked_fill_(~visible_RR, NEVER)


def _attend(q_BRHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, bias_B1RK: Tensor) -> Tensor:
    """Softmax attention [B, R, H, D].

    Query heads that share a key head become further rows of it: a quarter faster on a CPU than `enable_gqa`, but for
    the single row of the autoregressive mode.
    """
    k, v = k_BKGD.transpose(1, 2), v_BKGD.transpose(1, 2)
    B, R, H, D = q_BRHD.shape
    share = H // k.shape[1]
    if R == 1 or share == 1:
        q = q_BRHD.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B1RK, enable_gqa=share > 1)
        return out.transpose(1, 2)
    q = q_BRHD.view(B, R, -1, share, D).permute(0, 2, 3, 1, 4).reshape(B, -1, share * R, D)
    bias = bias_B1RK.expand(-1, share, -1, -1).reshape(B, 1, share * R, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.view(B, -1, share, R, D).permute(0, 3, 1, 2, 4).reshape(B, R, H, D)

"""What does a model remember of the clean tokens it has read?

One row of slots per sequence; slot i holds the key and value of the clean token at position i. In front of the slots
lies scratch room for the mask tokens of the forward in progress, so that one attention call reads both without a copy.
Mask tokens never enter a slot. Rejected drafts are not erased: they lie beyond every horizon until overwritten.

Shape letters: B sequences, R rows of a forward, C clean rows, M mask rows, T slots in use, H heads, D head width.
"""

import torch
from torch import Tensor

from tidar_core.attention import attend
from tidar_core.config import ModelConfig
from tidar_core.layout import TokenLayout, cache_layout
from tidar_core.visibility import dense_visibility

__all__ = ["CachedAttention", "KVCache"]


class KVCache:
    """Keys and values of `rows` sequences, `slot_len` clean tokens each, allocated once."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rows: int,
        slot_len: int,
        scratch_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """slot_len     most clean tokens of one sequence, drafts in flight included
        scratch_len  most mask tokens of one sequence in one forward
        """
        shape = (config.layers, rows, config.kv_heads, scratch_len + slot_len, config.head_size)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.rows, self.slot_len, self.scratch_len = rows, slot_len, scratch_len

    @property
    def bytes(self) -> int:
        """Memory held, known before the first request."""
        return 2 * self.key.numel() * self.key.element_size()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` clean tokens of row `source` over row `target`."""
        end = self.scratch_len + length
        for stored in (self.key, self.value):
            stored[:, target, :, self.scratch_len : end] = stored[:, source, :, self.scratch_len : end]

    def clean(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, H, length, D] of the first clean tokens of a row; views."""
        slots = slice(self.scratch_len, self.scratch_len + length)
        return self.key[:, row, :, slots], self.value[:, row, :, slots]


class CachedAttention:
    """Rows of one decoder forward against what a run of cache rows remembers, and each other.

    Clean rows are written to the slots of their positions; mask rows to scratch.
    """

    def __init__(self, cache: KVCache, first_row: int, layout: TokenLayout, clean_len: int, used_len: int) -> None:
        """layout     rows of this forward [B, R], the `clean_len` clean ones first
        first_row  cache row of the first sequence; the others follow
        used_len   T: slots that any row may look at
        """
        batch, row_len = layout.position.shape
        mask_len = row_len - clean_len
        assert mask_len <= cache.scratch_len, f"{mask_len} mask rows in a forward, room for {cache.scratch_len}"
        assert used_len <= cache.slot_len, f"{used_len} slots in use, room for {cache.slot_len}"
        self.cache, self.rows = cache, slice(first_row, first_row + batch)
        self.clean_len = clean_len
        self.batch_B1 = torch.arange(batch, device=layout.position.device)[:, None]
        self.slot_BC = layout.position[:, :clean_len] + cache.scratch_len
        self.masks = slice(cache.scratch_len - mask_len, cache.scratch_len)
        self.read = slice(cache.scratch_len - mask_len, cache.scratch_len + used_len)
        keys = layout[:, clean_len:].then(cache_layout(used_len, batch, layout.position.device))
        self.visible_BRT = dense_visibility(layout, keys)

    def __call__(self, layer: int, q_BRHD: Tensor, k_BRHD: Tensor, v_BRHD: Tensor) -> Tensor:
        key = self._store(self.cache.key[layer, self.rows], k_BRHD)
        value = self._store(self.cache.value[layer, self.rows], v_BRHD)
        return attend(q_BRHD.transpose(1, 2), key, value, self.visible_BRT).transpose(1, 2)

    def _store(self, stored_BHTD: Tensor, new_BRHD: Tensor) -> Tensor:
        stored_BHTD[self.batch_B1, :, self.slot_BC] = new_BRHD[:, : self.clean_len]
        stored_BHTD[:, :, self.masks] = new_BRHD[:, self.clean_len :].transpose(1, 2)
        return stored_BHTD[:, :, self.read]

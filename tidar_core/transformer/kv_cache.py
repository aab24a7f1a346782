"""Key-value cache in pages.

Keys and values lie in pages of equal length, allocated once. Entry i of a sequence's table is the page of its tokens
from i * page_len. Mask tokens never enter a page: their keys and values live for one forward. Rejected drafts are not
erased: they lie beyond the prefix's end, where no forward reads until they are overwritten.

Shape letters: G key heads, D head width.
"""

import math

import torch
from torch import Tensor

from tidar_core.config import ModelConfig
from tidar_core.errors import ConfigError

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of `pages` pages and of page 0, which belongs to no sequence."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        page_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate the pages. Raises ConfigError if there is no memory for them."""
        self.page_len = page_len
        shape = (config.layers, 1 + pages, page_len, 2, config.kv_heads, config.head_size)
        try:
            self.pages = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # on a CPU, torch has no class of its own for it
            gibibytes = math.prod(shape) * dtype.itemsize / 2**30
            raise ConfigError(
                f"a cache of {pages} pages of {page_len} tokens takes {gibibytes:,.1f} GiB of memory, which {device} "
                "does not have; lower the batch, the context or the pages"
            ) from error

    @property
    def bytes(self) -> int:
        """Bytes held, known before the first request."""
        return self.pages.numel() * self.pages.element_size()

    def clean(self, pages: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, length, G, D] of the first clean tokens of a sequence that holds `pages`."""
        tokens = self.pages[:, pages].flatten(1, 2)[:, :length]
        return tokens[:, :, 0], tokens[:, :, 1]

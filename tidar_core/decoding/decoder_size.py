"""Sizes of a decoder in sequences, tokens and pages.

They are checked before anything is allocated, so that impossible sizes are refused in one line.
"""

from dataclasses import dataclass

from tidar_core.config import DraftConfig, ModelConfig
from tidar_core.decoding.page_pool import page_count
from tidar_core.errors import ConfigError

__all__ = ["DecoderSize"]

MOST_SLOTS = 2**14
"""Most sequences that may run together. Each has objects of its own, and a larger number takes minutes to count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSize:
    """Sizes of a decoder's cache and batch."""

    slots: int
    """Sequences that may run together."""
    context_len: int
    """Most tokens of prompt and completion."""
    page_len: int
    """Tokens of a page."""
    max_pages: int
    """Most pages of one sequence."""
    pages: int
    """Pages of the cache."""

    @staticmethod
    def of(
        config: ModelConfig,
        draft: DraftConfig,
        *,
        slots: int,
        context_len: int | None,
        pages: int | None,
        page_len: int,
    ) -> "DecoderSize":
        """Sizes for a model and its drafts, with the arguments of `Decoder`. Raises ConfigError if they do not fit."""
        if draft.block_len > 1 and not config.drafting:
            raise ConfigError(
                f"block_len is {draft.block_len} and the model has no mask token; train it in dual mode, "
                "or decode with block_len 1"
            )
        context_len = context_len or config.context_len
        if max(context_len, draft.block_len) > config.context_len:
            raise ConfigError(
                f"context_len is {context_len} and block_len is {draft.block_len}; the model was built for "
                f"{config.context_len} positions; lower them"
            )
        if slots > MOST_SLOTS:
            raise ConfigError(
                f"{slots} sequences are to run together; at most {MOST_SLOTS} may; lower rows or the batch"
            )
        max_pages = page_count(context_len + draft.block_len, page_len)
        pages = pages or slots * max_pages
        if pages < max_pages:
            raise ConfigError(
                f"the cache has {pages} pages of {page_len} tokens; one context of {context_len} and a "
                f"block of {draft.block_len} take {max_pages}; give it as many or shorten the context"
            )
        return DecoderSize(slots=slots, context_len=context_len, page_len=page_len, max_pages=max_pages, pages=pages)

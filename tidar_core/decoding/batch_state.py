"""State of the running sequences on the device.

The tensors have a fixed size and address, so that a captured graph finds them again. Slots 0..B-1 always belong to the
running sequences. The other slots are empty: they have no prefix and page 0, and nothing reads what a forward writes
there.

Shape letters: B running slots, K block length, N pages of a sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor

from tidar_core.config import SamplingConfig
from tidar_core.decoding.page_pool import NULL_PAGE
from tidar_core.decoding.sampling import SamplingTensors
from tidar_core.decoding.verify import NO_DRAFT

__all__ = ["BatchState"]


class BatchState:
    """State of up to `slots` sequences."""

    def __init__(
        self, slots: int, block_len: int, max_pages: int, *, proposal_vocab: int | None, device: torch.device
    ) -> None:
        """max_pages       most pages of one sequence
        proposal_vocab  V where drafts are drawn from distributions that must be kept; None for point masses
        """
        long = torch.long
        self.slots = slots
        self.live = torch.zeros(slots, dtype=long, device=device)
        """1 where a sequence runs."""
        self.prefix_len = torch.zeros(slots, dtype=long, device=device)
        """Clean tokens in the cache."""
        self.draft = torch.zeros(slots, block_len, dtype=long, device=device)
        """d_1, which is final, and the drafts of masks after it."""
        self.page_table = torch.full((slots, max_pages), NULL_PAGE, dtype=long, device=device)
        shape = (slots, block_len, proposal_vocab or 0)
        self.proposal = torch.zeros(shape, device=device) if proposal_vocab is not None else None
        """Distributions that the drafts were drawn from."""
        self._sampling = SamplingTensors.of([SamplingConfig()] * slots, device)
        self._gathered = SamplingTensors.of([])
        self._views: dict[tuple[int, int], SamplingTensors] = {}
        self._tensors = [self.live, self.prefix_len, self.draft, self.page_table]
        self._tensors += [] if self.proposal is None else [self.proposal]

    def begin(self, slot: int, prefix_len: int) -> None:
        """Give a slot to a sequence with `prefix_len` clean tokens in the cache."""
        self.live[slot], self.prefix_len[slot] = 1, prefix_len

    def give_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Set the pages first, first + 1, .. of the slot's sequence."""
        self.page_table[slot, first : first + len(pages)] = torch.tensor(pages)

    def free(self, slot: int, last: int) -> None:
        """Empty `slot`; the sequence of the last running slot moves there. No cache is copied."""
        for tensor in self._tensors:
            if slot != last:
                tensor[slot] = tensor[last]
            tensor[last] = 0

    def redraft(self, slot: int, tokens: Sequence[int]) -> None:
        """Replace the drafts after d_1 by `tokens`, each a point mass, or NO_DRAFT."""
        drafted = slice(1, 1 + len(tokens))
        chosen = torch.tensor(tokens, dtype=torch.long, device=self.draft.device)
        self.draft[slot, drafted] = chosen
        if self.proposal is not None:
            self.proposal[slot, drafted] = 0.0
            made = (chosen[:, None] != NO_DRAFT).float()
            self.proposal[slot, drafted].scatter_(1, chosen[:, None].clamp(min=0), made)

    @contextmanager
    def rehearsal(self, batch: int, context: int, pages: int) -> Iterator[None]:
        """Fill the first slots with sequences that do not exist, each with `context` tokens, spread over all pages."""
        self.gather_sampling([SamplingConfig()] * batch)
        spread = torch.arange(batch * self.page_table.shape[1], device=self.page_table.device) % pages + 1
        self.page_table[:batch] = spread.view(batch, -1)
        self.prefix_len[:batch] = context
        try:
            yield
        finally:
            self.page_table.zero_()
            self.prefix_len.zero_()
            self.gather_sampling([])

    def snapshot(self) -> list[Tensor]:
        """A copy of all but the sampling fields."""
        return [tensor.clone() for tensor in self._tensors]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Put the copies of `snapshot` back, at the same addresses."""
        for tensor, copy in zip(self._tensors, copies):
            tensor.copy_(copy)

    def gather_sampling(self, requests: Sequence[SamplingConfig]) -> None:
        """Set the sampling fields of the running sequences."""
        self._gathered = SamplingTensors.of(requests)
        self._views = {}
        for name in _TENSOR_FIELDS:
            getattr(self._sampling, name)[: len(requests)].copy_(getattr(self._gathered, name))

    def sampling(self, slots: slice) -> SamplingTensors:
        """Sampling fields of some of the slots, at the same addresses every time."""
        key = (slots.start, slots.stop)
        if key not in self._views:
            views = {name: getattr(self._sampling, name)[slots] for name in _TENSOR_FIELDS}
            self._views[key] = replace(self._gathered, **views)
        return self._views[key]


_TENSOR_FIELDS = [field.name for field in fields(SamplingTensors) if field.type in (Tensor, "Tensor")]

"""What does the device know of each running sequence?

Tensors of fixed size, so that a captured graph finds them where they were: rows 0..B-1 belong to the running sequences,
always. The rows behind stand for nobody: no prefix, page 0, and what a forward writes there is never read.

Shape letters: B running rows, K block length, N pages of a sequence, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from tidar_core.config import SamplingConfig
from tidar_core.decoding.page_pool import NULL_PAGE
from tidar_core.decoding.sampling import SamplingTensors

__all__ = ["BatchState"]


class BatchState:
    """State of up to `rows` sequences."""

    def __init__(
        self, rows: int, block_len: int, max_pages: int, *, proposal_vocab: int | None, device: torch.device
    ) -> None:
        """max_pages       most pages of one sequence
        proposal_vocab  V where drafts are drawn from laws that must be kept; None where they are chosen outright
        """
        long = torch.long
        self.rows = rows
        self.live = torch.zeros(rows, dtype=long, device=device)
        """1 where a sequence runs."""
        self.prefix_len = torch.zeros(rows, dtype=long, device=device)
        """Clean tokens in the cache."""
        self.draft = torch.zeros(rows, block_len, dtype=long, device=device)
        """d_1, final, and what masks have drafted after it."""
        self.page_table = torch.full((rows, max_pages), NULL_PAGE, dtype=long, device=device)
        shape = (rows, block_len, proposal_vocab or 0)
        self.proposal = torch.zeros(shape, device=device) if proposal_vocab is not None else None
        """Laws that the drafts were drawn from."""
        self._sampling = SamplingTensors.of([SamplingConfig()] * rows, device)
        self._gathered = SamplingTensors.of([])
        self._views: dict[tuple[int, int], SamplingTensors] = {}
        self._tensors = [self.live, self.prefix_len, self.draft, self.page_table]
        self._tensors += [] if self.proposal is None else [self.proposal]

    def begin(self, row: int, prefix_len: int) -> None:
        """A sequence takes a row."""
        self.live[row], self.prefix_len[row] = 1, prefix_len

    def give_pages(self, row: int, first: int, pages: Sequence[int]) -> None:
        """The row's sequence holds these as its pages first, first + 1, .."""
        self.page_table[row, first : first + len(pages)] = torch.tensor(pages)

    def free(self, row: int, last: int) -> None:
        """The sequence of `row` leaves, that of the last running row moves there; no cache is copied."""
        for tensor in self._tensors:
            if row != last:
                tensor[row] = tensor[last]
            tensor[last] = 0

    def snapshot(self) -> list[Tensor]:
        """A copy of all but the sampling fields."""
        return [tensor.clone() for tensor in self._tensors]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """What `snapshot` gave, in the same memory as ever."""
        for tensor, copy in zip(self._tensors, copies):
            tensor.copy_(copy)

    def gather_sampling(self, requests: Sequence[SamplingConfig]) -> None:
        """Take in the sampling fields of the running sequences."""
        self._gathered = SamplingTensors.of(requests)
        self._views = {}
        for name in _TENSOR_FIELDS:
            getattr(self._sampling, name)[: len(requests)].copy_(getattr(self._gathered, name))

    def sampling(self, rows: slice) -> SamplingTensors:
        """Sampling fields of some of the rows, in the same memory every time."""
        key = (rows.start, rows.stop)
        if key not in self._views:
            views = {name: getattr(self._sampling, name)[rows] for name in _TENSOR_FIELDS}
            self._views[key] = replace(self._gathered, **views)
        return self._views[key]


_TENSOR_FIELDS = [field.name for field in fields(SamplingTensors) if field.type in (Tensor, "Tensor")]

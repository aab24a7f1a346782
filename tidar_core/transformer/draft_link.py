"""Link from each draft of a block to the token before it.

The masks of a block cannot know each other's tokens, so their likeliest tokens do not fit together. One product of rank
r conditions each draft on the draft before it, like the heads of Hydra (arXiv 2402.05109).

Shape letters: E embedding, V vocabulary, R rank of the link.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidar_core.config import ModelConfig

__all__ = ["LOOKED_UP_TOKENS", "DraftLink"]

LOOKED_UP_TOKENS = 1024
"""Largest vocabulary for which a decoder keeps a link's logits of every token: 4 MiB in fp32."""


class DraftLink(nn.Module):
    """Logits that a token adds to those of the mask behind it.

    A link has one table of low rank for the tokens before, and one for the tokens that follow. The tables may be maps
    of the model's embedding table and head instead. Such a link has V / E times fewer weights, and each label trains
    all of them. The link of an adapter may read the mask's hidden state too, like the sampler of arXiv 2507.11851.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shares_tables = config.adapter is not None and config.adapter.link_shares_tables
        rows = config.hidden_size if self.shares_tables else config.vocab_size
        self.before = nn.Parameter(torch.empty(rows, config.link_rank))
        self.after = nn.Parameter(torch.empty(rows, config.link_rank))
        self.state: nn.Parameter | None = None
        if config.adapter is not None and config.adapter.link_reads_state:
            self.state = nn.Parameter(torch.empty(config.link_rank, config.hidden_size))

    def forward(
        self,
        before: Tensor,
        hidden: Tensor,
        embedding: nn.Module,
        head: nn.Module,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits [.., V] to add, given the tokens before [..] and the masks' hidden states [.., E].

        embedding, head  those of the model
        after            multiplies by the result of `rows`; by default `rows` is computed
        """
        read = self._read(before, embedding)
        if self.state is not None:
            read = F.silu(read + F.linear(hidden, self.state))
        return F.linear(read, self.rows(head)) if after is None else after(read)

    def rows(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Row [V, R] of each token that may follow."""
        return head(self.after.T.contiguous()).T if self.shares_tables else self.after

    def table(self, embedding: nn.Module, head: nn.Module) -> Tensor | None:
        """Logits [V, V] to add after every token; None if they depend on hidden states."""
        if self.state is not None:
            return None
        after_VR = self.rows(head)
        every = torch.arange(len(after_VR), device=after_VR.device)
        return F.linear(self._read(every, embedding), after_VR).detach()

    def _read(self, before: Tensor, embedding: nn.Module) -> Tensor:
        """Row [.., R] of each token before."""
        if not self.shares_tables:
            return F.embedding(before, self.before)
        vector = embedding(before)
        return F.rms_norm(vector, vector.shape[-1:]) @ self.before

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Set weights with which the link adds 0: the model then equals the model without a link."""
        width = 1 if not self.shares_tables else len(self.before)
        self.before.copy_(torch.randn(self.before.shape, generator=generator) / math.sqrt(width))
        self.after.zero_()
        if self.state is not None:
            self.state.copy_(torch.randn(self.state.shape, generator=generator) / math.sqrt(self.state.shape[1]))

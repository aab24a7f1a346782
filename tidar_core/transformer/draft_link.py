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

__all__ = ["DraftLink"]

TOKENS_AT_ONCE = 8192
"""Tokens whose vectors are read together, which bounds memory."""


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

    def forward(self, before: Tensor, hidden: Tensor, embedding: nn.Module, head: nn.Module) -> Tensor:
        """Logits [.., V] to add, given the tokens before [..] and the masks' hidden states [.., E].

        embedding, head  those of the model
        """
        return F.linear(self.mixed(self._read(before, embedding), hidden), self.rows_after(head))

    def mixed(self, read: Tensor, hidden: Tensor) -> Tensor:
        """Rows [.., R] of the tokens before with what the link reads of the masks' hidden states [.., E]."""
        return read if self.state is None else F.silu(read + F.linear(hidden, self.state))

    def rows_before(self, embedding: nn.Embedding) -> Tensor:
        """Row [V, R] of each token before."""
        if not self.shares_tables:
            return self.before
        every = torch.arange(embedding.num_embeddings, device=self.before.device)
        return torch.cat([self._read(tokens, embedding) for tokens in every.split(TOKENS_AT_ONCE)])

    def rows_after(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Row [V, R] of each token that may follow."""
        return head(self.after.T.contiguous()).T if self.shares_tables else self.after

    def table(self, embedding: nn.Embedding, head: nn.Module) -> Tensor | None:
        """Logits [V, V] to add after every token; None if they depend on hidden states."""
        if self.state is not None:
            return None
        return F.linear(self.rows_before(embedding), self.rows_after(head)).detach()

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

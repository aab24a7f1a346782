"""A draft link in the form that a decoder computes.

What does a draft add to the logits of the mask behind it, without reading the model's tables for each draft?

Rows of all tokens are computed once, and for a small vocabulary all logits. Other drafts go into the same memory, as
steps that were captured keep its addresses.

Shape letters: E embedding, V vocabulary, R rank of the link.
"""

import torch.nn.functional as F
from torch import Tensor

from tidar_core.kernels import Kernels
from tidar_core.transformer.model import TidarModel

__all__ = ["LOOKED_UP_TOKENS", "HeldLink"]

LOOKED_UP_TOKENS = 1024
"""Largest vocabulary for which a decoder keeps a link's logits of every token: 4 MiB in fp32."""


class HeldLink:
    """Tables of a model's link."""

    def __init__(self, model: TidarModel, kernels: Kernels, looked_up_tokens: int) -> None:
        """looked_up_tokens  largest vocabulary for which all logits are kept"""
        assert model.link is not None, "the model has no link"
        self._model, self._link = model, model.link
        self._table_VV = None
        if model.config.vocab_size <= looked_up_tokens:
            self._table_VV = self._link.table(model.embedding, model.head)
        if self._table_VV is None:
            self._before_VR = self._link.rows_before(model.embedding).detach()
            self._after = kernels.draft_map(self._link.rows_after(model.head))

    def refresh(self) -> None:
        """Compute all anew, in the same memory, from other weights of the link."""
        embedding, head = self._model.embedding, self._model.head
        if self._table_VV is None:
            self._before_VR.copy_(self._link.rows_before(embedding))
            self._after.refresh(self._link.rows_after(head))
        else:
            table_VV = self._link.table(embedding, head)
            assert table_VV is not None, "a link with a table keeps it"
            self._table_VV.copy_(table_VV)

    def __call__(self, before: Tensor, hidden: Tensor) -> Tensor:
        """Logits [.., V] to add, given the tokens before [..] and the masks' hidden states [.., E]."""
        if self._table_VV is not None:
            return F.embedding(before, self._table_VV)
        return self._after(self._link.mixed(F.embedding(before, self._before_VR), hidden))

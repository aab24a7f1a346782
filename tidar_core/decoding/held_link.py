"""A draft link in the form that a decoder computes.

What does a draft add to the logits of the mask behind it, without reading the model's tables for each draft?

Rows of all tokens are computed once, and for a small vocabulary all logits. Other drafts go into the same memory, as
steps that were captured keep its addresses.

Shape letters: B sequences, K masks, E embedding, V vocabulary, R rank of the link.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_core.decoding.sampling import likeliest
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
        self._in_one_call, self._table_VV = kernels.linked_drafts, None
        if model.config.vocab_size <= looked_up_tokens:
            self._table_VV = self._link.table(model.embedding, model.head)
        if self._table_VV is None:
            self._before_VR = self._link.rows_before(model.embedding).detach().contiguous()
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

    def add_to(self, logits_BKV: Tensor, before_BK: Tensor, hidden_BKE: Tensor) -> None:
        """Correct the logits of masks in place, given the tokens before theirs and the masks' hidden states."""
        if self._table_VV is not None:
            logits_BKV += F.embedding(before_BK, self._table_VV)
        else:
            self._after.add_to(logits_BKV, self._link.mixed(F.embedding(before_BK, self._before_VR), hidden_BKE))

    def likeliest(self, logits_BKV: Tensor, before_B1: Tensor, hidden_BKE: Tensor) -> Tensor:
        """Likeliest drafts [B, K], each after the one before it; the logits are corrected in place.

        before_B1  token before the first
        """
        if self._in_one_call is not None:
            if self._table_VV is not None:
                return self._in_one_call(logits_BKV, before_B1, self._table_VV)
            state = None if self._link.state is None else F.linear(hidden_BKE, self._link.state)
            return self._in_one_call(logits_BKV, before_B1, self._before_VR, state, self._after)
        drafts = []
        for logits_B1V, hidden_B1E in zip(logits_BKV.split(1, 1), hidden_BKE.split(1, 1)):
            self.add_to(logits_B1V, before_B1, hidden_B1E)
            before_B1 = likeliest(logits_B1V)
            drafts.append(before_B1)
        return torch.cat(drafts, 1)

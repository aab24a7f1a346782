"""Loss of drafts against the model's own AR distribution of the same token.

With a large vocabulary the distribution is kept as its likeliest tokens and one bin for all others. The probability of
the bin is compared as a whole. So a teacher takes 200 numbers a token instead of 152,000.

Shape letters: N labelled tokens, V vocabulary, T tokens of the teacher.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WHOLE_VOCABULARY", "Blend", "blended"]

WHOLE_VOCABULARY = 2**16
"""Largest vocabulary whose distribution is kept whole."""
LIKELIEST = 200
"""Tokens kept of a larger vocabulary. The right token is among the base's 200 likeliest even where masks are not
trained (arXiv 2507.11851)."""


class Blend(NamedTuple):
    """The distribution that drafts are compared with: a share of a teacher's, and the label for the rest."""

    prob_NT: Tensor
    """Probabilities of tokens; they and `rest_N` add up to 1."""
    token_NT: Tensor | None
    """The tokens: the label, then the teacher's likeliest. `None` stands for all tokens in their order."""
    rest_N: Tensor | None
    """Probability of all tokens but the teacher's likeliest, together."""
    mask_id: int | None = None
    """The mask token, which neither distribution holds; `None`: there is none."""

    def cross_entropy(self, logprob_NV: Tensor) -> Tensor:
        """Cross-entropy [N] of a model's distribution against this one, in nats.

        The teacher's part exceeds the KL divergence by the teacher's entropy, which has no gradient.

        logprob_NV  the model's log-probabilities; minus infinity for the mask token alone
        """
        if self.token_NT is None or self.rest_N is None:
            if self.mask_id is not None:  # 0 times minus infinity is no number
                logprob_NV = logprob_NV.index_fill(1, torch.full((1,), self.mask_id, device=logprob_NV.device), 0.0)
            return -torch.linalg.vecdot(self.prob_NT, logprob_NV)
        others_N = logprob_NV.scatter(-1, self.token_NT[:, 1:], float("-inf")).logsumexp(-1)
        return -(self.prob_NT * logprob_NV.gather(-1, self.token_NT)).sum(-1) - self.rest_N * others_N


@torch.no_grad()
def blended(
    logits_NV: Tensor,
    label_N1: Tensor,
    share: float,
    mask_id: int | None = None,
    whole_vocabulary: int = WHOLE_VOCABULARY,
    likeliest: int = LIKELIEST,
) -> Blend:
    """The share `share` of the teacher's distribution, and 1 - share of the label."""
    if logits_NV.shape[-1] <= whole_vocabulary:
        whole_NV = logits_NV.softmax(-1).mul_(share)
        whole_NV.scatter_add_(1, label_N1, torch.full_like(whole_NV[:, :1], 1 - share))
        return Blend(whole_NV, None, None, mask_id)
    top = logits_NV.topk(likeliest, dim=-1)
    prob_NT = share * (top.values - logits_NV.logsumexp(-1, keepdim=True)).exp()
    of_label_N1 = torch.full_like(prob_NT[:, :1], 1 - share)
    rest_N = (share - prob_NT.sum(-1)).clamp(min=0)
    return Blend(torch.cat([of_label_N1, prob_NT], 1), torch.cat([label_N1, top.indices], 1), rest_N)

"""Loss of drafts against the model's own AR distribution of the same token.

With a large vocabulary the distribution is kept as its likeliest tokens and one bin for all others. The probability of
the bin is compared as a whole. So a teacher takes 200 numbers a token instead of 152,000.

Shape letters: N labelled tokens, V vocabulary, T tokens of the teacher.
"""

import torch
from torch import Tensor

__all__ = ["WHOLE_VOCABULARY", "soft_cross_entropy", "teacher"]

WHOLE_VOCABULARY = 2**16
"""Largest vocabulary whose distribution is kept whole."""
LIKELIEST = 200
"""Tokens kept of a larger vocabulary. The right token is among the base's 200 likeliest even where masks are not
trained (arXiv 2507.11851)."""


@torch.no_grad()
def teacher(
    logits_NV: Tensor, whole_vocabulary: int = WHOLE_VOCABULARY, likeliest: int = LIKELIEST
) -> tuple[Tensor, Tensor | None]:
    """Probabilities [N, T] of the teacher's tokens, and these tokens [N, T]; `None` for all tokens in their order."""
    if logits_NV.shape[-1] <= whole_vocabulary:
        return logits_NV.softmax(-1), None
    top = logits_NV.topk(likeliest, dim=-1)
    return (top.values - logits_NV.logsumexp(-1, keepdim=True)).exp(), top.indices


def soft_cross_entropy(logits_NV: Tensor, prob_NT: Tensor, token_NT: Tensor | None) -> Tensor:
    """Cross-entropy [N] of the logits' distribution against a teacher's, in nats.

    It exceeds the KL divergence by the teacher's entropy, which has no gradient.

    prob_NT, token_NT  from `teacher`
    """
    whole_N = logits_NV.logsumexp(-1)
    if token_NT is None:
        # the mask token has probability 0 and logit minus infinity
        likely_NV = torch.where(prob_NT > 0, logits_NV, 0.0)
        return whole_N - (prob_NT * likely_NV).sum(-1)
    rest_N = (1 - prob_NT.sum(-1)).clamp(min=0)
    others_N = logits_NV.scatter(-1, token_NT, float("-inf")).logsumexp(-1)
    return whole_N - (prob_NT * logits_NV.gather(-1, token_NT)).sum(-1) - rest_N * others_N

"""Decides how many drafts are accepted, and which token replaces the first rejected draft.

Two exact forms of speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; TiDAR, section 3.2). For any drafts,
the emitted tokens follow the target distribution.

`verify_argmax`   for point masses: drafts that were chosen outright. Each target token is drawn as in the
                  autoregressive mode, and drafts are accepted while they agree. So a draft d is accepted with
                  probability p(d), as in the ratio test. The text is that of the autoregressive mode, token for token.
                  Greedy decoding is the deterministic case.
`verify_sampled`  for drafts drawn from a distribution q that was kept. A draft is accepted with probability
                  min(1, p / q). The first rejected draft is replaced by a draw from max(0, p - q). More drafts are
                  accepted; the text differs from the autoregressive mode's, its distribution does not.

Shape letters: B sequences, K block length, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_core.decoding.sampling import draw

__all__ = ["NO_DRAFT", "Verdict", "verify_argmax", "verify_sampled"]


NO_DRAFT = -1
"""Id in the place of a draft that was never made. It is always rejected, and the target alone chooses the token."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one verification."""

    accepted_B: Tensor
    """n in 1..K: leading draft tokens that are final; the first is always final."""
    next_B: Tensor
    """The token after them, final as well: the correction, or after n = K the bonus."""


def verify_argmax(draft_BK: Tensor, target_BK: Tensor) -> Verdict:
    """Accept drafts while they equal the draws of the target.

    draft_BK   d_1..d_K, or NO_DRAFT; d_1 is final already
    target_BK  tokens drawn from the distribution after d_j, given the prefix and d_1..d_j
    """
    if draft_BK.shape[1] == 1:
        return Verdict(torch.ones_like(draft_BK[:, 0]), target_BK[:, 0])
    accepted_B = _leading(draft_BK[:, 1:] == target_BK[:, :-1])
    return Verdict(accepted_B, target_BK.gather(1, accepted_B[:, None] - 1)[:, 0])


def verify_sampled(
    draft_BK: Tensor,
    target_BKV: Tensor,
    proposal_BKV: Tensor,
    accept_uniform_BK: Tensor,
    target_uniform_BK: Tensor,
) -> Verdict:
    """Accept drafts by the ratio test.

    draft_BK           d_1..d_K, or NO_DRAFT; d_1 is final already
    target_BKV         distribution p of the token after d_j, given the prefix and d_1..d_j
    proposal_BKV       distribution q that d_j was drawn from, zeros for NO_DRAFT; column 0 is not read
    accept_uniform_BK  draws in [0, 1); column j decides on d_{j+1}, the last is not read
    target_uniform_BK  draws in [0, 1); column n - 1 chooses the token after d_n
    """
    K = draft_BK.shape[1]
    tested_BK1 = draft_BK[:, 1:, None].clamp(min=0)
    p_BK = target_BKV[:, :-1].gather(-1, tested_BK1)[..., 0]
    q_BK = proposal_BKV[:, 1:].gather(-1, tested_BK1)[..., 0]
    stands_BK = accept_uniform_BK[:, :-1] * q_BK < p_BK  # u < p / q, without the division
    accepted_B = _leading(stands_BK & (draft_BK[:, 1:] != NO_DRAFT))
    batch_B = torch.arange(len(accepted_B), device=accepted_B.device)
    target_BV = target_BKV[batch_B, accepted_B - 1]
    residual_BV = (target_BV - proposal_BKV[batch_B, accepted_B.clamp(max=K - 1)]).clamp(min=0)
    # Where p and q agree up to rounding, the residual is zero and p itself is right.
    rejected_B = (accepted_B < K) & (residual_BV.sum(-1) > 0)
    target_BV = torch.where(rejected_B[:, None], residual_BV, target_BV)
    return Verdict(accepted_B, draw(target_BV, target_uniform_BK.gather(1, accepted_B[:, None] - 1)[:, 0]))


def _leading(kept_BK: Tensor) -> Tensor:
    """1 + length of the leading run of True."""
    return 1 + kept_BK.long().cumprod(-1).sum(-1)

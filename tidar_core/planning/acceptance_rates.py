"""Rates at which drafts are accepted, by place in a block and by passage of a text.

How likely would each draft have been accepted in each window of the history?

A plan verifies some places of a block often in hard passages and others in easy ones. Shares of accepted drafts
therefore cannot be compared. A window has an ease and an entry has an ease; both add up to the log odds of acceptance
(Rasch 1960). Both are fitted to all outcomes together. So an entry that was verified in a few windows has a rate in
every window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tidar_core.planning.draft_history import Window

__all__ = ["fitted_rates", "mean_rates"]

ROUNDS = 8
"""Newton steps of the fit."""
ENTRY_PRIOR, WINDOW_PRIOR = 16.0, 0.5
"""Outcomes that a prior counts for. By the first, an entry is as easy as the entry before it. By the second, a window
is as easy as the mean one."""
LATE_ODDS = 0.6
"""Prior odds of the first draft behind a correction, relative to those of the first draft of a whole block."""
LONGEST_STEP = 1.5
"""Most that log odds change in one Newton step."""


def mean_rates(windows: Sequence[Window], block_len: int) -> dict[str, list[float]]:
    """Rates over all windows, each with the weight of its outcomes.

    Returns `whole`, the rates of a whole block's drafts, whose entry 0 is not used. `late` has the rates of the first
    and of each later draft behind a correction.
    """
    weight_W1 = torch.tensor([[len(window)] for window in windows]).double()
    rates = ((fitted_rates(windows, block_len) * weight_W1).sum(0) / weight_W1.sum()).tolist()
    return {"whole": rates[:block_len], "late": rates[block_len:]}


def fitted_rates(windows: Sequence[Window], block_len: int) -> Tensor:
    """Probability [W, K + 2] that a draft of each entry is accepted in each window; entry 0 is not used."""
    W, E = len(windows), block_len + 2
    codes = torch.tensor([code + 2 * E * w for w, window in enumerate(windows) for code in window])
    counts = torch.bincount(codes, minlength=2 * E * W).view(W, E, 2).double()
    kept_WE, tried_WE = counts[..., 1], counts.sum(-1)
    ease_W, ease_E = torch.zeros(W, dtype=torch.double), torch.zeros(E, dtype=torch.double)
    before_E = torch.tensor([0, 0, *range(1, block_len - 1), 1, block_len][:E])
    late_E = torch.zeros(E, dtype=torch.double)
    late_E[block_len] = math.log(LATE_ODDS)
    like_E, shift_E = _nearest(tried_WE.sum(0) > 0, before_E, late_E)
    kept_W = kept_WE.sum(1)
    mixed_W = ((kept_W > 0) & (kept_W < tried_WE.sum(1))).double()
    kept_E, counted_WE = mixed_W @ kept_WE, mixed_W[:, None] * tried_WE
    for _ in range(ROUNDS):
        rate_WE, own_E = (ease_W[:, None] + ease_E).sigmoid(), ease_E.sigmoid()
        prior_E = torch.where(before_E > 0, (ease_E[before_E] + late_E).sigmoid(), 0.5)
        expected_WE = counted_WE * rate_WE
        surplus = kept_E - expected_WE.sum(0) + ENTRY_PRIOR * (prior_E - own_E)
        slope = (expected_WE * (1 - rate_WE)).sum(0) + ENTRY_PRIOR * (own_E * (1 - own_E)).clamp(min=0.05)
        ease_E = (ease_E + (surplus / slope).clamp(-LONGEST_STEP, LONGEST_STEP))[like_E] + shift_E
        rate_WE, own_W = (ease_W[:, None] + ease_E).sigmoid(), ease_W.sigmoid()
        expected_WE = tried_WE * rate_WE
        surplus = kept_W - expected_WE.sum(1) + WINDOW_PRIOR * (0.5 - own_W)
        slope = (expected_WE * (1 - rate_WE)).sum(1) + WINDOW_PRIOR * 0.25
        ease_W = ease_W + (surplus / slope).clamp(-LONGEST_STEP, LONGEST_STEP)
    return (ease_W[:, None] + ease_E).sigmoid()


def _nearest(tried_E: Tensor, before_E: Tensor, late_E: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry before each untried one that was tried, 0 if there is none, and the shift of the log odds."""
    like, shift = list(range(len(before_E))), [0.0] * len(before_E)
    for entry, (tried, before) in enumerate(zip(tried_E.tolist(), before_E.tolist())):
        if not tried and entry:
            like[entry], shift[entry] = like[before], shift[before] + late_E[entry].item()
    return torch.tensor(like), torch.tensor(shift, dtype=torch.double)

"""Replay of the newest texts with other plans.

How many tokens per forward would each plan have brought?

Every place of the record was verified as some draft of some block. Another plan verifies it as another draft. Each
place has a luck, the same for all drafts: a draft is accepted if the luck is below its rate. If a draft of rate r was
accepted, one of rate r' would have been accepted with probability min(1, r' / r). If it was rejected, the probability
is max(0, (r' - r) / (1 - r)). A plan passes through a window from state to state. The expected forwards follow by
recursion from the window's last place to its first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tidar_core.decoding.plan_tensors import blocks_after
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.planning.acceptance_rates import fitted_rates
from tidar_core.planning.draft_history import Excerpt, Window, entries_by_kind

__all__ = ["PlanChain", "expected_tokens", "lost_tokens", "two_pass_chain"]


@dataclass(frozen=True, slots=True)
class PlanChain:
    """Effect of a repeated plan on one sequence."""

    clean_len: int
    """Pending tokens verified."""
    width: int
    """Masks that a block began with."""
    after: tuple[int, ...]
    """Mask that predicted the position of the next pending token, by accepted length from 1; 0 for a whole block."""

    @classmethod
    def of(cls, plan: StepPlan, block_len: int) -> "PlanChain":
        """Chain of a single-pass plan; its groups must contain group 1."""
        assert 1 in plan.groups, f"groups {plan.groups} leave a sequence without drafts for good"
        after = (min(block_len, block.mask_offset) for block in blocks_after(plan, block_len)[1:])
        return cls(plan.clean_len, plan.masks(block_len), tuple(after))

    def drafts(self, late: int) -> int:
        """Drafts that are verified of a block that begins at mask `late`."""
        return max(0, min(self.clean_len, self.width - late) - 1)


def two_pass_chain(clean_len: int, width: int) -> PlanChain:
    """Chain of two-pass rounds: every block is whole.

    clean_len   pending tokens verified
    width       masks of a block
    """
    return PlanChain(clean_len, width, (0,) * clean_len)


def expected_tokens(chains: Iterable[PlanChain], excerpt: Excerpt, block_len: int) -> list[float]:
    """Accepted length of each chain: the mean over the forwards that pass through the chosen windows."""
    windows = [excerpt.windows[number] for number in excerpt.weights]
    rate_WE = fitted_rates(excerpt.windows, block_len)[list(excerpt.weights)]
    forwards_CW = _replay(tuple(chains), block_len).forwards(_chances(windows, rate_WE), [len(w) for w in windows])
    weight_W = torch.tensor(list(excerpt.weights.values()))
    tokens = (weight_W * torch.tensor([len(window) for window in windows])).sum()
    return (tokens / (forwards_CW * weight_W).sum(1)).tolist()


def lost_tokens(mode: str, tokens: float) -> float:
    """Tokens that a text lacks of what its forwards bring in the long run.

    Its last round ends behind it, by half of the drafts in the mean. A text in single-pass mode begins with a forward
    that verifies nothing, or that drafts beside the prompt.

    tokens  long-run tokens of a cycle of plans
    """
    return (tokens - 1.0) * (1.5 if mode == "single-pass" else 0.5)


def _chances(windows: Sequence[Window], rate_WE: Tensor) -> Tensor:
    """Probability [W, L, E] that a draft of each entry is accepted at each place, given the outcome there.

    All windows end at place L. A place before the beginning of a window accepts every draft.
    """
    L, nothing = max(map(len, windows)), -1
    code_WL = torch.tensor([[nothing] * (L - len(window)) + window for window in windows])
    seen_WL1 = rate_WE.gather(1, code_WL.clamp(min=0) // 2)[..., None]
    rate_W1E = rate_WE[:, None]
    accepted_WLE, rejected_WLE = rate_W1E / seen_WL1, (rate_W1E - seen_WL1) / (1.0 - seen_WL1)
    chance_WLE = torch.where((code_WL % 2 == 1)[..., None], accepted_WLE, rejected_WLE).clamp(0.0, 1.0)
    return chance_WLE.masked_fill((code_WL == nothing)[..., None], 1.0).float()


class _Replay:
    """The chains as tables of a recursion: the part that stays the same when outcomes change.

    Shape letters: C chains, W windows, L places, E entries of a draft (`draft_history`). N = K accepted lengths. D = K
    counts of drafts that are verified of a block, from 0. B = 2 kinds of block: whole, and going on behind a
    correction. S states of all chains: the kind of block that is pending, and the drafts that are verified of it.
    """

    def __init__(self, chains: tuple[PlanChain, ...], block_len: int) -> None:
        K, C = block_len, len(chains)
        numbers: dict[tuple[int, int, int], int] = {}

        def state(c: int, late: int) -> int:
            return numbers.setdefault((chains[c].drafts(late), int(late > 0), c), len(numbers))

        self.first_C = torch.tensor([state(c, 0) for c in range(C)])
        after = [[state(c, chain.after[min(n, chain.clean_len) - 1]) for c, chain in enumerate(chains)]
                 for n in range(1, K + 1)]  # fmt: skip
        self.next_NC = torch.tensor(after) + torch.arange(1, K + 1)[:, None] * len(numbers)
        """Rows of a table [place, S], from the present place on: the state after each accepted length."""
        self.verified_S = torch.tensor([(drafts * 2 + kind) * C + c for drafts, kind, c in numbers])
        """Rows of a table [D, B, C]: the drafts that are verified in each state."""

    def forwards(self, chance_WLE: Tensor, lens: Sequence[int]) -> Tensor:
        """Expected forwards [C, W] from the beginning of each window, with a whole block pending, to its end.

        Tokens behind the end take back what forwards cost for them in the mean.
        """
        (N, C), S, (W, L) = self.next_NC.shape, len(self.verified_S), chance_WLE.shape[:2]
        survival_LDB1W = _survival(chance_WLE, N)
        table_LSW = torch.zeros(L + N + 1, S, W)
        rows, steps = table_LSW.view(-1, W), torch.empty(N + 1, C, W)
        after_NCW, lengths_N11 = steps[1:], torch.arange(1, N + 1)[:, None, None]
        begin_W = L - torch.tensor(lens)
        inside_LW = (torch.arange(L)[:, None] >= begin_W).float()
        mean_D = torch.einsum("ldw,lw->d", survival_LDB1W[:, :, 0, 0], inside_LW).cumsum(0) / sum(lens)
        mean_C1 = mean_D[self.verified_S[self.first_C] // (2 * C), None]
        for place in range(L - 1, -1, -1):
            torch.index_select(rows[place * S :], 0, self.next_NC.flatten(), out=after_NCW.view(N * C, W))
            beyond = L - place
            after_NCW[beyond:] = (beyond - lengths_N11[beyond:]) / mean_C1
            steps[0] = -1.0  # so the sums below begin with the forward itself
            sums_DBCW = (steps.diff(dim=0)[:, None] * survival_LDB1W[place]).cumsum(0)
            torch.index_select(sums_DBCW.view(-1, W), 0, self.verified_S, out=table_LSW[place])
        return table_LSW[begin_W[:, None], self.first_C, torch.arange(W)[:, None]].T


def _survival(chance_WLE: Tensor, block_len: int) -> Tensor:
    """Probability [L, D, B, 1, W] that the first D drafts of a block at each place are accepted."""
    K, L = block_len, chance_WLE.shape[1]
    chance_WLE = torch.nn.functional.pad(chance_WLE, (0, 0, 0, K), value=1.0)
    kinds = []
    for entries in entries_by_kind(K):
        drafts = [chance_WLE[:, place : place + L, entry] for place, entry in enumerate(entries)]
        kinds.append(torch.stack([torch.ones_like(chance_WLE[:, :L, 0]), *drafts]).cumprod(0))
    return torch.stack(kinds).permute(3, 1, 0, 2)[..., None, :].contiguous()


@lru_cache(maxsize=64)
def _replay(chains: tuple[PlanChain, ...], block_len: int) -> _Replay:
    return _Replay(chains, block_len)

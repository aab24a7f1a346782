"""What does one forward do to the rows that it serves?

Verification of each draft block, and the next block drafted in the same forward for the outcomes that the plan names
(TiDAR, section 3.2). Tensors in, tensors out: shapes follow from the batch and the plan alone, nothing is read back, so
that a forward can be captured and replayed.

Shape letters: B sequences, C clean rows, K block length, R rows of a forward, E embedding, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tidar_core.config import DraftConfig
from tidar_core.decode_forward import DecodeForward
from tidar_core.kv_cache import KVCache
from tidar_core.model import TidarModel
from tidar_core.modes import StepPlan
from tidar_core.row_state import RowState
from tidar_core.sampling import ACCEPT, DRAFT, TARGET, SamplingTensors, draw, law, sample, uniform
from tidar_core.verify import match, weigh

__all__ = ["NextBlock", "Outcome", "Stepper", "blocks_after"]

ROWS_TOGETHER = 64
"""Up to so many rows of a sequence, one product with the head serves all: reading its weights costs more than the rows
that are not sampled from."""


@dataclass(frozen=True, slots=True)
class NextBlock:
    """Which masks of a forward draft the next block."""

    first_row: int
    """Row of the mask at the position of the next d_1; those after it draft d_2, d_3, .."""
    pending: int
    """d_1 and the drafts after it."""
    late: int
    """Which mask of its block predicted d_1's place, from 0; of no meaning where nothing else is pending."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a decode step found out."""

    accepted_emitted: Tensor
    """[B, 1 + C]: n in 1..C, then as many final tokens, and what stands behind them is of no meaning."""
    ar_logits: Tensor
    """[B, C, V]: the autoregressive mode's, as the head gave them."""
    hidden: Tensor
    """[B, R, E]."""


class Stepper:
    """A model at work on the pages of a cache and the rows of a state."""

    def __init__(self, model: TidarModel, draft: DraftConfig, cache: KVCache, state: RowState) -> None:
        self.model, self.draft, self.cache, self.state = model, draft, cache, state
        self._forward = DecodeForward(
            model, cache, positions=state.page_table.shape[1] * cache.page_len + 2 * draft.block_len
        )
        self._link = None if model.link is None else model.link.final()

    def read(self, page_table_1N: Tensor, start: int, chunk_1C: Tensor, plan: StepPlan) -> Tensor:
        """Hidden states [1, R, E] of the tokens from `start` on of one sequence, and of a block of masks per group."""
        prefix_len = torch.tensor([start], device=chunk_1C.device)
        return self._read(page_table_1N, prefix_len, chunk_1C, plan, -(-start // self.cache.page_len))

    def begin(self, rows: slice, hidden: Tensor, plan: StepPlan, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """Choose the first token [1] of a sequence that was read to its end, and draft the block behind it.

        rows    its row
        hidden  [1, R, E], from `read`, its rows as `plan` says
        logits  [1, 1, V], from `target_logits` of the last clean row
        """
        first = sample(logits, sampling, self.state.prefix_len[rows, None], TARGET)[:, 0]
        self.propose(rows, first, torch.full_like(first, plan.clean_len), hidden, plan, sampling)
        return first

    def step(
        self, batch: int, plan: StepPlan, used_pages: int, adjust: Callable[[Tensor], Tensor] | None = None
    ) -> Outcome:
        """Verify and draft for the first `batch` rows.

        used_pages  leading pages that hold all of every prefix
        adjust      changes the target logits [B, C, V] by the rules of the requests
        """
        B, C, state = batch, plan.clean_len, self.state
        sampling = state.sampling(slice(0, B))
        prefix_B, draft_BC = state.prefix_len[:B], state.draft[:B, :C]
        hidden_BRE = self._read(state.page_table[:B], prefix_B, draft_BC, plan, used_pages)
        together = bool(plan.groups) and plan.rows(self.draft.block_len) <= ROWS_TOGETHER
        logits_BRV = self.model.head(hidden_BRE if together else hidden_BRE[:, :C])
        ar_logits = logits_BRV[:, :C]
        first_masks_BCE = hidden_BRE[:, C :: plan.masks(self.draft.block_len)]
        logits_BCV = self.target_logits(ar_logits, first_masks_BCE, draft_BC, sampling)
        if adjust is not None:
            logits_BCV = adjust(logits_BCV)
        next_BC = prefix_B[:, None] + _ahead(C, prefix_B.device)
        if state.proposal is None:
            emitted_BC = sample(logits_BCV, sampling, next_BC, TARGET)  # drafts that stand are what the target drew
            verdict = match(draft_BC, emitted_BC)
        else:
            accept_BC, target_BC = (uniform(sampling.seed_B, next_BC, role) for role in (ACCEPT, TARGET))
            verdict = weigh(draft_BC, law(logits_BCV, sampling), state.proposal[:B, :C], accept_BC, target_BC)
            emitted_BC = torch.cat([draft_BC[:, 1:], verdict.next_B[:, None]], 1)
            emitted_BC.scatter_(1, verdict.accepted_B[:, None] - 1, verdict.next_B[:, None])
        accepted_B = verdict.accepted_B
        prefix_B += accepted_B * state.live[:B]
        self.propose(
            slice(0, B), verdict.next_B, accepted_B, hidden_BRE, plan, sampling, logits_BRV if together else None
        )
        return Outcome(torch.cat([accepted_B[:, None], emitted_BC], 1), ar_logits, hidden_BRE)

    def target_logits(
        self, ar_BRV: Tensor, first_masks_BRE: Tensor, token_BR: Tensor, sampling: SamplingTensors
    ) -> Tensor:
        """z = beta * AR + (1 - beta) * diffusion, fp32; both predict the same positions (TiDAR, section 4.4.3).

        first_masks_BRE  first mask of the group behind each row; not read where all betas are 1
        token_BR         of each row
        """
        ar_BRV = ar_BRV.float()
        if sampling.trusts_ar:
            return ar_BRV
        beta_B11 = sampling.beta_B[:, None, None]
        diffusion_BRV = self.model.linked(self.model.head(first_masks_BRE), token_BR).float()
        mixed_BRV = beta_B11 * ar_BRV + (1 - beta_B11) * diffusion_BRV
        return torch.where(ar_BRV.isneginf(), ar_BRV, mixed_BRV)

    def propose(
        self, rows: slice, first_B: Tensor, accepted_B: Tensor, hidden_BRE: Tensor, plan: StepPlan,
        sampling: SamplingTensors, logits_BRV: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Set the next draft block: the final token, then what the masks after its position believe.

        The prefix lengths must be the new ones.

        logits_BRV  of all rows, where they are there
        """
        state, width = self.state, plan.masks(self.draft.block_len)
        self.stand_in(rows, first_B)
        if width == 1 or not plan.groups:
            return
        row_NR, guessed_NR = _draft_rows(plan, self.draft.block_len, first_B.device)
        row_BR, guessed_BR = row_NR.index_select(0, accepted_B), guessed_NR.index_select(0, accepted_B)
        chosen = _chosen(hidden_BRE if logits_BRV is None else logits_BRV, row_BR)
        logits_BRV = self.model.head(chosen) if logits_BRV is None else chosen
        first_B1, drafted = first_B[:, None], slice(1, width)
        drawn, laws = zip(*self._drawn(logits_BRV, first_B1, rows, sampling))
        state.draft[rows, drafted] = torch.where(guessed_BR, torch.cat(drawn, 1), first_B1)
        if state.proposal is not None:
            kept_BRV = state.proposal[rows, drafted]
            state.proposal[rows, drafted] = torch.where(guessed_BR[..., None], torch.cat(laws, 1), kept_BRV)

    def _drawn(
        self, logits_BRV: Tensor, before_B1: Tensor, rows: slice, sampling: SamplingTensors
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Drafts and the laws that they were drawn from (logits, where no law is kept): all at once, or one by one
        where each is linked to the one before it.

        before_B1  the token before the first
        """
        drafts = logits_BRV.shape[1]
        position_BR = self.state.prefix_len[rows, None] + _ahead(drafts, logits_BRV.device)
        at_once = drafts if self._link is None else 1
        for logits, position in zip(logits_BRV.split(at_once, 1), position_BR.split(at_once, 1)):
            linked = logits if self._link is None else logits + self._link(before_B1)
            if self.state.proposal is None:
                before_B1 = linked.argmax(-1)
                yield before_B1, linked
            else:
                proposal = law(linked, sampling)
                before_B1 = draw(proposal, uniform(sampling.seed_B, position, DRAFT))
                yield before_B1, proposal

    def stand_in(self, rows: slice, first_B: Tensor) -> None:
        """Where there is no mask, the final token stands in for drafts, a point mass like any other guess."""
        state = self.state
        state.draft[rows] = first_B[:, None].expand(-1, self.draft.block_len)
        if state.proposal is not None:
            state.proposal[rows] = 0.0
            state.proposal[rows].scatter_(2, state.draft[rows][..., None], 1.0)

    def _read(
        self, page_table_BN: Tensor, prefix_len_B: Tensor, clean_BC: Tensor, plan: StepPlan, used_pages: int
    ) -> Tensor:
        width = plan.masks(self.draft.block_len)
        return self._forward(page_table_BN, prefix_len_B, clean_BC, plan.groups, width, used_pages)


def _chosen(x_BRN: Tensor, row_BK: Tensor) -> Tensor:
    """Some rows of each sequence [B, K, N]."""
    return x_BRN.gather(1, row_BK[..., None].expand(-1, -1, x_BRN.shape[-1]))


@lru_cache(maxsize=64)
def _ahead(count: int, device: torch.device) -> Tensor:
    """1..count: how far behind something each of a run of rows stands."""
    return 1 + torch.arange(count, device=device)


@lru_cache(maxsize=1024)
def blocks_after(plan: StepPlan, block_len: int) -> tuple[NextBlock, ...]:
    """For each accepted length 0..clean_len: which masks of the forward draft the next block.

    The masks of the largest group that is no larger; where that is smaller, its later ones.
    """
    width = plan.masks(block_len)
    blocks = [NextBlock(0, 1, 0)]
    for n in range(1, plan.clean_len + 1):
        below = [index for index, group in enumerate(plan.groups) if group <= n]
        late = n - plan.groups[below[-1]] if below else width
        first_row = plan.clean_len + below[-1] * width + late if late < width else 0
        blocks.append(NextBlock(first_row, max(1, width - late), late))
    return tuple(blocks)


@lru_cache(maxsize=1024)
def _draft_rows(plan: StepPlan, block_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """By accepted length: the rows of the masks that draft d_2, d_3, .. of the next block, and whether there is one."""
    rows, guessed = [], []
    for block in blocks_after(plan, block_len):
        there = [offset < block.pending for offset in range(1, plan.masks(block_len))]
        rows.append([block.first_row + offset if masked else 0 for offset, masked in enumerate(there, 1)])
        guessed.append(there)
    return torch.tensor(rows, device=device), torch.tensor(guessed, device=device)

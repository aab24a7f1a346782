"""Runs one forward of a decode step for the sequences of a batch.

The forward verifies each draft block, and drafts the next block for the outcomes that the plan names (TiDAR, section
3.2). It takes and gives tensors. Their shapes follow from the batch and the plan alone, and nothing is read back to the
host. So a forward can be captured and replayed.

Shape letters: B sequences, C clean tokens, K block length, R query tokens of a forward, E embedding, V vocabulary.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from tidar_core.config import DraftConfig
from tidar_core.decoding.batch_state import BatchState
from tidar_core.decoding.decode_forward import DecodeForward, Passage, QueryTokens
from tidar_core.decoding.held_link import LOOKED_UP_TOKENS, HeldLink
from tidar_core.decoding.logit_rules import LogitRules
from tidar_core.decoding.plan_tensors import PlanTensors
from tidar_core.decoding.sampling import (
    ACCEPT,
    DRAFT,
    TARGET,
    SamplingTensors,
    draw,
    likeliest,
    sample,
    target_probs,
    uniform,
)
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.decoding.verify import verify_argmax, verify_sampled
from tidar_core.kernels import Kernels
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["DEFAULT_TUNING", "DecodeStepRunner", "DecodeTuning", "Outcome"]

PLANS_KEPT, PREFILLS_KEPT = 256, 16
"""Plans whose tensors stay on the device: of decode steps, and the latest of prefills, whose lengths vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTuning:
    """Sizes up to which a decoder computes the same results in another way."""

    one_product_tokens: int = 64
    """Most query tokens of a sequence for which one product with the head serves all. Reading the weights of the head
    then costs more than the query tokens that are not sampled from."""
    looked_up_tokens: int = LOOKED_UP_TOKENS
    """Largest vocabulary for which the products of a draft link are looked up."""


DEFAULT_TUNING = DecodeTuning()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a decode step."""

    accepted_emitted: Tensor
    """[B, 1 + C]: n in 1..C, then n final tokens; the entries after them have no meaning."""
    ar_logits: Tensor | None
    """[B, C, V]: logits of the autoregressive mode, from the head; None for a captured step that is not scored."""
    hidden: Tensor | None
    """[B, R, E]; None for a captured step."""


class DecodeStepRunner:
    """A model with the pages of a cache and the slots of a state."""

    def __init__(
        self,
        model: TidarModel,
        draft: DraftConfig,
        cache: KVCache,
        state: BatchState,
        kernels: Kernels | None = None,
        *,
        tuning: DecodeTuning = DEFAULT_TUNING,
    ) -> None:
        """kernels  the kernels of the cache's device by default"""
        self.model, self.draft, self.cache, self.state, self._tuning = model, draft, cache, state, tuning
        positions = state.page_table.shape[1] * cache.page_len + 2 * draft.block_len
        self._forward = DecodeForward(model, cache, positions=positions, block_len=draft.block_len, kernels=kernels)
        looked_up, kernels = tuning.looked_up_tokens, self._forward.kernels
        self._link = None if model.link is None else HeldLink(model, kernels, looked_up)
        device = cache.pages.device
        self._ahead_K = 1 + torch.arange(draft.block_len, device=device)
        """1..K: distances of the tokens of a block from the token before it."""
        of, of_prefill = (
            partial(make, block_len=draft.block_len, device=device, causal_masks=model.config.causal_masks)
            for make in (PlanTensors.of, PlanTensors.of_prefill)
        )
        self.tensors_of = lru_cache(maxsize=PLANS_KEPT)(of)
        """Tensors of a decode step's plan. A captured step must keep its own: other plans evict them from here."""
        self._tensors_of_prefill = lru_cache(maxsize=PREFILLS_KEPT)(of_prefill)

    def refresh_drafts(self) -> None:
        """Compute anew, in the same memory, all that was computed of the weights of adapter and link."""
        self._forward.refresh_adapter()
        if self._link is not None:
            self._link.refresh()

    def chunk(self, page_table_1N: Tensor, start: int, chunk_1C: Tensor, plan: StepPlan) -> QueryTokens:
        """A chunk of one sequence whose first token has position `start`, and a block of masks for each group of the
        plan."""
        prefix_len = torch.tensor([start], device=chunk_1C.device)
        pattern = self._tensors_of_prefill(plan).pattern
        return QueryTokens(page_table_1N, prefix_len, chunk_1C, pattern, -(-start // self.cache.page_len))

    def enter(self, chunks: Collection[QueryTokens]) -> Passage:
        """Chunks of different sequences, before the first layer."""
        return self._forward.enter(*chunks)

    def read(self, passage: Passage) -> list[Tensor]:
        """Take chunks through all layers that are left; returns hidden states [1, R, E] of each."""
        return self._forward.finish(passage)

    def begin(
        self, slots: slice, hidden: Tensor, plan: StepPlan, last_11: Tensor, sampling: SamplingTensors,
        adjust: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Choose the first token of a sequence that was read to its end, and draft the block after it.

        Returns the token [1] and the logits of the autoregressive mode [1, 1, V] that it follows from.

        slots    the slot of the sequence
        hidden   [1, R, E], from `read` with the same `plan`
        last_11  the last token of the prompt
        adjust   changes the target logits [1, 1, V] by the rules of the request
        """
        C = plan.clean_len
        ar_logits = self.model.head(hidden[:, C - 1 : C])
        logits = self.target_logits(ar_logits, hidden[:, C : C + 1], last_11, sampling)
        if adjust is not None:
            logits = adjust(logits.float())
        first = sample(logits, sampling, self.state.prefix_len[slots, None], TARGET)[:, 0]
        self._propose(slots, first, torch.zeros_like(first), hidden, self._tensors_of_prefill(plan), sampling)
        return first, ar_logits

    def step(
        self,
        batch: int,
        tensors: PlanTensors,
        used_pages: int,
        adjust: Callable[[Tensor], Tensor] | None = None,
        beside: Passage | None = None,
        layers: int = 0,
    ) -> Outcome:
        """Verify and draft for the first `batch` slots.

        tensors     tensors of the plan, from `tensors_of`
        used_pages  leading pages that hold all of every prefix
        adjust      changes the target logits [B, C, V] by the rules of the requests
        beside      chunks of sequences without a slot, which pass their next `layers` layers in the same forward
        """
        plan, state = tensors.plan, self.state
        B, C = batch, plan.clean_len
        sampling = state.sampling(slice(0, B))
        prefix_B, draft_BC = state.prefix_len[:B], state.draft[:B, :C]
        read_BC = draft_BC.clamp(min=0)  # NO_DRAFT is rejected, whatever is read in its place
        batch_tokens = QueryTokens(state.page_table[:B], prefix_B, read_BC, tensors.pattern, used_pages)
        hidden_BRE = self._forward.step(batch_tokens, beside, layers)
        together = bool(plan.groups) and plan.query_tokens(self.draft.block_len) <= self._tuning.one_product_tokens
        logits_BRV = self.model.head(hidden_BRE if together else hidden_BRE[:, :C])
        ar_logits = logits_BRV[:, :C]
        first_masks_BCE = hidden_BRE[:, C :: plan.masks(self.draft.block_len)]
        logits_BCV = self.target_logits(ar_logits, first_masks_BCE, read_BC, sampling)
        if adjust is not None:
            logits_BCV = adjust(logits_BCV.float())
        next_BC = prefix_B[:, None] + self._ahead_K[:C]
        if state.proposal is None:
            emitted_BC = sample(logits_BCV, sampling, next_BC, TARGET)  # an accepted draft equals the target's draw
            verdict = verify_argmax(draft_BC, emitted_BC)
        else:
            accept_BC, target_BC = (uniform(sampling.seed_B, next_BC, role) for role in (ACCEPT, TARGET))
            verdict = verify_sampled(
                draft_BC, target_probs(logits_BCV, sampling), state.proposal[:B, :C], accept_BC, target_BC
            )
            emitted_BC = torch.cat([draft_BC[:, 1:], verdict.next_B[:, None]], 1)
            emitted_BC.scatter_(1, verdict.accepted_B[:, None] - 1, verdict.next_B[:, None])
        accepted_B = verdict.accepted_B
        prefix_B += accepted_B * state.live[:B]
        self._propose(
            slice(0, B), verdict.next_B, accepted_B, hidden_BRE, tensors, sampling, logits_BRV if together else None
        )
        return Outcome(torch.cat([accepted_B[:, None], emitted_BC], 1), ar_logits, hidden_BRE)

    def target_logits(
        self, ar_BRV: Tensor, first_masks_BRE: Tensor, token_BR: Tensor, sampling: SamplingTensors
    ) -> Tensor:
        """z = beta * AR + (1 - beta) * diffusion, in fp32; both predict the same positions (TiDAR, section 4.4.3).

        Where all betas are 1, these are the AR logits as they are.

        first_masks_BRE  first mask of the group after each token; not read where all betas are 1
        token_BR         the tokens themselves
        """
        if sampling.trusts_ar:
            return ar_BRV
        ar_BRV = ar_BRV.float()
        beta_B11 = sampling.beta_B[:, None, None]
        diffusion_BRV = self.linked(self.model.head(first_masks_BRE), token_BR, first_masks_BRE).float()
        mixed_BRV = beta_B11 * ar_BRV + (1 - beta_B11) * diffusion_BRV
        return torch.where(ar_BRV.isneginf(), ar_BRV, mixed_BRV)

    def _propose(
        self, slots: slice, first_B: Tensor, outcome_B: Tensor, hidden_BRE: Tensor, tensors: PlanTensors,
        sampling: SamplingTensors, logits_BRV: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Set the next draft block: the final token, then the predictions of the masks after its position.

        The prefix lengths must be updated before.

        outcome_B   index of the outcome in `tensors`
        logits_BRV  logits of all query tokens, where they are known already
        """
        state, width = self.state, tensors.plan.masks(self.draft.block_len)
        self.fill_with_point_mass(slots, first_B)
        if width == 1 or not tensors.plan.groups:
            return
        index_BR, guessed_BR = (x.index_select(0, outcome_B) for x in (tensors.draft_index_NM, tensors.guessed_NM))
        masks_BRE = _chosen(hidden_BRE, index_BR)
        logits_BRV = self.model.head(masks_BRE) if logits_BRV is None else _chosen(logits_BRV, index_BR)
        first_B1, drafted = first_B[:, None], slice(1, width)
        draft_BR, proposal_BRV = self._drawn(logits_BRV, masks_BRE, first_B1, slots, sampling)
        state.draft[slots, drafted] = torch.where(guessed_BR, draft_BR, first_B1)
        if state.proposal is not None:
            kept_BRV = state.proposal[slots, drafted]
            state.proposal[slots, drafted] = torch.where(guessed_BR[..., None], proposal_BRV, kept_BRV)

    def _drawn(
        self, logits_BRV: Tensor, masks_BRE: Tensor, before_B1: Tensor, slots: slice, sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """Drafts [B, R] and the distributions that they were drawn from, or logits where no distribution is kept.

        Where they are linked, each draft follows from the one before it.

        masks_BRE  hidden states of the masks
        before_B1  the token before the first
        """
        if self.state.proposal is None:
            if self._link is None:
                return likeliest(logits_BRV), logits_BRV
            return self._link.likeliest(logits_BRV, before_B1, masks_BRE), logits_BRV
        drafts = logits_BRV.shape[1]
        position_BR = self.state.prefix_len[slots, None] + self._ahead_K[:drafts]
        at_once = drafts if self._link is None else 1
        drawn, proposals = [], []
        for logits, masks, position in zip(*(x.split(at_once, 1) for x in (logits_BRV, masks_BRE, position_BR))):
            proposals.append(target_probs(self.linked(logits, before_B1, masks), sampling))
            before_B1 = draw(proposals[-1], uniform(sampling.seed_B, position, DRAFT))
            drawn.append(before_B1)
        return torch.cat(drawn, 1), torch.cat(proposals, 1)

    def linked(self, logits_BKV: Tensor, before_BK: Tensor, masks_BKE: Tensor) -> Tensor:
        """The logits of masks, corrected in place by the tokens before theirs, once these are known.

        masks_BKE  hidden states of the masks
        """
        if self._link is not None:
            self._link.add_to(logits_BKV, before_BK, masks_BKE)
        return logits_BKV

    def drafts_within(self, rules: LogitRules, masks_RE: Tensor) -> list[int]:
        """Drafts of consecutive masks of one block, or of the first of them, within the rules of a request."""
        logits_RV = self.model.head(masks_RE)

        def linked(mask: int, before_1: Tensor) -> Tensor:
            of_mask = slice(mask, mask + 1)
            return self.linked(logits_RV[None, of_mask], before_1[None], masks_RE[None, of_mask])[0]

        return rules.adjust_drafts(logits_RV, linked)

    def fill_with_point_mass(self, slots: slice, first_B: Tensor) -> None:
        """Fill draft blocks with their final token: a point mass in the place of drafts that no mask has predicted."""
        state = self.state
        state.draft[slots] = first_B[:, None].expand(-1, self.draft.block_len)
        if state.proposal is not None:
            state.proposal[slots] = 0.0
            state.proposal[slots].scatter_(2, state.draft[slots][..., None], 1.0)


def _chosen(x_BRN: Tensor, index_BK: Tensor) -> Tensor:
    """Entries of some query tokens of each sequence [B, K, N], as a copy."""
    B, R, _ = x_BRN.shape
    row_BK = index_BK if B == 1 else index_BK + R * torch.arange(B, device=index_BK.device)[:, None]
    return x_BRN.flatten(0, 1).index_select(0, row_BK.flatten()).unflatten(0, row_BK.shape)

"""Training batches of packed rows, for one mode or for both modes at once.

The clean half attends causally and predicts the next token. The mask half predicts, at each position, the token of that
position (TiDAR, section 3.1: full masking, no shift on the mask half). Other recipes hide fewer tokens, use other
weights, or compute only some of the blocks.

Shape letters: B rows, S tokens of a row, M tokens of its mask half (S, or fewer), L tokens of a layout (S or S + M).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tidar_core.training.recipe import LEAST_HIDDEN, Draws, Recipe
from tidar_core.transformer.layout import LENGTH_STEP, PADDING, TokenLayout, causal_layout, training_layout

__all__ = ["IGNORED", "TrainBatch", "ar_batch", "dual_mode_batch"]

IGNORED = -100
"""Target of a token that has no loss."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Input tokens, their layout, and the targets of each half."""

    token_BL: Tensor
    layout: TokenLayout
    ar_target_BS: Tensor
    """Next token of the same document, for the first S tokens; IGNORED at the end of a document."""
    diffusion_target_BM: Tensor | None
    """Token at the mask's own position, for the last M tokens; IGNORED in a document's first block, whose masks see
    no clean token. `None` without a mask half."""
    diffusion_weight_BM: Tensor | None = None
    """Weight of each of these labels, fp32; `None`: all have weight 1."""
    diffusion_total: Tensor | None = None
    """Expected sum of these weights over the recipe's draws, fp64; `None`: the number of labels."""
    dpace: bool = False
    """Whether the loss multiplies these weights by those of `tidar_core.training.dpace`. The sum above does not."""
    before_BM: Tensor | None = None
    """Token before each mask's own; `None` without a mask half."""
    teacher_BM: Tensor | None = None
    """Index in the clean half of the token that predicts the same token as the mask; `None`: nothing compares."""
    distillation: float = 0.0
    """Share of the diffusion loss that compares with the teacher's distribution instead of the label."""
    frozen: bool = False
    """Whether the clean half is a frozen checkpoint's: it has no loss."""
    consistency: float = 0.0
    """Weight of the mean square between a mask's hidden state and its teacher's."""
    unlinked: Tensor | None = None
    """Weight of the loss without the link, a scalar; `None`: there is no such loss. A tensor, so that its changes leave
    a compiled loss as it is."""
    whole: TokenLayout | None = None
    """Layout of whole rows, if this is the part of one of several workers that share them; `None`: rows are whole."""
    first_mask: int = 0
    """Place of the first of the M mask tokens among those of whole rows."""


def ar_batch(input_ids_BS: Tensor, document_BS: Tensor, trained_BS: Tensor | None = None) -> TrainBatch:
    """Packed rows for ordinary next-token training.

    document_BS  document of each token; PADDING for none
    trained_BS   whether a token is a label; `None`: all are
    """
    target_BS = _next_token(_labels(input_ids_BS, trained_BS), document_BS)
    return TrainBatch(input_ids_BS, causal_layout(document_BS), target_BS, None)


def dual_mode_batch(
    input_ids_BS: Tensor,
    document_BS: Tensor,
    block_len: int,
    mask_id: int,
    trained_BS: Tensor | None = None,
    *,
    recipe: Recipe | None = None,
    seed_B: Sequence[int] | None = None,
    share: float = 0.0,
    ragged: bool = False,
    multiple: int = 1,
    causal_masks: bool = False,
) -> TrainBatch:
    """Packed rows, doubled: clean tokens, then mask tokens at the same positions, once for each visit of the recipe.

    document_BS  document of each token; PADDING for none
    trained_BS   whether a token is a label, in both halves; `None`: all are
    recipe       `None`: the paper's
    seed_B       seed of each row's draws; needed if the recipe draws
    share        share of the run that is done, 0..1: some choices change with it
    ragged       leave out blocks without a label: M is then the most mask tokens that a row of this batch needs,
                 rounded up. No block sees another, so losses and gradients stay. Waits for the device.
    multiple     M is a multiple of this number, if it is `ragged`; it must divide S
    causal_masks  a mask token sees no later mask token
    """
    recipe = recipe or Recipe()
    S, label_BS = input_ids_BS.shape[1], _labels(input_ids_BS, trained_BS)
    assert not recipe.draws or seed_B is not None, "this recipe draws: each row needs a seed"
    draws = Draws.of(seed_B, S, input_ids_BS.device) if recipe.draws and seed_B is not None else None
    weights, weighs = recipe.weights_at(share), recipe.weighs(share)
    decay = (recipe.position_decay or 1 + 3 * block_len / 8) if weights == "exponential" else None
    halves, kept, totals = [], [], []
    for visit, layout in enumerate(_mask_layouts(document_BS, block_len, recipe, draws, causal_masks)):
        masks = _MaskHalf.of(layout, label_BS, mask_id)
        masks = masks.weighted(decay, recipe.first_weight) if weighs else masks
        totals.append((masks.weight * (masks.target != IGNORED)).sum(dtype=torch.float64))
        if draws is not None and recipe.masking == "random":
            masks = masks.partly_shown(input_ids_BS, draws)
        if draws is not None and recipe.block_share < 1:
            masks = masks.some_blocks(recipe.mask_len(S, block_len) // recipe.visits, draws)
        elif ragged:
            kept.append(masks.in_labelled_block())
        halves.append(masks.numbered_from(visit * (S + 1)))
    masks = _MaskHalf.joined(halves).cut_to(kept, multiple)
    before_BM = (masks.place - 1).clamp(min=0)
    return TrainBatch(
        torch.cat([input_ids_BS, masks.token], 1),
        causal_layout(document_BS).then(masks.layout),
        _next_token(label_BS, document_BS),
        masks.target,
        diffusion_weight_BM=masks.weight if weighs else None,
        diffusion_total=torch.stack(totals).sum() if weighs else None,
        dpace=weights == "dpace",
        before_BM=input_ids_BS.gather(1, before_BM),
        teacher_BM=before_BM if recipe.distillation or recipe.consistency else None,
        distillation=recipe.distillation,
        consistency=recipe.consistency,
        unlinked=input_ids_BS.new_tensor(recipe.unlinked_at(share), dtype=torch.float32) if recipe.unlinked else None,
    )


def _mask_layouts(
    document_BS: Tensor, block_len: int, recipe: Recipe, draws: Draws | None, causal_masks: bool
) -> Iterator[TokenLayout]:
    """Layout of the mask half of each visit [B, S]."""
    drawn_len = _block_len(recipe, block_len, draws)
    for visit in range(recipe.visits):
        phase: int | Tensor = 0
        if draws is not None and recipe.random_phase:
            phase = ((draws.phase_B1 + visit / recipe.visits) % 1 * drawn_len).long()
        layout = training_layout(document_BS, drawn_len, phase, causal_masks=causal_masks)
        yield layout[..., document_BS.shape[1] :]


def _block_len(recipe: Recipe, block_len: int, draws: Draws | None) -> int | Tensor:
    """Block length of all rows, or of each row [B, 1]."""
    if len(recipe.block_lens) > 1 and draws is not None:
        lengths = torch.tensor(recipe.block_lens, device=draws.length_B1.device)
        return lengths[(draws.length_B1 * len(lengths)).long()]
    return recipe.block_lens[0] if recipe.block_lens else block_len


def _labels(input_ids_BS: Tensor, trained_BS: Tensor | None) -> Tensor:
    return input_ids_BS if trained_BS is None else torch.where(trained_BS, input_ids_BS, IGNORED)


def _next_token(label_BS: Tensor, document_BS: Tensor) -> Tensor:
    target_BS = torch.full_like(label_BS, IGNORED)
    goes_on = (document_BS[:, 1:] == document_BS[:, :-1]) & (document_BS[:, 1:] != PADDING)
    target_BS[:, :-1] = torch.where(goes_on, label_BS[:, 1:], IGNORED)
    return target_BS


@dataclass(frozen=True, slots=True)
class _MaskHalf:
    """Facts of the mask half that a recipe may change; all [B, M]."""

    layout: TokenLayout
    token: Tensor
    target: Tensor
    place: Tensor
    """Index of the token in its row."""
    weight: Tensor

    @staticmethod
    def of(layout: TokenLayout, label_BS: Tensor, mask_id: int) -> "_MaskHalf":
        """Mask tokens alone, with equal weights; all but those of first blocks have a label."""
        return _MaskHalf(
            layout,
            torch.full_like(label_BS, mask_id),
            torch.where((layout.document != PADDING) & (layout.block > 0), label_BS, IGNORED),
            torch.arange(label_BS.shape[1], device=label_BS.device).expand_as(label_BS),
            torch.ones((), device=label_BS.device),
        )

    @staticmethod
    def joined(halves: Sequence["_MaskHalf"]) -> "_MaskHalf":
        """These halves, one after the other."""
        first, *others = halves
        for other in others:
            both = ([getattr(half, name) for half in (first, other)] for name in ("token", "target", "place"))
            weights = [half.weight.expand_as(half.place) for half in (first, other)]
            parts = (torch.cat(pair, 1) for pair in (*both, weights))
            first = _MaskHalf(first.layout.then(other.layout), *parts)
        return first

    def numbered_from(self, number: int) -> "_MaskHalf":
        """This half with higher numbers of its blocks, so that they are not those of another half."""
        return replace(self, layout=replace(self.layout, block=self.layout.block + number))

    def block_start(self) -> Tensor:
        """Index in the row of the first token of each token's block."""
        return self.place - self.layout.offset

    def weighted(self, decay: float | None, first_weight: float) -> "_MaskHalf":
        """This half with smaller weights for later tokens of a block, and a factor for its first.

        decay  `None`: later tokens weigh as much as earlier ones
        """
        offset = self.place - self.block_start()
        weight = torch.ones_like(offset).float() if decay is None else torch.exp(offset.float() / -decay)
        return replace(self, weight=torch.where(offset > 0, weight, first_weight))

    def partly_shown(self, input_ids_BS: Tensor, draws: Draws) -> "_MaskHalf":
        """This half with a drawn share of each block hidden, at the inverse weight; the rest is shown to the block."""
        t = (1 - draws.share_BS.gather(1, self.block_start())).clamp(min=LEAST_HIDDEN)
        hidden = draws.hidden_BS < t
        return replace(
            self,
            token=torch.where(hidden, self.token, input_ids_BS),
            target=torch.where(hidden, self.target, IGNORED),
            weight=self.weight / t,
        )

    def some_blocks(self, mask_len: int, draws: Draws) -> "_MaskHalf":
        """This half cut to `mask_len` tokens: as many drawn blocks as surely fit, then padding.

        The weights of the kept blocks rise by the ratio of all blocks to kept blocks.
        """
        start, has_label = self.block_start(), self.starts_with_label()
        block_len = (self.place - start).amax(1, keepdim=True) + 1
        rank = torch.where(has_label, draws.rank_BS, 2.0).argsort(1).argsort(1)
        count = has_label.sum(1, keepdim=True)
        kept = torch.minimum(count, mask_len // block_len)
        weight = self.weight * count / kept.clamp(min=1)
        return replace(self, weight=weight).cut((has_label & (rank < kept)).gather(1, start), mask_len)

    def in_labelled_block(self) -> Tensor:
        """Whether each token's block holds a label."""
        return self.starts_with_label().gather(1, self.block_start())

    def cut_to(self, chosen_of_visits: Sequence[Tensor], multiple: int) -> "_MaskHalf":
        """The chosen tokens of each row, then padding to a length that many batches share; this half without a choice.

        chosen_of_visits  [B, S] for each visit
        """
        if not chosen_of_visits:
            return self
        chosen = torch.cat(list(chosen_of_visits), 1)
        step = math.lcm(multiple, LENGTH_STEP)
        return self.cut(chosen, -(-max(1, int(chosen.sum(1).amax())) // step) * step)

    def starts_with_label(self) -> Tensor:
        """Whether each token is the first of a block that holds a label."""
        start = self.block_start()
        return torch.zeros_like(start).scatter_add_(1, start, (self.target != IGNORED).long()) > 0

    def cut(self, chosen: Tensor, mask_len: int) -> "_MaskHalf":
        """The chosen tokens of each row, at most `mask_len`, then padding."""
        index = (~chosen).long().argsort(dim=1, stable=True)[:, :mask_len]
        held = chosen.gather(1, index)

        def picked(fact: Tensor, otherwise: int) -> Tensor:
            return torch.where(held, fact.gather(1, index), otherwise)

        layout = TokenLayout(
            picked(self.layout.document, PADDING),
            picked(self.layout.position, 0),
            picked(self.layout.horizon, -1),
            picked(self.layout.block, 0),
            picked(self.layout.reach, 0),
        )
        weight = self.weight.expand_as(chosen).gather(1, index)
        place = self.place.gather(1, index)
        return _MaskHalf(layout, self.token.gather(1, index), picked(self.target, IGNORED), place, weight)

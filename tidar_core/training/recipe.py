"""Recipe of dual-mode training: its choices and their draws.

The defaults are the paper's; each other choice is an experiment (docs/experiments.md). Draws follow from one number per
row. So a resumed run draws the same, even on another number of workers.

Shape letters: B rows, S tokens of a row, E embedding, R entries of a table.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tidar_core.config import AdapterConfig, ModelConfig
from tidar_core.errors import ConfigError
from tidar_core.transformer.draft_adapter import DraftAdapter, freeze
from tidar_core.transformer.draft_link import DraftLink
from tidar_core.transformer.model import TidarModel

__all__ = [
    "ADAPTER_RECIPE",
    "MASKINGS",
    "MASK_STARTS",
    "Draws",
    "Recipe",
    "adapted_config",
    "linked_config",
    "mask_embedding",
    "start_draft_adapter",
    "start_draft_link",
    "start_mask_token",
]

MASKINGS = ("full", "random")
POSITION_WEIGHTS = ("flat", "exponential", "dpace")
MASK_STARTS = ("mean", "normal", "zero")
ADAPTER_RECIPE: dict[str, Any] = {
    "position_weights": "dpace", "first_weight": 0.1, "distillation": 0.5, "unlinked": 0.3
}  # fmt: skip
"""Choices for drafts of a frozen checkpoint that differ from the paper's, which trains all weights."""
UNLINKED_SHARE = 1 / 3
"""Share of a run in which the weight of the loss without the link falls."""
LEAST_HIDDEN = 1e-3
"""Least share of a block that random masking hides, so that its inverse, the weight, stays finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Choices that make and weight the doubled row."""

    alpha: float = 1.0
    """Weight of the AR loss against the diffusion loss (TiDAR, equation 3)."""
    masking: str = "full"
    """`full`: the mask half is mask tokens alone. `random`: for each block a share t in (0, 1] is drawn. Each of its
    tokens is hidden with probability t; the loss of hidden tokens has weight 1 / t (block diffusion's objective)."""
    block_lens: tuple[int, ...] = ()
    """Block lengths; each row draws one. Empty: only the block length of the objective."""
    random_phase: bool = False
    """Whether each row draws, at each visit, the phase of its blocks: how many tokens the first block of each document
    lacks. Otherwise blocks begin at the same tokens at every visit. DFlash accepts 13 to 19 % more drafts with random
    starts (arXiv 2602.06036)."""
    visits: int = 1
    """Mask halves of a row in one train step, whose phases are spread evenly over a block from a drawn one. They share
    the clean half, which is most of the cost of a frozen checkpoint."""
    position_weights: str | None = None
    """Weights of labels by their offset i in the block. `flat`: 1. `exponential`: exp(-i / position_decay) (DFlash,
    arXiv 2602.06036). `dpace`: by how far the drafts before are likely to be accepted (arXiv 2605.18810;
    `tidar_core.training.dpace`). `None`: `exponential` if there is a `position_decay`, else `flat`."""
    position_decay: float | None = None
    """Decay of exponential weights, in tokens. `None`: 1 + 3 K / 8, which is 4 for K = 8 and 7 for K = 16 (DFlash)."""
    dpace_after: float = 0.1
    """Share of the run with exponential weights before `dpace` weights begin: an untrained draft's chances mean
    nothing."""
    first_weight: float = 1.0
    """Factor on the weight of offset 0. Decoding takes the first token of a block from the AR mode, so its label
    teaches nothing that decoding reads unless `beta` is below 1."""
    distillation: float = 0.0
    """Share of the diffusion loss that compares with the model's own AR distribution of the same token instead of the
    label (`tidar_core.training.distillation`). No gradient flows through this distribution."""
    unlinked: float = 0.0
    """Weight of the same loss without the link, beside the loss with the link; the sum is divided by both weights. It
    falls from 1 to this value over the first third of the run (Domino, arXiv 2605.29707). 0: no such loss."""
    consistency: float = 0.0
    """Weight of the mean square between the last hidden state of a mask and of the clean token that predicts the same
    token (arXiv 2507.11851). It is added to each label's loss, without a gradient for the clean token."""
    block_share: float = 1.0
    """Share of a row's mask half that is computed: blocks are drawn, and their weights rise by the inverse share."""
    mask_start: str | None = None
    """Mask token's embedding before the first train step. `mean`: mean of the other embeddings, plus noise with a tenth
    of their spread. `normal`: mean and spread of the others. `zero`: zeros. `None`: as in the weights, or `mean` if
    they have no mask token."""
    link_rank: int | None = None
    """Rank of the link from each draft to the token before it (`tidar_core.transformer.draft_link`). `None`: as
    in the weights. An AR checkpoint has no link: its drafts are independent."""

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, f"alpha is {self.alpha}; it must be 0 or more")
        _require(self.masking in MASKINGS, f"masking is {self.masking!r}; it must be one of {MASKINGS}")
        _require(all(n >= 1 for n in self.block_lens), f"block_lens is {self.block_lens}; each must be at least 1")
        _require(
            self.visits == 1 or (self.visits > 1 and self.random_phase),
            f"visits is {self.visits}; it must be 1, or more with random_phase: true, which sets the visits apart",
        )
        weights, decay = self.position_weights, self.position_decay
        _require(
            weights is None or weights in POSITION_WEIGHTS,
            f"position_weights is {weights!r}; it must be one of {POSITION_WEIGHTS}, or left out",
        )
        _require(decay is None or decay > 0, f"position_decay is {decay}; it must be above 0, or left out")
        _require(
            decay is None or weights != "flat",
            f"position_decay is {decay} and position_weights flat; flat weights have no decay: leave either out",
        )
        _require(0 <= self.dpace_after < 1, f"dpace_after is {self.dpace_after}; it must be 0 or more, below 1")
        _require(self.first_weight >= 0, f"first_weight is {self.first_weight}; it must be 0 or more")
        _require(0 <= self.distillation <= 1, f"distillation is {self.distillation}; it must be within 0..1")
        _require(0 <= self.unlinked <= 1, f"unlinked is {self.unlinked}; it must be within 0..1")
        _require(self.consistency >= 0, f"consistency is {self.consistency}; it must be 0 or more")
        _require(0 < self.block_share <= 1, f"block_share is {self.block_share}; it must be above 0, at most 1")
        _require(
            self.mask_start is None or self.mask_start in MASK_STARTS,
            f"mask_start is {self.mask_start!r}; it must be one of {MASK_STARTS}, or left out",
        )
        _require(
            self.link_rank is None or self.link_rank >= 1,
            f"link_rank is {self.link_rank}; it must be 1 or more, or left out",
        )

    def checked(self, block_len: int) -> "Recipe":
        """This recipe, if its longest block is `block_len`; raises ConfigError otherwise."""
        longest = max(self.block_lens, default=block_len)
        _require(
            longest == block_len,
            f"block_lens is {self.block_lens}; the longest of them must be block_len, {block_len}: change either",
        )
        return self

    def frozen(self) -> "Recipe":
        """This recipe for a frozen checkpoint, whose AR loss has no weight; raises ConfigError if it shows tokens."""
        _require(
            self.masking == "full",
            f"masking is {self.masking!r}; the mask half of a frozen checkpoint holds mask tokens alone: give full",
        )
        return replace(self, alpha=0.0)

    def mask_len(self, row_len: int, block_len: int) -> int:
        """Tokens of the mask halves of a row, over all visits.

        block_len  block length, if the recipe has no block lengths of its own
        """
        if self.block_share == 1:
            return self.visits * row_len
        return self.visits * max(max(self.block_lens, default=block_len), int(self.block_share * row_len))

    @property
    def draws(self) -> bool:
        """Whether the recipe draws, so that each row needs a seed."""
        return self.masking == "random" or len(self.block_lens) > 1 or self.block_share < 1 or self.random_phase

    def weights_at(self, share: float) -> str:
        """The `position_weights` after this share of the run, 0..1."""
        if self.position_weights == "dpace":
            return "dpace" if share >= self.dpace_after else "exponential"
        return self.position_weights or ("flat" if self.position_decay is None else "exponential")

    def unlinked_at(self, share: float) -> float:
        """The weight of the loss without the link after this share of the run, 0..1."""
        return max(self.unlinked, 1 - (1 - self.unlinked) * share / UNLINKED_SHARE)

    def weighs(self, share: float) -> bool:
        """Whether labels of the mask half have different weights after this share of the run, before any `dpace`."""
        decays = self.weights_at(share) == "exponential"
        return self.masking == "random" or decays or self.first_weight != 1 or self.block_share < 1


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers in [0, 1) for the choices of each row; the same in every recipe."""

    length_B1: Tensor
    """Number that chooses the block length."""
    share_BS: Tensor
    """Numbers 1 - t, where t is the share of the block that begins at the token."""
    hidden_BS: Tensor
    """Numbers that hide a token if they are below t."""
    rank_BS: Tensor
    """Blocks are computed in the order of this number at their first token."""
    phase_B1: Tensor
    """Number that chooses the phase of the blocks."""

    @classmethod
    def of(cls, seed_B: Sequence[int], row_len: int, device: torch.device) -> "Draws":
        """Draws of rows with these seeds; they do not depend on the rest of the batch."""
        parts = [1, row_len, row_len, row_len, 1]  # a new part comes last, so that earlier parts stay as they are
        rows = [torch.rand(sum(parts), generator=torch.Generator().manual_seed(seed)) for seed in seed_B]
        return cls(*torch.stack(rows).to(device).split(parts, 1))


@torch.no_grad()
def start_mask_token(model: TidarModel, how: str, *, seed: int) -> None:
    """Set the mask token's embedding, as `Recipe.mask_start` defines it.

    The embeddings of text tokens are the entries before the mask token.
    """
    mask_id, table = model.config.mask_id, model.embedding.weight
    assert mask_id, "the model needs a mask token behind the text tokens"
    noise_E = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(seed)).to(table.device)
    table[mask_id] = mask_embedding(table[:mask_id].float(), how, noise_E).to(table.dtype)


def linked_config(config: ModelConfig, rank: int) -> ModelConfig:
    """The config with a link of this rank. Raises ConfigError if it has a link of another rank."""
    held = config.link_rank
    _require(held in (0, rank), f"link_rank is {rank}; the weights have a link of rank {held}; leave link_rank out")
    return replace(config, link_rank=rank)


def start_draft_link(model: TidarModel, rank: int, *, seed: int) -> None:
    """Give a model a link that adds 0 at first; a link of the same rank stays as it is."""
    table, model.config = model.embedding.weight, linked_config(model.config, rank)
    if model.link is not None:
        return
    model.link = DraftLink(model.config)
    model.link.start(torch.Generator().manual_seed(seed))
    model.link.to(table.device, table.dtype)


def adapted_config(config: ModelConfig, adapter: AdapterConfig) -> ModelConfig:
    """The config of a checkpoint with this adapter.

    Raises ConfigError if its weights draft already, or if it has an adapter of another shape.
    """
    _require(
        config.mask_id is None,
        "the weights of the model have a mask token of their own; drafts: adapter needs an AR checkpoint",
    )
    if config.adapter is not None:
        for name, given in asdict(adapter).items():
            held = getattr(config.adapter, name)
            _require(held == given, f"the drafts have {name} {held}; this job has {given}; give it the same")
    return replace(config, adapter=adapter)


def start_draft_adapter(model: TidarModel, adapter: AdapterConfig, *, seed: int) -> None:
    """Give a checkpoint's model an adapter that changes nothing at first. All other weights are frozen.

    An adapter of the same shape stays as it is. Raises ConfigError for an adapter of another shape.
    """
    table, model.config = model.embedding.weight, adapted_config(model.config, adapter)
    if model.adapter is None:
        model.adapter = DraftAdapter(model.config)
        model.adapter.start(table, torch.Generator().manual_seed(seed))
        model.adapter.to(table.device, table.dtype)
    freeze(model)


def mask_embedding(real_RE: Tensor, how: str, noise: Tensor) -> Tensor:
    """New entries [.., E] for a table whose other entries are `real_RE`.

    how    one of MASK_STARTS
    noise  standard normal [.., E]
    """
    width = {"mean": 0.1, "normal": 1.0}
    return torch.zeros_like(noise) if how == "zero" else real_RE.mean(0) + width[how] * real_RE.std(0) * noise


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)

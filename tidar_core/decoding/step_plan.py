"""Plans of decode steps: the query tokens that a mode spends on each.

A mode chooses, for each step, how many pending tokens are verified, and for which outcomes the next block is drafted.
The cache is the same in all modes, so any step may follow any other.

    autoregressive   verify d_1 alone, draft nothing                               1 query token a token
    single-pass      verify all, draft for every outcome (TiDAR, section 3.2)      K + K * K query tokens
                     or for some: an outcome without a group takes the next lower group's later masks
                     or with fewer masks in a block: drafts are guesses, so any number of them is exact
    two-pass         draft behind d_1, then verify, in turns                       1 + K, then K query tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tidar_core.config import AUTOREGRESSIVE, DRAFTING_MODES
from tidar_core.errors import ConfigError

if TYPE_CHECKING:
    from tidar_core.decoding.request import DecodeStep

__all__ = ["MODES", "FixedMode", "Planner", "StepPlan"]

MODES = (AUTOREGRESSIVE, *DRAFTING_MODES)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Query tokens of one decode step, the same for every sequence of the batch."""

    clean_len: int
    """Pending tokens read, d_1 first, 1..K."""
    groups: tuple[int, ...] = ()
    """Assumed accepted lengths, ascending, within 1..clean_len, that a block of masks is spent on."""
    width: int = 0
    """Masks of each block, up to K; 0 stands for K."""

    def masks(self, block_len: int) -> int:
        """Masks of each block, where the longest block has `block_len`."""
        return self.width or block_len

    def query_tokens(self, block_len: int) -> int:
        """Query tokens of one sequence."""
        return self.clean_len + len(self.groups) * self.masks(block_len)


class Planner(Protocol):
    """Chooses the plan of each decode step."""

    @property
    def drafts_first_blocks(self) -> bool:
        """Whether the forward that ends a prompt drafts the first block."""
        ...

    def begin_prefill(self) -> None:
        """Called before a prefill."""
        ...

    def end_prefill(self) -> None:
        """Called after the prefill."""
        ...

    def next_plan(self, pending: Mapping[str, int], context: int) -> StepPlan:
        """The plan of the next decode step.

        pending  pending tokens (d_1 and its drafts) of each running request
        context  clean tokens in the cache of the longest running sequence
        """
        ...

    def observe(self, steps: "Sequence[DecodeStep]", *, beside: bool = False) -> None:
        """Learn from the steps of the plan; a sequence that was preempted brought no step.

        beside  whether their forward read prompts too
        """
        ...

    def forget_drafts(self) -> None:
        """Called when the weights that make drafts were exchanged."""
        ...

    def facts(self) -> dict[str, Any] | None:
        """The present choice and its reasons, for reports; None where the planner has no choice."""
        ...


@dataclass(frozen=True, slots=True)
class FixedMode:
    """One mode for all steps."""

    mode: str
    block_len: int
    groups: tuple[int, ...] = ()
    """single-pass: the groups drafted for; all by default."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.groups != tuple(sorted(set(self.groups) & set(range(1, self.block_len + 1)))):
            raise ConfigError(f"groups are {self.groups}; they must ascend within 1..{self.block_len}")

    @property
    def drafts_first_blocks(self) -> bool:
        """Only in single-pass mode; in two-pass mode the first step drafts, so that all sequences stay in step."""
        return self.mode == "single-pass" and self.block_len > 1

    def begin_prefill(self) -> None:
        """A fixed mode does not time its prefills."""

    def end_prefill(self) -> None:
        """A fixed mode does not time its prefills."""

    def next_plan(self, pending: Mapping[str, int], context: int) -> StepPlan:
        """The plan of the mode."""
        if self.mode == "autoregressive" or self.block_len == 1:
            return StepPlan(1)
        if self.mode == "single-pass":
            return StepPlan(self.block_len, self.groups or tuple(range(1, self.block_len + 1)))
        return StepPlan(self.block_len) if max(pending.values()) > 1 else StepPlan(1, (1,))

    def observe(self, steps: "Sequence[DecodeStep]", *, beside: bool = False) -> None:
        """A fixed mode has nothing to learn."""

    def forget_drafts(self) -> None:
        """A fixed mode has nothing to forget."""

    def facts(self) -> None:
        """A fixed mode has no choice to report."""

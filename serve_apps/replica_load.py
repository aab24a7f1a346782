"""How busy is a decoder replica, and what has its cache spared it?

Read beside the decoder's thread, without stopping it: each number is right, together they may be a step apart.
"""

from dataclasses import dataclass

from tidar_core.batcher import Batcher
from tidar_core.modes import FixedMode
from tidar_core.planner import AutoPlanner

__all__ = ["Load", "load_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One replica at one moment."""

    replica: str
    running: int
    """Sequences that hold a row."""
    waiting: int
    """Sequences that wait for one."""
    pages_held: int
    """Pages of the KV cache that sequences hold."""
    pages: int
    shared_tokens: int
    """Prompt tokens found in the cache since the replica began."""
    preemptions: int
    """Sequences that gave up their pages since then."""
    mode: str
    """The planner's present choice."""
    expected_over_ar: float | None
    """Tokens per second that it promises over the autoregressive mode's; None where the mode is fixed."""


def load_of(batcher: Batcher, replica: str) -> Load:
    """What a batcher and its decoder are at."""
    decoder, planner = batcher.decoder, batcher.planner
    mode, expected = "", None
    if isinstance(planner, AutoPlanner):
        mode, expected = planner.choice.mode, planner.expected_over_ar
    elif isinstance(planner, FixedMode):
        mode = planner.mode
    return Load(
        replica=replica,
        running=decoder.rows - decoder.free_rows,
        waiting=batcher.waiting,
        pages_held=decoder.pool.held,
        pages=decoder.pool.pages,
        shared_tokens=decoder.shared_tokens,
        preemptions=decoder.preemptions,
        mode=mode,
        expected_over_ar=expected,
    )

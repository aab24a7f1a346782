"""How busy is a decoder replica, and what has its cache spared it?

Read beside the decoder's thread, without stopping it: each number is right, together they may be a step apart.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve_apps.replica.throughput import ThroughputEstimate
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.planning.planner import AutoPlanner

__all__ = ["Load", "load_of", "together"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One replica at one moment."""

    replica: str
    pid: int
    """Its process."""
    decoder_pid: int
    """That of its decoder."""
    rows: int
    """Sequences that it decodes together."""
    running: int
    """Sequences that hold a row."""
    waiting: int
    """Sequences that wait for one."""
    waiting_tokens: int
    """Tokens that those bring and are expected to write."""
    tokens_per_forward: float
    """Read and written lately, over all sequences; 0 before the first forward."""
    forwards_per_second: float
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


def load_of(batcher: Scheduler, pace: ThroughputEstimate, replica: str) -> Load:
    """What a batcher and its decoder are at.

    pace  that the decoder is measured to have
    """
    decoder, planner = batcher.decoder, batcher.planner
    mode, expected = "", None
    if isinstance(planner, AutoPlanner):
        mode, expected = planner.choice.mode, planner.expected_over_ar
    elif isinstance(planner, FixedMode):
        mode = planner.mode
    return Load(
        replica=replica,
        pid=os.getpid(),
        decoder_pid=os.getpid(),
        rows=decoder.rows,
        running=decoder.rows - decoder.free_rows,
        waiting=batcher.waiting,
        waiting_tokens=pace.expected(batcher.queued),
        tokens_per_forward=pace.tokens_per_forward,
        forwards_per_second=pace.forwards_per_second,
        pages_held=decoder.pool.held,
        pages=decoder.pool.pages,
        shared_tokens=decoder.shared_tokens,
        preemptions=decoder.preemptions,
        mode=mode,
        expected_over_ar=expected,
    )


def together(loads: Sequence[Load]) -> Load:
    """The load of a replica with several engines, each of which said its own; the rest is the first one's."""
    counted = ("rows", "running", "waiting", "waiting_tokens", "pages_held", "pages", "shared_tokens", "preemptions")
    return replace(loads[0], **{name: sum(getattr(load, name) for load in loads) for name in counted})

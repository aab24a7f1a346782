"""The load of a decoder replica.

It is read beside the decoder's thread, without stopping the thread. So each number is right, but two of them may belong
to successive forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Load", "together"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load of one replica at one moment."""

    replica: str
    pid: int
    """Process of the replica."""
    decoder_pid: int
    """Process of its decoder."""
    rows: int
    """Slots: sequences that it decodes together."""
    running: int
    """Sequences that hold a slot."""
    waiting: int
    """Sequences that wait for a slot."""
    waiting_tokens: int
    """Tokens of the waiting sequences: their prompts and the expected length of their texts."""
    tokens_per_forward: float
    """Recent throughput over all sequences, prompt tokens included; 0 before the first forward."""
    forwards_per_second: float
    pages_held: int
    """Pages of the KV cache that sequences hold."""
    pages: int
    shared_tokens: int
    """Prompt tokens found in the cache since the start of the replica."""
    preemptions: int
    """Sequences that gave up their pages since the start of the replica."""
    mode: str
    """Mode that the planner has chosen."""
    expected_over_ar: float | None
    """Expected speedup of that mode over the autoregressive mode; None if the mode is fixed."""


def together(loads: Sequence[Load]) -> Load:
    """Load of a replica with several engines: counts are sums, other values belong to the first engine."""
    counted = ("rows", "running", "waiting", "waiting_tokens", "pages_held", "pages", "shared_tokens", "preemptions")
    sums: dict[str, Any] = {name: sum(getattr(load, name) for load in loads) for name in counted}
    return replace(loads[0], **sums)

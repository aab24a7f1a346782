"""Timing of calls on a noisy machine, as medians over turns."""

import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["Clock", "median_seconds", "seconds_of"]

TIMED = 4
"""Timed repetitions of a short run in a row, after two that are not timed."""
LONG_SECONDS = 0.02
"""Runs of at least this many seconds are timed once, after one run that is not timed. Compared with them, the effect of
what the run before left in the caches is small."""
Clock = Callable[[], float]
"""Seconds, ascending, from an arbitrary start."""


def median_seconds(runs: Sequence[Callable[[], None]], repeats: int, clock: Clock = time.perf_counter) -> list[float]:
    """Seconds of each run: the median over turns. Each time is taken relative to its turn, since a slower machine slows
    all runs.

    repeats   turns over all runs
    """
    turns = [[seconds_of(run, clock) for run in runs] for _ in range(repeats)]
    median_turn = statistics.median(sum(times) for times in turns)
    return [
        statistics.median(median_turn * taken / sum(times) for taken, times in zip(of_run, turns))
        for of_run in zip(*turns)
    ]


def seconds_of(run: Callable[[], None], clock: Clock = time.perf_counter) -> float:
    """Seconds of a run after a first one.

    Short runs are repeated in a row, as when text is generated, and the first repetitions are not timed. Otherwise the
    shortest steps seem a fifth longer, because of what the run before left in the caches.
    """
    run()  # late compilation, capture and allocation happen here
    seconds = _of(run, 1, clock)
    return seconds if seconds >= LONG_SECONDS else _of(run, TIMED, clock)


def _of(run: Callable[[], None], repetitions: int, clock: Clock) -> float:
    began = clock()
    for _ in range(repetitions):
        run()
    return (clock() - began) / repetitions

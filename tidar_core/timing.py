"""Timing of calls on a noisy machine, as medians over turns."""

import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["LEAST_RUNS", "Clock", "median_seconds"]

LEAST_RUNS = 2
"""Runs that are timed even if they exceed the budget."""
TIMED = 4
"""Timed repetitions of a short run in a row, after two that are not timed."""
LONG_SECONDS = 0.02
"""Runs of at least this many seconds are timed once, after one run that is not timed. Compared with them, the effect of
what the run before left in the caches is small."""
Clock = Callable[[], float]
"""Seconds, ascending, from an arbitrary start."""


def median_seconds(
    runs: Sequence[Callable[[], None]],
    repeats: int,
    clock: Clock = time.perf_counter,
    *,
    budget: float = float("inf"),
) -> list[float]:
    """Seconds of each run: the median over turns. Fewer values than runs if the budget ends in the first turn.

    Short runs are repeated in a row, as when text is generated, and the first repetitions are not timed. Otherwise the
    shortest steps seem a fifth longer, because of what the run before left in the caches. Each time is taken relative
    to its turn, since a slower machine slows all runs.

    repeats   turns over all runs, as long as the budget allows
    budget    seconds; the first LEAST_RUNS runs are timed even if they take longer
    """
    began, turns = clock(), list[list[float]]()
    while len(turns) < repeats:
        started, times = clock(), list[float]()
        for index, run in enumerate(runs):
            spent = clock() - began
            if not turns and index >= LEAST_RUNS and spent + 2 * times[-1] > budget:
                break
            times.append(_timed(run, clock))
        runs = runs[: len(times)]
        turns.append(times)
        if clock() - began + (clock() - started) > budget:
            break
    median_turn = statistics.median(sum(times) for times in turns)
    return [
        statistics.median(median_turn * taken / sum(times) for taken, times in zip(of_run, turns))
        for of_run in zip(*turns)
    ]


def _timed(run: Callable[[], None], clock: Clock) -> float:
    run()  # late compilation, capture and allocation happen here
    seconds = _of(run, 1, clock)
    return seconds if seconds >= LONG_SECONDS else _of(run, TIMED, clock)


def _of(run: Callable[[], None], repetitions: int, clock: Clock) -> float:
    began = clock()
    for _ in range(repetitions):
        run()
    return (clock() - began) / repetitions

"""How long does a call take on a noisy machine?"""

import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["LEAST_RUNS", "Clock", "median_seconds"]

LEAST_RUNS = 2
"""Runs that are timed whatever they take."""
TIMED = 4
"""Repetitions of a short run in a row that count, after two that do not."""
LONG_SECONDS = 0.02
"""A run of this length or more counts at once, after one that does not: what its neighbour left in the caches is small
beside it."""
Clock = Callable[[], float]


def median_seconds(
    runs: Sequence[Callable[[], None]],
    repeats: int,
    clock: Clock = time.perf_counter,
    *,
    budget: float = float("inf"),
) -> list[float]:
    """Seconds of each run: the median over turns. Fewer values than runs where the budget ends in the first turn.

    Short runs are repeated in a row, as in a text, and the first repetitions are not timed: otherwise the shortest
    steps seem a fifth longer, because of what their neighbour left in the caches. Each time is taken relative to its
    turn, since whatever slows the machine slows all runs.
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
    pace_of_all = statistics.median(sum(times) for times in turns)
    return [
        statistics.median(pace_of_all * taken / sum(times) for taken, times in zip(of_run, turns))
        for of_run in zip(*turns)
    ]


def _timed(run: Callable[[], None], clock: Clock) -> float:
    run()  # what is compiled, captured or allocated late is paid for here
    seconds = _of(run, 1, clock)
    return seconds if seconds >= LONG_SECONDS else _of(run, TIMED, clock)


def _of(run: Callable[[], None], repetitions: int, clock: Clock) -> float:
    began = clock()
    for _ in range(repetitions):
        run()
    return (clock() - began) / repetitions

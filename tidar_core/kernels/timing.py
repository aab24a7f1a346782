"""Timing of calls on a CUDA device, without the time that launching them takes."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch

__all__ = ["graph_time"]


def graph_time(calls: Sequence[Callable[[], object]], *, replays: int = 9) -> float:
    """Microseconds of one call: the median replay of one graph that captured all calls, divided by their number.

    calls  the same work on different memory, enough of it not to be found in a cache
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return 1000 * median(before.elapsed_time(after) for before, after in pairwise(marks)) / len(calls)

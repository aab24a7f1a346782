"""Rare garbage collection while a process starts.

Why does a process start sooner when Python looks for garbage rarely? Large libraries make millions of objects while
they are imported, and next to no garbage. With Python's own thresholds, looking for some takes a fifth to a fourth of
the time of their imports.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["rare_collection"]

THRESHOLDS = 50_000, 20, 10
"""Number of objects more than before at which Python looks through the youngest ones. Then the number of such looks
after which it looks through older ones, and the same for the oldest. Python 3.11's own: 700, 10, 10."""


@contextmanager
def rare_collection() -> Iterator[None]:
    """Within it, Python looks for garbage rarely; what lives at its end is never looked through again."""
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.collect()
        gc.freeze()

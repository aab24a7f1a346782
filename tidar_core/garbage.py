"""A process that looks for garbage rarely starts sooner.

How often does a process look for garbage? Large libraries make millions of objects while they are imported, and next to
no garbage. With Python's own thresholds, looking for some takes a fourth of the time of these imports.
"""

import gc

__all__ = ["collect_rarely"]

THRESHOLDS = 50_000, 20, 10
"""Number of objects more than before at which Python looks through the youngest ones. Then the number of such looks
after which it looks through older ones, and the same for the oldest. Python's own: 700, 10, 10."""


def collect_rarely() -> None:
    """Let this process look for garbage rarely. To be called at its start, before anything large is imported."""
    gc.set_threshold(*THRESHOLDS)

"""Correction of a latency table by the decode steps that are served.

How long do decode steps take in service, compared with the table?

A table that was measured within seconds is coarse, and the machine changes. Every served step corrects the table. The
deviation that all steps share is the drift of the machine; the rest is an error of the table at that many query tokens.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidar_core.planning.latency_table import Curve, LatencyTable

__all__ = ["ServedLatency"]

DRIFT_GAIN, LEAST_GAIN = 0.2, 0.1
"""Share of a deviation that goes to the drift, and the least share that goes to the correction of its query tokens."""
LARGEST_DEVIATION = math.log(4.0)
"""Largest log ratio that counts: a pause of the machine is no property of a plan."""
CONTEXT_STEP = 256
"""Tokens of context that share one expectation."""
MOST_EXPECTATIONS = 512
"""Expectations that are kept; all are dropped when more would be."""


@dataclass(slots=True)
class _Correction:
    log_ratio: float = 0.0
    """Logarithm of served seconds over the seconds of the table, without the drift of the machine."""
    steps: int = 0


@dataclass(slots=True)
class ServedLatency:
    """A latency table, corrected by the steps of one decoder."""

    table: LatencyTable
    _corrections: dict[int, dict[int, _Correction]] = field(default_factory=dict)
    """Corrections by batch, then by query tokens of one sequence."""
    _drift: float | None = None
    """Logarithm of the machine's slowdown since the table was measured; None before the first step."""
    _expected: dict[tuple[int, int, int, bool], float] = field(default_factory=dict)

    def seconds(self, rows: int, batch: int, context: int, *, drafts: bool = False) -> float:
        """Expected seconds of a forward at the machine's speed when the table was measured: drift is left out.

        rows    query tokens of one sequence
        drafts  masks are among them
        """
        return self.curve(batch, context, drafts=drafts).seconds(rows)

    def curve(self, batch: int, context: int, *, drafts: bool = False) -> Curve:
        """Curve over query tokens at one batch and context; `seconds` reads it.

        The correction is linear between corrected numbers of query tokens, and constant beyond them.
        """
        curve, corrections = self.table.curve(batch, context, drafts=drafts), self._corrections.get(batch)
        if not corrections:
            return curve
        rows = tuple(sorted({*curve.rows, *corrections}))
        ratios = {count: correction.log_ratio for count, correction in sorted(corrections.items())}
        return Curve(rows, tuple(curve.seconds(count) * math.exp(_between(ratios, count)) for count in rows))

    def observe(self, rows: int, batch: int, context: int, drafts: bool, seconds: float) -> None:
        """Learn from one served step; a time of 0 or less is ignored, since its clock did not advance."""
        if seconds <= 0:
            return
        corrections = self._corrections.setdefault(batch, {})
        correction = corrections.setdefault(rows, _Correction())
        expected = self._expectation(rows, batch, context, drafts)
        ratio = math.log(seconds / expected)
        self._drift = ratio if self._drift is None else self._drift
        deviation = ratio - self._drift - correction.log_ratio
        deviation = min(max(deviation, -LARGEST_DEVIATION), LARGEST_DEVIATION)
        correction.steps += 1
        correction.log_ratio += max(LEAST_GAIN, 1 / (correction.steps + 1)) * deviation
        self._drift += DRIFT_GAIN * deviation

    def _expectation(self, rows: int, batch: int, context: int, drafts: bool) -> float:
        key = (rows, batch, context // CONTEXT_STEP, drafts)
        if key not in self._expected:
            if len(self._expected) >= MOST_EXPECTATIONS:
                self._expected.clear()
            middle = (context // CONTEXT_STEP) * CONTEXT_STEP + CONTEXT_STEP // 2
            self._expected[key] = self.table.seconds(rows, batch, middle, drafts=drafts)
        return self._expected[key]


def _between(known: Mapping[int, float], rows: int) -> float:
    """Linear between the known numbers of query tokens, which ascend; constant beyond them."""
    counts, values = tuple(known), tuple(known.values())
    index = bisect_left(counts, rows)
    if index in (0, len(counts)):
        return values[min(index, len(counts) - 1)]
    share = (rows - counts[index - 1]) / (counts[index] - counts[index - 1])
    return values[index - 1] + share * (values[index] - values[index - 1])

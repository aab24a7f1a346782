"""Formula of the time of decode steps, corrected by the steps that are served.

How long do decode steps take in service, compared with the table?

A table that was measured within seconds is coarse, and the machine changes. Served steps of one shape share a mean. The
costs of the formula are fitted to these means, with the table's costs as prior. So a shape that was never served is
corrected too. A deviation that all steps share is the drift of the machine. Besides, each shape wanders for itself. So
a step of a shape that was not run lately is believed more than one of many in a row.
"""

import math
from dataclasses import dataclass, field

from tidar_core.planning.latency_formula import LatencyFormula, LatencyPoint, Weighted
from tidar_core.planning.latency_table import LatencyTable

__all__ = ["ServedLatency"]

DRIFT_VARIANCE = 0.0025
"""Variance of the drift before each step, of its logarithm."""
TABLE_SPREAD, MEAN_ERROR = 0.3, 0.1
"""Standard deviations of logarithms. The first is that of a cost, or of a shape's time, from the table's. The second is
that of a shape from the best formula."""
NOISE, LEAST_NOISE, NOISE_GAIN = 0.07**2, 0.02**2, 0.02
"""Variance of the logarithm of one step from the typical one: the first guess, the least, and the share of a step in
its mean."""
WANDERING, LEAST_WANDERING, WANDERED = 0.003, 1e-4, 5.0
"""Variance that the logarithm of a shape's time over that of the others gains in a second. The numbers are the first
guess, the least, and the seconds for which the guess counts. Another process that uses memory slows a step of one token
down, and hardly one of many."""
MOST_WANDERED = 0.02
"""Most variance that a shape gains, however old: much of a deviation from the table is a property of the shape."""
FADING, LONG_AGO = 0.99, 0.25
"""Decay of what was seen of the wandering, with each step of a shape that was not run for so many seconds."""
LARGEST_DEVIATION = math.log(1.25)
"""Largest log ratio of a step that counts, beside the doubt about its shape: a pause is no property of a plan. A step
that is too fast counts in full, for nothing lets a machine be faster than it is."""
MEAN_GAIN, LARGEST_RATIO = 0.02, 4.0
"""Share of a step in the mean ratio of measured and typical times, and the largest ratio that counts."""
MOST_SHAPES = 64
"""Shapes whose means are kept; the longest unused goes first."""


@dataclass(slots=True)
class _Shape:
    """Typical time of the steps of one shape."""

    rows: int
    batch: int
    drafts: bool
    context: float
    """Mean context."""
    log_seconds: float
    """Logarithm of the seconds, without the drift."""
    at: float
    """Time of its last step."""
    variance: float = TABLE_SPREAD**2
    """Variance of the logarithm after its last step."""

    def doubt(self, now: float, wandering: float) -> float:
        """Variance of the logarithm now.

        now        time, in seconds
        wandering  variance that a second adds
        """
        return self.variance + min(wandering * (now - self.at), MOST_WANDERED)

    def renew(self, deviation: float, gain: float, doubt: float, context: int, now: float) -> None:
        """Learn from a share of the deviation of one step."""
        self.variance, self.at = (1.0 - gain) * doubt, now
        self.log_seconds += gain * deviation
        self.context += gain * (context - self.context)

    def weighted(self, doubt: float) -> Weighted:
        """The mean as a measurement, weaker with the doubt about it."""
        return Weighted(
            LatencyPoint(
                rows=self.rows, batch=self.batch, context=round(self.context), drafts=self.drafts,
                seconds=math.exp(self.log_seconds),
            ),
            math.sqrt(MEAN_ERROR**2 + doubt),
        )  # fmt: skip


@dataclass(slots=True)
class ServedLatency:
    """A latency table, corrected by the steps of one decoder."""

    table: LatencyTable
    drift: float = 0.0
    """Logarithm of the machine's slowdown since the table was measured."""
    _mean_ratio: float = 1.0
    """Mean time of a step over its typical time, which is less: times are spread to one side."""
    _formula: LatencyFormula = field(init=False)
    _own: dict[tuple[int, int, bool], float] = field(default_factory=dict)
    """Logarithm of the served time over the formula's, by query tokens of one sequence, batch and drafts."""
    _shapes: dict[tuple[int, int, int, bool], _Shape] = field(default_factory=dict)
    _now: float = 0.0
    """Time of the last step, of the clock of `observe`."""
    _noise: float = NOISE
    _wandered: tuple[float, float] = (WANDERING * WANDERED, WANDERED)
    """Variance that shapes gained while they were not run, and the seconds of it."""

    def __post_init__(self) -> None:
        self._formula = self.table.formula

    @property
    def slowdown(self) -> float:
        """Mean time of a step now over its time in `seconds`, the same for all steps."""
        return math.exp(self.drift) * self._mean_ratio

    def seconds(self, rows: int, batch: int, context: int, *, drafts: bool = False) -> float:
        """Expected seconds of a step at the machine's speed when the table was measured: drift is left out.

        rows    query tokens of one sequence
        drafts  masks are among them
        """
        own = self._own.get((rows, batch, drafts), 0.0)
        return self._formula.seconds(rows, batch, context, drafts=drafts) * math.exp(own)

    def doubt(self, rows: int, batch: int, *, drafts: bool) -> float:
        """Standard deviation of the logarithm of a shape's time over that of others, from its steps at any context.

        If there were none, that of the formula.
        """
        shape = rows, batch, drafts
        served = [x for x in self._shapes.values() if (x.rows, x.batch, x.drafts) == shape]
        return sum(1.0 / self._doubt(x) for x in served) ** -0.5 if served else MEAN_ERROR

    def steady_seconds(self, margin: float) -> float:
        """Seconds for which a shape's time is likely to keep within a margin of its logarithm."""
        return (0.5 * margin) ** 2 / self._wandering

    @property
    def _wandering(self) -> float:
        variance, seconds = self._wandered
        return max(variance / seconds, LEAST_WANDERING)

    def _doubt(self, shape: _Shape) -> float:
        return shape.doubt(self._now, self._wandering)

    def observe(self, rows: int, batch: int, context: int, drafts: bool, seconds: float, now: float) -> None:
        """Learn from one served step; seconds of 0 or less are ignored, since its clock did not advance.

        now   time at its end, in seconds: what was learned long ago is doubted
        """
        if seconds <= 0:
            return
        self._now = max(self._now, now - seconds)
        key = (rows, batch, (context + 1).bit_length(), drafts)
        shape = self._shapes.get(key)
        if shape is None:
            expected = math.log(self.seconds(rows, batch, context, drafts=drafts))
            shape = self._shapes[key] = _Shape(rows, batch, drafts, context, expected, self._now)
        deviation, doubt = math.log(seconds) - self.drift - shape.log_seconds, self._doubt(shape)
        self._mean_ratio += MEAN_GAIN * (min(math.exp(deviation), LARGEST_RATIO) - self._mean_ratio)
        deviation = min(deviation, LARGEST_DEVIATION + 2.0 * math.sqrt(doubt))
        self._learn_spread(shape, deviation)
        variance = DRIFT_VARIANCE + doubt + self._noise
        shape.renew(deviation, doubt / variance, doubt, context, now)
        self._now = now
        self.drift += DRIFT_VARIANCE / variance * deviation
        if len(self._shapes) > MOST_SHAPES:
            del self._shapes[min(self._shapes, key=lambda known: self._shapes[known].at)]

    def _learn_spread(self, shape: _Shape, deviation: float) -> None:
        """Learn how much steps of one shape differ: at once, which is noise, and after a while."""
        age, unexpected = self._now - shape.at, deviation**2 - shape.variance - self._noise
        if age >= LONG_AGO:
            variance, seconds = self._wandered
            self._wandered = FADING * variance + unexpected, FADING * seconds + age
        elif shape.variance < self._noise:
            self._noise = max(self._noise + NOISE_GAIN * unexpected, LEAST_NOISE)

    def refit(self) -> None:
        """Fit the costs of the formula to all that was served."""
        if not self._shapes:
            return
        self._share_drift()
        measured = [shape.weighted(self._doubt(shape)) for shape in self._shapes.values()]
        self._formula = self.table.formula.fitted(measured, spread=TABLE_SPREAD, start=self._formula)
        sums: dict[tuple[int, int, bool], tuple[float, float]] = {}
        for shape in self._shapes.values():
            key = (shape.rows, shape.batch, shape.drafts)
            found = self._formula.seconds(shape.rows, shape.batch, round(shape.context), drafts=shape.drafts)
            weight, (weights, ratios) = 1.0 / self._doubt(shape), sums.get(key, (1.0 / MEAN_ERROR**2, 0.0))
            sums[key] = (weights + weight, ratios + weight * (shape.log_seconds - math.log(found)))
        self._own = {key: ratios / weights for key, (weights, ratios) in sums.items()}

    def _share_drift(self) -> None:
        """Move the ratio to the table that all served shapes have in common into the drift.

        Otherwise drift and means could grow without end in opposite directions.
        """
        weights = ratios = 0.0
        for shape in self._shapes.values():
            expected = self.table.formula.seconds(shape.rows, shape.batch, round(shape.context), drafts=shape.drafts)
            weight = 1.0 / (MEAN_ERROR**2 + self._doubt(shape))
            weights, ratios = weights + weight, ratios + weight * (shape.log_seconds - math.log(expected))
        self.drift += ratios / weights
        for shape in self._shapes.values():
            shape.log_seconds -= ratios / weights

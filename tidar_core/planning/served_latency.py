"""Formula of the time of decode steps, corrected by the steps that are served.

How long do decode steps take in service, compared with the table?

A table that was measured within seconds is coarse, and the machine changes. Served steps of one shape share a mean. The
costs of the formula are fitted to these means, with the table's costs as prior. So a shape that was never served is
corrected too. A deviation that all steps share is the drift of the machine.
"""

import math
from dataclasses import dataclass, field

from tidar_core.planning.latency_formula import LatencyFormula, LatencyPoint, Weighted
from tidar_core.planning.latency_table import LatencyTable

__all__ = ["ServedLatency"]

DRIFT_GAIN, LEAST_GAIN = 0.2, 0.02
"""Share of a deviation that goes to the drift, and the least share that goes to the mean of its shape."""
FIRST_STEPS = 3
"""Steps of a shape that count as its first; the deviations of later steps count as drift."""
FIRST_DEVIATION, LARGEST_DEVIATION = math.log(4.0), math.log(1.25)
"""Largest log ratios that count, of the first steps of a shape and of later steps: a pause is no property of a plan."""
TABLE_SPREAD = 0.2
"""Standard deviation of the logarithm of a cost in service from the cost in the table."""
STEP_NOISE, MEAN_ERROR, MOST_STEPS = 0.1, 0.1, 50
"""Relative noise of one step, error of a mean that does not fall with its steps, and the most steps that count."""
MEAN_GAIN, LARGEST_RATIO = 0.02, 4.0
"""Share of a step in the mean ratio of measured and typical times, and the largest ratio that counts."""
HALF_LIFE = 2000
"""Steps of any shape after which a mean that was not renewed counts half."""
LEAST_WEIGHT = 1e-6
"""Least weight of a step, however old: a weight is never 0."""
MOST_SHAPES = 64
"""Shapes whose means are kept; the longest unused goes first."""
KNOWN_STEPS = 4
"""Steps of a shape after which its time is known until they count less than one."""
OWN_STEPS = 4
"""Steps of a shape after which its own mean counts as much as the formula."""


@dataclass(slots=True)
class _Shape:
    """Mean of the steps of one shape."""

    rows: int
    batch: int
    drafts: bool
    context: float
    """Mean context."""
    log_seconds: float
    """Mean logarithm of the seconds, without the drift."""
    steps: int = 0
    last: int = 0
    """Ordinal of its last step."""

    def weight(self, now: int) -> float:
        """Steps that the mean counts for."""
        return float(min(self.steps, MOST_STEPS) * max(0.5 ** ((now - self.last) / HALF_LIFE), LEAST_WEIGHT))

    def weighted(self, now: int) -> Weighted:
        """The mean as a measurement, weaker with age."""
        noise = math.hypot(MEAN_ERROR, STEP_NOISE / math.sqrt(self.weight(now)))
        return Weighted(
            LatencyPoint(
                rows=self.rows, batch=self.batch, context=round(self.context), drafts=self.drafts,
                seconds=math.exp(self.log_seconds),
            ),
            noise,
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
    _steps: int = 0

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

    def knows(self, rows: int, batch: int, *, drafts: bool) -> bool:
        """Whether enough steps of this shape were served at any context, and not all long ago."""
        shape = rows, batch, drafts
        served = [x for x in self._shapes.values() if (x.rows, x.batch, x.drafts) == shape]
        return sum(x.steps for x in served) >= KNOWN_STEPS and sum(x.weight(self._steps) for x in served) >= 1.0

    def observe(self, rows: int, batch: int, context: int, drafts: bool, seconds: float) -> None:
        """Learn from one served step; a time of 0 or less is ignored, since its clock did not advance."""
        if seconds <= 0:
            return
        self._steps += 1
        key = (rows, batch, (context + 1).bit_length(), drafts)
        shape = self._shapes.get(key)
        if shape is None:
            expected = math.log(self.seconds(rows, batch, context, drafts=drafts))
            shape = self._shapes[key] = _Shape(rows, batch, drafts, context, expected)
        deviation = math.log(seconds) - self.drift - shape.log_seconds
        self._mean_ratio += MEAN_GAIN * (min(math.exp(deviation), LARGEST_RATIO) - self._mean_ratio)
        shape.steps, shape.last = shape.steps + 1, self._steps
        most = FIRST_DEVIATION if shape.steps <= FIRST_STEPS else LARGEST_DEVIATION
        deviation = min(max(deviation, -most), most)
        gain = max(LEAST_GAIN, 1 / shape.steps)
        shape.log_seconds += gain * deviation
        shape.context += gain * (context - shape.context)
        if shape.steps > FIRST_STEPS:
            self.drift += DRIFT_GAIN * deviation
        if len(self._shapes) > MOST_SHAPES:
            del self._shapes[min(self._shapes, key=lambda known: self._shapes[known].last)]

    def refit(self) -> None:
        """Fit the costs of the formula to all that was served."""
        if not self._shapes:
            return
        self._share_drift()
        measured = [shape.weighted(self._steps) for shape in self._shapes.values()]
        self._formula = self.table.formula.fitted(measured, spread=TABLE_SPREAD, start=self._formula)
        sums: dict[tuple[int, int, bool], tuple[float, float]] = {}
        for shape in self._shapes.values():
            key = (shape.rows, shape.batch, shape.drafts)
            found = self._formula.seconds(shape.rows, shape.batch, round(shape.context), drafts=shape.drafts)
            steps, ratios = sums.get(key, (0, 0.0))
            ratio = shape.log_seconds - math.log(found)
            sums[key] = (steps + shape.steps, ratios + shape.steps * ratio)
        self._own = {key: ratios / (steps + OWN_STEPS) for key, (steps, ratios) in sums.items()}

    def _share_drift(self) -> None:
        """Move the ratio to the table that all served shapes have in common into the drift.

        Otherwise drift and means could grow without end in opposite directions.
        """
        weights = ratios = 0.0
        for shape in self._shapes.values():
            expected = self.table.formula.seconds(shape.rows, shape.batch, round(shape.context), drafts=shape.drafts)
            weight = shape.weight(self._steps)
            weights, ratios = weights + weight, ratios + weight * (shape.log_seconds - math.log(expected))
        self.drift += ratios / weights
        for shape in self._shapes.values():
            shape.log_seconds -= ratios / weights

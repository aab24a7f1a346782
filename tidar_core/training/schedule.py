"""Schedule of the learning rate.

Linear warm-up, then half a cosine down to the minimum (TiDAR, section 4.1). It runs over a number of train steps or
over a share of any other budget.
"""

import math
from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rates from the first update to the last."""

    peak: float
    minimum: float
    warmup: float
    """Share of the budget that passes before the peak is reached."""

    def at_step(self, step: int, steps: int) -> float:
        """Rate of train step `step` of 0..steps - 1.

        The first step of the warm-up has a rate above 0; the last step of all has the minimum.
        """
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return self.peak * (step + 1) / warmup
        return self._decayed((step - warmup) / max(1, steps - 1 - warmup))

    def at_share(self, share: float) -> float:
        """Rate after `share` of the budget, 0..1, is used: for runs limited by seconds, not by steps.

        Such a run is not reproducible to the last bit: the steps in a second depend on the machine.
        """
        if share < self.warmup:
            return self.peak * share / self.warmup
        return self._decayed((share - self.warmup) / max(1e-9, 1 - self.warmup))

    def _decayed(self, progress: float) -> float:
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

"""The end of a run that diverged, before it replaces its healthy checkpoints.

Which train steps had no finite loss or gradient, and how many in a row are too many?

DeepSpeed skips an update whose gradient is not finite, without a warning. A finite loss shows that the weights before
its step were healthy. So a checkpoint is known to be healthy once a later step has a finite loss.
"""

import logging
import math
from dataclasses import dataclass

from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import whole_checkpoints
from tidar_core.errors import DivergedError

__all__ = ["Health"]

LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Health:
    """The skipped updates of one run; the same on every worker."""

    job: TrainJob
    skipped: int
    """Skipped updates since the run began."""
    finite_step: int
    """Last train step with a finite loss: checkpoints of earlier steps are healthy."""
    logs: bool
    """Whether this worker logs skipped updates; only one worker does."""
    in_a_row: int = 0
    """Train steps without a finite loss and an update, up to now."""

    @property
    def lost(self) -> bool:
        """Whether the run has reached the job's limit."""
        return self.in_a_row >= self.job.max_skipped_updates

    def observe(self, step: int, *, applied: bool, loss: float) -> None:
        """Count a train step.

        loss  sum over its labels, on all workers
        """
        finite = math.isfinite(loss)
        self.skipped += not applied
        self.in_a_row = 0 if applied and finite else self.in_a_row + 1
        if finite:
            self.finite_step = step
        if self.in_a_row and self.logs:
            what = "its update was skipped" if not applied else "its loss is not finite"
            LOG.warning("train step %d: %s, the %d. in a row; loss %s", step, what, self.in_a_row, loss)

    def may_save(self, step: int) -> bool:
        """Whether the weights after this step are fit for a checkpoint, or for a bundle at the end."""
        if self.in_a_row == 0:
            return True
        last_with_finite_loss = step == self.job.steps and self.finite_step == step  # only its gradient overflowed
        if not last_with_finite_loss and self.logs:
            LOG.warning("train step %d: no checkpoint is written, because its update was skipped", step)
        return last_with_finite_loss

    def diverged(self, step: int, reason: str) -> DivergedError:
        """The error that ends the run."""
        healthy = [kept for kept in whole_checkpoints(self.job.checkpoints) if kept.cursor.step < self.finite_step]
        kept = f"{healthy[-1].uri} is the newest healthy checkpoint" if healthy else "there is no healthy checkpoint"
        return DivergedError(
            f"training of {self.job.output} diverged at train step {step}: {reason}; no bundle is written, and {kept}; "
            f"begin a new run with another output and a learning_rate below {self.job.learning_rate:g}"
        )

    def too_many(self, step: int) -> DivergedError:
        """The error of a run that reached the limit, or its end, without a finite loss and an update."""
        return self.diverged(
            step,
            f"{self.in_a_row} steps in a row had no finite loss or gradient, and their updates were skipped "
            f"(max_skipped_updates is {self.job.max_skipped_updates})",
        )

"""Progress of a job that runs in the cluster, shown where the job was started.

A task reports to an actor; a thread beside the driver reads the actor and shows its state (`progress`).
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.cluster.progress import job_progress

__all__ = ["remote_progress", "report_progress"]

POLL_SECONDS = 0.5


@contextmanager
def remote_progress(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """Handle of an actor, for `report_progress`; tasks may hold it. Reports are shown while the context is open."""
    reports = _Reports.remote()  # type: ignore[attr-defined]
    finished = threading.Event()

    def poll() -> None:
        with job_progress(title, total=total, unit=unit) as show:
            ended = False
            while not ended:
                ended = finished.wait(POLL_SECONDS)  # the last reports are shown as well
                show(*ray.get(reports.latest.remote()))

    thread = threading.Thread(target=poll, name="progress")
    thread.start()
    try:
        yield reports
    finally:
        finished.set()
        thread.join()
        ray.kill(reports)


def report_progress(reports: Any, completed: int, numbers: Mapping[str, float]) -> None:
    """Report the number of finished units, and figures by name, without waiting for an answer.

    reports   handle that `remote_progress` yields
    """
    reports.report.remote(completed, dict(numbers))


@ray.remote(num_cpus=0)
class _Reports:
    def __init__(self) -> None:
        self.completed, self.numbers = 0, dict[str, float]()

    def report(self, completed: int, numbers: dict[str, float]) -> None:
        self.completed = completed
        self.numbers |= numbers  # a figure that is measured seldom stays visible

    def latest(self) -> tuple[int, dict[str, float]]:
        return self.completed, self.numbers

"""Progress of a job that runs in the cluster, shown where the job was started.

A task reports to an actor; a thread beside the driver reads the actor and shows its state (`progress`).
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.cluster.console import stderr
from pipelines.cluster.progress import job_progress

__all__ = ["remote_progress", "report_line", "report_progress", "report_start"]

POLL_SECONDS = 0.5


@contextmanager
def remote_progress(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """Handle of an actor, for `report_progress`; tasks may hold it. Reports are shown while the context is open."""
    reports = _Reports.remote()  # pyrefly: ignore[missing-attribute]
    finished = threading.Event()

    def poll() -> None:
        with job_progress(title, total=total, unit=unit) as show:
            ended = False
            while not ended:
                ended = finished.wait(POLL_SECONDS)  # the last reports are shown as well
                *progress, lines = ray.get(reports.latest.remote())
                for line in lines:
                    stderr.print(line, markup=False, highlight=False, soft_wrap=True)
                show(*progress)

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


def report_line(reports: Any, line: str) -> None:
    """Report a line to be shown beside the progress, without waiting for an answer."""
    reports.add_line.remote(line)


def report_start(reports: Any, again: str) -> None:
    """Report that the work begins; the line `again` is shown if it had begun before."""
    reports.start.remote(again)


@ray.remote(num_cpus=0)
class _Reports:
    def __init__(self) -> None:
        self.completed, self.numbers = 0, dict[str, float]()
        self.lines, self.begun = list[str](), False

    def report(self, completed: int, numbers: dict[str, float]) -> None:
        self.completed = completed
        self.numbers |= numbers  # a figure that is measured seldom stays visible

    def add_line(self, line: str) -> None:
        self.lines.append(line)

    def start(self, again: str) -> None:
        self.lines += [again] if self.begun else []
        self.begun = True

    def latest(self) -> tuple[int, dict[str, float], list[str]]:
        lines, self.lines = self.lines, []
        return self.completed, self.numbers, lines

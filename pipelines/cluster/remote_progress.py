"""How does a job in the cluster tell the one who waits how far it is?

On a terminal by a bar; in a log, which a bar would leave no trace in before its end, by a line now and then.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.cluster.progress import job_progress, stderr

__all__ = ["log_line", "pin", "watched_board"]

POLL_SECONDS = 0.5
LINE_SECONDS = 30.0
"""Between two lines of a log."""


@contextmanager
def watched_board(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """A board to hand to tasks; while the context is open, what they pin is shown."""
    board = _Board.remote()  # type: ignore[attr-defined]
    finished = threading.Event()

    def look() -> None:
        written, before = time.monotonic(), -1
        with job_progress(title, total=total, unit=unit) as show:
            while not finished.wait(POLL_SECONDS):
                completed, numbers = ray.get(board.read.remote())
                show(completed, numbers)
                if not stderr.is_terminal and completed != before and time.monotonic() - written >= LINE_SECONDS:
                    written, before = time.monotonic(), completed
                    stderr.print(log_line(title, completed, total, unit, numbers), markup=False, highlight=False)

    watcher = threading.Thread(target=look, name="progress")
    watcher.start()
    try:
        yield board
    finally:
        finished.set()
        watcher.join()
        ray.kill(board)


def pin(board: Any, completed: int, numbers: Mapping[str, float]) -> None:
    """Tell how many units are done, and the numbers worth seeing; does not wait."""
    board.pin.remote(completed, dict(numbers))


def log_line(title: str, completed: int, total: int, unit: str, numbers: Mapping[str, float]) -> str:
    """What a log says at one moment."""
    words = [f"{title}: {completed}/{total} {unit}"]
    words += [f"{name} {value:,.4g}" for name, value in numbers.items() if name != "eta_seconds"]
    if (left := numbers.get("eta_seconds")) is not None:
        minutes, seconds = divmod(round(left), 60)
        words.append(f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return " ".join(words)


@ray.remote(num_cpus=0)
class _Board:
    def __init__(self) -> None:
        self.latest: tuple[int, dict[str, float]] = (0, {})

    def pin(self, completed: int, numbers: dict[str, float]) -> None:
        self.latest = completed, self.latest[1] | numbers  # what is measured seldom stays to be seen

    def read(self) -> tuple[int, dict[str, float]]:
        return self.latest

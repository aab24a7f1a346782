"""How does a job in the cluster tell the one who waits how far it is?"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from pipelines.progress import job_progress

__all__ = ["pin", "watched_board"]

POLL_SECONDS = 0.5


@contextmanager
def watched_board(title: str, *, total: int, unit: str) -> Iterator[Any]:
    """A board to hand to tasks; while the context is open, what they pin is shown as a progress bar."""
    board = _Board.remote()  # type: ignore[attr-defined]
    finished = threading.Event()

    def look() -> None:
        with job_progress(title, total=total, unit=unit) as show:
            while not finished.wait(POLL_SECONDS):
                show(*ray.get(board.read.remote()))

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


@ray.remote(num_cpus=0)
class _Board:
    def __init__(self) -> None:
        self.latest: tuple[int, dict[str, float]] = (0, {})

    def pin(self, completed: int, numbers: dict[str, float]) -> None:
        self.latest = completed, numbers

    def read(self) -> tuple[int, dict[str, float]]:
        return self.latest

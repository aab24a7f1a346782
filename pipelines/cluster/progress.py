"""Progress of a long job on standard error: a bar on a terminal, a line now and then in a log.

How much is done, how fast, and how much time is left? Standard output stays free for results.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipelines.cluster.console import figure, stderr

__all__ = ["Show", "job_progress", "log_line"]

Show = Callable[[int, Mapping[str, float]], None]
"""Function that shows progress: the number of finished units, and figures by name."""

LINE_SECONDS = 30.0
"""Time between two lines of a log."""


@contextmanager
def job_progress(title: str, *, total: int, unit: str, line_seconds: float = LINE_SECONDS) -> Iterator[Show]:
    """Progress over `total` units while the context is open.

    In a log, a line is written at most every `line_seconds` and only after a change. The last line is always written.
    """
    with _bar(title, total, unit) if stderr.is_terminal else _lines(title, total, unit, line_seconds) as show:
        yield show


def log_line(title: str, completed: int, total: int, unit: str, numbers: Mapping[str, float]) -> str:
    """One line of a log. The figure `eta_seconds` becomes the time left, as h:mm:ss."""
    words = [f"{title}: {completed}/{total} {unit}", *_figures(numbers)]
    if (left := numbers.get("eta_seconds")) is not None:
        minutes, seconds = divmod(round(left), 60)
        words.append(f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return " ".join(words)


@contextmanager
def _lines(title: str, total: int, unit: str, line_seconds: float) -> Iterator[Show]:
    written, shown = time.monotonic(), -1
    completed, numbers = 0, dict[str, float]()

    def write() -> None:
        nonlocal written, shown
        if completed != shown:
            written, shown = time.monotonic(), completed
            line = log_line(title, completed, total, unit, numbers)
            stderr.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(done: int, figures: Mapping[str, float]) -> None:
        nonlocal completed, numbers
        completed, numbers = done, dict(figures)
        if time.monotonic() - written >= line_seconds:
            write()

    try:
        yield show
    finally:
        write()


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Show]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=stderr) as progress:
        task = progress.add_task(title, total=total, numbers="")
        yield lambda done, numbers: progress.update(task, completed=done, numbers=" ".join(_figures(numbers)))


def _figures(numbers: Mapping[str, float]) -> list[str]:
    return [f"{name} {figure(value)}" for name, value in numbers.items() if name != "eta_seconds"]

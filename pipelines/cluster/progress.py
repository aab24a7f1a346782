"""How far is a long job, how fast, how much longer? Written to standard error, never to standard output."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Show", "job_progress", "stderr"]

Show = Callable[[int, Mapping[str, float]], None]
"""Called with how many units are done and the numbers worth seeing beside the bar."""

stderr = Console(stderr=True)


@contextmanager
def job_progress(title: str, *, total: int, unit: str) -> Iterator[Show]:
    """A bar over `total` units; in a log file, its last state alone."""
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

        def show(completed: int, numbers: Mapping[str, float]) -> None:
            words = " ".join(f"{name} {value:,.4g}" for name, value in numbers.items())
            progress.update(task, completed=completed, numbers=words)

        yield show

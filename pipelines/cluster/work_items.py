"""Runs work on many items with Ray Data: in tasks, or in a pool of actors that keep something large, such as a model.

Items and outcomes are pickled, so they may be any objects. Outcomes come back in any order, each as soon as it is
there. A TidarError is raised in the driver with its own type.
"""

import logging
import pickle
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.data

from pipelines.cluster.connection import connect, known_tasks
from tidar_core.errors import StorageError, TidarError

__all__ = ["ActorPool", "actor_outcomes", "task_outcomes"]

MOST_BLOCKS = 4096
"""Most tasks that Ray Data tracks at once; with more items, a task takes several items."""
RAY_DATA: Mapping[str, Any] = {
    "enable_progress_bars": False,
    "print_on_execution_start": False,
    "op_resource_reservation_enabled": False,
    "downstream_capacity_backpressure_ratio": None,
}

ItemWork = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPool:
    """Size of a pool of actors."""

    actors: int
    cpus: int
    """CPUs of an actor."""
    gpus: float
    """GPUs of an actor."""
    in_flight: int
    """Items that an actor works on at the same time."""


def task_outcomes(items: Sequence[Any], work: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """Do the work of each item in a task of one CPU; returns the outcomes in any order.

    The processes of tasks live on for later calls, with everything that they have cached.

    workers  tasks at a time
    """
    connect()
    known = min(known_tasks(workers), len(items))
    yield from _outcomes_of(items, partial(_in_task, work=work), batch_size=1, concurrency=known)


def actor_outcomes(items: Sequence[Any], make_work: Callable[[], ItemWork], pool: ActorPool) -> Iterator[Any]:
    """Do the work of each item in one of the actors; returns the outcomes in any order.

    make_work  called once in each actor; what it returns does the work of an item, and may wait for other items
    """
    connect()
    compute = ray.data.ActorPoolStrategy(
        size=min(pool.actors, len(items)),
        max_tasks_in_flight_per_actor=pool.in_flight,
        max_concurrent_calls_per_actor=pool.in_flight,
    )
    yield from _outcomes_of(
        items,
        _Actor,
        batch_size=1,
        compute=compute,
        fn_constructor_args=(make_work,),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )


def _outcomes_of(items: Sequence[Any], work: Any, **how: Any) -> Iterator[Any]:
    pickled = [{"item": pickle.dumps(item)} for item in items]
    with _ray_data_settings():
        blocks = ray.data.from_items(pickled, override_num_blocks=min(len(pickled), MOST_BLOCKS))
        for entry in blocks.map_batches(work, **how).iter_rows():
            outcome = pickle.loads(entry["outcome"])
            if isinstance(outcome, TidarError):
                raise outcome
            yield outcome


def _in_task(batch: dict[str, Any], work: Callable[[Any], Any]) -> dict[str, Any]:
    outcomes: list[Any] = []
    for item in batch["item"]:
        with _caught(outcomes):
            outcomes.append(work(pickle.loads(item)))
    return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}


class _Actor:
    """Keeps the work that all items of an actor share. It is made at the first item, so that its errors have a type."""

    def __init__(self, make_work: Callable[[], ItemWork]) -> None:
        self._make_work = make_work
        self._work: ItemWork | None = None

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outcomes: list[Any] = []
        for item in batch["item"]:
            with _caught(outcomes):
                if self._work is None:
                    self._work = self._make_work()
                outcomes.append(await self._work(pickle.loads(item)))
        return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}


@contextmanager
def _caught(outcomes: list[Any]) -> Iterator[None]:
    """Turn a TidarError or a disk's error into an outcome, because Ray Data would lose its type."""
    try:
        yield
    except TidarError as error:
        outcomes.append(error)
    except OSError as error:
        if error.errno is None:
            raise
        line = f"{error}; check the rights and the free space of this disk, then start the job again"
        outcomes.append(StorageError(line))


@contextmanager
def _ray_data_settings() -> Iterator[None]:
    """Ray Data prints nothing, and always runs as many tasks as `concurrency` allows.

    Its reservations see no CPU in the first second of a stage, so they would let only one task run in it. Its
    backpressure compares the unread outcomes, a few hundred bytes, with the outcomes being read. Above a ratio it
    would let only one task run until the end of the stage.
    """
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before, level = {name: getattr(context, name) for name in RAY_DATA}, logger.level
    for name, value in RAY_DATA.items():
        setattr(context, name, value)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)

"""Connection to the Ray cluster of a job, and the original error of a failed task."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import ray
from ray._private import services
from ray._private.node import Node
from ray.exceptions import RayTaskError

from tidar_core.artifacts.network.cluster_address import given_cluster
from tidar_core.artifacts.network.local_cluster import start_local_cluster
from tidar_core.artifacts.store.muted import muted_stderr
from tidar_core.errors import ConfigError, TidarError

__all__ = ["connect", "disconnect", "known_tasks", "on_a_node", "original_error", "require_room"]

Result = TypeVar("Result")
OBJECT_STORE_BYTES = 512 * 2**20
"""Size of a local cluster's object store: only metadata and small batches travel through it."""

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else each worker without accelerators warns
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def connect(cpus: int | None = None) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start a local cluster of `cpus` (default: all) if it is not set.

    Does nothing when this process is connected already. Raises ConfigError if nothing answers at the address.
    """
    if ray.is_initialized():
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with given_cluster() as address, warnings.catch_warnings(), muted_stderr():
        warnings.simplefilter("ignore")  # Ray's own deprecations; our users cannot act on them
        if address is not None:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            start_local_cluster(
                partial(
                    ray.init,
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                ),
                Node,
                services,
            )


def disconnect() -> None:
    """Disconnect from the cluster; a local cluster stops."""
    ray.shutdown()


def on_a_node(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call the function on a node of the cluster; a local cluster has this machine alone, so it is called here.

    A task would first start a process, which takes seconds.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return function(*arguments)
    outcome: Result = ray.get(ray.remote(function).remote(*arguments))
    return outcome


def known_tasks(workers: int) -> int:
    """How many one-CPU tasks to submit at once so that `workers` of them are always running.

    Ray Data looks for finished tasks only a few times a second. A local cluster cannot grow: if it has no more CPUs
    than `workers`, twice as many tasks are submitted. A free CPU then starts the next one at once.
    """
    grows = bool(os.environ.get("RAY_ADDRESS"))
    return workers if grows or workers < ray.cluster_resources().get("CPU", 0) else 2 * workers


def require_room(cpus: int, gpus: float) -> None:
    """Raise ConfigError if a worker needs more than a cluster has that cannot grow; it would wait for ever."""
    found = ray.cluster_resources()
    for needed, kind, key in ((cpus, "CPU", "cpus_per_worker"), (gpus, "GPU", "gpus_per_worker")):
        has = int(found.get(kind, 0))
        if needed > has and not os.environ.get("RAY_ADDRESS"):
            raise ConfigError(f"{key} is {needed:g}; this machine has {has} {kind}s for Ray; lower {key}")


def original_error(error: BaseException) -> BaseException:
    """The TidarError inside an error that Ray wrapped, or the error itself if it contains no TidarError."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        if isinstance(current, TidarError) and not isinstance(current, RayTaskError):
            return current
        seen.append(current)
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__
    return error

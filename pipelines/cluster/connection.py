"""Which Ray cluster does a job run on, and what did a task really say when it failed?"""

import logging
import os
import warnings

import ray
from ray.exceptions import RayTaskError

from tidar_core.artifacts.network.cluster_address import given_cluster
from tidar_core.artifacts.store.muted import muted_stderr
from tidar_core.errors import TidarError

__all__ = ["connect", "disconnect", "known_tasks", "original_error"]

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a local cluster: only metadata and small batches travel through it."""

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else each worker without accelerators warns
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def connect(cpus: int | None = None) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start a local one of `cpus` (default: all) if that is not set.

    Does nothing when this process is connected already. Raises ConfigError for an address that does not answer.
    """
    if ray.is_initialized():
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with given_cluster() as address, warnings.catch_warnings(), muted_stderr():
        warnings.simplefilter("ignore")  # Ray's own deprecations, none of which a user of ours can act on
        if address is not None:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
            )


def disconnect() -> None:
    """Leave the cluster; a local one ends."""
    ray.shutdown()


def known_tasks(workers: int) -> int:
    """Of how many tasks of one CPU each Ray should know, so that `workers` of them always run.

    Ray Data sees a few times a second who is done. Where there are no more CPUs than `workers`, nor will be, as in a
    local cluster, twice as many can be known: a CPU that is done takes the next one up at once.
    """
    grows = bool(os.environ.get("RAY_ADDRESS"))
    return workers if grows or workers < ray.cluster_resources().get("CPU", 0) else 2 * workers


def original_error(error: BaseException) -> BaseException:
    """The TidarError inside an error that Ray wrapped, or the error itself if there is none."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        if isinstance(current, TidarError) and not isinstance(current, RayTaskError):
            return current
        seen.append(current)
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__
    return error

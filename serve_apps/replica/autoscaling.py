"""How many replicas does a service need?

What runs needs its share of rows, what waits as many replicas again as work it off in time, and the caches must not
fill up. Replicas say how busy they are; Serve's controller asks the policy here, and holds each decision for a while
before it follows it. The controller may run where this project is not installed: the policy is sent to it by value, so
it uses nothing of ours from other files.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_apps.messages.replica_load import Load
from serve_apps.settings import ServeSettings

__all__ = ["Busy", "Policy", "autoscaling", "replicas_needed", "stats"]

LOOKS = 3
"""The mean of so many reports of a replica counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """One replica, lately."""

    rows: float
    """Share of its rows that are taken."""
    kv: float
    """Share of its cache's pages that are taken."""
    waiting_tokens: float
    """Tokens that wait for a row, to be read or expected to be written."""
    tokens_per_forward: float = 0.0
    """Read and written, over all texts; 0 before the first forward."""
    forwards_per_second: float = 0.0


def replicas_needed(replicas: Sequence[Busy], *, queue_seconds: float, kv_use: float) -> float:
    """A number of replicas with a fraction, to be rounded up; 0 where there is nothing to do.

    queue_seconds  what waits shall be worked off in this time
    kv_use         share of the pages that may be taken
    """
    paces = [b.tokens_per_forward * b.forwards_per_second for b in replicas if b.forwards_per_second]
    waiting = sum(b.waiting_tokens for b in replicas)
    queue = waiting / (sum(paces) / len(paces) * queue_seconds) if paces else 0.0
    return max(sum(b.rows for b in replicas) + queue, sum(b.kv for b in replicas) / kv_use)


class Policy:
    """Serve's hook: asked over and over how many replicas there shall be."""

    def __init__(self, queue_seconds: float, kv_use: float) -> None:
        self._queue_seconds, self._kv_use = queue_seconds, kv_use

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number, and nothing to be remembered. Until a replica has said how busy it is, all stays as it is."""
        told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        replicas = [
            Busy(**{name: told[name][replica] for name in Busy.__slots__ if replica in told.get(name, {})})
            for replica in told.get("rows", {})
        ]
        if not replicas:
            return context.target_num_replicas, {}
        return replicas_needed(replicas, queue_seconds=self._queue_seconds, kv_use=self._kv_use), {}


def stats(loads: Sequence[Load]) -> dict[str, float]:
    """What a replica tells the policy, from the loads of its engines; `Busy` as Serve carries it.

    The fullest engine is what counts; the pace is the first one's, and left out while nobody knows it.
    """
    told = {
        "rows": max(load.running / load.rows for load in loads),
        "kv": max(load.pages_held / load.pages for load in loads),
        "waiting_tokens": float(sum(load.waiting_tokens for load in loads)),
    }
    if loads[0].forwards_per_second:
        told["tokens_per_forward"] = loads[0].tokens_per_forward
        told["forwards_per_second"] = loads[0].forwards_per_second
    return told


def autoscaling(settings: ServeSettings) -> AutoscalingConfig:
    """Serve's own words for it. The first replica starts at once: what is wrong with a bundle shows then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Serve would rather have the interval in the environment of each of its nodes
        return AutoscalingConfig(
            min_replicas=settings.min_replicas,
            initial_replicas=max(1, settings.min_replicas),
            max_replicas=settings.max_replicas,
            metrics_interval_s=settings.scale_look_seconds,
            look_back_period_s=LOOKS * settings.scale_look_seconds,
            upscale_delay_s=settings.scale_up_seconds,
            downscale_delay_s=settings.scale_down_seconds,
            policy=AutoscalingPolicy(
                policy_function=Policy,
                policy_kwargs={"queue_seconds": settings.scale_queue_seconds, "kv_use": settings.scale_kv_use},
            ),
        )

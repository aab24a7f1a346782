"""The number of replicas that a service needs.

Replicas = share of busy slots + queued tokens / (throughput x scale_queue_seconds); more if KV caches are too full.
Replicas report their load. Serve's controller calls the policy, and holds each decision for a while before it acts. The
controller may run where this project is not installed. Serve sends the policy by value, so the policy uses no other
file of the project.
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
"""Number of reports of a replica whose mean counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """Recent load of one replica."""

    rows: float
    """Share of its slots that are taken."""
    kv: float
    """Share of its cache's pages that are taken."""
    waiting_tokens: float
    """Tokens of the texts that wait for a slot: their prompts and their expected length."""
    tokens_per_forward: float = 0.0
    """Mean over all texts, prompt tokens included; 0 before the first forward."""
    forwards_per_second: float = 0.0


def replicas_needed(replicas: Sequence[Busy], *, queue_seconds: float, kv_use: float) -> float:
    """Number of replicas with a fraction, to be rounded up; 0 without any texts.

    queue_seconds  time in which the waiting tokens shall be decoded
    kv_use         share of the pages that may be taken
    """
    throughputs = [b.tokens_per_forward * b.forwards_per_second for b in replicas if b.forwards_per_second]
    waiting = sum(b.waiting_tokens for b in replicas)
    queue = waiting / (sum(throughputs) / len(throughputs) * queue_seconds) if throughputs else 0.0
    return max(sum(b.rows for b in replicas) + queue, sum(b.kv for b in replicas) / kv_use)


class Policy:
    """Serve's hook: called regularly for the number of replicas."""

    def __init__(self, queue_seconds: float, kv_use: float) -> None:
        self._queue_seconds, self._kv_use = queue_seconds, kv_use

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas, and an empty state. Without any report of a replica, the number stays the same."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        replicas = [
            Busy(**{name: metrics[name][replica] for name in Busy.__slots__ if replica in metrics.get(name, {})})
            for replica in metrics.get("rows", {})
        ]
        if not replicas:
            return context.target_num_replicas, {}
        return replicas_needed(replicas, queue_seconds=self._queue_seconds, kv_use=self._kv_use), {}


def stats(loads: Sequence[Load]) -> dict[str, float]:
    """Report of a replica for the policy, from the loads of its engines: the fields of `Busy`.

    The fullest engine counts. The throughput belongs to the first engine, and is left out while it is unknown.
    """
    report = {
        "rows": max(load.running / load.rows for load in loads),
        "kv": max(load.pages_held / load.pages for load in loads),
        "waiting_tokens": float(sum(load.waiting_tokens for load in loads)),
    }
    if loads[0].forwards_per_second:
        report["tokens_per_forward"] = loads[0].tokens_per_forward
        report["forwards_per_second"] = loads[0].forwards_per_second
    return report


def autoscaling(settings: ServeSettings) -> AutoscalingConfig:
    """Configuration of Serve. The first replica starts at once, so that errors of a bundle appear at the start."""
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

"""Load of one engine, read from its scheduler."""

import os

from serve_apps.messages.replica_load import Load
from serve_apps.replica.throughput import ThroughputEstimate
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.planning.planner import AutoPlanner

__all__ = ["load_of"]


def load_of(scheduler: Scheduler, throughput: ThroughputEstimate, replica: str) -> Load:
    """Load of an engine, under the name of its replica.

    throughput  measured throughput of the decoder
    """
    planner = scheduler.planner
    mode, expected = "", None
    if isinstance(planner, AutoPlanner):
        mode, expected = planner.choice.mode, planner.expected_over_ar
    elif isinstance(planner, FixedMode):
        mode = planner.mode
    return Load(
        replica=replica,
        pid=os.getpid(),
        decoder_pid=os.getpid(),
        rows=scheduler.decoder.slots,
        running=scheduler.taken_slots,
        waiting=scheduler.waiting,
        waiting_tokens=throughput.expected(scheduler.queued),
        tokens_per_forward=throughput.tokens_per_forward,
        forwards_per_second=throughput.forwards_per_second,
        pages_held=scheduler.pool.held,
        pages=scheduler.pool.pages,
        shared_tokens=scheduler.shared_tokens,
        preemptions=scheduler.preemptions,
        mode=mode,
        expected_over_ar=expected,
    )

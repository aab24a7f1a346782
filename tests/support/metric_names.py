"""Names of the metrics that the service exports.

The service's own code produces the exposition, and a parser reads it as Prometheus would.
"""

import asyncio
from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from serve_apps.messages.replica_load import Load
from serve_apps.messages.request_timing import RequestTiming
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.rollout.alias_watcher import STEPS
from serve_apps.telemetry.metrics import Counters, gauges
from serve_apps.telemetry.version_metrics import version_metrics


def exported():
    """Names without the prefix; each part of a histogram has its own name."""
    counters = Counters("m")
    counters.count_answer(200)
    counters.count_abandoned("body")
    counters.count_tokens(UsageCounts(1, 2, (0, 1)))
    asyncio.run(
        pass_through(counters, [TextDelta("a", "stop", UsageCounts(1, 2), timing=RequestTiming(0.1, 0.1, 0.1))])
    )
    text = counters.exposition() + gauges("m", [Load(**{f.name: "x" if f.type is str else 1 for f in fields(Load)})])
    report = VersionReport(
        replica="a", version="1", fingerprint="f", bundle_hash="b", state="champion", problem="", totals=VersionStats()
    )
    text += version_metrics("m", [report], dict.fromkeys(STEPS, 0))
    samples = (s.name for family in text_string_to_metric_families(text) for s in family.samples)
    return {name.removeprefix("tidar:") for name in samples if name.startswith("tidar:")}


async def pass_through(counters, deltas):
    """Passes the deltas of a streamed text through the counters, which time them."""

    async def source():
        for delta in deltas:
            yield 0, delta

    return [delta async for _, delta in counters.timed(source(), streamed=True)]

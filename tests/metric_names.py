"""Which metrics does the service export? Asked of the service's own code, as Prometheus would read it."""

import asyncio
from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from serve_apps.alias_watch import STEPS
from serve_apps.lap import Lap
from serve_apps.metrics import Counters, gauges
from serve_apps.pieces import Piece, Tally
from serve_apps.replica_load import Load
from serve_apps.version_metrics import version_metrics
from serve_apps.version_totals import VersionReport, VersionTotals


def exported():
    """Names after the prefix, a histogram's parts one by one."""
    counters = Counters("m")
    counters.count_answer(200)
    counters.count_abandoned("body")
    counters.count_tokens(Tally(1, 2, (0, 1)))
    asyncio.run(pass_through(counters, [Piece("a", "stop", Tally(1, 2), lap=Lap(0.1, 0.1, 0.1))]))
    text = counters.exposition() + gauges("m", [Load(**{f.name: "x" if f.type is str else 1 for f in fields(Load)})])
    report = VersionReport(
        replica="a", version="1", fingerprint="f", bundle_hash="b", state="champion", problem="", totals=VersionTotals()
    )
    text += version_metrics("m", [report], dict.fromkeys(STEPS, 0))
    samples = (s.name for family in text_string_to_metric_families(text) for s in family.samples)
    return {name.removeprefix("tidar:") for name in samples if name.startswith("tidar:")}


async def pass_through(counters, pieces):
    """Have the pieces of a streamed text timed."""

    async def source():
        for piece in pieces:
            yield 0, piece

    return [piece async for _, piece in counters.timed(source(), streamed=True)]

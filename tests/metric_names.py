"""Which metrics does the service export? Asked of the service's own code, as Prometheus would read it."""

from dataclasses import fields

from prometheus_client.parser import text_string_to_metric_families

from serve_apps.metrics import Counters, gauges
from serve_apps.replica_load import Load


def exported():
    """Names after the prefix, a histogram's parts one by one."""
    counters = Counters("m")
    counters.count_answer(200)
    text = counters.exposition() + gauges("m", [Load(**{f.name: "x" if f.type is str else 1 for f in fields(Load)})])
    samples = (s.name for family in text_string_to_metric_families(text) for s in family.samples)
    return {name.removeprefix("tidar:") for name in samples if name.startswith("tidar:")}

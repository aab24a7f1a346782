"""Prometheus metrics of the versions of a model."""

from collections.abc import Callable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.rollout.alias_watcher import STEPS
from serve_apps.telemetry.metrics import PREFIX, text_of

__all__ = ["version_metrics"]

OUTCOMES = ("texts", "errors", "refused", "aborted")
TOTALS: dict[str, tuple[str, Callable[[VersionStats], float]]] = {
    "version_generation_tokens": ("Tokens that a version has generated.", lambda t: t.tokens),
    "version_forwards": ("Forwards that produced tokens of a text, counted for each text.", lambda t: t.forwards),
    "version_draft_tokens": ("Speculative tokens that a version has verified.", lambda t: t.draft_tokens),
    "version_accepted_tokens": ("Accepted speculative tokens.", lambda t: t.accepted_tokens),
}
"""Meaning and value of each counter."""
SECONDS: dict[str, tuple[str, Callable[[VersionStats], tuple[float, int]]]] = {
    "version_text_seconds": ("Time from a text's arrival at its replica to its end.", lambda t: (t.seconds, t.texts)),
    "version_first_token_seconds": (
        "Time from a text's arrival at its replica to its first token.",
        lambda t: (t.first_seconds, t.firsts),
    ),
}
"""Meaning, sum and count of each time."""


def version_metrics(model_name: str, reports: Sequence[VersionReport], steps: Mapping[str, int]) -> str:
    """Reports of each version at each replica, and events in the model's life, in Prometheus' text format.

    steps  counts of the alias watcher; empty without an alias watcher
    """
    names = ["model_name", "replica", "version"]
    entries = [([model_name, report.replica, report.version], report) for report in reports]
    info = GaugeMetricFamily(
        f"{PREFIX}:model_version_info", "1 for the state of a version at a replica.",
        labels=[*names, "state", "fingerprint"],
    )  # fmt: skip
    texts = CounterMetricFamily(
        f"{PREFIX}:version_texts",
        "Texts by outcome: completed, failed, refused, or aborted by the client.",
        labels=[*names, "outcome"],
    )
    life = CounterMetricFamily(f"{PREFIX}:model_life", "Events in the model's life.", labels=["model_name", "step"])
    for where, report in entries:
        info.add_metric([*where, report.state, report.fingerprint], 1)
        for outcome in OUTCOMES:
            texts.add_metric([*where, outcome], getattr(report.totals, outcome))
    for step in STEPS:
        if step in steps:
            life.add_metric([model_name, step], steps[step])
    families: list[Metric] = [info, texts, life]
    for name, (meaning, value_of) in TOTALS.items():
        total = CounterMetricFamily(f"{PREFIX}:{name}", meaning, labels=names)
        for where, report in entries:
            total.add_metric(where, value_of(report.totals))
        families.append(total)
    for name, (meaning, timed) in SECONDS.items():
        summary = SummaryMetricFamily(f"{PREFIX}:{name}", meaning, labels=names)
        for where, report in entries:
            seconds, count = timed(report.totals)
            summary.add_metric(where, count_value=count, sum_value=seconds)
        families.append(summary)
    return text_of(families)

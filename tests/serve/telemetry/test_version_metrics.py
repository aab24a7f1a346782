"""Prometheus metrics of versions."""

from prometheus_client.parser import text_string_to_metric_families

from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.telemetry.version_metrics import version_metrics

REPORT = VersionReport(
    replica="a", version="3", fingerprint="0123-auto-4", bundle_hash="0123", state="challenger", problem="",
    totals=VersionStats(
        texts=5, errors=1, refused=2, aborted=3, tokens=90, forwards=60, drafts=50, draft_tokens=150,
        accepted_tokens=40, seconds=2.5, first_seconds=0.5, firsts=8,
    ),
)  # fmt: skip


def test_each_version_at_each_replica_has_its_state_and_its_totals():
    text = version_metrics('a "model"', [REPORT], {"champion_changed": 2, "load_failed": 0})
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert {s.labels.pop("model_name") for s in samples} == {'a "model"'}
    life = {s.labels["step"]: s.value for s in samples if s.name == "tidar:model_life_total"}
    assert life == {"champion_changed": 2, "load_failed": 0}
    rest = [s for s in samples if s.name != "tidar:model_life_total"]
    assert {(s.labels["replica"], s.labels["version"]) for s in rest} == {("a", "3")}
    assert {(s.name.removeprefix("tidar:"), s.labels.get("outcome")): s.value for s in rest} == {
        ("model_version_info", None): 1,
        ("version_texts_total", "texts"): 5, ("version_texts_total", "errors"): 1,
        ("version_texts_total", "refused"): 2, ("version_texts_total", "aborted"): 3,
        ("version_generation_tokens_total", None): 90,
        ("version_forwards_total", None): 60,
        ("version_draft_tokens_total", None): 150,
        ("version_accepted_tokens_total", None): 40,
        ("version_text_seconds_sum", None): 2.5, ("version_text_seconds_count", None): 5,
        ("version_first_token_seconds_sum", None): 0.5, ("version_first_token_seconds_count", None): 8,
    }  # fmt: skip
    info = rest[0].labels
    assert (info["state"], info["fingerprint"]) == ("challenger", "0123-auto-4")


def test_without_replicas_and_without_an_alias_watcher_there_are_no_samples():
    assert not [s for family in text_string_to_metric_families(version_metrics("m", [], {})) for s in family.samples]

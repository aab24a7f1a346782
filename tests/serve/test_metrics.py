"""Totals that Prometheus can read."""

from prometheus_client.parser import text_string_to_metric_families

from serve_apps.metrics import Counters, gauges
from serve_apps.pieces import Tally
from serve_apps.replica_load import Load

BUSY = Load(
    replica="a", running=3, waiting=2, pages_held=30, pages=40, shared_tokens=48, preemptions=1, mode="two-pass",
    expected_over_ar=1.5,
)  # fmt: skip
IDLE = Load(
    replica="b", running=0, waiting=0, pages_held=0, pages=40, shared_tokens=0, preemptions=0, mode="autoregressive",
    expected_over_ar=None,
)  # fmt: skip


def totals(counters):
    families = text_string_to_metric_families(counters.exposition())
    return {(s.name, s.labels.get("status")): s.value for family in families for s in family.samples}


def test_totals_add_up_over_requests():
    counters = Counters('a "model"')
    for status in (200, 429, 200):
        counters.count_answer(status)
    counters.count_tokens(Tally(3, 9, (2, 1, 0, 1)))
    counters.count_tokens(Tally(1, 1, (0, 0, 0, 0)))
    assert totals(counters) == {
        ("tidar:requests_total", "200"): 2,
        ("tidar:requests_total", "429"): 1,
        ("tidar:requests_ended_early_total", None): 0,
        ("tidar:prompt_tokens_total", None): 4,
        ("tidar:generation_tokens_total", None): 10,
        ("tidar:spec_decode_num_drafts_total", None): 4,
        ("tidar:spec_decode_num_draft_tokens_total", None): 12,
        ("tidar:spec_decode_num_accepted_tokens_total", None): 4,
    }


def test_every_total_carries_the_model_name():
    families = text_string_to_metric_families(Counters('a "model"').exposition())
    assert {s.labels["model_name"] for family in families for s in family.samples} == {'a "model"'}


def test_each_replica_says_what_it_is_at_under_vllms_names():
    families = list(text_string_to_metric_families(gauges("m", [BUSY, IDLE])))
    samples = {(s.name, s.labels["replica"]): s for family in families for s in family.samples}
    values = {key: sample.value for key, sample in samples.items()}
    assert values == {
        ("tidar:num_requests_running", "a"): 3, ("tidar:num_requests_running", "b"): 0,
        ("tidar:num_requests_waiting", "a"): 2, ("tidar:num_requests_waiting", "b"): 0,
        ("tidar:kv_cache_pages", "a"): 40, ("tidar:kv_cache_pages", "b"): 40,
        ("tidar:kv_cache_pages_used", "a"): 30, ("tidar:kv_cache_pages_used", "b"): 0,
        ("tidar:kv_cache_usage_perc", "a"): 0.75, ("tidar:kv_cache_usage_perc", "b"): 0,
        ("tidar:prefix_cache_hits_total", "a"): 48, ("tidar:prefix_cache_hits_total", "b"): 0,
        ("tidar:num_preemptions_total", "a"): 1, ("tidar:num_preemptions_total", "b"): 0,
        ("tidar:decode_mode", "a"): 1, ("tidar:decode_mode", "b"): 1,
        ("tidar:decode_expected_speedup", "a"): 1.5,
    }  # fmt: skip
    assert samples["tidar:decode_mode", "a"].labels["mode"] == "two-pass"
    assert {family.type for family in families if family.name.endswith(("hits", "preemptions"))} == {"counter"}


def test_without_replicas_there_is_nothing_to_say_of_them():
    assert not [s for family in text_string_to_metric_families(gauges("m", [])) for s in family.samples]

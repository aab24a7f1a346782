"""Totals that Prometheus can read."""

from prometheus_client.parser import text_string_to_metric_families

from serve_apps.events import Tally
from serve_apps.metrics import Counters


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

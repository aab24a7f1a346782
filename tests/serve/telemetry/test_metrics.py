"""Totals and histograms that Prometheus can read."""

import asyncio
import time
from contextlib import aclosing

import pytest
from metric_names import pass_through
from prometheus_client.parser import text_string_to_metric_families

from serve_apps.messages.replica_load import Load
from serve_apps.messages.request_timing import RequestTiming
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.telemetry.metrics import Counters, gauges

BUSY = Load(
    replica="a", pid=1, decoder_pid=1, rows=4, running=3, waiting=2, waiting_tokens=90, tokens_per_forward=6.5,
    forwards_per_second=50.0, pages_held=30, pages=40, shared_tokens=48, preemptions=1, mode="two-pass",
    expected_over_ar=1.5,
)  # fmt: skip
IDLE = Load(
    replica="b", pid=2, decoder_pid=2, rows=4, running=0, waiting=0, waiting_tokens=0, tokens_per_forward=0.0,
    forwards_per_second=0.0, pages_held=0, pages=40, shared_tokens=0, preemptions=0, mode="autoregressive",
    expected_over_ar=None,
)  # fmt: skip


def samples(text):
    """Values by name and by the labels besides the model's name."""
    families = text_string_to_metric_families(text)
    return {
        (s.name, *(value for label, value in s.labels.items() if label != "model_name")): s.value
        for family in families
        for s in family.samples
    }


def nonzero(counters):
    """Samples that are not zero."""
    return {name: value for name, value in samples(counters.exposition()).items() if value}


def test_totals_add_up_over_requests():
    counters = Counters('a "model"')
    for status in (200, 429, 200):
        counters.count_answer(status)
    counters.count_break()
    counters.count_tokens(UsageCounts(3, 9, (2, 1, 0, 1)))
    counters.count_tokens(UsageCounts(1, 1, (0, 0, 0, 0)))
    assert nonzero(counters) == {
        ("tidar:requests_total", "200"): 2,
        ("tidar:requests_total", "429"): 1,
        ("tidar:requests_ended_early_total",): 1,
        ("tidar:prompt_tokens_total",): 4,
        ("tidar:generation_tokens_total",): 10,
        ("tidar:spec_decode_num_drafts_total",): 4,
        ("tidar:spec_decode_num_draft_tokens_total",): 12,
        ("tidar:spec_decode_num_accepted_tokens_total",): 4,
        ("tidar:spec_decode_num_accepted_tokens_per_pos_total", "0"): 2,
        ("tidar:spec_decode_num_accepted_tokens_per_pos_total", "1"): 1,
        ("tidar:spec_decode_num_accepted_tokens_per_pos_total", "2"): 1,
    }


def test_totals_without_another_label_are_present_before_anything_is_counted():
    there = samples(Counters("m").exposition())
    assert there["tidar:generation_tokens_total",] == 0
    assert there["tidar:time_to_first_token_seconds_count",] == 0


def test_every_total_carries_the_model_name():
    families = text_string_to_metric_families(Counters('a "model"').exposition())
    assert {s.labels["model_name"] for family in families for s in family.samples} == {'a "model"'}


def test_metrics_of_drafts_have_vllms_names_too_if_requested():
    plain, doubled = Counters("m"), Counters("m", vllm_names=True)
    for counters in (plain, doubled):
        counters.count_tokens(UsageCounts(3, 9, (2, 1, 0, 1)))
    ours, both = nonzero(plain), nonzero(doubled)
    assert {name: value for name, value in both.items() if name in ours} == ours
    assert {name: value for name, value in both.items() if name not in ours} == {
        ("vllm:spec_decode_num_drafts_total",): 4,
        ("vllm:spec_decode_num_draft_tokens_total",): 12,
        ("vllm:spec_decode_num_accepted_tokens_total",): 4,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "0"): 2,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"): 1,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "2"): 1,
    }


def test_a_text_is_timed_as_it_passes_and_its_replica_s_times_are_nonzero():
    counters = Counters("m")
    deltas = [
        TextDelta("", None, UsageCounts(7, 0)),
        TextDelta("a", None, UsageCounts(7, 2)),
        TextDelta("b", None, UsageCounts(7, 3)),
        TextDelta("c", "length", UsageCounts(7, 5), timing=RequestTiming(queue=0.25, prefill=0.5, decode=2.0)),
    ]
    began = time.monotonic()
    assert asyncio.run(pass_through(counters, deltas)) == deltas
    passed = time.monotonic() - began
    values = nonzero(counters)
    sums = {name[0].removesuffix("_sum"): value for name, value in values.items() if name[0].endswith("_sum")}
    counts = {name[0].removesuffix("_count"): value for name, value in values.items() if name[0].endswith("_count")}
    assert values["tidar:request_success_total", "length"] == 1
    assert counts.pop("tidar:inter_token_latency_seconds") == 2
    assert set(counts.values()) == {1}
    measured = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    assert all(0 < sums.pop(f"tidar:{name}_seconds") <= passed for name in measured)
    assert sums == {
        "tidar:request_queue_time_seconds": 0.25,
        "tidar:request_prefill_time_seconds": 0.5,
        "tidar:request_decode_time_seconds": 2.0,
        "tidar:request_inference_time_seconds": 2.5,
        "tidar:request_time_per_output_token_seconds": 0.5,
        "tidar:request_prompt_tokens": 7,
        "tidar:request_generation_tokens": 5,
    }


@pytest.mark.parametrize(("streamed", "early"), [(True, ""), (False, ""), (False, "a")])
def test_the_first_token_of_an_unstreamed_text_is_timed_before_its_decoding(streamed, early):
    counters = Counters("m")

    async def slowly():
        yield 0, TextDelta(early, None, UsageCounts(1, 1))  # admitted late: a token without a delta for the client
        await asyncio.sleep(0.05)
        yield 0, TextDelta("ab", "stop", UsageCounts(1, 2), timing=RequestTiming(queue=0.0, prefill=0.01, decode=0.04))

    async def consume():
        return [delta async for delta in counters.timed(slowly(), streamed=streamed)]

    asyncio.run(consume())
    values = samples(counters.exposition())
    whole, first = values["tidar:e2e_request_latency_seconds_sum",], values["tidar:time_to_first_token_seconds_sum",]
    assert whole - first == pytest.approx(0.04, abs=1e-6)
    assert values["tidar:inter_token_latency_seconds_count",] == 0


def test_a_consumer_that_stops_closes_the_source():
    closed = []

    async def endless():
        try:
            while True:
                yield 0, TextDelta("a", None, UsageCounts(1, 1))
        finally:
            closed.append(True)

    async def leave():
        async with aclosing(Counters("m").timed(endless(), streamed=True)) as deltas:
            await anext(deltas)

    asyncio.run(leave())
    assert closed == [True]


def test_each_replica_reports_its_state_under_vllms_names():
    families = list(text_string_to_metric_families(gauges("m", [BUSY, IDLE])))
    found = {(s.name, s.labels["replica"]): s for family in families for s in family.samples}
    values = {key: sample.value for key, sample in found.items()}
    assert values == {
        ("tidar:num_requests_running", "a"): 3, ("tidar:num_requests_running", "b"): 0,
        ("tidar:num_requests_waiting", "a"): 2, ("tidar:num_requests_waiting", "b"): 0,
        ("tidar:num_tokens_waiting", "a"): 90, ("tidar:num_tokens_waiting", "b"): 0,
        ("tidar:tokens_per_forward", "a"): 6.5, ("tidar:tokens_per_forward", "b"): 0,
        ("tidar:forwards_per_second", "a"): 50, ("tidar:forwards_per_second", "b"): 0,
        ("tidar:kv_cache_pages", "a"): 40, ("tidar:kv_cache_pages", "b"): 40,
        ("tidar:kv_cache_pages_used", "a"): 30, ("tidar:kv_cache_pages_used", "b"): 0,
        ("tidar:kv_cache_usage_perc", "a"): 0.75, ("tidar:kv_cache_usage_perc", "b"): 0,
        ("tidar:prefix_cache_hits_total", "a"): 48, ("tidar:prefix_cache_hits_total", "b"): 0,
        ("tidar:num_preemptions_total", "a"): 1, ("tidar:num_preemptions_total", "b"): 0,
        ("tidar:decode_mode", "a"): 1, ("tidar:decode_mode", "b"): 1,
        ("tidar:decode_expected_speedup", "a"): 1.5,
    }  # fmt: skip
    assert found["tidar:decode_mode", "a"].labels["mode"] == "two-pass"
    assert {family.type for family in families if family.name.endswith(("hits", "preemptions"))} == {"counter"}


def test_without_replicas_there_are_no_samples():
    assert not [s for family in text_string_to_metric_families(gauges("m", [])) for s in family.samples]

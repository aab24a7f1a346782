"""Figures of the benchmark of HTTP's overhead."""

import pytest
from tiny import wide_model

from serve_apps.tools.http_overhead_bench import Flow, Run, compared, figures, in_process, main
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.transformer.shapes import named_shape


def test_figures_cover_the_median_run_and_all_latencies():
    slow = Run([Flow(0.0, [1.0, 2.0, 6.0], 9)], 10.0)
    fast = Run([Flow(0.0, [0.5, 1.5, 2.5], 9), Flow(1.0, [1.25], 1)], 2.5)
    assert figures([slow, fast, fast]) == {
        "tokens_per_second": 4.0,
        "tokens_per_piece": 29 / 11,
        "time_to_first_token_seconds_p50": 0.5,
        "time_to_first_token_seconds_p95": 1.0,
        "inter_token_latency_seconds_p50": 1.0,
        "inter_token_latency_seconds_p95": 4.0,
        "time_per_output_token_seconds_p50": 0.25,
        "time_per_output_token_seconds_p95": 0.625,
    }


def test_ratios_are_of_adjacent_runs_so_that_a_machine_that_slows_down_changes_nothing():
    def run(seconds):
        return Run([Flow(0.0, [1.0, 2.0], 9)], seconds)

    facts = compared([run(1), run(4), run(8)], [run(2), run(5), run(16)])
    assert (facts["ratio"], facts["ratio_spread"]) == (0.5, [0.5, 0.8])


def test_in_process_all_texts_are_generated_and_never_more_than_requested_at_the_same_time():
    decoder = Decoder(wide_model(named_shape("tiny", vocab_len=300)), DraftConfig(block_len=4), slots=3)
    requests = [
        Request(request_id=str(n), prompt=(1, 2 + n), sampling=SamplingConfig(max_tokens=7 + n)) for n in range(5)
    ]
    run = in_process(Scheduler(decoder), requests, 2)
    assert sorted(flow.tokens for flow in run.flows) == [7, 8, 9, 10, 11]
    assert all(flow.sent <= flow.arrivals[0] for flow in run.flows)
    sent = sorted(flow.sent for flow in run.flows)
    ended = sorted(flow.arrivals[-1] for flow in run.flows)
    assert all(later >= earlier for later, earlier in zip(sent[2:], ended))


@pytest.mark.parametrize(
    "wrong", [["--repeats", "0"], ["--settings", "{"], ["--settings", "[]"], ["--concurrency", "0"]]
)
def test_wrong_options_are_reported_in_one_line(wrong, capsys):
    assert main(["nowhere", *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1

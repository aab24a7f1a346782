"""Throughput of a decoder, estimated from the tokens of its forwards."""

import pytest

from serve_apps.replica.throughput import ThroughputEstimate
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import Request


def request(prompt_len, max_tokens):
    return Request(request_id="r", prompt=(1,) * prompt_len, sampling=SamplingConfig(max_tokens=max_tokens))


def test_before_the_first_forward_and_the_first_text_nothing_is_known_and_texts_are_as_long_as_they_may_be():
    estimate = ThroughputEstimate()
    assert (estimate.tokens_per_forward, estimate.forwards_per_second) == (0, 0)
    assert estimate.expected([request(3, 100), request(5, 7)]) == 115
    assert estimate.expected([]) == 0


def test_the_pace_is_a_mean_in_which_the_last_forwards_count_most():
    estimate = ThroughputEstimate()
    estimate.count(8, 0.5)
    assert (estimate.tokens_per_forward, estimate.forwards_per_second) == (8, 2)
    estimate.count(4, 0.25)
    assert estimate.tokens_per_forward == pytest.approx((4 + 0.98 * 8) / 1.98)
    assert estimate.forwards_per_second == pytest.approx(1.98 / (0.25 + 0.98 * 0.5))
    for _ in range(1000):
        estimate.count(2, 0.1)
    assert (estimate.tokens_per_forward, estimate.forwards_per_second) == (pytest.approx(2), pytest.approx(10))


def test_a_text_is_expected_to_be_as_long_as_texts_were_or_as_short_as_it_must_be():
    estimate = ThroughputEstimate()
    estimate.count_text(10)
    estimate.count_text(20)  # a mean of (20 + 0.98 * 10) / 1.98, about 15
    assert estimate.expected([request(3, 4000), request(3, 6)]) == 3 + 15 + 3 + 6

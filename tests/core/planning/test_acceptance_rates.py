"""Rates of drafts: what a plan verifies in hard passages alone is not taken for hard itself."""

import math
import random

import pytest

from tidar_core.planning.acceptance_rates import LATE_ODDS, fitted_rates, mean_rates
from tidar_core.planning.draft_history import PRIOR

K = 4
FIRST, SECOND, LATE, LATER = 1, 2, K, K + 1


def window(luck, ease, entries, count=32):
    """Outcomes of drafts whose log odds are the ease of the window and of the entry together."""
    chosen = [luck.choice(list(entries)) for _ in range(count)]
    return [2 * entry + (luck.random() < 1 / (1 + math.exp(-ease - entries[entry]))) for entry in chosen]


def test_an_entry_that_was_verified_in_hard_windows_alone_has_its_rate_in_easy_ones():
    """Both entries are equally easy. The shares of accepted drafts are 0.27 and about 0.6."""
    luck = random.Random(0)
    hard = [window(luck, -1.0, {FIRST: 0.0, LATE: 0.0}) for _ in range(64)]
    easy = [window(luck, 2.0, {LATE: 0.0}) for _ in range(64)]
    rate_WE = fitted_rates(hard + easy, K)
    assert rate_WE[:64, FIRST].mean() == pytest.approx(0.27, abs=0.03)
    assert rate_WE[64:, FIRST].mean() == pytest.approx(0.88, abs=0.03)
    assert rate_WE[64:, LATE].mean() == pytest.approx(0.88, abs=0.03)


def test_entries_differ_by_what_they_show_in_the_same_windows():
    luck = random.Random(1)
    mixed = [window(luck, 0.5, {FIRST: 0.8, SECOND: -0.8}) for _ in range(64)]
    rates = mean_rates(mixed, K)
    assert rates["whole"][1:3] == pytest.approx([0.786, 0.426], abs=0.04)
    assert rates["whole"][3] == pytest.approx(rates["whole"][2], abs=0.01)  # never verified: as the draft before it


def test_windows_without_a_rejection_show_nothing_of_the_entries():
    luck = random.Random(2)
    hard = [window(luck, 0.0, {FIRST: 0.0, LATE: 0.0}) for _ in range(32)]
    repeated = [[2 * LATE + 1] * 32 for _ in range(96)]
    alone, beside = fitted_rates(hard, K), fitted_rates(hard + repeated, K)
    assert (beside[:32] - alone).abs().max() < 1e-6
    assert beside[32:, FIRST].min() > 0.97


def test_before_any_draft_every_other_one_is_accepted_and_fewer_behind_a_correction():
    rates = mean_rates([PRIOR], K)
    assert rates["whole"][1:] == pytest.approx([0.5] * (K - 1), abs=0.01)
    assert rates["late"] == pytest.approx([LATE_ODDS / (1 + LATE_ODDS)] * 2, abs=0.01)


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_all_drafts_behind_the_last_tried_one_are_rated_as_it(rate):
    luck = random.Random(3)
    short = [window(luck, 0.0, dict.fromkeys((1, 2, 3), math.log(rate / (1 - rate)))) for _ in range(64)]
    rates = mean_rates(short, 64)["whole"]
    assert rates[1:] == pytest.approx([rate] * 63, abs=0.03)


@pytest.mark.parametrize("block_len", [1, 2, 3, 16])
@pytest.mark.parametrize("accepted", [0, 1])
def test_rates_are_probabilities_however_long_all_drafts_had_the_same_outcome(block_len, accepted):
    windows = [[2 * min(1, block_len) + accepted] * 40 for _ in range(100)]
    rate_WE = fitted_rates(windows, block_len)
    assert rate_WE.shape == (100, block_len + 2)
    assert ((rate_WE > 0) & (rate_WE < 1)).all()

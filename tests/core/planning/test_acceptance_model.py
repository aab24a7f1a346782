"""Counts of accepted drafts: by place, by regime, with the prior of all requests, and forgotten with time."""

import pytest

from tidar_core.decoding.request import DecodeStep
from tidar_core.planning.acceptance_model import ALL, NONE, SOME, Acceptance, regime_after


def test_acceptance_is_counted_per_draft_and_regime_up_to_the_first_rejected_draft():
    acceptance = Acceptance(4)
    acceptance.observe(DecodeStep("r", (1, 2), None, 4, 2, 4), NONE)  # 1 accepted, 2 rejected, 3 not reached
    acceptance.observe(
        DecodeStep("r", (1, 2), None, 3, 2, 4, mask_offset=1), SOME
    )  # behind a correction: accepted, rejected
    acceptance.observe(DecodeStep("r", (1,), None, 1, 1, 4), ALL)  # nothing was drafted
    assert acceptance.tried[NONE] == pytest.approx([0, 1, 1, 0, 0, 0], abs=0.01)
    assert acceptance.kept[NONE] == pytest.approx([0, 1, 0, 0, 0, 0], abs=0.01)
    assert acceptance.tried[SOME] == pytest.approx([0, 0, 0, 0, 1, 1], abs=0.01)
    assert acceptance.kept[SOME] == pytest.approx([0, 0, 0, 0, 1, 0], abs=0.01)
    assert acceptance.tried[ALL] == [0] * 6


@pytest.mark.parametrize(
    ("pending", "accepted", "verified", "regime"),
    [(4, 1, 4, NONE), (4, 3, 4, SOME), (4, 4, 4, ALL), (4, 2, 2, ALL), (1, 1, 4, "same"), (4, 1, 1, "same"),
     (1, 4, 4, ALL)],
)  # fmt: skip
def test_the_regime_is_how_many_of_the_verified_drafts_were_accepted(pending, accepted, verified, regime):
    step = DecodeStep("r", (1,) * accepted, None, pending, accepted, verified)
    for before in (NONE, SOME, ALL):
        assert regime_after(before, step) == (before if regime == "same" else regime)


def test_the_prior_of_a_draft_is_the_rate_of_the_draft_before_it():
    acceptance = Acceptance(4)
    acceptance.kept[NONE][1], acceptance.tried[NONE][1] = 80.0, 100.0
    first = (80 + 16 * 0.5) / 116
    assert acceptance.pooled().whole[1:] == pytest.approx([first] * 3)
    assert acceptance.pooled().late == (0.5, 0.7)
    acceptance.kept[SOME][2], acceptance.tried[SOME][2] = 1.0, 8.0
    assert acceptance.pooled().whole[2] == pytest.approx((1 + 16 * first) / 24)


def test_a_request_whose_drafts_are_accepted_more_often_than_others_has_later_rates_at_the_same_odds():
    everyone, own = Acceptance(4), Acceptance(4)
    for regime in (NONE, SOME, ALL):
        everyone.kept[regime], everyone.tried[regime] = [5e5] * 6, [1e6] * 6
        own.kept[regime][1], own.tried[regime][1] = 1e6 * 0.8, 1e6
    for of_regime in own.with_prior(everyone):
        assert of_regime.whole[1:] == pytest.approx([0.8] * 3, abs=0.001)  # odds of 4 to 1 instead of 1 to 1
    assert Acceptance(4).with_prior(everyone)[NONE].whole[1:] == pytest.approx([0.5] * 3, abs=0.001)


def test_what_was_not_tried_for_long_is_unknown_again():
    acceptance = Acceptance(4)
    acceptance.tried[ALL][2] = 50.0
    for _ in range(20_000):  # so many that the weights of the counts must be renewed
        acceptance.observe(DecodeStep("r", (1, 1), None, 2, 2, 2), ALL)
    assert acceptance.rates()[ALL].whole[2] > 0.9


def test_what_few_verifications_of_a_kind_showed_is_kept_while_many_of_another_kind_are_counted():
    """A choice may verify whole blocks behind rejections alone. Other plans show at times what follows whole blocks."""
    acceptance = Acceptance(8)
    for _ in range(12):
        for _ in range(4):
            acceptance.observe(DecodeStep("r", (1,) * 8, None, 8, 8, 8), ALL)
        for _ in range(200):
            acceptance.observe(DecodeStep("r", (1,), None, 8, 1, 8), NONE)
            acceptance.observe(DecodeStep("r", (1,) * 4, None, 4, 4, 4, mask_offset=4), SOME)
    assert acceptance.rates()[ALL].whole[1] > 0.5
    assert acceptance.rates()[NONE].whole[1] < 0.05

"""Limits at which a challenger is rolled back."""

import pytest

from serve_apps.messages.text_delta import UsageCounts
from serve_apps.messages.version_stats import Since, VersionReport, VersionStats
from serve_apps.rollout.canary import CanarySettings, failure

LIMITS = CanarySettings(texts=10, error_rate=0.2, tokens_per_forward=2.0, of_champion=0.5)
CHAMPION = VersionStats(texts=10, tokens=400, forwards=100)


def challenger(texts=10, errors=0, tokens=300, forwards=100):
    return VersionStats(texts=texts, errors=errors, tokens=tokens, forwards=forwards)


def report(replica, bundle_hash, totals):
    return VersionReport(
        replica=replica,
        version="1",
        fingerprint="f",
        bundle_hash=bundle_hash,
        state="champion",
        problem="",
        totals=totals,
    )


@pytest.mark.parametrize(
    "stays",
    [
        challenger(),
        challenger(tokens=200),  # 2.0 per forward: exactly at both limits
        challenger(texts=9, tokens=90),  # slow, but too few texts
        challenger(texts=0, tokens=0, forwards=0),
        challenger(texts=8, errors=2),  # 0.2 of ten
        challenger(texts=0, errors=2, tokens=0, forwards=0),  # eight good texts would bring the share to the limit
        VersionStats(texts=10, refused=99, aborted=99, tokens=300, forwards=100),  # caused by clients
    ],
)
def test_a_challenger_within_every_limit_or_with_too_few_texts_stays(stays):
    assert failure(LIMITS, stays, CHAMPION) is None


@pytest.mark.parametrize(
    ("goes", "why"),
    [
        (challenger(texts=97, errors=33), "33 of 130 texts failed; at most 0.2 of all may"),
        (challenger(texts=0, errors=3, tokens=0, forwards=0), "3 of 3 texts failed; at most 0.2 of all may"),
        (challenger(tokens=199), "1.990 tokens per forward; at least 2 are required"),
        (challenger(tokens=0, forwards=0), "0.000 tokens per forward; at least 2 are required"),
    ],
)
def test_a_challenger_that_fails_too_often_or_drafts_too_badly_is_rolled_back(goes, why):
    assert failure(LIMITS, goes, CHAMPION) == why


def test_it_is_compared_with_the_champion_once_both_have_enough_texts():
    limits = CanarySettings(texts=10, of_champion=0.9)
    slow = challenger(tokens=359)
    assert failure(limits, slow, CHAMPION) == (
        "3.590 tokens per forward beside the champion's 4.000; at least 0.9 of that is required"
    )
    assert failure(limits, challenger(tokens=360), CHAMPION) is None
    assert failure(limits, slow, VersionStats(texts=9, tokens=360, forwards=90)) is None
    assert failure(CanarySettings(texts=10, of_champion=0), slow, CHAMPION) is None


def test_a_text_is_counted_by_its_outcome_with_its_tokens_and_time():
    totals = VersionStats()
    totals.count_first(0.5)
    totals.count("texts", UsageCounts(3, 9, (2, 1, 0, 1)), 2.0)
    totals.count("aborted", UsageCounts(3, 4, (1, 0, 0, 0)), 7.0)
    totals.count("errors", UsageCounts(), 1.0)
    assert totals == VersionStats(
        texts=1, errors=1, aborted=1, tokens=13, drafts=5, draft_tokens=15, accepted_tokens=4, seconds=2.0,
        first_seconds=0.5, firsts=1,
    )  # fmt: skip


def test_counts_of_a_canary_begin_with_it_and_include_all_replicas_even_dead_replicas():
    since = Since([report("a", "new", VersionStats(texts=5)), report("a", "old", VersionStats(texts=50))])
    since.update([report("a", "new", VersionStats(texts=7)), report("b", "new", VersionStats(texts=10))])
    since.update([report("a", "new", VersionStats(texts=8)), report("a", "old", VersionStats(texts=51))])
    assert since.totals("new") == VersionStats(texts=13)
    assert since.totals("old") == VersionStats(texts=1)
    assert since.totals("never seen") == VersionStats()

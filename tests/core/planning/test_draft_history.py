"""The record of verified drafts: outcomes in their order, windows of one text, an excerpt that stands for all."""

import pytest

from tidar_core.decoding.request import DecodeStep
from tidar_core.planning.draft_history import (
    NEWEST,
    OWN_PRIOR,
    PRIOR,
    REPRESENTATIVES,
    WINDOW_LEN,
    WINDOWS,
    DraftHistory,
)

K = 4


def verified(accepted, pending=K, late=0, request="r", end=None):
    return DecodeStep(request, (1,) * accepted, end, pending, accepted, K, mask_offset=late)


def outcomes(history):
    """Entries of all drafts after the prior, with whether they were accepted."""
    return [(code // 2, code % 2 == 1) for window in history.excerpt().windows if window != PRIOR for code in window]


def test_a_verification_shows_its_drafts_up_to_the_first_rejected_one():
    history = DraftHistory(K)
    assert history.observe(verified(2)) == 1  # draft 1 accepted, draft 2 rejected, draft 3 not reached
    assert history.observe(verified(2, pending=3, late=1)) == 2  # behind a correction: accepted, rejected
    assert history.observe(verified(1, pending=1)) == 0  # nothing was drafted
    assert history.observe(verified(4)) == 3  # the token behind the last draft had none
    assert outcomes(history) == [(1, True), (2, False), (K, True), (K + 1, False), (1, True), (2, True), (3, True)]
    assert history.verifications("r") == 3


def test_windows_belong_to_one_text_and_ends_of_texts_are_joined():
    history = DraftHistory(K)
    for request in ("a", "b"):
        for _ in range(WINDOW_LEN // 3 + 1):  # a window and no more
            history.observe(verified(4, request=request))
    for request in "cdefghijklmn":
        history.observe(verified(1, request=request))
        history.observe(verified(4, request=request, end="stop"))
    rejected = [sum(code % 2 == 0 for code in window) for window in history.excerpt().windows if window != PRIOR]
    assert rejected == [0, 0, 8, 4]  # two windows, ends that fill one, and ends that do not yet
    assert len(history) == 2


def test_requests_that_never_finish_are_dropped_and_their_drafts_kept():
    history = DraftHistory(K)
    for request in ("aborted", "running"):
        history.observe(verified(4, request=request))
    history.keep({"running"})
    assert len(history) == 1
    assert history.verifications("aborted") == 0
    assert sum(map(len, history.excerpt().windows)) == len(PRIOR) + 6


def test_what_is_old_is_forgotten():
    history = DraftHistory(K)
    for accepted in (1, 4):
        for _ in range(2 * WINDOWS * WINDOW_LEN):
            history.observe(verified(accepted))
    windows = history.excerpt().windows
    assert len(windows) == WINDOWS
    assert all(code % 2 == 1 for window in windows for code in window)


def accepted(windows):
    """Mean share of accepted drafts."""
    return sum(sum(code % 2 for code in window) / len(window) for window in windows) / len(windows)


@pytest.mark.parametrize("texts", [[1, 4], [1, 1, 1, 1, 1, 1, 1, 4], [4, 4, 4, 3, 2]])
def test_few_windows_stand_for_the_newest_by_their_shares_of_accepted_drafts(texts):
    history = DraftHistory(K)
    for i in range(400):
        for _ in range(WINDOW_LEN):
            history.observe(verified(texts[i % len(texts)], request=str(i)))
        history.observe(verified(1, request=str(i), end="stop"))
    excerpt = history.excerpt()
    chosen = [excerpt.windows[number] for number in excerpt.weights]
    newest, outcomes = 0, 0
    while outcomes < NEWEST:
        newest += 1
        outcomes += len(excerpt.windows[-newest])
    assert len(chosen) == REPRESENTATIVES < newest / 2
    assert accepted(chosen) == pytest.approx(accepted(excerpt.windows[-newest:]), abs=0.03)
    assert set(excerpt.weights.values()) == {1.0}


def test_the_windows_of_a_lone_request_count_for_more_than_those_of_others():
    history = DraftHistory(K)
    for _ in range(20 * WINDOW_LEN):
        history.observe(verified(1, request="other"))
    for _ in range(5):
        history.observe(verified(4))
    excerpt = history.excerpt("r")
    own = [number for number in excerpt.weights if excerpt.windows[number] == [3, 5, 7] * 5]
    others = sum(len(excerpt.windows[number]) * each for number, each in excerpt.weights.items() if number not in own)
    assert [excerpt.weights[number] for number in own] == [1.0]
    assert others == pytest.approx(OWN_PRIOR)
    assert set(history.excerpt("unknown").weights.values()) == {1.0}


def test_what_many_running_requests_verified_just_now_counts():
    history, batch = DraftHistory(K), [str(i) for i in range(64)]
    for _ in range(4 * NEWEST):
        history.observe(verified(1, request="before"))
    assert accepted(chosen_of(history)) == 0.0
    for _ in range(4):
        for request in batch:
            history.observe(verified(4, request=request))
    assert accepted(chosen_of(history)) > 0.4  # 768 outcomes of 2,048


def chosen_of(history):
    excerpt = history.excerpt()
    return [excerpt.windows[number] for number in excerpt.weights]

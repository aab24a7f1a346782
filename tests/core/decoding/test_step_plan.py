"""Modes are choices of query tokens: every one, and every mixture of them, gives the autoregressive texts."""

import pytest
import torch
from decoding import GREEDY, RandomPlanner, expected_texts, prefilled, prompts, requests

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import Completion, complete
from tidar_core.decoding.decode_step import DecodeTuning
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode, StepPlan
from tidar_core.errors import ConfigError

SAMPLED = SamplingConfig(max_tokens=20, temperature=1.0, top_k=50, seed=6)


def texts_of(model, texts, sampling, planner, *, block_len, rows=3, kind="argmax", **settings):
    decoder = Decoder(model, DraftConfig(block_len=block_len, kind=kind), slots=rows, **settings)
    scheduler = Scheduler(decoder, planner)
    return [tuple(c.token_ids) for c in complete(scheduler, requests(texts, sampling))]


@pytest.mark.parametrize(
    ("mode", "pending", "plan"),
    [
        ("autoregressive", (4, 1), StepPlan(1)),
        ("single-pass", (4, 4), StepPlan(4, (1, 2, 3, 4))),
        ("two-pass", (1, 1), StepPlan(1, (1,))),
        ("two-pass", (4, 1), StepPlan(4)),
    ],
)
def test_each_mode_spends_these_rows(mode, pending, plan):
    assert FixedMode(mode, 4).next_plan(dict(enumerate(pending)), 9) == plan


def test_a_dense_step_has_k_plus_k_squared_rows_and_a_two_pass_round_three_k():
    assert StepPlan(16, tuple(range(1, 17))).query_tokens(16) == 272
    assert StepPlan(1, (1,)).query_tokens(16) + StepPlan(16).query_tokens(16) == 33


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("block_len", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_autoregressive_text(model, mode, block_len, sampling):
    texts = prompts(5, 12, 3, 8)
    planner = FixedMode(mode, block_len)
    assert texts_of(model, texts, sampling, planner, block_len=block_len) == expected_texts(model, texts, sampling)


@pytest.mark.parametrize("groups", [(1,), (4,), (2, 3), (1, 4), (1, 2, 3)])
def test_every_subset_of_groups_gives_the_autoregressive_text(model, groups):
    texts = prompts(5, 12, 3)
    planner = FixedMode("single-pass", 4, groups)
    assert texts_of(model, texts, GREEDY, planner, block_len=4) == expected_texts(model, texts, GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("seed", range(12))
def test_switching_at_random_between_any_two_steps_changes_nothing(model, seed, sampling):
    texts = prompts(5, 12, 3, 8, 17, seed=seed)
    block_len = (2, 4, 8)[seed % 3]
    wanderer = RandomPlanner(seed, block_len)
    assert texts_of(model, texts, sampling, wanderer, block_len=block_len) == expected_texts(model, texts, sampling)


@pytest.mark.parametrize("seed", range(4))
def test_drawn_drafts_survive_random_switching_when_greedy(model, seed):
    texts = prompts(5, 12, 3, seed=seed)
    found = texts_of(model, texts, GREEDY, RandomPlanner(seed, 4), block_len=4, kind="sampled")
    assert found == expected_texts(model, texts, GREEDY)


def test_where_no_mask_drafted_the_stand_in_is_a_point_mass(model):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=4, kind="sampled"), slots=1))
    prefilled(scheduler, requests(prompts(7), SAMPLED)[0], drafts=False)
    assert tuple(scheduler.pending.values()) == (1,)
    stored = scheduler.decoder._state.proposal[0]
    assert torch.equal(stored.sum(-1), torch.ones(4))
    assert torch.equal(stored.argmax(-1), scheduler.decoder._state.draft[0])
    assert stored.max() == 1


def test_a_missing_group_hands_on_the_later_masks_of_the_one_below(model):
    """Drafts are group 1's masks from the n-th on, where only that group was drafted and n tokens were accepted."""
    dense = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1))
    sparse = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1))
    request = requests(prompts(7), GREEDY)[0]
    truth = expected_texts(model, prompts(7), SamplingConfig(max_tokens=40))[0]
    for scheduler, groups in ((dense, (1, 2, 3, 4)), (sparse, (1,))):
        prefilled(scheduler, request)
        scheduler.redraft("0", [truth[1], (truth[2] + 1) % 500, truth[3]])  # two stand
        assert scheduler.decode_step(StepPlan(4, groups))[0].accepted == 2
    assert tuple(dense.pending.values()) == (4,)
    assert tuple(sparse.pending.values()) == (3,)
    block_of_group_1 = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=1))
    prefilled(block_of_group_1, request)
    block_of_group_1.decode_step(StepPlan(1, (1,)))
    assert sparse.decoder._state.draft[0, 1:3].tolist() == block_of_group_1.decoder._state.draft[0, 2:4].tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_blocks_of_fewer_masks_give_the_autoregressive_text(model, width):
    texts = prompts(5, 12, 3)
    groups = (1, 3)

    class Narrow(FixedMode):
        def next_plan(self, pending, context):
            return StepPlan(4, groups, width)

    found = texts_of(model, texts, GREEDY, Narrow("single-pass", 6), block_len=6)
    assert found == expected_texts(model, texts, GREEDY)


@pytest.mark.parametrize("kind", ["argmax", "sampled"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_one_product_with_the_head_or_two_give_the_same(model, kind, sampling):
    texts = prompts(5, 12, 3)
    emitted = []
    for one_product_tokens in (0, 1000):
        tuning = DecodeTuning(one_product_tokens=one_product_tokens)
        emitted.append(
            texts_of(model, texts, sampling, FixedMode("single-pass", 4), block_len=4, kind=kind, tuning=tuning)
        )
    assert emitted[0] == emitted[1]


def test_a_narrow_block_leaves_as_many_pending_as_it_has_masks(model):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=6), slots=1))
    prefilled(scheduler, requests(prompts(7), GREEDY)[0])
    truth = expected_texts(model, prompts(7), SamplingConfig(max_tokens=40))[0]
    scheduler.redraft("0", [truth[1], (truth[2] + 1) % 500, 1, 2, 3])  # two stand
    step = scheduler.decode_step(StepPlan(3, (1,), 4))[0]
    assert (step.accepted, step.pending, step.verified) == (2, 6, 3)
    assert tuple(scheduler.pending.values()) == (3,), "the second, third and fourth of group 1's four masks"
    assert scheduler.decode_step(StepPlan(1))[0].mask_offset == 1


def test_forwards_are_counted_by_what_they_verify(model):
    request = requests(prompts(7), GREEDY)
    for mode, verifications in (("autoregressive", 0), ("two-pass", 1), ("single-pass", 1)):
        decoder = Decoder(model, DraftConfig(block_len=4), slots=1)
        completion = complete(Scheduler(decoder, FixedMode(mode, 4)), request)[0]
        decode_steps = completion.forwards - 1
        share = {0: 0, 1: decode_steps if mode == "single-pass" else decode_steps // 2}[verifications]
        assert completion.accepted.total() == share
        assert completion.in_rounds >= len(completion.token_ids) - 2 if verifications else completion.in_rounds == 0


def test_tokens_of_steps_that_drafted_nothing_belong_to_no_round():
    """Otherwise a mode that hardly drafts would have more tokens a round than a block has."""
    plain = {"request_id": "0", "token_ids": (7,), "finish_reason": None, "pending": 1, "accepted": 1, "verified": 1}
    verified = plain | {"token_ids": (7, 7, 7), "pending": 4, "accepted": 3, "verified": 4}
    completion = Completion(requests(prompts(3), GREEDY)[0])
    for step in (plain | {"accepted": 0, "verified": 0}, plain, plain, plain, verified, verified, plain):
        completion.add(DecodeStep(**step))
    assert completion.in_rounds == 1 + 3 + 3, "the plain step before a verification drafted"
    assert completion.accepted == {3: 2}


@pytest.mark.parametrize(("mode", "groups"), [("fast", ()), ("single-pass", (0,)), ("single-pass", (2, 1))])
def test_a_mode_that_does_not_exist_is_refused(mode, groups):
    with pytest.raises(ConfigError):
        FixedMode(mode, 4, groups)

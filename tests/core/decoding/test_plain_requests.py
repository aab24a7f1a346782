"""A request that wants no drafts is decoded autoregressively, also beside requests with drafts."""

from dataclasses import replace

import pytest
from decoding import GREEDY, RandomPlanner, expected_texts, prompts, requests

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode, StepPlan

SAMPLED = SamplingConfig(max_tokens=24, temperature=1.0, top_k=50, seed=6)
AGAIN_AND_AGAIN = replace(GREEDY, logit_bias=((70, 100.0),))
"""The same token for ever: a draft that repeats the last token would be accepted."""
PLANNERS = {
    "single-pass": FixedMode("single-pass", 4),
    "two-pass": FixedMode("two-pass", 4),
    "any plan": RandomPlanner(1, 4),
}


class Uncalled(FixedMode):
    """A planner that must not be called for a plan."""

    def next_plan(self, pending, context):
        raise AssertionError("the planner was called for a plan")


def decoder_of(model, kind="argmax", pages=None):
    draft = DraftConfig(block_len=4, kind=kind)
    return Decoder(model, draft, slots=4, context_len=64, page_len=4, pages=pages)


def mixed(texts, sampling):
    """Every second one wants no drafts."""
    return [replace(r, speculative=i % 2 == 0) for i, r in enumerate(requests(texts, sampling))]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, AGAIN_AND_AGAIN], ids=["greedy", "sampled", "one token"])
@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_each_forward_gives_it_one_token_and_all_texts_are_the_autoregressive_ones(model, planner, sampling):
    texts = prompts(9, 14, 5, 11, 7, 8)
    done = complete(Scheduler(decoder_of(model, pages=50), planner), mixed(texts, sampling))
    emitted = [tuple(completion.token_ids) for completion in done]
    assert emitted == ([(70,) * 24] * 6 if sampling is AGAIN_AND_AGAIN else expected_texts(model, texts, sampling))
    assert [completion.forwards for completion in done[1::2]] == [24] * 3
    assert [completion.accepted for completion in done[1::2]] == [{}] * 3
    assert all(completion.accepted for completion in done[::2])


def test_no_draft_is_accepted_for_it_where_drafts_pass_the_ratio_test(model):
    done = complete(Scheduler(decoder_of(model, "sampled")), mixed(prompts(9, 14, 5, 11), AGAIN_AND_AGAIN))
    assert [completion.token_ids for completion in done] == [[70] * 24] * 4
    assert [completion.forwards for completion in done[1::2]] == [24] * 2


def test_where_nobody_wants_drafts_each_forward_is_the_autoregressive_one(model):
    decoder = decoder_of(model)
    plans, step = [], decoder.decode_step
    decoder.decode_step = lambda plan, *beside: plans.append(plan) or step(plan, *beside)
    scheduler = Scheduler(decoder, Uncalled("single-pass", 4))
    texts = prompts(9, 14)
    done = complete(scheduler, [replace(request, speculative=False) for request in requests(texts, GREEDY)])
    assert [tuple(completion.token_ids) for completion in done] == expected_texts(model, texts, GREEDY)
    assert set(plans) == {StepPlan(1)}


def test_its_id_means_nothing_once_it_is_gone(model):
    scheduler = Scheduler(decoder_of(model))
    (request,) = requests(prompts(9), AGAIN_AND_AGAIN)
    plain = replace(request, speculative=False)
    complete(scheduler, [plain])
    assert complete(scheduler, [request])[0].forwards < 24
    scheduler.submit(plain)
    scheduler.advance()
    scheduler.abort(plain.request_id)
    assert complete(scheduler, [request])[0].forwards < 24

"""Many requests on few pages: all texts are autoregressive, whether requests wait, share, leave or are preempted."""

import random
from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, RandomPace, RandomPlanner, expected_texts, prefilled, prompts, requests

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode, StepPlan
from tidar_core.errors import ConfigError

SAMPLED = SamplingConfig(max_tokens=20, temperature=1.0, top_k=50, seed=6)


def decoder_of(model, *, rows=3, block_len=4, context_len=64, page_len=4, pages=None, kind="argmax"):
    draft = DraftConfig(block_len=block_len, kind=kind)
    return Decoder(model, draft, slots=rows, context_len=context_len, page_len=page_len, pages=pages)


def texts_of(scheduler, texts, sampling):
    return [tuple(c.token_ids) for c in complete(scheduler, requests(texts, sampling))]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("mode", ["autoregressive", "single-pass", "two-pass"])
def test_sequences_that_give_up_their_pages_are_read_again_and_give_the_same_text(model, mode, sampling):
    texts = prompts(15, 12, 20, 8, 17)
    scheduler = Scheduler(decoder_of(model, pages=19), FixedMode(mode, 4))
    assert texts_of(scheduler, texts, sampling) == expected_texts(model, texts, sampling)
    assert scheduler.preemptions > 0
    assert scheduler.pool.held == 0


def pages_are_held_by_right(scheduler):
    """Whether no waiting sequence holds pages but the first of the line and those whose chunks are in hand."""
    in_hand = [chunk.sequence for chunk in scheduler._reading.chunks] if scheduler._reading else []
    return all(sequence in in_hand for sequence in tuple(scheduler._line)[1:] if sequence.pages.ids)


@pytest.mark.parametrize("paced", ["whole chunks", "layers at random"])
@pytest.mark.parametrize("kind", ["argmax", "sampled"])
@pytest.mark.parametrize("seed", range(6))
def test_after_any_history_of_admits_aborts_and_finishes_every_page_is_free(model, seed, kind, paced):
    luck = random.Random(seed)
    texts = prompts(*(luck.randint(1, 24) for _ in range(14)), seed=seed)
    texts += [text[:10] + prompts(5, seed=seed)[0] for text in texts if len(text) > 10]  # some begin alike
    expected = dict(enumerate(expected_texts(model, texts, GREEDY)))
    scheduler = Scheduler(decoder_of(model, rows=4, pages=22, kind=kind), RandomPlanner(seed, 4))
    if paced == "layers at random":
        scheduler._pace = RandomPace(seed)
    waiting, emitted = requests(texts, GREEDY), {str(i): () for i in range(len(texts))}
    while waiting or scheduler.busy:
        if waiting and luck.random() < 0.5:
            scheduler.submit(waiting.pop(0))
        if luck.random() < 0.1:
            gone = str(luck.randrange(len(texts)))
            if scheduler.abort(gone):
                expected[int(gone)] = None
        for step in scheduler.advance():
            emitted[step.request_id] += step.token_ids
        assert scheduler.pool.held <= 22
        assert pages_are_held_by_right(scheduler)
    for i, text in expected.items():
        assert text is None or emitted[str(i)] == text
    assert (scheduler.pool.held, scheduler.pool.available) == (0, 22)
    assert not scheduler.decoder._state.live.any()
    assert not scheduler.decoder._state.page_table.any()


@pytest.mark.parametrize("gone", ["0", "1", "2"])
def test_a_request_that_goes_takes_its_chunk_in_hand_along_and_the_others_are_read_again(model, gone):
    """Its pages may be another's at once, so no forward may write there any more."""
    texts = prompts(6, 5, 7, 4)
    scheduler = Scheduler(decoder_of(model, rows=4), FixedMode("autoregressive", 4))
    first, *others = requests(texts[3:] + texts[:3], GREEDY)
    scheduler.submit(first)
    emitted = {request.request_id: () for request in (first, *others)}
    assert scheduler.advance()
    scheduler._pace.layers = lambda tokens, left: 1  # of two
    for request in others:
        scheduler.submit(request)
    scheduler.advance()
    assert scheduler._reading.left == 1
    gone = others[int(gone)].request_id
    assert scheduler.abort(gone)
    assert scheduler._reading is None
    assert pages_are_held_by_right(scheduler)
    while scheduler.busy:
        for step in scheduler.advance():
            emitted[step.request_id] += step.token_ids
    found = {name: text for name, text in emitted.items() if name != gone}
    expected = dict(zip(emitted, expected_texts(model, texts[3:] + texts[:3], GREEDY), strict=True))
    assert {name: text[-20:] for name, text in found.items()} == {name: expected[name][-20:] for name in found}
    assert scheduler.pool.held == 0


def test_a_prompt_that_begins_like_one_before_is_not_read_twice(model):
    text = prompts(30)[0]
    again = (*text[:20], *prompts(6, seed=3)[0])
    scheduler = Scheduler(decoder_of(model))
    assert texts_of(scheduler, [text], GREEDY) == expected_texts(model, [text], GREEDY)
    assert scheduler.shared_tokens == 0
    assert texts_of(scheduler, [again], GREEDY) == expected_texts(model, [again], GREEDY)
    assert scheduler.shared_tokens == 20
    assert texts_of(scheduler, [text], GREEDY) == expected_texts(model, [text], GREEDY)
    assert scheduler.shared_tokens == 20 + 28, "all but the page that the prompt's last token is on"


def test_a_completion_is_shared_as_well_by_whoever_continues_it(model):
    text = prompts(9)[0]
    scheduler = Scheduler(decoder_of(model))
    emitted = texts_of(scheduler, [text], GREEDY)[0]
    longer = (*text, *emitted)
    assert texts_of(scheduler, [longer], GREEDY) == expected_texts(model, [longer], GREEDY)
    assert scheduler.shared_tokens >= 28


def test_many_requests_of_the_same_prompt_hold_its_pages_once(model):
    text = prompts(40)[0]
    scheduler = Scheduler(decoder_of(model, rows=4, context_len=64))
    firsts = [prefilled(scheduler, request) for request in requests([text] * 4, GREEDY)]
    assert [step.cached for step in firsts] == [0, 36, 36, 36]
    assert {step.cached for step in scheduler.decode_step(StepPlan(1))} == {0}, "reported once"
    assert scheduler.pool.held == 9 + 4 * 2  # 36 tokens shared; each has the last 4 of the prompt, and room for a block
    assert scheduler.shared_tokens == 3 * 36


def test_a_long_prompt_holds_up_nobody(model):
    sampling = replace(GREEDY, max_tokens=12)
    scheduler = Scheduler(decoder_of(model, rows=2, context_len=128))
    short, long = requests(prompts(5, 100), sampling)
    prefilled(scheduler, short)
    scheduler.submit(long)
    gaps = 0
    while scheduler.arriving:
        assert scheduler.decode_step(StepPlan(1))
        gaps += not scheduler.prefill(16)
    assert gaps == 6, "100 tokens in chunks of 16 leave room for six steps before the first token"


def test_what_lies_beyond_a_prefix_is_never_looked_at(model):
    texts = prompts(5, 12, 3, 8)
    decoder = decoder_of(model)
    decoder.cache.pages.fill_(1e4)
    assert texts_of(Scheduler(decoder), texts, GREEDY) == expected_texts(model, texts, GREEDY)


def test_mask_tokens_never_own_a_page(model):
    """Dense drafting adds a page for each committed token's slot and none for the 16 mask rows."""
    scheduler = Scheduler(decoder_of(model, rows=1))
    prefilled(scheduler, requests(prompts(7), GREEDY)[0])
    scheduler.decode_step(StepPlan(4, (1, 2, 3, 4)))
    assert scheduler.pool.held == 3  # 7 tokens, and 4 drafts in flight
    written = scheduler.decoder.cache.pages[0].abs().sum((1, 2, 3, 4)) > 0
    assert written.sum() == 3


def test_the_memory_of_the_cache_is_known_before_the_first_request(model):
    config = model.config
    token_bytes = 2 * config.layers * config.kv_heads * config.head_size * 4
    assert decoder_of(model, pages=40).cache.bytes == 41 * 4 * token_bytes


def test_a_cache_too_small_for_one_context_is_refused(model):
    with pytest.raises(ConfigError, match="take 17; give it as many"):
        decoder_of(model, pages=16)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"pages": 10**12}, "GiB of memory, which cpu does not have"), ({"slots": 10**5}, "at most 16384")],
)
def test_a_decoder_that_no_memory_can_hold_is_refused_in_one_line(model, sizes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Decoder(model, DraftConfig(block_len=4), **{"slots": 1, **sizes})
    assert "\n" not in str(caught.value)


def test_a_rehearsal_after_requests_would_write_over_shared_pages(model):
    decoder = decoder_of(model)
    texts_of(Scheduler(decoder), prompts(9), GREEDY)
    with pytest.raises(AssertionError, match="before requests come"), decoder.rehearsal(1, 8):
        pass


def test_a_rehearsal_leaves_no_trace(model):
    text = prompts(9)[0]
    decoder = decoder_of(model)
    with decoder.rehearsal(3, 40) as step:
        for plan in (StepPlan(1), StepPlan(4, (1, 2, 3, 4))):
            step(plan)
    assert not torch.any(decoder._state.prefix_len)
    assert texts_of(Scheduler(decoder), [text], GREEDY) == expected_texts(model, [text], GREEDY)

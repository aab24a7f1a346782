"""Prompts are read in the forward of a decode step, several at a time; each gives the numbers that it gives alone."""

import copy
from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, RandomPace, expected_texts, prompts, requests
from tiny import wide_model

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decode_forward import DecodeForward, QueryTokens
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.plan_tensors import QueryPattern
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode
from tidar_core.kernels import PLAIN, c_kernels, compiled
from tidar_core.kernels.linear import prepare_for_decoding
from tidar_core.kernels.quantised_linear import WEIGHTS
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.shapes import named_shape

K = 4


def query_tokens(page_table, texts, groups):
    rows = torch.tensor(texts)
    pattern = QueryPattern.of(rows.shape[1], groups, K, rows.device)
    return QueryTokens(torch.tensor(page_table), torch.zeros(len(texts), dtype=torch.long), rows, pattern, 0)


PARTS = (
    query_tokens([[1, 2], [3, 4]], prompts(4, 4), (1, 2, 3, 4)),  # a decode step of two sequences
    query_tokens([[5, 6]], prompts(7, seed=1), (7,)),  # the end of a prompt, with masks
    query_tokens([[7, 8]], prompts(8, seed=2), ()),  # the middle of another
)


def hidden_states(model, kernels, *forwards):
    """Hidden states of the parts of all forwards, in order."""
    read = DecodeForward(model, KVCache(model.config, pages=8, page_len=4), positions=40, block_len=K, kernels=kernels)
    with torch.no_grad():
        return [hidden for parts in forwards for hidden in read(*parts)]


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
def test_with_kernels_in_c_parts_of_a_forward_have_the_bits_that_each_has_alone(model):
    model = copy.deepcopy(model)
    prepare_for_decoding(model)
    together = hidden_states(model, c_kernels(), PARTS)
    alone = hidden_states(model, c_kernels(), *([part] for part in PARTS))
    assert all(map(torch.equal, together, alone))


def test_with_plain_torch_parts_differ_by_rounding_alone(model):
    together = hidden_states(model, PLAIN, PARTS)
    alone = hidden_states(model, PLAIN, *([part] for part in PARTS))
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-5)  # products of other shapes sum in another order


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize("calls", ["one for all layers", "one for each function"])
def test_with_kernels_in_c_chunks_that_pass_some_layers_beside_each_of_several_steps_have_the_same_bits(calls):
    model = wide_model(replace(named_shape("tiny"), layers=7))
    prepare_for_decoding(model)
    kernels = c_kernels() if calls == "one for all layers" else replace(c_kernels(), layers=None)
    step, *chunks = PARTS
    step_alone, *alone = hidden_states(model, c_kernels(), [step], chunks)
    read = DecodeForward(model, KVCache(model.config, pages=8, page_len=4), positions=40, block_len=K, kernels=kernels)
    with torch.no_grad():
        passage = read.enter(*chunks)
        for layers in (1, 0, 3, 2):
            assert torch.equal(read.step(step, passage, layers), step_alone)
        assert passage.passed == 6
        assert all(map(torch.equal, read.finish(passage), alone))


def test_a_step_takes_chunks_no_further_than_through_the_last_layer(model):
    step, *chunks = PARTS
    expected = hidden_states(model, PLAIN, chunks)
    read = DecodeForward(model, KVCache(model.config, pages=8, page_len=4), positions=40, block_len=K, kernels=PLAIN)
    with torch.no_grad():
        passage = read.enter(*chunks)
        read.step(step, passage, 99)
    for found, alone in zip(passage.hidden, expected, strict=True):
        torch.testing.assert_close(found, alone, rtol=0, atol=4e-5)


class Watched(Scheduler):
    """A scheduler that notes the prompt tokens of each forward: those of chunks beside a step, or alone."""

    def __init__(self, model, *, slots, **settings):
        super().__init__(Decoder(model, DraftConfig(block_len=K), slots=slots, context_len=64, page_len=4), **settings)
        self.alone, self.beside = [], []
        read, step = self.decoder.read, self.decoder.decode_step

        def watched_read(reading):
            self.alone += [lengths] if (lengths := [chunk.plan.clean_len for chunk in reading.unread]) else []
            read(reading)

        def watched_step(plan, beside, layers):
            self.beside.append([chunk.plan.clean_len for chunk in beside.unread] if layers else [])
            return step(plan, beside, layers)

        self.decoder.read, self.decoder.decode_step = watched_read, watched_step


@pytest.mark.parametrize("mode", ["autoregressive", "single-pass", "two-pass"])
def test_prompts_that_arrive_together_are_read_in_one_forward(model, mode):
    texts = prompts(9, 5, 12, 3)
    scheduler = Watched(model, slots=4, planner=FixedMode(mode, K))
    found = [tuple(c.token_ids) for c in complete(scheduler, requests(texts, GREEDY))]
    assert found == expected_texts(model, texts, GREEDY)
    assert scheduler.alone == [[9, 5, 12, 3]]


@pytest.mark.parametrize("mode", ["autoregressive", "single-pass", "two-pass"])
def test_a_prompt_that_arrives_later_is_read_beside_the_steps_of_others(model, mode):
    texts = prompts(9, 5, 12)
    scheduler = Watched(model, slots=3, planner=FixedMode(mode, K), prefill_tokens=10)
    first, *others = requests(texts, GREEDY)
    scheduler.submit(first)
    emitted = {request.request_id: () for request in (first, *others)}
    while scheduler.busy:
        for step in scheduler.advance():
            emitted[step.request_id] += step.token_ids
        if len(scheduler.beside) == 1:
            scheduler.submit(others.pop(0))
            scheduler.submit(others.pop(0))
    assert list(emitted.values()) == expected_texts(model, texts, GREEDY)
    assert scheduler.alone == [[9]]
    assert [chunks for chunks in scheduler.beside if chunks] == [[5, 5], [7]]


@pytest.mark.parametrize("passed", [0, 1])
def test_a_gap_counts_what_is_read_alone_in_it_and_what_is_read_beside_its_step(model, passed):
    """The first text ends, so the next prompts are read alone. The gap ends with the first step of the second text."""
    scheduler = Watched(model, slots=3, planner=FixedMode("autoregressive", K), prefill_tokens=8)
    pace, read = scheduler._pace, []
    step_ended, pace.layers = pace.step_ended, lambda tokens, left: 2
    pace.step_ended = lambda work, share: read.append(work) or step_ended(work, share)
    first, *others = requests(prompts(5, 7, 9), replace(GREEDY, max_tokens=2))
    scheduler.submit(first)
    scheduler.advance()
    pace.tokens, pace.layers = (lambda running: 0 if running and not passed else 8), lambda tokens, left: passed
    for request in others:
        scheduler.submit(request)
    scheduler.advance()  # the first text ends, and 8 tokens pass the layers that they have not passed, alone
    pace.tokens, pace.layers = (lambda running: 8), lambda tokens, left: 2
    scheduler.advance()
    assert scheduler.alone == [[5], [7, 1]]
    assert scheduler.beside[-1] == [8]
    assert read == [5 * 2 + 8 * passed, 8 * (2 - passed) + 8 * 2]


def test_prompts_that_begin_alike_wait_for_the_pages_of_the_first(model):
    common, ends = prompts(9)[0], prompts(3, 5, 4, seed=1)
    scheduler = Watched(model, slots=3)
    done = complete(scheduler, requests([common + end for end in ends], GREEDY))
    assert [tuple(c.token_ids) for c in done] == expected_texts(model, [common + end for end in ends], GREEDY)
    assert scheduler.alone == [[12], [6, 5]]
    assert scheduler.shared_tokens == 2 * 8


@pytest.mark.parametrize("others", [0, 1])
def test_a_text_that_finds_all_of_its_pages_again_goes_on_without_a_read(model, others):
    texts = prompts(9, 5)[: 1 + others]
    scheduler = Watched(model, slots=2, planner=FixedMode("autoregressive", K))
    emitted = {str(n): () for n in range(len(texts))}
    for request in requests(texts, GREEDY):
        scheduler.submit(request)
    preempted = False
    while scheduler.busy:
        for step in scheduler.advance():
            emitted[step.request_id] += step.token_ids
        if not preempted and len(emitted["0"]) == 8:  # 16 tokens were read: four whole pages
            preempted, sequence = True, scheduler._sequences["0"]
            scheduler._leave(sequence)
            scheduler._line.appendleft(sequence)
    assert list(emitted.values()) == expected_texts(model, texts, GREEDY)
    assert preempted
    assert scheduler.alone == [[len(text) for text in texts]]
    assert not any(scheduler.beside)


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize("form", ["fp32", "bf16", *WEIGHTS])
@pytest.mark.parametrize("mode", MODES)
def test_with_kernels_in_c_a_long_prompt_gives_the_same_bits_in_every_mode_and_in_chunks_of_any_length(form, mode):
    """So in bf16 too, a text is that of the AR mode, token by token, whatever runs beside it."""
    model = wide_model(replace(named_shape("tiny"), tied_head=False, context_len=512))
    model = model.bfloat16() if form != "fp32" else model
    prepare_for_decoding(model, form if form in WEIGHTS else None)
    sampling = SamplingConfig(max_tokens=10, prompt_logprobs=True, logprobs=3)
    texts = requests(prompts(300, 5, 270), sampling)

    def decoded(mode, slots, prefill_tokens, some, pace=None):
        decoder = Decoder(model, DraftConfig(block_len=K), slots=slots)
        scheduler = Scheduler(decoder, FixedMode(mode, K), prefill_tokens=prefill_tokens)
        scheduler._pace = pace or scheduler._pace
        return [(done.token_ids, done.logprobs, done.prompt_logprobs) for done in complete(scheduler, some)]

    expected = [decoded("autoregressive", 1, 10_000, [text])[0] for text in texts]
    assert decoded(mode, 3, 50, texts) == expected
    assert decoded(mode, 2, 50, texts, RandomPace(1)) == expected, "chunks pass some layers in each step"

"""Drafting changes neither the texts nor the log-probabilities of a request, whatever its sampling fields."""

from dataclasses import replace

import pytest
import torch
from decoding import GREEDY, RandomPlanner, expected_texts, prompts, requests

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive, score
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, FixedMode

WARM = SamplingConfig(max_tokens=24, temperature=1.0, seed=7)
# The bad words occur in the greedy text of the first prompt, so that the ban has an effect; a test below holds this.
FEATURES = {
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.4},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "less than none": {"frequency_penalty": -1.0, "presence_penalty": -1.0},
    "bias": {"logit_bias": ((3, 4.0), (17, -100.0), (400, 2.5))},
    "bad words": {"bad_words": ((5,), (40, 41), (7, 8, 9))},
    "min tokens": {"min_tokens": 12, "eos_ids": tuple(range(0, 500, 3))},
    "all": {
        "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "min_tokens": 6,
        "logit_bias": ((3, 1.0),), "bad_words": ((9, 9),), "eos_ids": tuple(range(0, 500, 50)), "top_k": 80,
    },
}  # fmt: skip


def decoded(model, wanted_requests, *, planner=None, kind="argmax", rows=3, pages=None, block_len=4, **settings):
    decoder = Decoder(
        model, DraftConfig(block_len=block_len, kind=kind), slots=rows, context_len=64, page_len=4, pages=pages
    )
    return complete(Scheduler(decoder, planner, **settings), wanted_requests)


def words_of_the_text(model, text):
    """Bad words that the greedy text holds: a single token, and two that follow each other."""
    emitted = generate_autoregressive(model, text, GREEDY)
    return ((emitted[4],), (emitted[8], emitted[9]), (emitted[1], emitted[2], emitted[3]))


@pytest.mark.parametrize("mode", [*MODES, "any"])
@pytest.mark.parametrize("base", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_gives_the_text_that_it_gives_one_token_at_a_time(model, feature, base, mode):
    texts = prompts(5, 12, 3, 8)
    sampling = replace(base, **FEATURES[feature])
    if feature == "bad words":
        sampling = replace(sampling, bad_words=words_of_the_text(model, texts[0]))
        assert expected_texts(model, texts[:1], sampling) != expected_texts(model, texts[:1], base)
    planner = RandomPlanner(3, 4) if mode == "any" else FixedMode(mode, 4)
    found = [tuple(c.token_ids) for c in decoded(model, requests(texts, sampling), planner=planner)]
    assert found == expected_texts(model, texts, sampling)


def test_requests_with_and_without_rules_share_a_batch_and_its_pages(model):
    texts = prompts(5, 12, 3, 8, 9)
    wanted = [
        GREEDY,
        *(replace(WARM, **FEATURES[name]) for name in ("all", "repetition")),
        WARM,
        replace(GREEDY, min_tokens=9),
    ]
    wanted_requests = [Request(request_id=str(i), prompt=t, sampling=s) for i, (t, s) in enumerate(zip(texts, wanted))]
    found = [tuple(c.token_ids) for c in decoded(model, wanted_requests, pages=24)]
    assert found == [generate_autoregressive(model, text, sampling) for text, sampling in zip(texts, wanted)]


class Alternating:
    """A grammar of texts that alternate between even and odd tokens, and may end after an even number of them."""

    def __init__(self, vocab_size, end):
        self.vocab_size, self.end, self.emitted = vocab_size, end, []

    def allowed(self, tokens):
        rows = []
        for count in range(len(tokens) + 1):
            length = len(self.emitted) + count
            row = torch.arange(self.vocab_size) % 2 == length % 2
            row[self.end] = length % 2 == 0 and length > 0
            rows.append(row)
        return torch.stack(rows)

    def advance(self, tokens):
        for token in tokens:
            assert token % 2 == len(self.emitted) % 2
            self.emitted.append(token)

    def retreat(self, count):
        del self.emitted[len(self.emitted) - count :]

    @property
    def finished(self):
        return False


@pytest.mark.parametrize("kind", ["argmax", "sampled"])
@pytest.mark.parametrize("base", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", [*MODES, "any"])
def test_a_constrained_text_keeps_to_its_grammar_and_is_the_autoregressive_one(model, mode, base, kind):
    end = 498
    sampling = replace(base, eos_ids=(end,), logit_bias=((end, 6.0),))
    texts = prompts(5, 12, 3)

    def grammar():
        return Alternating(model.config.vocab_size, end)

    wanted_requests = [
        Request(request_id=str(i), prompt=text, sampling=sampling, constraint=grammar()) for i, text in enumerate(texts)
    ]
    planner = RandomPlanner(5, 4) if mode == "any" else FixedMode(mode, 4)
    found = [tuple(c.token_ids) for c in decoded(model, wanted_requests, planner=planner, kind=kind, pages=24)]
    for text in found:
        assert all(token % 2 == i % 2 for i, token in enumerate(text) if token != end)
    if kind == "argmax" or base is GREEDY:
        assert found == [generate_autoregressive(model, text, sampling, grammar()) for text in texts]


def test_drafts_within_a_grammar_are_all_allowed(model):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=8), slots=1))
    constraint = Alternating(model.config.vocab_size, 498)
    scheduler.submit(Request(request_id="r", prompt=(1, 2, 3), sampling=GREEDY, constraint=constraint))
    first = scheduler.prefill()[0].token_ids[0]
    for _ in range(3):
        drafts = scheduler.decoder._state.draft[0, : scheduler.pending["r"]].tolist()
        assert tuple(scheduler.pending.values()) == (8,)
        assert drafts[0] == first
        assert all(token % 2 == (len(constraint.emitted) - 1 + i) % 2 for i, token in enumerate(drafts))
        first = scheduler.decode_step(FixedMode("single-pass", 8).next_plan({"r": 8}, 3))[0].token_ids[-1]


@pytest.mark.parametrize("sampling", [GREEDY, replace(WARM, **FEATURES["all"])], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", [*MODES, "any"])
def test_logprobs_of_emitted_tokens_are_those_of_a_plain_causal_forward(model, mode, sampling):
    texts = prompts(5, 12, 3)
    sampling = replace(sampling, logprobs=3, prompt_logprobs=True)
    planner = RandomPlanner(5, 4) if mode == "any" else FixedMode(mode, 4)
    for text, completion in zip(texts, decoded(model, requests(texts, sampling), planner=planner, pages=20)):
        whole = (*text, *completion.token_ids)
        scores = score(model, whole, top=3)
        found = [*completion.prompt_logprobs, *completion.logprobs]
        assert [entry.token_id for entry in found] == list(whole[1:])
        # fp32, keys summed in another order
        torch.testing.assert_close(torch.tensor([e.logprob for e in found]), scores.logprob_L, rtol=0, atol=1e-4)
        top = torch.tensor([[value for _, value in entry.top] for entry in found])
        torch.testing.assert_close(top, scores.top_logprob_LT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_as_many_logprobs_come_as_the_request_wants(model, logprobs):
    sampling = replace(GREEDY, logprobs=logprobs)
    completion = decoded(model, requests(prompts(7), sampling))[0]
    assert [len(entry.top) for entry in completion.logprobs] == ([] if logprobs is None else [logprobs] * 24)
    assert completion.prompt_logprobs == ()


def test_a_prompt_in_chunks_is_scored_whole_even_where_its_pages_are_known(model):
    text = prompts(30)[0]
    plain, scored = (
        replace(GREEDY, prompt_logprobs=wanted, logprobs=0 if wanted else None) for wanted in (False, True)
    )
    wanted_requests = [
        Request(request_id=str(i), prompt=text, sampling=s) for i, s in enumerate((plain, scored, scored))
    ]
    done = decoded(model, wanted_requests, rows=1, prefill_tokens=7)
    for completion in done[1:]:
        found = torch.tensor([entry.logprob for entry in completion.prompt_logprobs])
        torch.testing.assert_close(found, score(model, text).logprob_L, rtol=0, atol=1e-4)

"""Bans, biases and penalties: typed out, against one token at a time in plain Python, and under drafts."""

import math
import random

import pytest
import torch

from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.logit_rules import LogitRules, check
from tidar_core.decoding.sampling import TARGET, SamplingTensors, sample
from tidar_core.decoding.verify import verify_argmax
from tidar_core.errors import RequestError
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout

INF = math.inf
V, END = 8, 0


class EvenThenOdd:
    """Even and odd tokens in turns, 2 to 6 of them, then END: a constraint in plain Python."""

    def __init__(self, vocab_size=V):
        self.emitted, self.vocab_size = [], vocab_size

    @property
    def finished(self):
        return len(self.emitted) >= 6

    def allowed(self, tokens):
        return torch.stack([self._row([*self.emitted, *tokens[:n]]) for n in range(len(tokens) + 1)])

    def advance(self, tokens):
        for token in tokens:
            assert self._row(self.emitted)[token]
            self.emitted.append(token)

    def retreat(self, count):
        del self.emitted[len(self.emitted) - count :]

    def _row(self, emitted):
        row = torch.zeros(self.vocab_size, dtype=torch.bool)
        if len(emitted) < 6:
            row[1 + len(emitted) % 2 : V : 2] = True
        row[END] = len(emitted) >= 2
        return row


def adjusted(logits, drafts=(), prompt=(), output=(), **fields):
    """Rows adjusted by the rules of a request, as lists."""
    rules = LogitRules(SamplingConfig(**fields), prompt, len(logits), output=output)
    return rules.adjust(torch.tensor(logits).expand(len(drafts) + 1, -1), drafts).tolist()


def naive(logits, sampling, prompt, output, allowed=None):
    """One row by plain Python over the whole history. No row of the tests runs out of tokens."""
    row = list(logits)
    for token in range(len(row)):
        in_bad_word = any((*output, token)[-len(word) :] == word for word in sampling.bad_words)
        too_early = token in sampling.eos_ids and len(output) < sampling.min_tokens
        if in_bad_word or too_early or not (allowed is None or allowed[token]):
            row[token] = -INF
        row[token] += dict(sampling.logit_bias).get(token, 0.0)
        if token in prompt or token in output:
            r = sampling.repetition_penalty
            row[token] = row[token] / r if row[token] > 0 else row[token] * r
        row[token] -= sampling.frequency_penalty * output.count(token)
        row[token] -= sampling.presence_penalty * (token in output)
    return row


def test_repetition_divides_positive_logits_and_multiplies_negative_ones_of_prompt_and_output():
    [row] = adjusted([2.0, -2.0, 1.0, 3.0], prompt=(0, 0), output=(1, 2), repetition_penalty=2.0)
    assert row == [1.0, -4.0, 0.5, 3.0]


def test_frequency_counts_and_presence_does_not_and_neither_reads_the_prompt():
    [row] = adjusted([1.0] * 4, prompt=(0, 3), output=(1, 2, 2), frequency_penalty=0.5, presence_penalty=0.25)
    assert row == [1.0, 1 - 0.5 - 0.25, 1 - 2 * 0.5 - 0.25, 1.0]


def test_a_draft_counts_from_the_row_after_it():
    rows = adjusted([1.0, 1.0, 1.0], drafts=(2, 2), output=(1,), frequency_penalty=0.5)
    assert rows == [[1, 0.5, 1], [1, 0.5, 0.5], [1, 0.5, 0]]


def test_bias_comes_before_penalties():
    fields = {"logit_bias": ((1, 3.0),), "repetition_penalty": 2.0, "presence_penalty": 0.5}
    assert adjusted([0.0, -1.0, 0.0], output=(1,), **fields) == [[0, (-1 + 3) / 2 - 0.5, 0]]


@pytest.mark.parametrize("committed", range(4))
def test_a_bad_word_ends_where_it_would_be_completed_wherever_drafts_begin(committed):
    output, words = (5, 1, 2), ((3,), (2, 4), (1, 2, 5), (2, 1, 2, 6))
    rows = adjusted([0.0] * V, output[committed:], output=output[:committed], bad_words=words)
    banned = [{token for token, logit in enumerate(row) if logit == -INF} for row in rows]
    assert banned == [{3}, {3}, {3}, {3, 4, 5}][committed:]  # the last bad word is longer than the history


def test_bad_words_of_the_prompt_are_not_held_against_the_output():
    assert adjusted([0.0] * 4, prompt=(1,), bad_words=((1, 2),)) == [[0, 0, 0, 0]]


def test_no_end_of_text_and_no_stop_token_comes_before_min_tokens():
    rows = adjusted([0.0] * 4, drafts=(3, 3, 3), output=(3,), min_tokens=3, eos_ids=(0, 2))
    assert rows == [[-INF, 0, -INF, 0], [-INF, 0, -INF, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert adjusted([0.0] * 4, min_tokens=1, eos_ids=(0, 99))[0] == [-INF, 0, 0, 0]  # 99 is no token


def test_where_all_is_banned_only_end_of_text_is_left():
    words = tuple((token,) for token in range(V))
    assert adjusted([1.0] * V, bad_words=words, eos_ids=(END, 3)) == [[0, -INF, -INF, 0] + [-INF] * 4]
    assert adjusted([1.0] * V, bad_words=words) == [[1.0] * V]  # nothing ends this text but its length


def test_a_grammar_outweighs_the_other_bans():
    finished = EvenThenOdd()
    finished.emitted = [1, 2, 1, 2, 1, 2]
    rules = LogitRules(SamplingConfig(min_tokens=9, eos_ids=(END, 3)), (), V, constraint=finished)
    assert rules.adjust(torch.ones(1, V)).tolist() == [[1] + [-INF] * 7]
    rules = LogitRules(
        SamplingConfig(bad_words=((1,), (3,), (5,), (7,)), eos_ids=(END,)), (), V, constraint=EvenThenOdd()
    )
    assert rules.adjust(torch.ones(1, V)).tolist() == [[-INF, 1] * 4]
    biased = SamplingConfig(logit_bias=tuple((token, -100.0) for token in range(V)), eos_ids=(END,))
    rules = LogitRules(biased, (), V, constraint=EvenThenOdd())
    assert rules.adjust(torch.ones(1, V)).tolist() == [[-INF, -99] * 4]


def test_a_token_that_the_model_bans_stays_banned():
    [row] = adjusted([0.0, -INF], output=(1,), logit_bias=((1, 100.0),), repetition_penalty=0.5, presence_penalty=-2.0)
    assert row == [0, -INF]


def test_the_logits_are_not_written_to():
    logits = torch.zeros(1, V)
    for fields in ({"min_tokens": 1}, {"bad_words": ((1,),)}, {"logit_bias": ((1, 1.0),)}, {"presence_penalty": 1.0}):
        LogitRules(SamplingConfig(**fields), (), V, output=(1,)).adjust(logits)[:] = 7
    assert torch.equal(logits, torch.zeros(1, V))


def random_case(seed):
    """A request with every rule, logits of four rows, and a history that keeps to the constraint."""
    rng = random.Random(seed)
    sampling = SamplingConfig(
        repetition_penalty=rng.choice([0.7, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, -0.4, 0.9]),
        frequency_penalty=rng.choice([0.0, 0.6]),
        logit_bias=tuple((token, rng.uniform(-9, 9)) for token in rng.sample(range(V), rng.randint(0, 3))),
        bad_words=tuple(tuple(rng.choices(range(1, V), k=rng.randint(1, 3))) for _ in range(rng.randint(0, 2))),
        min_tokens=rng.choice([0, 3]),
        eos_ids=(END,),
    )
    text = [rng.choice([1, 3, 5, 7] if place % 2 == 0 else [2, 4, 6]) for place in range(5)]
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(seed)) * 3
    return sampling, rng.choices(range(V), k=5), text[:2], text[2:], logits


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_adjusting_in_one_go_equals_one_token_at_a_time_exactly(seed, constrained):
    sampling, prompt, output, drafts, logits = random_case(seed)
    constraints = [EvenThenOdd() if constrained else None for _ in range(3)]
    rows = LogitRules(sampling, prompt, V, constraint=constraints[0], output=output).adjust(logits, drafts)
    slow = LogitRules(sampling, prompt, V, constraint=constraints[1])
    slow.commit(output)
    for j in range(4):
        assert torch.equal(rows[j], slow.adjust(logits[j : j + 1])[0])
        allowed = constraints[2].allowed([*output, *drafts[:j]])[-1].tolist() if constrained else None
        expected = naive(logits[j].tolist(), sampling, prompt, (*output, *drafts[:j]), allowed)
        if max(expected) > -INF:
            assert rows[j].tolist() == pytest.approx(expected, abs=1e-5)  # fp32 against fp64, logits about 10
        slow.commit(drafts[j : j + 1])


@pytest.mark.parametrize("seed", range(40))
def test_drafts_are_the_likeliest_that_the_rules_leave_and_nothing_remembers_them(seed):
    sampling, prompt, output, _, logits = random_case(seed)
    rules = LogitRules(sampling, prompt, V, constraint=EvenThenOdd(), output=output)
    before = rules.adjust(logits[:1])
    drafts = rules.adjust_drafts(logits)
    assert torch.equal(rules.adjust(logits[:1]), before)
    rows = rules.adjust(torch.cat([logits, logits[:1]])[: len(drafts) + 1], drafts)
    assert drafts == rows[: len(drafts)].argmax(-1).tolist()
    assert len(drafts) == 4 or drafts[-1] == END
    assert END not in drafts[:-1]


def test_drafts_stop_with_a_finished_grammar():
    rules = LogitRules(SamplingConfig(eos_ids=(END,)), (), V, constraint=EvenThenOdd(), output=(1, 2, 1, 2))
    logits = torch.zeros(4, V)
    logits[:, END] = -9.0
    assert rules.adjust_drafts(logits) == [1, 2, END]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": ((8, 1.0),)}, "logit_bias names token 8; ids are 0..7"),
        ({"bad_words": ((1, -1),)}, "bad_words names token -1; ids are 0..7"),
    ],
)
def test_a_rule_about_a_token_that_is_none_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        check(SamplingConfig(**fields), V)


def test_a_request_without_rules_needs_none():
    plain = SamplingConfig(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, eos_ids=(3,), logprobs=5)
    assert not LogitRules.needed(plain)
    for fields in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": ((1, 1.0),)},
        {"bad_words": ((1,),)},
        {"min_tokens": 1},
    ):
        assert LogitRules.needed(SamplingConfig(**fields))


RULES = SamplingConfig(
    max_tokens=20,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    logit_bias=((7, 6.0), (9, -4.0)),
    bad_words=((7, 7), (9,)),
    min_tokens=3,
    eos_ids=(END,),
    seed=4,
)


def generate_with_drafts(model, prompt, sampling, truth, constraint, rng):
    """Verify drafts, good and bad ones, by a whole causal forward at each step; the rules adjust all rows at once."""
    fields = SamplingTensors.of([sampling])
    rules = LogitRules(sampling, prompt, model.config.vocab_size, constraint=constraint)
    output = []
    while len(output) < sampling.max_tokens and END not in output:
        drafts = [token if rng.random() < 0.8 else rng.randrange(V) for token in truth[len(output) :][:3]]
        drafts = drafts if output else []
        ids = torch.tensor([[*prompt, *output, *drafts]])
        layout = causal_layout(torch.zeros_like(ids))
        with torch.no_grad():
            logits = model.head(model(ids, layout.position, DenseAttention(layout)))[0, -len(drafts) - 1 :]
        positions = torch.arange(ids.shape[1] - len(drafts), ids.shape[1] + 1)[None]
        drawn = sample(rules.adjust(logits, drafts)[None], fields, positions, TARGET)
        kept = int(verify_argmax(torch.tensor([[0, *drafts]]), drawn).accepted_B)
        new = drawn[0, :kept].tolist()[: sampling.max_tokens - len(output)]
        output += new[: new.index(END) + 1] if END in new else new
        rules.commit(new)
    return tuple(output)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("constrained", [False, True])
def test_drafts_never_change_a_text_under_rules(model, temperature, constrained):
    sampling = SamplingConfig(**{name: getattr(RULES, name) for name in RULES.__slots__} | {"temperature": temperature})

    def constraint():
        return EvenThenOdd(model.config.vocab_size) if constrained else None

    truth = generate_autoregressive(model, (5, 6, 7), sampling, constraint())
    drafted = generate_with_drafts(model, (5, 6, 7), sampling, truth, constraint(), random.Random(1))
    assert drafted == truth
    assert truth != generate_autoregressive(model, (5, 6, 7), SamplingConfig(max_tokens=20, temperature=temperature))

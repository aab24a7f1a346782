"""Logits become distributions and draws become tokens: typed-out distributions, chosen draws."""

import math

import pytest
import torch

from tidar_core.config import SamplingConfig
from tidar_core.decoding.sampling import (
    ACCEPT,
    DRAFT,
    TARGET,
    SamplingTensors,
    draw,
    likeliest,
    sample,
    target_probs,
    uniform,
)
from tidar_core.errors import RequestError

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def probs_of(**fields):
    return target_probs(LOGITS[None, None], SamplingTensors.of([SamplingConfig(**fields)]))[0, 0].tolist()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 0.0, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.49}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.3}, [0, 16 / 25, 0, 9 / 25]),  # 4 / 16 is too little, 9 / 16 is not
        ({"temperature": 1.0, "min_p": 0.49, "top_p": 0.45}, [0, 4 / 7, 0, 3 / 7]),  # of what min-p left, 4 / 9 < 0.45
        ({"temperature": 1.0, "min_p": 0.6, "top_k": 3}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.0, "min_p": 0.5}, [0, 1, 0, 0]),
    ],
)
def test_the_distribution_is_temperature_then_min_p_then_top_k_then_top_p(fields, expected):
    assert probs_of(**fields) == pytest.approx(expected, abs=1e-6)


def test_top_k_keeps_exactly_k_of_equal_tokens():
    tied = target_probs(torch.zeros(1, 1, 5), SamplingTensors.of([SamplingConfig(temperature=1.0, top_k=2)]))
    assert tied[0, 0].tolist() == [0.5, 0.5, 0, 0, 0]


def test_each_request_of_a_batch_has_its_own_distribution():
    requests = [
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=1.0, top_k=2),
        SamplingConfig(temperature=1),
        SamplingConfig(temperature=1.0, min_p=0.6),
    ]
    probs = target_probs(LOGITS.expand(4, 1, 4), SamplingTensors.of(requests))[:, 0]
    assert probs[3].tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-6)
    assert probs[0].tolist() == [0, 1, 0, 0]
    assert probs[1].tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1e-6)
    assert probs[2].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-6)


def test_inversion_gives_each_token_its_share_of_the_unit_interval():
    prob = torch.tensor([0.25, 0.0, 0.5, 0.25])
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(prob.expand(6, 4), draws).tolist() == [0, 0, 2, 2, 3, 3]


def test_evenly_spread_draws_give_each_token_its_share_of_the_distribution_with_min_p():
    draws = (torch.arange(900) + 0.5) / 900
    prob = target_probs(LOGITS.expand(1, 900, 4), SamplingTensors.of([SamplingConfig(temperature=1.0, min_p=0.3)]))[0]
    assert torch.bincount(draw(prob, draws), minlength=4).tolist() == [0, 400, 200, 300]


def test_a_token_without_probability_is_never_drawn_even_at_the_edges():
    prob = torch.tensor([0.0, 1.0, 0.0])
    assert draw(prob.expand(2, 3), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_weights_need_not_sum_to_one():
    assert draw(torch.tensor([[3.0, 1.0]]).expand(2, 2), torch.tensor([0.74, 0.76])).tolist() == [0, 1]


def test_draws_are_a_function_of_seed_position_and_role():
    seeds = torch.tensor([1, 2, 1, -5])
    positions = torch.tensor([[3, 4], [3, 4], [3, 4], [3, 4]])
    first = uniform(seeds, positions, TARGET)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first, uniform(seeds, positions, TARGET))
    assert len({float(x) for x in first.flatten()}) == 6
    others = [uniform(seeds, positions, role) for role in (ACCEPT, DRAFT)]
    assert not any(torch.isclose(first, other).any() for other in others)


def test_draws_are_uniform_and_neighbours_are_unrelated():
    u = uniform(torch.arange(200), torch.arange(200).expand(200, 200), TARGET)
    assert ((u >= 0) & (u < 1)).all()
    # 40,000 draws: the standard error of the mean is 0.0014, of a correlation 0.005; bounds are five of them
    assert u.mean().item() == pytest.approx(0.5, abs=0.0075)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.002)
    centred = u - u.mean()
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean().item() / u.var().item()) < 0.026
    counts = torch.histc(u.float(), bins=10, min=0, max=1)
    assert ((counts - 4000) ** 2 / 4000).sum().item() < 33.7  # chi-square, 9 degrees, p = 1e-4


def test_greedy_needs_no_draw():
    fields = SamplingTensors.of([SamplingConfig(seed=s) for s in range(4)])
    position = torch.zeros(4, 1, dtype=torch.long)
    assert sample(LOGITS.expand(4, 1, 4), fields, position, TARGET)[:, 0].tolist() == [1, 1, 1, 1]


def test_a_banned_token_stays_banned_at_any_temperature():
    logits = torch.tensor([[[0.0, -math.inf, 1.0]]])
    filters = ({"temperature": 50.0}, {"top_p": 0.999}, {"top_k": 3}, {"min_p": 1e-9})
    for fields in ({"temperature": 1.0, **filter_} for filter_ in filters):
        assert target_probs(logits, SamplingTensors.of([SamplingConfig(**fields)]))[0, 0, 1] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 (off) to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf; it must be above 0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be from -2 to 2"),
        ({"logit_bias": ((4, 0.0), (7, 101.0))}, "logit_bias of token 7 is 101.0; it must be from -100 to 100"),
        ({"logit_bias": ((4, math.nan),)}, "logit_bias of token 4 is nan; it must be from -100 to 100"),
        ({"logit_bias": ((4, 1.0), (4, 2.0))}, "logit_bias names a token twice; give each token one bias"),
        ({"bad_words": ((1,), ())}, "bad_words holds an empty sequence; each must have at least one token"),
        ({"max_tokens": 8, "min_tokens": 9}, "min_tokens is 9; it must be from 0 to max_tokens, here 8"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be from 0 to max_tokens"),
        ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20, or absent"),
    ],
)
def test_a_field_out_of_range_is_refused_with_what_is_needed(fields, message):
    with pytest.raises(RequestError) as raised:
        SamplingConfig(**fields)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("vocab", [4, 4095, 4096, 4097, 5000, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(vocab, dtype):
    logits = torch.randn(2, 6, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[0, 0, [vocab // 2, vocab - 1]] = 9.0
    logits[0, 1, vocab - 1] = 9.0
    logits[0, 2] = 0.0
    logits[0, 3, :-1] = float("-inf")
    assert likeliest(logits).tolist() == logits.float().argmax(-1).tolist()
    assert likeliest(logits)[0, :4].tolist() == [vocab // 2, vocab - 1, 0, vocab - 1]
    assert torch.equal(likeliest(logits[:, 1::2]), likeliest(logits)[:, 1::2])
    assert torch.equal(likeliest(logits[:, :3]), likeliest(logits)[:, :3])
    assert torch.equal(likeliest(logits[1, 4]), likeliest(logits)[1, 4])
    assert likeliest(logits[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("vocab", [5, 40, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_that_of_torch_where_logits_are_no_numbers_or_zeros_of_both_signs(vocab, dtype):
    """So a broken model gives the same token on every device."""
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(6, vocab, dtype=dtype)
    logits[0, [3, 4]] = torch.tensor([nan, inf], dtype=dtype)
    logits[1, :] = nan
    logits[2, :] = -inf
    logits[3, 4] = inf
    logits[4, :2] = -0.0
    logits[5, [1, 4]] = torch.tensor([2.0, -nan], dtype=dtype)
    assert likeliest(logits).tolist() == logits.argmax(-1).tolist() == [3, 0, 0, 4, 0, 4]

"""The oracle's log-probabilities: one forward over a text equals one forward for each of its beginnings."""

import pytest
import torch

from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive, score
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout


def last_row(model, tokens):
    """Logits after `tokens`, from a forward over them alone."""
    ids = torch.tensor([tokens])
    layout = causal_layout(torch.zeros_like(ids))
    with torch.no_grad():
        return model.head(model(ids, layout.position, DenseAttention(layout)))[0, -1]


def test_a_text_is_scored_token_by_token(model):
    tokens = (3, 1, 4, 1, 5, 9, 2, 6)
    scores = score(model, tokens, top=3)
    for n in range(1, len(tokens)):
        logprobs = last_row(model, tokens[:n]).softmax(-1).log()
        # 1e-4: fp32 sums in another order, logits about 10
        assert scores.logprob_L[n - 1].item() == pytest.approx(logprobs[tokens[n]].item(), abs=1e-4)
        best = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[:3]
        assert scores.top_token_LT[n - 1].tolist() == best
        assert scores.top_logprob_LT[n - 1].tolist() == pytest.approx(logprobs[best].tolist(), abs=1e-4)


def test_the_greedy_text_is_the_likeliest_at_every_token_and_rules_do_not_touch_log_probabilities(model):
    prompt = (5, 6, 7)
    text = generate_autoregressive(model, prompt, SamplingConfig(max_tokens=6))
    scores = score(model, prompt + text, top=1)
    assert scores.top_token_LT[len(prompt) - 1 :, 0].tolist() == list(text)
    biased = generate_autoregressive(model, prompt, SamplingConfig(max_tokens=6, logit_bias=((8, 100.0),)))
    assert biased == (8,) * 6
    assert (score(model, prompt + biased).logprob_L < 0).all()


def test_one_token_has_no_log_probability(model):
    assert score(model, (3,), top=2).logprob_L.tolist() == []

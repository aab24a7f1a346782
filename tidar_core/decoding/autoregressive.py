"""Generates one token per forward: the plain loop, without slots, layout and drafts, for one sequence.

The loop is the oracle that every faster method must equal. So it shares only the model, the rules for a single position
and the sampler's draws with them. `score` is its counterpart for log-probabilities: all tokens in one causal forward,
no cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_core.config import SamplingConfig
from tidar_core.decoding.logit_rules import Constraint, LogitRules
from tidar_core.decoding.sampling import TARGET, SamplingTensors, sample
from tidar_core.transformer.attention import DenseAttention, attend
from tidar_core.transformer.layout import causal_layout
from tidar_core.transformer.model import TidarModel

__all__ = ["Scores", "generate_autoregressive", "score"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities in the AR distribution of all tokens of a text but the first: L = length - 1 of them."""

    logprob_L: Tensor
    """Natural logarithms, fp32, before any rule or temperature."""
    top_token_LT: Tensor
    """The T likeliest tokens at the same places, the likeliest first."""
    top_logprob_LT: Tensor


@torch.inference_mode()
def generate_autoregressive(
    model: TidarModel, prompt: tuple[int, ...], sampling: SamplingConfig, constraint: Constraint | None = None
) -> tuple[int, ...]:
    """Token ids that continue `prompt`, up to max_tokens or the first end-of-text token (included).

    constraint  a grammar that the text must keep to, at its beginning; used up
    """
    device = model.embedding.weight.device
    fields = SamplingTensors.of([sampling], device)
    rules = None
    if constraint is not None or LogitRules.needed(sampling):
        rules = LogitRules(sampling, prompt, model.config.vocab_size, device, constraint)
    memory = _GrowingMemory()
    unread = list(prompt)
    generated: list[int] = []
    while len(generated) < sampling.max_tokens:
        position = torch.arange(memory.length, memory.length + len(unread), device=device)[None]
        hidden = model(torch.tensor([unread], device=device), position, memory)
        logits = model.head(hidden[:, -1:])
        if rules is not None:
            logits = rules.adjust(logits[0])[None]
        token = int(sample(logits, fields, position[:, -1:] + 1, TARGET))
        generated.append(token)
        unread = [token]
        if token in sampling.eos_ids:
            break
        if rules is not None:
            rules.commit(unread)
    return tuple(generated)


@torch.inference_mode()
def score(model: TidarModel, tokens: tuple[int, ...], top: int = 0) -> Scores:
    """Score all of `tokens` but the first in one plain causal forward.

    top  likeliest tokens to return for each place
    """
    ids = torch.tensor([tokens], device=model.embedding.weight.device)
    layout = causal_layout(torch.zeros_like(ids))
    hidden = model(ids, layout.position, DenseAttention(layout))
    logprob_LV = model.head(hidden)[0, :-1].float().log_softmax(-1)
    best = logprob_LV.topk(top, dim=-1)
    return Scores(logprob_LV.gather(-1, ids[0, 1:, None])[:, 0], best.indices, best.values)


class _GrowingMemory:
    """Keys and values of all tokens so far, concatenated again at every forward."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
        if layer in self.layers:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.layers[layer], (k, v)))
        self.layers[layer] = k, v
        queries, keys = q.shape[2], k.shape[2]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return attend(q, k, v, visible.expand(q.shape[0], -1, -1)).transpose(1, 2)

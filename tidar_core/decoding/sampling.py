"""Turns logits into the distribution that a request wants, and uniform draws into tokens.

Rules that follow from the history of a text are applied to the logits before (`logit_rules`).

Greedy is the distribution at temperature 0: a point mass on the likeliest token. Every draw is a function of (seed,
position, role), computed by hashing. So neither other requests of the batch, nor preemption, nor the number of drafts
can change a text.

Shape letters: B sequences, R query tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar_core.config import SamplingConfig
from tidar_core.kernels import on_cpu
from tidar_core.kernels.compiled import library

__all__ = ["ACCEPT", "DRAFT", "TARGET", "SamplingTensors", "draw", "likeliest", "sample", "target_probs", "uniform"]

ACCEPT, TARGET, DRAFT = 1, 2, 3
"""Roles of a draw at a position: it accepts or rejects the draft, chooses the token, or proposes the draft."""


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """The sampling fields of several requests, one entry each."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    beta_B: Tensor
    greedy: bool
    """All temperatures are 0."""
    trusts_ar: bool
    """All betas are 1."""
    ranks: bool
    """Some request has a top-k or a top-p, for which tokens must be sorted."""
    cuts: bool
    """Some request has a min-p."""

    @property
    def kind(self) -> tuple[bool, ...]:
        """The flags that decide which tensor functions run; the values of the fields do not."""
        return self.greedy, self.trusts_ar, self.ranks, self.cuts

    @staticmethod
    def of(requests: Sequence[SamplingConfig], device: torch.device | str = "cpu") -> "SamplingTensors":
        """Gather the fields of `requests`."""

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(request, name) for request in requests], dtype=dtype, device=device)

        return SamplingTensors(
            column("temperature", torch.float32),
            column("top_k", torch.long),
            column("top_p", torch.float32),
            column("min_p", torch.float32),
            column("seed", torch.long),
            column("beta", torch.float32),
            all(request.temperature == 0 for request in requests),
            all(request.beta == 1 for request in requests),
            any(request.top_k > 0 or request.top_p < 1 for request in requests),
            any(request.min_p > 0 for request in requests),
        )


def likeliest(logits: Tensor) -> Tensor:
    """Ids [..] of the largest logits [.., V]; the least id where several are equal, as `argmax` has it.

    On a CPU, `argmax` reads one entry at a time, so it takes many times as long as the kernel in C.
    """
    in_c = logits.device.type == "cpu" and logits.dtype in on_cpu.DTYPES and library() is not None
    return on_cpu.likeliest(logits) if in_c else logits.argmax(-1)


def target_probs(logits_BRV: Tensor, sampling: SamplingTensors) -> Tensor:
    """Probabilities [B, R, V] in fp32; a point mass where temperature is 0.

    In vLLM's order: temperature, then min-p, top-k, top-p, each applied to the tokens that the cuts before it left.
    """
    logits_BRV = logits_BRV.float()
    point_BRV = torch.zeros_like(logits_BRV).scatter_(-1, likeliest(logits_BRV)[..., None], 1.0)
    if sampling.greedy:
        return point_BRV
    greedy_B11 = sampling.temperature_B[:, None, None] == 0
    scaled_BRV = logits_BRV / torch.where(greedy_B11, 1.0, sampling.temperature_B[:, None, None])
    if sampling.cuts:
        # p >= min_p * max p, without the softmax; the logarithm of 0 drops nothing
        least_BR1 = scaled_BRV.amax(-1, keepdim=True) + sampling.min_p_B.log()[:, None, None]
        scaled_BRV = scaled_BRV.masked_fill(scaled_BRV < least_BR1, float("-inf"))
    if sampling.ranks:
        scaled_BRV = _filtered(scaled_BRV, sampling.top_k_B, sampling.top_p_B)
    return torch.where(greedy_B11, point_BRV, scaled_BRV.softmax(-1))


def draw(prob: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [..] by inversion: the first token whose cumulative probability exceeds the draw.

    prob     [.., V], non-negative; need not sum to one
    uniform  [..] in [0, 1)
    """
    total = prob.double().cumsum(-1)
    threshold = uniform.double()[..., None] * total[..., -1:]
    return torch.searchsorted(total, threshold, right=True)[..., 0].clamp(max=prob.shape[-1] - 1)


def sample(logits_BRV: Tensor, sampling: SamplingTensors, position_BR: Tensor, role: int) -> Tensor:
    """Token ids [B, R] drawn from the distribution; the likeliest tokens where all requests are greedy."""
    if sampling.greedy:
        return likeliest(logits_BRV)
    return draw(target_probs(logits_BRV, sampling), uniform(sampling.seed_B, position_BR, role))


def uniform(seed_B: Tensor, position_BR: Tensor, role: int) -> Tensor:
    """Draws in [0, 1), fp64 [B, R], which depend on the arguments alone."""
    state_BR = _mix(_mix(_mix(seed_B[:, None] + _GOLDEN) ^ position_BR) + role)
    return _shifted(state_BR, 11).double() * 2.0**-53


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014); 64-bit products wrap."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _filtered(logits_BRV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Minus infinity where top-k, then top-p of what is left, drops a token; the likeliest always stays.

    Ties are broken by token id, so exactly k stay.
    """
    sorted_BRV, order_BRV = logits_BRV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_BRV.shape[-1], device=logits_BRV.device)
    k_B11 = torch.where(top_k_B > 0, top_k_B, logits_BRV.shape[-1])[:, None, None]
    sorted_BRV = sorted_BRV.masked_fill(rank_V >= k_B11, float("-inf"))
    prob_BRV = sorted_BRV.softmax(-1)
    before_BRV = prob_BRV.cumsum(-1, dtype=torch.float64) - prob_BRV
    dropped_BRV = (before_BRV >= top_p_B[:, None, None]) & (rank_V > 0)
    sorted_BRV = torch.where(dropped_BRV & (top_p_B < 1)[:, None, None], float("-inf"), sorted_BRV)
    return torch.empty_like(logits_BRV).scatter_(-1, order_BRV, sorted_BRV)

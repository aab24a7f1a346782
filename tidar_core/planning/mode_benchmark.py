"""Benchmark of all modes of one model on the same prompts.

How fast is each mode, and do all modes generate the same tokens?

Modes take turns within every repeat, so that a noisy machine disturbs all alike. Speeds and ratios are medians over
repeats. Each ratio is taken within one repeat, because a drift of the machine shifts ratios less than speeds.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import score
from tidar_core.decoding.completion import Completion
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import MODES, Planner
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.planner import AUTO, planner_of
from tidar_core.planning.step_timing import decoding_latency
from tidar_core.transformer.model import TidarModel

__all__ = ["Divergence", "ModeResult", "TimedRun", "compare_modes", "prompts_in_all", "timed_run"]

WARM_UP_TOKENS = 8
"""New tokens of each prompt of the warm-up in a fixed mode: enough for every kind of step. `auto` warms up with whole
texts, since it learns from them."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """First difference between a text and the autoregressive mode's text."""

    prompt: int
    """Index of the prompt."""
    token: int
    """Index of the first token that differs."""
    top_2_gap: float
    """Gap in log-probability between the two likeliest tokens there, by a causal forward in the model's own dtype.
    Near 0 a rounding decides; a large gap means that a mode is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeResult:
    """Speed, acceptance and texts of one mode over all prompts."""

    tokens_per_second: float
    """All new tokens over wall time, prefills included; median over repeats."""
    tokens_per_second_spread: tuple[float, float]
    """Slowest and fastest repeat."""
    over_ar: float
    """Speed over the autoregressive mode's speed in the same repeat; median over repeats."""
    over_ar_spread: tuple[float, float]
    """Least and greatest ratio."""
    tokens_per_forward: float
    """Tokens over forwards, prefills included (T/NFE)."""
    tokens_per_round: float
    """Tokens of rounds over rounds (`Completion.in_rounds`). A round is one forward in single-pass mode, two in
    two-pass mode. 1 if no draft is verified."""
    acceptance_histogram: tuple[int, ...]
    """Verifications by accepted length n = 1, 2, .., K."""
    acceptance_by_position: tuple[float, ...]
    """Share of verifications in which draft d_j was accepted, for j = 1..K; d_1 always is. Zeros without any."""
    time_to_first_token_seconds: float
    """Seconds from submission to the first token, median over prompts."""
    equal_to_ar: bool
    """Whether every text equals the autoregressive mode's text, token for token."""
    divergences: tuple[Divergence, ...]
    """One entry for each text that differs."""
    choice: dict[str, Any] | None
    """Last choice of the planner of the mode `auto`, and its expected speed."""
    texts: tuple[tuple[int, ...], ...]
    """New token ids of each prompt."""

    def figures(self) -> dict[str, Any]:
        """Everything but the texts, for a report."""
        values = asdict(self)
        del values["texts"]
        return values


def compare_modes(
    model: TidarModel,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingConfig,
    *,
    block_len: int,
    batch: int = 1,
    repeats: int = 3,
    context_len: int | None = None,
    modes: Sequence[str] = MODES,
    on_prompt: Callable[[], None] = lambda: None,
    table: Callable[[Decoder, int], LatencyTable] | None = None,
) -> dict[str, ModeResult]:
    """Continue all prompts in every mode, `batch` at a time, `repeats` times, after one batch to warm up.

    Every prompt is prefilled each time: prefixes are not shared.

    batch      requests that run at once
    modes      all are compared with the first, the autoregressive mode
    on_prompt  called after each finished prompt, `prompts_in_all` times
    table      returns the latency table of `auto` for a decoder and the longest context; it is timed here by default
    """
    decoder = Decoder(model, DraftConfig(block_len=block_len), slots=batch, context_len=context_len)
    longest = max(map(len, prompts)) + sampling.max_tokens
    costs = None
    if AUTO in modes:
        costs = decoding_latency(decoder, context_len=longest) if table is None else table(decoder, longest)
    planners = {mode: planner_of(mode, decoder, costs) for mode in modes}
    runs: dict[str, list[TimedRun]] = {mode: [] for mode in modes}
    brief = replace(sampling, max_tokens=min(WARM_UP_TOKENS, sampling.max_tokens))
    for mode, planner in planners.items():
        timed_run(decoder, planner, prompts[:batch], sampling if mode == AUTO else brief, on_prompt)
    for _ in range(repeats):
        for mode, planner in planners.items():
            runs[mode].append(timed_run(decoder, planner, prompts, sampling, on_prompt))
    truth = [tuple(c.token_ids) for c in runs[modes[0]][0].completions]
    results = {}
    for mode, done in runs.items():
        parted = _divergences(model, prompts, truth, [tuple(c.token_ids) for c in done[0].completions])
        results[mode] = _result(done, runs[modes[0]], block_len, parted, planners[mode])
    return results


def prompts_in_all(prompts: int, *, modes: int, batch: int, repeats: int) -> int:
    """Number of prompts that `compare_modes` continues, warm-up included."""
    return modes * (min(batch, prompts) + repeats * prompts)


@dataclass(slots=True)
class TimedRun:
    """All prompts of a benchmark, continued once."""

    seconds: float = 0.0
    completions: list[Completion] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)


def timed_run(decoder: Decoder, planner: Planner, prompts: Sequence[tuple[int, ...]], sampling: SamplingConfig,
              on_prompt: Callable[[], None]) -> TimedRun:  # fmt: skip
    """Run as many clients as the decoder has slots; each sends its next prompt when its last one is done."""
    scheduler, run = Scheduler(decoder, planner, share_prefixes=False), TimedRun()
    run.completions = [
        Completion(Request(request_id=str(i), prompt=p, sampling=sampling)) for i, p in enumerate(prompts)
    ]
    waiting, submitted = deque(run.completions), {}
    began = time.perf_counter()

    def send() -> None:
        if waiting:
            completion = waiting.popleft()
            submitted[completion.request.request_id] = time.perf_counter()
            scheduler.submit(completion.request)

    for _ in range(decoder.slots):
        send()
    while scheduler.busy:
        for step in scheduler.advance():
            completion = run.completions[int(step.request_id)]
            if not completion.token_ids:
                run.first_token_seconds.append(time.perf_counter() - submitted[step.request_id])
            completion.add(step)
            if step.finish_reason is not None:
                on_prompt()
                send()
    run.seconds = time.perf_counter() - began
    return run


def _result(
    runs: list[TimedRun], ar: list[TimedRun], block_len: int, parted: tuple[Divergence, ...], planner: Planner
) -> ModeResult:
    completions = runs[0].completions
    texts = tuple(tuple(completion.token_ids) for completion in completions)
    tokens = sum(len(text) for text in texts)
    speeds = [tokens / run.seconds for run in runs]
    ar_tokens = sum(len(completion.token_ids) for completion in ar[0].completions)
    ratios = [theirs.seconds / run.seconds * tokens / ar_tokens for theirs, run in zip(ar, runs)]
    accepted: Counter[int] = sum((c.accepted for c in completions), Counter())
    rounds = accepted.total()
    histogram = tuple(accepted[n] for n in range(1, block_len + 1))
    return ModeResult(
        tokens_per_second=statistics.median(speeds),
        tokens_per_second_spread=(min(speeds), max(speeds)),
        over_ar=statistics.median(ratios),
        over_ar_spread=(min(ratios), max(ratios)),
        tokens_per_forward=tokens / sum(c.forwards for c in completions),
        tokens_per_round=sum(c.in_rounds for c in completions) / rounds if rounds else 1.0,
        acceptance_histogram=histogram,
        acceptance_by_position=tuple(sum(histogram[j:]) / max(1, rounds) for j in range(block_len)),
        time_to_first_token_seconds=statistics.median(s for run in runs for s in run.first_token_seconds),
        equal_to_ar=not parted,
        divergences=parted,
        choice=planner.facts(),
        texts=texts,
    )


def _divergences(
    model: TidarModel,
    prompts: Sequence[tuple[int, ...]],
    truth: Sequence[tuple[int, ...]],
    texts: Sequence[tuple[int, ...]],
) -> tuple[Divergence, ...]:
    found = []
    for index, (prompt, expected, text) in enumerate(zip(prompts, truth, texts)):
        if text == expected:
            continue
        token = next(i for i, pair in enumerate(zip_longest(expected, text)) if pair[0] != pair[1])
        first, second = score(model, (*prompt, *expected[: token + 1]), top=2).top_logprob_LT[-1].tolist()
        found.append(Divergence(index, token, first - second))
    return tuple(found)

"""Benchmark of `auto` against every fixed plan on the same prompts.

How near does the planner come to the best that it could have chosen?

Every candidate of the planner continues a few prompts. The fastest ones, autoregression and `auto` then continue all
prompts. They take turns after each few prompts, so that a noisy machine disturbs all alike. Ratios are taken within a
repeat.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidar_core.config import AUTOREGRESSIVE, DraftConfig, SamplingConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep
from tidar_core.decoding.step_plan import Planner, StepPlan
from tidar_core.planning.candidate_plans import Candidate
from tidar_core.planning.latency_table import LatencyTable
from tidar_core.planning.mode_benchmark import timed_run
from tidar_core.planning.planner import AUTO, AutoPlanner, planner_of
from tidar_core.transformer.model import TidarModel

__all__ = ["FixedCycle", "PlanComparison", "compare_plans", "name_of", "plan_prompts"]

FINALISTS = 4
FEW_PROMPTS = 7
"""Prompts that every candidate continues, if the file has as many; two for each slot of a larger batch."""


@dataclass(frozen=True, slots=True)
class FixedCycle:
    """Planner that keeps to one candidate."""

    candidate: Candidate

    @property
    def drafts_first_blocks(self) -> bool:
        """Only in single-pass mode; in two-pass mode the first step drafts."""
        return self.candidate.mode == "single-pass"

    def begin_prefill(self) -> None:
        """A fixed plan does not time its prefills."""

    def end_prefill(self) -> None:
        """A fixed plan does not time its prefills."""

    def next_plan(self, pending: Mapping[str, int], context: int) -> StepPlan:
        """The next plan of the candidate."""
        return self.candidate.next_plan(max(pending.values()))

    def observe(self, steps: Sequence[DecodeStep], *, beside: bool = False) -> None:
        """A fixed plan has nothing to learn."""

    def forget_drafts(self) -> None:
        """A fixed plan has nothing to forget."""

    def facts(self) -> dict[str, Any] | None:
        """A fixed plan has no choice to report."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanComparison:
    """Speeds of `auto` and of fixed plans, in new tokens per second."""

    tried: dict[str, float]
    """Speed of every candidate on a few prompts, fastest first."""
    finals: dict[str, tuple[float, ...]]
    """Speeds of `auto`, autoregression and the fastest candidates on all prompts, one for each repeat."""
    best: str
    """The fixed plan with the highest median among them."""
    auto_over_best: tuple[float, ...]
    """Speed of `auto` over that plan, in each repeat."""
    auto_over_ar: tuple[float, ...]


def name_of(candidate: Candidate) -> str:
    """Words for a candidate: its mode, the clean tokens, groups and masks of its longest plan."""
    plan = max(candidate.cycle, key=lambda plan: plan.clean_len)
    if candidate.mode == AUTOREGRESSIVE:
        return AUTOREGRESSIVE
    if candidate.mode == "two-pass":
        return f"two-pass, {plan.clean_len} verified"
    groups = ", ".join(map(str, plan.groups))
    return f"single-pass, {plan.clean_len} verified, groups {groups}, {plan.width} masks"


def plan_prompts(prompts: int, candidates: int, *, batch: int, repeats: int) -> int:
    """Number of prompts that `compare_plans` continues."""
    few = _few(prompts, batch)
    return few + candidates * few + repeats * (min(FINALISTS, candidates - 1) + 2) * prompts


def compare_plans(
    model: TidarModel,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingConfig,
    *,
    block_len: int,
    batch: int,
    repeats: int,
    context_len: int,
    table: Callable[[Decoder, int], LatencyTable],
    on_prompt: Callable[[], None] = lambda: None,
) -> PlanComparison:
    """Continue the prompts with every plan, `batch` at a time.

    repeats    times that the fastest plans continue all prompts
    table      returns the latency table of `auto` for a decoder and the longest context
    on_prompt  called after each prompt, `plan_prompts` times for all candidates
    """
    decoder = Decoder(model, DraftConfig(block_len=block_len), slots=batch, context_len=context_len)
    auto = planner_of(AUTO, decoder, table(decoder, context_len))
    assert isinstance(auto, AutoPlanner)
    candidates = {name_of(candidate): FixedCycle(candidate) for candidate in auto.candidates}

    def speeds(planners: Mapping[str, Planner], some: Sequence[tuple[int, ...]], together: int) -> dict[str, float]:
        tokens, seconds = dict.fromkeys(planners, 0), dict.fromkeys(planners, 0.0)
        for first in range(0, len(some), together):
            for name, planner in planners.items():
                run = timed_run(decoder, planner, some[first : first + together], sampling, on_prompt)
                tokens[name] += sum(len(completion.token_ids) for completion in run.completions)
                seconds[name] += run.seconds
        return {name: tokens[name] / seconds[name] for name in planners}

    few = prompts[:: max(1, len(prompts) // _few(len(prompts), batch))][: _few(len(prompts), batch)]
    speeds({AUTO: auto}, few, len(few))  # it learns the drafts
    found = speeds(candidates, few, len(few))
    tried = dict(sorted(found.items(), key=lambda entry: -entry[1]))
    drafting = [name for name in tried if name != AUTOREGRESSIVE]
    planners = {AUTO: auto, AUTOREGRESSIVE: candidates[AUTOREGRESSIVE]}
    planners |= {name: candidates[name] for name in drafting[:FINALISTS]}
    turns = [speeds(planners, prompts, 2 * batch) for _ in range(repeats)]
    finals = {name: tuple(turn[name] for turn in turns) for name in planners}
    best = max((name for name in finals if name != AUTO), key=lambda name: statistics.median(finals[name]))
    return PlanComparison(
        tried=tried,
        finals=finals,
        best=best,
        auto_over_best=tuple(turn[AUTO] / turn[best] for turn in turns),
        auto_over_ar=tuple(turn[AUTO] / turn[AUTOREGRESSIVE] for turn in turns),
    )


def _few(prompts: int, batch: int) -> int:
    return min(prompts, max(FEW_PROMPTS, 2 * batch))

"""Collects the decode steps of requests into whole completions."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tidar_core.decoding.request import DecodeStep, Request, TokenLogprob
from tidar_core.decoding.scheduler import Scheduler

__all__ = ["Completion", "complete"]


@dataclass(slots=True)
class Completion:
    """A request from end to end."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    forwards: int = 0
    """Forwards that gave tokens: the prefill's last, and every decode step."""
    accepted: Counter[int] = field(default_factory=Counter)
    """Count of decode steps with n in 1..K accepted tokens, among the decode steps that verified drafts."""
    in_rounds: int = 0
    """Tokens that became final in rounds, tokens beyond the end included. A round is a decode step that verified
    drafts, and the one before if that verified none: in two-pass mode it made them."""
    _before: int = 0
    """Tokens of the last decode step, if it verified no drafts."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, step: DecodeStep) -> None:
        """Account for another step of this request."""
        self.token_ids += step.token_ids
        self.logprobs += step.logprobs
        self.prompt_logprobs = self.prompt_logprobs or step.prompt_logprobs
        self.finish_reason = step.finish_reason
        self.forwards += 1
        if step.verified > 1:
            self.accepted[step.accepted] += 1
            self.in_rounds += self._before + step.accepted
        self._before = step.accepted if step.verified == 1 else 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens over forwards (T/NFE in the paper); 1 is autoregressive."""
        return len(self.token_ids) / self.forwards


def complete(scheduler: Scheduler, requests: Iterable[Request]) -> list[Completion]:
    """Run `requests` to their ends; returns their completions in the same order."""
    completions = {request.request_id: Completion(request) for request in requests}
    for completion in completions.values():
        scheduler.submit(completion.request)
    while scheduler.busy:
        for step in scheduler.advance():
            if step.request_id in completions:
                completions[step.request_id].add(step)
    return list(completions.values())

"""Who runs next when many requests share one decoder?

Requests join between two forwards, in order of arrival, as soon as a row is free; each leaves when it is done. Prompts
are read in chunks between decode steps, so that a long one does not hold up those who decode. No threads, no clock: the
owner calls `advance` for as long as `busy`.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep, Request, TokenLogprob
from tidar_core.decoding.step_plan import FixedMode, Planner, StepPlan
from tidar_core.errors import CapacityError, RequestError

__all__ = ["Completion", "Scheduler", "complete"]


class Scheduler:
    """A queue in front of a decoder."""

    def __init__(self, decoder: Decoder, planner: Planner | None = None, *, max_waiting: int = 1024) -> None:
        """planner      chooses the rows of each step; single-pass with all groups by default
        max_waiting  requests that may queue beyond the free rows; one more is refused with CapacityError."""
        self.decoder, self.max_waiting = decoder, max_waiting
        self.planner = planner or FixedMode("single-pass", decoder.draft.block_len)
        self._waiting: deque[Request] = deque()
        self._plain: set[str] = set()
        """Requests that want no drafts."""

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._waiting or self.decoder.running or self.decoder.arriving)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def queued(self) -> tuple[Request, ...]:
        """The queue, in order of arrival."""
        return tuple(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request, or say at once why it can never run (RequestError) or not now (CapacityError)."""
        self.decoder.check(request)
        if any(request.request_id == queued.request_id for queued in self._waiting):
            raise RequestError(f"request id {request.request_id!r} is waiting already; give each request its own")
        if len(self._waiting) >= self.max_waiting + self.decoder.free_rows:
            raise CapacityError(
                f"all rows are taken and {self.max_waiting} requests wait already, the most allowed; try again later"
            )
        self._waiting.append(request)
        if not request.speculative:
            self._plain.add(request.request_id)

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it is; False if it is neither waiting nor running."""
        before = len(self._waiting)
        self._plain.discard(request_id)
        self._waiting = deque(r for r in self._waiting if r.request_id != request_id)
        return len(self._waiting) < before or self.decoder.abort(request_id)

    def drop_begun(self) -> set[str]:
        """Drop the requests that hold a row or pages, as after a forward that failed; ids of those that go on."""
        self.decoder.drop_begun()
        left = {*self.decoder.arriving, *(request.request_id for request in self._waiting)}
        self._plain &= left
        return left

    def advance(self) -> list[DecodeStep]:
        """One forward for all that run, then a chunk of the prompts of those who join."""
        steps: list[DecodeStep] = []
        if pending := self.decoder.pending:
            steps = [self._as_asked(step) for step in self.decoder.decode_step(self._plan(pending))]
            self.planner.observe(steps)
        while self._waiting and self.decoder.free_rows:
            self.decoder.admit(self._waiting.popleft())
        drafting = not self._plain.issuperset(self.decoder.arriving)
        steps += self.decoder.prefill(drafts=drafting and self.planner.drafts_at_prefill)
        self._plain -= {step.request_id for step in steps if step.finish_reason is not None}
        return steps

    def _plan(self, pending: dict[str, int]) -> StepPlan:
        """The autoregressive one if nobody wants drafts; else who wants none has tokens pending that never stand."""
        plain = self._plain & pending.keys()
        if len(plain) == len(pending):
            return StepPlan(1)
        draft_len, mask_id = self.decoder.draft.block_len - 1, self.decoder.model.config.mask_id
        for request_id in plain:
            if mask_id is not None:  # the model never says it
                self.decoder.redraft(request_id, [mask_id] * draft_len)
        known = {request_id: 1 if request_id in plain else count for request_id, count in pending.items()}
        return self.planner.next_plan(known, self.decoder.context)

    def _as_asked(self, step: DecodeStep) -> DecodeStep:
        """What stood in for the drafts that a request does not want was none."""
        return replace(step, pending=1, verified=1, late=0) if step.request_id in self._plain else step


@dataclass(slots=True)
class Completion:
    """A request from end to end."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    forwards: int = 0
    """Forwards that gave tokens: the prefill's last, and every decode step."""
    accepted: Counter[int] = field(default_factory=Counter)
    """How often each n in 1..K pending tokens stood, over the decode steps that put drafts to the test."""
    committed: int = 0
    """Tokens that became final in decode steps, those beyond the end included."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, step: DecodeStep) -> None:
        """Account for one more step of this request."""
        self.token_ids += step.token_ids
        self.logprobs += step.logprobs
        self.prompt_logprobs = self.prompt_logprobs or step.prompt_logprobs
        self.finish_reason = step.finish_reason
        self.forwards += 1
        self.committed += step.accepted
        if step.verified > 1:
            self.accepted[step.accepted] += 1

    @property
    def tokens_per_forward(self) -> float:
        """Tokens over forwards (T/NFE in the paper); 1 is autoregressive."""
        return len(self.token_ids) / self.forwards


def complete(batcher: Scheduler, requests: Iterable[Request]) -> list[Completion]:
    """Run `requests` to their ends and give their completions in the same order."""
    completions = {request.request_id: Completion(request) for request in requests}
    for completion in completions.values():
        batcher.submit(completion.request)
    while batcher.busy:
        for step in batcher.advance():
            if step.request_id in completions:
                completions[step.request_id].add(step)
    return list(completions.values())

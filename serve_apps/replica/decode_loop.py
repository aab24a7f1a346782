"""How do many asyncio callers share one decoder?

A thread owns the batcher and is the only one to touch it: callers post what they want, the thread does it between two
forwards, sleeps when there is nothing to decode, and hands every caller the steps of its own request. Steps that come
faster than an interval are handed on together: what each hand-over costs, here and on the way to the client, is paid by
the forwards beside it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from serve_apps.messages.request_timing import TimingRecorder
from serve_apps.replica.throughput import ThroughputEstimate
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import DecodeStep, Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.errors import CapacityError, TidarError

__all__ = ["DecodeLoop", "StepReceiver"]

FAILURES_TOLERATED = 3
"""Forwards that may fail in a row before the loop counts as broken; one good forward clears the count."""

PATIENCE = 2
"""Texts beside others wait so many intervals for their next pieces: all pay for each."""

LOOK_SECONDS = 0.02
"""How often a health check looks for a forward."""
PROBE = "health check"
"""Id of a request that nobody has asked for."""

logger = logging.getLogger("ray.serve")


class StepReceiver(Protocol):
    """Receiver of the decode steps of one request. Every method is called in the decoder's thread."""

    def take(self, step: DecodeStep) -> bool:
        """Take one step. Returns True if the request ends with it, whatever the step itself says."""

    def deliver(self, *, last: bool) -> None:
        """Hand on all steps taken since the last call. The first call means that the request was admitted, and may
        have no step."""

    def fail(self, error: Exception) -> None:
        """End the request with an error."""


@dataclass(slots=True, eq=False)
class _Caller:
    request: Request
    receiver: StepReceiver
    watch: TimingRecorder
    pending: bool = False
    """Steps were taken and not delivered."""
    told_at: float = 0.0
    heard: bool = False
    """It knows that it was admitted."""
    written: int = 0

    def deliver(self, now: float, *, last: bool = False) -> None:
        self.pending, self.heard, self.told_at = False, True, now
        self.receiver.deliver(last=last)


class DecodeLoop:
    """A batcher at work in its own thread."""

    def __init__(
        self,
        batcher: Scheduler,
        *,
        interval: float = 0.0,
        max_waiting_tokens: int | None = None,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        """interval            seconds between two lists of steps of one request, at least; its last steps never wait.
                            Requests beside others wait `PATIENCE` times as long
        max_waiting_tokens  expected of the requests that may wait for a row; beyond them CapacityError
        flush               called after each round of deliveries, so that receivers may send theirs together
        """
        self._batcher, self._interval, self._max_waiting_tokens = batcher, interval, max_waiting_tokens
        self._flush = flush
        self.pace = ThroughputEstimate()
        self._forwards = 0
        self._callers: dict[str, _Caller] = {}
        self._failures = 0
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="batch-loop", daemon=True)
        self._thread.start()

    async def steps(
        self,
        request: Request,
        until: Callable[[DecodeStep], bool] | None = None,
        watch: TimingRecorder | None = None,
    ) -> AsyncGenerator[list[DecodeStep], None]:
        """Steps of `request` as they come. The first list says that it was admitted; it is told after the next forward,
        and is empty if that has brought no tokens.

        Steps that come faster than they are taken arrive together. Closing the generator before its end, or cancelling
        who waits on it, frees the request's row before the next forward.

        until  asked of each step, in the decoder's thread; True makes it the last, and frees the row at once
        watch  told when the request had a row and tokens
        """
        receiver = _StepQueue(until)
        end = self.start(request, receiver, watch)
        try:
            finished = False
            while not finished:
                steps, finished = await receiver.next_steps()
                yield steps
        finally:
            end()

    def start(
        self, request: Request, receiver: StepReceiver, watch: TimingRecorder | None = None
    ) -> Callable[[], None]:
        """Admit `request` before the next forward; returns a function that ends it, if it has not ended, and frees its
        row before the next forward. Callable in any thread."""
        caller = _Caller(request, receiver, watch or TimingRecorder())
        self._post(partial(self._admit, caller))
        return lambda: self._post(partial(self._drop, caller))

    @property
    def running(self) -> int:
        """Sequences that hold a row."""
        return self._batcher.decoder.rows - self._batcher.decoder.free_rows

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        return self._batcher.waiting

    def check_health(self) -> None:
        """Raise if the thread is dead or its forwards keep failing."""
        if not self._thread.is_alive():
            raise RuntimeError("the decoder's thread has ended")
        if self._failures >= FAILURES_TOLERATED:
            raise RuntimeError(f"the last {self._failures} forwards of the decoder failed")

    async def prove(self, token_id: int, seconds: float) -> None:
        """Raise unless a forward succeeds in that time: one of those that run, or else two tokens after `token_id`."""
        self.check_health()
        before = self._forwards
        probe = Request(request_id=PROBE, prompt=(token_id,), sampling=SamplingConfig(max_tokens=2))
        try:
            async with asyncio.timeout(seconds):
                while self._forwards == before:
                    if self._batcher.busy:
                        await asyncio.sleep(LOOK_SECONDS)
                        continue
                    with suppress(CapacityError):  # so others came meanwhile, whose forwards will do
                        async with aclosing(self.steps(probe)) as batches:
                            async for _ in batches:
                                pass
        except TimeoutError as error:
            raise RuntimeError(f"no forward of the decoder has ended for {seconds:g} s") from error

    def stop(self) -> None:
        """End the thread after the forward in flight; requests that still run fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._ended:
                self._inbox.append(command)
                self._wake.notify()
                return
        command()  # no thread is left to race with
        self._flush()

    def _run(self) -> None:
        try:
            while self._take_inbox():
                try:
                    self._advance()
                except Exception as error:
                    logger.exception("a forward of the decoder failed")
                    self._failures += 1
                    self._end_affected(error)
                self._flush()
        finally:
            self._end_all()

    def _take_inbox(self) -> bool:
        """Do what callers have asked for, once there is anything to do; False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._stopping or self._batcher.busy)
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        if commands:
            self._flush()
        return not self._stopping

    def _admit(self, caller: _Caller) -> None:
        try:
            if self._ended:
                raise TidarError("the decoder has stopped")
            self._check_tokens(caller.request)
            self._batcher.submit(caller.request)
        except TidarError as error:
            caller.receiver.fail(error)
        else:
            caller.watch.requested = time.monotonic()
            self._callers[caller.request.request_id] = caller

    def _check_tokens(self, request: Request) -> None:
        """Raise CapacityError if it would have to wait, and brings more than may."""
        most, queued = self._max_waiting_tokens, self._batcher.queued
        if most is None or len(queued) < self._batcher.decoder.free_rows:
            return
        if (tokens := self.pace.expected((*queued, request))) > most:
            raise CapacityError(
                f"with this request {tokens} tokens would wait for a row; at most {most} may; try again later"
            )

    def _drop(self, caller: _Caller) -> None:
        request_id = caller.request.request_id
        if self._callers.get(request_id) is caller:  # it has neither finished nor failed
            del self._callers[request_id]
            self._batcher.abort(request_id)

    def _advance(self) -> None:
        if not self._batcher.busy:
            return
        before = time.monotonic()
        steps = self._batcher.advance()
        now = time.monotonic()
        if PROBE not in self._callers:
            self._measure(steps, now - before)
        begun = {*self._batcher.decoder.running, *self._batcher.decoder.arriving, *(s.request_id for s in steps)}
        for caller in self._callers.values():
            if caller.watch.begun is None and caller.request.request_id in begun:
                caller.watch.begun = before
        for step in steps:
            caller = self._callers[step.request_id]
            caller.pending = True
            caller.watch.record_tokens(now)
            ended = step.finish_reason is not None
            if caller.receiver.take(step) and not ended:
                ended = self._batcher.abort(step.request_id)
            if ended:
                del self._callers[step.request_id]
                if caller.written:
                    self.pace.count_text(caller.written)
                caller.deliver(now, last=True)
        interval = self._interval * (PATIENCE if len(self._callers) > 1 else 1)
        for caller in self._callers.values():
            if caller.pending and now - caller.told_at >= interval:
                caller.deliver(now)
            elif not caller.heard:
                caller.heard = True
                caller.receiver.deliver(last=False)
        self._failures = 0
        self._forwards += 1

    def _measure(self, steps: list[DecodeStep], seconds: float) -> None:
        tokens = 0
        for step in steps:
            caller = self._callers[step.request_id]
            caller.written += len(step.token_ids)
            tokens += len(step.token_ids)
            if not step.accepted:  # the prefill is over
                tokens += len(caller.request.prompt)
        self.pace.count(tokens, seconds)

    def _end_affected(self, error: Exception) -> None:
        """Fail every request that held a row or pages; the others go on where they were, a preempted text included."""
        batcher = self._batcher
        left = batcher.drop_begun()
        if left.issuperset(self._callers):  # it was no forward that failed: the same would fail again
            for request_id in batcher.decoder.arriving or tuple(left):
                batcher.abort(request_id)
                left.discard(request_id)
        failed = [caller for request_id, caller in self._callers.items() if request_id not in left]
        self._callers = {request_id: caller for request_id, caller in self._callers.items() if request_id in left}
        for caller in failed:
            caller.receiver.fail(TidarError(f"the decoder failed on this request's batch: {type(error).__name__}"))

    def _end_all(self) -> None:
        """Nobody waits for a thread that has ended."""
        for caller in self._callers.values():
            caller.receiver.fail(TidarError("the decoder has stopped"))
        self._callers = {}
        with self._wake:
            self._ended = True
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        self._flush()


class _StepQueue:
    """Receiver for a caller in an event loop: steps that come faster than they are read arrive together."""

    def __init__(self, until: Callable[[DecodeStep], bool] | None) -> None:
        self._loop, self._until = asyncio.get_running_loop(), until
        self._answers = asyncio.Queue[tuple[list[DecodeStep], bool] | Exception]()
        self._taken: list[DecodeStep] = []

    def take(self, step: DecodeStep) -> bool:
        self._taken.append(step)
        return step.finish_reason is None and self._until is not None and self._until(step)

    def deliver(self, *, last: bool) -> None:
        steps, self._taken = self._taken, []
        self._put((steps, last))

    def fail(self, error: Exception) -> None:
        self._put(error)

    async def next_steps(self) -> tuple[list[DecodeStep], bool]:
        """All steps that have come by now, at least one delivery, and whether they are the last. Raises the error that
        ended the request."""
        answers = [await self._answers.get()]
        while not self._answers.empty():
            answers.append(self._answers.get_nowait())
        joined: list[DecodeStep] = []
        finished = False
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            steps, finished = answer
            joined += steps
        return joined, finished

    def _put(self, answer: tuple[list[DecodeStep], bool] | Exception) -> None:
        with suppress(RuntimeError):  # its event loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)

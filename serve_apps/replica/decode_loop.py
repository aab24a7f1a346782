"""Shares one scheduler among many asyncio callers.

A thread owns the scheduler, and nothing else touches it. Callers post commands. The thread runs them between two
forwards, sleeps while there is nothing to decode, and sends every caller the steps of its own request. Steps that come
faster than an interval are sent together. Every hand-over, here and on the way to the client, delays the forwards of
the whole batch.
"""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
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
from tidar_core.timing import Clock

__all__ = ["DecodeLoop", "StepReceiver"]

FAILURES_TOLERATED = 3
"""Forwards that may fail in a row before the loop counts as broken; a forward that succeeds clears the count."""

PATIENCE = 2
"""Intervals between two updates of a request while several are running: every update delays the whole batch."""

POLL_SECONDS = 0.02
"""Interval at which a health check looks for a forward that has ended."""
PROBE = "health check"
"""Id of the request that a health check submits."""

logger = logging.getLogger("ray.serve")


class StepReceiver(Protocol):
    """Receiver of the decode steps of one request. Every method is called in the decoder's thread."""

    def take(self, step: DecodeStep) -> bool:
        """Take one step. Returns True if the request ends with it, whatever the step itself reports."""

    def deliver(self, *, last: bool) -> None:
        """Hand on all steps taken since the last call. The first call means that the request was admitted, and may
        have no step."""

    def fail(self, error: Exception) -> None:
        """End the request with an error."""


@dataclass(slots=True, eq=False)
class _Caller:
    request: Request
    receiver: StepReceiver
    timing: TimingRecorder
    pending: bool = False
    """Steps were taken and not delivered."""
    delivered_at: float = 0.0
    informed: bool = False
    """The receiver knows that its request was admitted."""
    written: int = 0

    def deliver(self, now: float, *, last: bool = False) -> None:
        self.pending, self.informed, self.delivered_at = False, True, now
        self.receiver.deliver(last=last)


class DecodeLoop:
    """A scheduler at work in its own thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        interval: float = 0.0,
        max_waiting_tokens: int | None = None,
        flush: Callable[[], None] = lambda: None,
        clock: Clock = time.monotonic,
    ) -> None:
        """interval            least seconds between two lists of steps of one request; its last steps never wait. With
                            several requests running, `PATIENCE` times as long
        max_waiting_tokens  most tokens expected of the requests that wait for a slot; beyond them CapacityError
        flush               called after each round of deliveries, so that receivers may send theirs together
        clock               seconds, ascending
        """
        self._scheduler, self._interval, self._max_waiting_tokens = scheduler, interval, max_waiting_tokens
        self._flush, self._clock = flush, clock
        self.throughput = ThroughputEstimate()
        self._forwards = 0
        self._callers: dict[str, _Caller] = {}
        self._failures = 0
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)
        self._thread.start()

    async def steps(
        self,
        request: Request,
        until: Callable[[DecodeStep], bool] | None = None,
        timing: TimingRecorder | None = None,
    ) -> AsyncGenerator[list[DecodeStep], None]:
        """Decode steps of `request` as they come. The first list shows that the request was admitted: it arrives after
        the next forward, and is empty if that forward brought no tokens.

        Steps that come faster than they are taken arrive together. Closing the generator before its end, or cancelling
        its consumer, frees the slot of the request before the next forward. Raises RequestError and CapacityError.

        until   called with each step in the decoder's thread; True makes the step the last, and frees the slot at once
        timing  records when the request had a slot and tokens
        """
        receiver = _StepQueue(until)
        end = self.start(request, receiver, timing)
        try:
            finished = False
            while not finished:
                steps, finished = await receiver.next_steps()
                yield steps
        finally:
            end()

    def start(
        self, request: Request, receiver: StepReceiver, timing: TimingRecorder | None = None
    ) -> Callable[[], None]:
        """Submit `request` before the next forward. Callable in any thread.

        Returns a function that ends the request early and frees its slot before the next forward. After the end of the
        request, the function has no effect.
        """
        caller = _Caller(request, receiver, timing or TimingRecorder())
        self._post(partial(self._admit, caller))
        return lambda: self._post(partial(self._drop, caller))

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.taken_slots

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._scheduler.waiting

    async def between_forwards(self, work: Callable[[], None]) -> None:
        """Run `work` in the decoder's thread before the next forward. Raises its error."""
        done = concurrent.futures.Future[None]()

        def run() -> None:
            try:
                work()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._post(run)
        await asyncio.wrap_future(done)

    def check_health(self) -> None:
        """Raise RuntimeError if the thread is dead or its forwards keep failing."""
        if not self._thread.is_alive():
            raise RuntimeError("the decoder's thread has ended")
        if self._failures >= FAILURES_TOLERATED:
            raise RuntimeError(f"the last {self._failures} forwards of the decoder failed")

    async def probe(self, token_id: int, seconds: float) -> None:
        """Raise RuntimeError unless a forward succeeds within `seconds`.

        A busy loop is watched; an idle loop decodes two tokens after `token_id`.
        """
        self.check_health()
        before = self._forwards
        probe = Request(request_id=PROBE, prompt=(token_id,), sampling=SamplingConfig(max_tokens=2))
        try:
            async with asyncio.timeout(seconds):
                while self._forwards == before:
                    if self._scheduler.busy:
                        await asyncio.sleep(POLL_SECONDS)
                        continue
                    with suppress(CapacityError):  # others came meanwhile, and their forwards will do
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
                    self._flush()  # refusals of new requests do not wait for the forward
                    self._advance()
                    self._flush()
                except Exception as error:
                    logger.exception("a forward of the decoder failed, or its deltas could not be sent")
                    self._failures += 1
                    self._end_affected(error)
                    self._flush()
        finally:
            self._end_all()

    def _take_inbox(self) -> bool:
        """Wait for commands or work, then run the commands; False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._stopping or self._scheduler.busy)
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        return not self._stopping

    def _admit(self, caller: _Caller) -> None:
        try:
            if self._ended:
                raise TidarError("the decoder has stopped")
            self._check_tokens(caller.request)
            self._scheduler.submit(caller.request)
        except TidarError as error:
            caller.receiver.fail(error)
        else:
            caller.timing.requested = self._clock()
            self._callers[caller.request.request_id] = caller

    def _check_tokens(self, request: Request) -> None:
        """Raise CapacityError if the request would have to wait, and too many tokens wait with it."""
        most = self._max_waiting_tokens
        if most is None or self._scheduler.free_slots:
            return
        if (tokens := self.throughput.expected((*self._scheduler.queued, request))) > most:
            raise CapacityError(
                f"with this request {tokens} tokens would wait for a slot; at most {most} may; try again later"
            )

    def _drop(self, caller: _Caller) -> None:
        request_id = caller.request.request_id
        if self._callers.get(request_id) is caller:  # it has neither finished nor failed
            del self._callers[request_id]
            self._scheduler.abort(request_id)

    def _advance(self) -> None:
        """Run the scheduler once, then deliver what is due."""
        if not self._scheduler.busy:
            return
        before = self._clock()
        steps = self._scheduler.advance()
        now = self._clock()
        if PROBE not in self._callers:
            self._measure(steps, now - before)
        self._record_starts(steps, before)
        for step in steps:
            self._collect(step, now)
        interval = self._interval * (PATIENCE if len(self._callers) > 1 else 1)
        for caller in self._callers.values():
            if caller.pending and now - caller.delivered_at >= interval:
                caller.deliver(now)
            elif not caller.informed:
                caller.informed = True
                caller.receiver.deliver(last=False)
        self._failures = 0
        self._forwards += 1

    def _record_starts(self, steps: Sequence[DecodeStep], before: float) -> None:
        """Record that requests have a slot since the forward that began at `before`."""
        begun = {*self._scheduler.running, *self._scheduler.arriving, *(step.request_id for step in steps)}
        for caller in self._callers.values():
            if caller.timing.begun is None and caller.request.request_id in begun:
                caller.timing.begun = before

    def _collect(self, step: DecodeStep, now: float) -> None:
        """Give a step to its receiver; the last step of a request is delivered at once."""
        caller = self._callers[step.request_id]
        caller.pending = True
        caller.timing.record_tokens(now)
        ended = step.finish_reason is not None
        if caller.receiver.take(step) and not ended:
            ended = self._scheduler.abort(step.request_id)
        if ended:
            del self._callers[step.request_id]
            if caller.written:
                self.throughput.count_text(caller.written)
            caller.deliver(now, last=True)

    def _measure(self, steps: Sequence[DecodeStep], seconds: float) -> None:
        """Count the tokens that the forwards of one `advance` have read and written."""
        tokens = 0
        for step in steps:
            caller = self._callers[step.request_id]
            caller.written += len(step.token_ids)
            tokens += len(step.token_ids)
            if not step.accepted:  # the step of a prefill
                tokens += len(caller.request.prompt)
        self.throughput.count(tokens, seconds)

    def _end_affected(self, error: Exception) -> None:
        """Fail every request that ran or held pages; the others go on where they were, preempted requests included."""
        left = self._scheduler.drop_begun()
        if left.issuperset(self._callers):  # no forward failed: the requests that are next would fail again
            for request_id in self._scheduler.arriving:
                self._scheduler.abort(request_id)
                left.discard(request_id)
        failed = [caller for request_id, caller in self._callers.items() if request_id not in left]
        self._callers = {request_id: caller for request_id, caller in self._callers.items() if request_id in left}
        for caller in failed:
            caller.receiver.fail(TidarError(f"the decoder failed on this request's batch: {type(error).__name__}"))

    def _end_all(self) -> None:
        """Fail all requests: the thread has ended."""
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
        self._deliveries = asyncio.Queue[tuple[list[DecodeStep], bool] | Exception]()
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
        """Steps of all deliveries so far, at least one delivery, and whether they are the last. Raises the error that
        ended the request."""
        deliveries = [await self._deliveries.get()]
        while not self._deliveries.empty():
            deliveries.append(self._deliveries.get_nowait())
        joined: list[DecodeStep] = []
        finished = False
        for delivery in deliveries:
            if isinstance(delivery, Exception):
                raise delivery
            steps, finished = delivery
            joined += steps
        return joined, finished

    def _put(self, delivery: tuple[list[DecodeStep], bool] | Exception) -> None:
        with suppress(RuntimeError):  # its event loop is closed
            self._loop.call_soon_threadsafe(self._deliveries.put_nowait, delivery)

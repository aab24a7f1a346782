"""One thread decodes for many asyncio callers; a caller that leaves frees a slot, and a failure is reported."""

import asyncio
import threading
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import wide_model

from serve_apps.messages.request_timing import TimingRecorder
from serve_apps.replica.decode_loop import FAILURES_TOLERATED, DecodeLoop, _Caller
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.errors import CapacityError, ContextLengthError, PromptError, RequestError, TidarError
from tidar_core.transformer.shapes import named_shape

ENDLESS = 8000
"""Tokens that take far longer than any test waits for."""


@pytest.fixture(scope="module")
def model():
    return wide_model(replace(named_shape("tiny", vocab_len=300), context_len=8192))


@pytest.fixture
def scheduler(model):
    return Scheduler(Decoder(model, DraftConfig(block_len=4), slots=2), max_waiting=5)


@pytest.fixture
def loop(scheduler):
    loop = DecodeLoop(scheduler)
    yield loop
    loop.stop()


def request(name, prompt=(5, 6, 7), max_tokens=9):
    return Request(request_id=name, prompt=prompt, sampling=SamplingConfig(max_tokens=max_tokens))


async def tokens_of(loop, request):
    return tuple([t async for steps in loop.steps(request) for step in steps for t in step.token_ids])


async def until(holds):
    async with asyncio.timeout(2):
        while not holds():
            await asyncio.sleep(0.001)


def test_callers_of_different_lengths_each_get_the_autoregressive_tokens(model, loop):
    requests = [request(str(n), prompt=tuple(range(1, 4 + 3 * n)), max_tokens=5 + 7 * n) for n in range(4)]

    async def together():
        return await asyncio.gather(*[tokens_of(loop, r) for r in requests])

    assert asyncio.run(together()) == [generate_autoregressive(model, r.prompt, r.sampling) for r in requests]


def test_the_first_list_begins_with_the_prefill_where_there_is_a_row_and_is_empty_where_there_is_none(loop):
    async def first(name):
        async with aclosing(loop.steps(request(name, max_tokens=ENDLESS))) as batches:
            received = await anext(batches)
            if name != "c":
                await waiting
            return received

    async def together():
        nonlocal waiting
        running = [asyncio.create_task(first(name)) for name in "ab"]
        await until(lambda: loop.running == 2)
        waiting.set_result(await first("c"))
        return await asyncio.gather(*running), await waiting

    with asyncio.Runner() as runner:
        waiting = runner.get_loop().create_future()
        (one, other), waited = runner.run(together())
    assert one[0].accepted == other[0].accepted == 0
    assert waited == []


def test_a_closed_generator_frees_the_row_and_what_waits_takes_it(loop):
    async def leave():
        async with aclosing(loop.steps(request("a", max_tokens=ENDLESS))) as first:
            await anext(first)
            second = asyncio.create_task(tokens_of(loop, request("b", max_tokens=ENDLESS)))
            third = asyncio.create_task(tokens_of(loop, request("c", max_tokens=4)))
            await until(lambda: (loop.running, loop.waiting) == (2, 1))
        assert len(await third) == 4
        second.cancel()
        await until(lambda: loop.running == 0)

    asyncio.run(leave())


def test_a_step_that_the_caller_ends_is_its_last_and_frees_the_row_before_the_next_forward(loop, scheduler):
    seen = []

    def until(step):
        seen.append(step)
        return len(seen) == 3

    async def all_steps():
        return [step async for steps in loop.steps(request("a", max_tokens=ENDLESS), until) for step in steps]

    assert asyncio.run(all_steps()) == seen
    assert (len(seen), loop.running) == (3, 0)
    assert scheduler.pool.held == 0


def test_a_cancelled_caller_leaves_the_queue(loop):
    async def leave():
        tasks = [asyncio.create_task(tokens_of(loop, request(n, max_tokens=ENDLESS))) for n in "abc"]
        await until(lambda: loop.waiting == 1)
        tasks[2].cancel()
        await until(lambda: loop.waiting == 0)
        assert loop.running == 2
        for task in tasks:
            task.cancel()
        await until(lambda: loop.running == 0)

    asyncio.run(leave())


def test_a_request_that_cannot_run_is_refused_alone(loop):
    async def all_of_them():
        wrong = [request("long", max_tokens=8192), request("empty", prompt=()), request("mask", prompt=(300,))]
        return await asyncio.gather(*[tokens_of(loop, r) for r in [*wrong, request("a")]], return_exceptions=True)

    long, empty, mask, good = asyncio.run(all_of_them())
    assert isinstance(long, ContextLengthError)
    assert isinstance(empty, PromptError)
    assert isinstance(mask, PromptError)
    assert len(good) == 9


def test_more_than_may_wait_is_refused_with_capacity(loop):
    async def flood():
        return await asyncio.gather(
            *[tokens_of(loop, request(str(n), max_tokens=100)) for n in range(12)], return_exceptions=True
        )

    answers = asyncio.run(flood())
    refused = [a for a in answers if isinstance(a, CapacityError)]
    assert refused
    assert len(refused) + sum(len(a) == 100 for a in answers if isinstance(a, tuple)) == 12


def test_a_second_request_of_the_same_id_is_refused_and_does_not_end_the_first(loop):
    async def twice():
        first = asyncio.create_task(tokens_of(loop, request("a", max_tokens=60)))
        await until(lambda: loop.running == 1)
        with pytest.raises(RequestError):
            await tokens_of(loop, request("a"))
        return await first

    assert len(asyncio.run(twice())) == 60


def test_a_failed_forward_ends_what_ran_and_spares_what_waits(scheduler, loop, model, monkeypatch):
    async def fail_once():
        running = [asyncio.create_task(tokens_of(loop, request(n, max_tokens=ENDLESS))) for n in "ab"]
        await until(lambda: loop.running == 2)
        waiting = asyncio.create_task(tokens_of(loop, request("c")))
        await until(lambda: loop.waiting == 1)

        def fail(plan, *beside):
            monkeypatch.undo()  # before anything can run again
            return 1 / 0

        monkeypatch.setattr(scheduler.decoder, "decode_step", fail)
        lost = await asyncio.gather(*running, return_exceptions=True)
        return lost, await waiting

    lost, spared = asyncio.run(fail_once())
    assert [str(error) for error in lost] == ["the decoder failed on this request's batch: ZeroDivisionError"] * 2
    assert all(type(error) is TidarError for error in lost)
    assert spared == generate_autoregressive(model, (5, 6, 7), SamplingConfig(max_tokens=9))
    loop.check_health()


def test_a_loop_that_keeps_failing_is_unhealthy_until_a_forward_succeeds(scheduler, loop, monkeypatch):
    async def fail(times):
        for n in range(times):
            with pytest.raises(TidarError):
                await tokens_of(loop, request(str(n)))

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "prefill", lambda **_: 1 / 0)
        asyncio.run(fail(FAILURES_TOLERATED - 1))
        loop.check_health()
        asyncio.run(fail(1))
        with pytest.raises(RuntimeError, match="forwards"):
            loop.check_health()
    asyncio.run(tokens_of(loop, request("a")))
    loop.check_health()


def test_a_stopped_loop_fails_who_waits_and_who_comes(scheduler):
    async def stop():
        loop = DecodeLoop(scheduler)
        caller = asyncio.create_task(tokens_of(loop, request("a", max_tokens=ENDLESS)))
        await until(lambda: loop.running == 1)
        loop.stop()
        for late in (caller, tokens_of(loop, request("b"))):
            with pytest.raises(TidarError, match="stopped"):
                await late
        with pytest.raises(RuntimeError, match="ended"):
            loop.check_health()

    asyncio.run(stop())


def test_steps_that_come_faster_than_the_interval_are_sent_together_and_the_first_and_last_at_once(scheduler, model):
    hour = DecodeLoop(scheduler, interval=3600)
    watch = TimingRecorder()

    async def lists():
        return [steps async for steps in hour.steps(request("a", max_tokens=400), timing=watch) if steps]

    first, rest = asyncio.run(lists())
    hour.stop()
    assert len(first[0].token_ids) == 1
    sent = tuple(token for step in [*first, *rest] for token in step.token_ids)
    assert sent == generate_autoregressive(model, (5, 6, 7), request("a", max_tokens=400).sampling)
    assert rest[-1].finish_reason == "length"
    timing = watch.timing
    assert timing is not None
    assert min(timing.queue, timing.prefill, timing.decode) > 0


@pytest.mark.parametrize(("others", "intervals"), [(0, 1), (1, 2), (3, 2)])
def test_requests_beside_others_are_updated_half_as_often(model, monkeypatch, others, intervals):
    scheduler = Scheduler(Decoder(model, DraftConfig(block_len=4), slots=4))
    sent, clock = [], SimpleNamespace(now=1000.0)
    advance, deliver = scheduler.advance, _Caller.deliver

    def tick():
        clock.now += 1
        return advance()

    def note(caller, *now, **last):
        sent.append((caller.request.request_id, len(caller.receiver._taken)))
        deliver(caller, *now, **last)

    monkeypatch.setattr(scheduler, "advance", tick)
    monkeypatch.setattr(_Caller, "deliver", note)
    loop = DecodeLoop(scheduler, interval=2, clock=lambda: clock.now)

    async def beside():
        endless = [asyncio.create_task(tokens_of(loop, request(str(n), max_tokens=ENDLESS))) for n in range(others)]
        await until(lambda: loop.running == others)
        await tokens_of(loop, request("a", max_tokens=100))
        for task in endless:
            task.cancel()

    asyncio.run(beside())
    loop.stop()
    first, *rest, _ = [steps for name, steps in sent if name == "a"]
    assert first == 1
    assert set(rest) == {2 * intervals}


def test_a_request_that_waits_for_a_row_is_timed_from_its_row_on(scheduler):
    loop, watches = DecodeLoop(scheduler), [TimingRecorder() for _ in range(3)]

    async def listen(number, max_tokens):
        wanted = request(str(number), max_tokens=max_tokens)
        return [steps async for steps in loop.steps(wanted, timing=watches[number])]

    async def together():
        await asyncio.gather(listen(0, 60), listen(1, 60), listen(2, 4))

    asyncio.run(together())
    loop.stop()
    one, other, waited = watches
    assert waited.requested < one.first
    assert waited.begun > max(one.first, other.first)


def test_tokens_that_may_wait_for_a_row_are_counted_with_those_that_texts_are_expected_to_have(scheduler):
    async def crowd():
        loop = DecodeLoop(scheduler, max_waiting_tokens=24)
        running = [asyncio.create_task(tokens_of(loop, request(n, max_tokens=ENDLESS))) for n in "ab"]
        await until(lambda: loop.running == 2)
        waiting = [asyncio.create_task(tokens_of(loop, request(n))) for n in "cd"]  # 3 to read and 9 to write, twice
        await until(lambda: loop.waiting == 2)
        with pytest.raises(CapacityError, match="with this request 27 tokens would wait for a slot; at most 24 may"):
            await tokens_of(loop, request("e", prompt=(5,), max_tokens=2))
        waiting.pop().cancel()
        await until(lambda: loop.waiting == 1)
        last = asyncio.create_task(tokens_of(loop, request("f", prompt=(5,), max_tokens=2)))
        await until(lambda: loop.waiting == 2)
        for task in running:
            task.cancel()
        assert [len(await task) for task in (*waiting, last)] == [9, 2]
        loop.stop()

    asyncio.run(crowd())


def test_the_pace_counts_what_forwards_read_and_write(loop):
    asyncio.run(tokens_of(loop, request("a", prompt=(5,) * 20, max_tokens=9)))
    pace = loop.throughput
    assert 29 * 0.98**30 < pace.tokens <= 29
    assert (pace.texts, pace.written) == (1, 9)
    assert pace.forwards_per_second > 0


def test_an_idle_loop_proves_itself_by_a_forward_that_nothing_else_counts(loop, scheduler, monkeypatch):
    asyncio.run(loop.probe(5, seconds=5))
    assert (loop.throughput.forwards, loop.throughput.texts, loop.running) == (0, 0, 0)
    monkeypatch.setattr(scheduler, "prefill", lambda **_: 1 / 0)
    with pytest.raises(TidarError, match="ZeroDivisionError"):
        asyncio.run(loop.probe(5, seconds=5))


def test_a_busy_loop_proves_itself_by_its_own_forwards(loop, scheduler, monkeypatch):
    async def busy():
        running = asyncio.create_task(tokens_of(loop, request("a", max_tokens=ENDLESS)))
        await until(lambda: loop.running == 1)
        probes, before = [], loop.throughput.forwards
        monkeypatch.setattr(scheduler, "submit", probes.append)
        await loop.probe(5, seconds=5)
        running.cancel()
        return probes, loop.throughput.forwards - before

    probes, forwards = asyncio.run(busy())
    assert probes == []
    assert forwards > 0


def test_a_loop_that_hangs_or_has_ended_is_found_out(loop, scheduler, monkeypatch):
    going_on = threading.Event()
    advance = scheduler.advance

    def hang():
        going_on.wait(10)
        return advance()

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "advance", hang)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"no forward of the decoder has ended for 0\.1 s"):
                asyncio.run(loop.probe(5, seconds=0.1))
        going_on.set()
    asyncio.run(loop.probe(5, seconds=5))
    loop.stop()
    with pytest.raises(RuntimeError, match="ended"):
        asyncio.run(loop.probe(5, seconds=5))


def test_a_delivery_that_cannot_be_sent_fails_its_requests_and_the_loop_goes_on(scheduler, model):
    failures = ["the pipe is full"]

    def flush():
        if failures and loop.running:
            raise OSError(failures.pop())

    loop = DecodeLoop(scheduler, flush=flush)
    with pytest.raises(TidarError, match="OSError"):
        asyncio.run(tokens_of(loop, request("a", max_tokens=ENDLESS)))
    loop.check_health()
    again = request("b")
    assert asyncio.run(tokens_of(loop, again)) == generate_autoregressive(model, again.prompt, again.sampling)
    loop.stop()

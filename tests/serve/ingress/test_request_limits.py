"""A request takes so much time and so many bytes, and no more."""

import asyncio
import json

import pytest
from starlette.requests import Request

from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.errors import BodyTooLargeError, ParameterError, RequestTimeoutError
from serve_apps.ingress.request_limits import Limits
from tidar_core.errors import CapacityError

SHORT = Limits(seconds=0.05, body_bytes=10)


async def pieces(*parts):
    for part in parts:
        yield part


def body(headers, *parts):
    return asyncio.run(SHORT.body(headers, pieces(*parts)))


def test_a_body_is_read_up_to_its_limit():
    assert body({}, b"12345", b"67890") == b"1234567890"
    with pytest.raises(BodyTooLargeError, match="at most 10"):
        body({}, b"12345", b"678901")


def test_a_body_that_declares_a_length_above_the_limit_is_not_read():
    async def never():
        pytest.fail("it was read")
        yield b""

    with pytest.raises(BodyTooLargeError, match="has 11 bytes"):
        asyncio.run(SHORT.body({"content-length": "11"}, never()))


def test_a_body_that_does_not_come_is_not_waited_for_longer_than_a_request_may_take():
    async def stalled():
        yield b"1"
        await asyncio.sleep(30)

    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        asyncio.run(SHORT.body({}, stalled()))


class Slow:
    """Two items at once, then nothing for long."""

    closed = False

    async def run(self):
        try:
            yield 1
            yield 2
            await asyncio.sleep(30)
        finally:
            self.closed = True


async def taken(limits, source, headers):
    return [item async for item in limits.timed(source, headers)]


def test_what_takes_too_long_ends_with_an_error_and_is_closed():
    slow = Slow()
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        asyncio.run(taken(SHORT, slow.run(), {}))
    assert slow.closed
    with pytest.raises(RequestTimeoutError):
        asyncio.run(SHORT.in_time(asyncio.sleep(30), {}))


def test_what_ends_in_time_is_whole():
    assert asyncio.run(taken(SHORT, pieces(1, 2, 3), {})) == [1, 2, 3]

    async def five():
        return 5

    assert asyncio.run(SHORT.in_time(five(), {})) == 5


def test_a_client_may_request_less_time_and_gets_no_more():
    long = Limits(seconds=60, body_bytes=10)
    with pytest.raises(RequestTimeoutError, match=r"0\.035"):
        asyncio.run(taken(long, Slow().run(), {"x-request-timeout-seconds": "0.05"}))
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        asyncio.run(taken(SHORT, Slow().run(), {"x-request-timeout-seconds": "60"}))


@pytest.mark.parametrize("stated", ["soon", "0", "-1", "nan"])
def test_a_time_that_is_none_is_refused(stated):
    with pytest.raises(ParameterError, match="x-request-timeout-seconds"):
        asyncio.run(taken(SHORT, pieces(1), {"x-request-timeout-seconds": stated}))


async def half():
    yield b"1"
    await asyncio.sleep(30)


async def waiting(limits, count):
    """So many bodies that are waited for."""
    tasks = [asyncio.ensure_future(limits.body({}, half())) for _ in range(count)]
    await asyncio.sleep(0.05)
    return tasks


def test_a_body_has_less_time_than_a_request():
    limits = Limits(seconds=60, body_bytes=10, body_seconds=0.05)
    with pytest.raises(RequestTimeoutError, match=r"body was not complete after 0\.05 s"):
        asyncio.run(limits.body({}, half()))


def test_so_many_half_sent_bodies_are_waited_for_and_whole_ones_are_read_all_the_same():
    async def crowd():
        limits = Limits(seconds=60, body_bytes=10, bodies=2)
        tasks = await waiting(limits, 2)
        with pytest.raises(CapacityError, match="2 bodies are on their way"):
            await limits.body({}, half())
        assert await limits.body({}, pieces(b"12", b"3")) == b"123"
        tasks.pop().cancel()
        await asyncio.sleep(0)
        tasks += await waiting(limits, 1)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()

    asyncio.run(crowd())


def test_a_body_in_a_million_parts_is_read_in_a_time_that_grows_with_its_length():
    limits = Limits(seconds=60, body_bytes=10**6)
    assert asyncio.run(limits.body({}, pieces(*[b"1"] * 10**6))) == b"1" * 10**6


def test_so_many_texts_are_in_flight_and_no_more():
    async def crowd():
        limits = Limits(seconds=60, body_bytes=10, choices=2)
        running = limits.timed(pieces(1, 2), {}, 3)
        await anext(running)
        with pytest.raises(CapacityError, match="3 texts are being written and 2 more"):
            await anext(limits.timed(pieces(1), {}, 2))
        assert await limits.in_time(asyncio.sleep(0, 5), {}) == 5
        await running.aclose()
        assert [item async for item in limits.timed(pieces(1), {}, 4)] == [1]

    asyncio.run(crowd())


def read(limits, **fields):
    body = json.dumps({"model": "m", "prompt": "a", **fields}).encode()

    async def receive():
        return {"type": "http.request", "body": body}

    http = Request({"type": "http", "headers": []}, receive)
    return asyncio.run(limits.read(http, CompletionRequest))


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": ["a"] * 7}, "prompt"), ({"n": 7}, "n"), ({"prompt": ["a"] * 2, "n": 4}, "n"),
     ({"prompt": "a" * 900, "n": 5}, "n")],
)  # fmt: skip
def test_prompts_times_n_are_bounded_by_what_may_wait_and_their_bytes_by_the_largest_body(fields, param):
    limits = Limits(seconds=60, body_bytes=1000, choices=6)
    with pytest.raises(ParameterError) as caught:
        read(limits, **fields)
    assert caught.value.param == param

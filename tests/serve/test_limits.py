"""A request takes so much time and so many bytes, and no more."""

import asyncio

import pytest

from serve_apps.errors import BodyTooLargeError, ParameterError, RequestTimeoutError
from serve_apps.limits import Limits

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


def test_a_body_that_says_that_it_is_too_long_is_not_read():
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


def test_a_client_may_ask_for_less_time_and_gets_no_more():
    long = Limits(seconds=60, body_bytes=10)
    with pytest.raises(RequestTimeoutError, match=r"0\.035"):
        asyncio.run(taken(long, Slow().run(), {"x-request-timeout-seconds": "0.05"}))
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        asyncio.run(taken(SHORT, Slow().run(), {"x-request-timeout-seconds": "60"}))


@pytest.mark.parametrize("stated", ["soon", "0", "-1", "nan"])
def test_a_time_that_is_none_is_refused(stated):
    with pytest.raises(ParameterError, match="x-request-timeout-seconds"):
        asyncio.run(taken(SHORT, pieces(1), {"x-request-timeout-seconds": stated}))

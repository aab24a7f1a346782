"""How much of a service may one request take: how long a body, how much time?"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from serve_apps.errors import BodyTooLargeError, ParameterError, RequestTimeoutError

__all__ = ["Limits"]

TIMEOUT_HEADER = "x-request-timeout-seconds"
FIRST = 0.7
"""Of the time that a client's header gives: Serve's proxy reads that header too, and would answer in plain text."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of each request."""

    seconds: float
    body_bytes: int

    async def body(self, headers: Mapping[str, str], stream: AsyncIterator[bytes]) -> bytes:
        """The whole body. BodyTooLargeError as soon as it is known to be too long, RequestTimeoutError if late."""
        stated = headers.get("content-length", "")
        self._check(int(stated) if stated.isdecimal() else 0)
        return await self.in_time(self._joined(stream), headers)

    async def in_time(self, work: Awaitable[Item], headers: Mapping[str, str]) -> Item:
        """What `work` gives. RequestTimeoutError if that takes too long."""
        seconds = self._seconds(headers)
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError as error:
            raise _timeout(seconds) from error

    async def timed(self, items: AsyncGenerator[Item, None], headers: Mapping[str, str]) -> AsyncGenerator[Item, None]:
        """`items`, which are closed at their end or with this. RequestTimeoutError if all take too long."""
        seconds = self._seconds(headers)
        deadline = asyncio.get_running_loop().time() + seconds
        async with aclosing(items):
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        item = await anext(items)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise _timeout(seconds) from error
                yield item

    async def _joined(self, stream: AsyncIterator[bytes]) -> bytes:
        parts: list[bytes] = []
        async for part in stream:
            parts.append(part)
            self._check(sum(map(len, parts)))
        return b"".join(parts)

    def _check(self, length: int) -> None:
        if length > self.body_bytes:
            raise BodyTooLargeError(
                f"the body has {length} bytes or more; at most {self.body_bytes} are read here; send less"
            )

    def _seconds(self, headers: Mapping[str, str]) -> float:
        stated = headers.get(TIMEOUT_HEADER)
        if stated is None:
            return self.seconds
        try:
            asked = float(stated)
        except ValueError:
            asked = float("nan")
        if not asked > 0:
            raise ParameterError(f"the header {TIMEOUT_HEADER} is {stated!r}; it must be a number above 0; drop it")
        return min(self.seconds, FIRST * asked)


def _timeout(seconds: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"the request took longer than {seconds:g} s and was aborted; ask for fewer tokens or come back later"
    )

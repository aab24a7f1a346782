"""Limits of one request at an ingress: length of its body, time, number of texts."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from serve_apps.api import bounds
from serve_apps.api.errors import BodyTooLargeError, ParameterError, RequestTimeoutError
from serve_apps.api.parsing import Body, parse_request
from tidar_core.errors import CapacityError

__all__ = ["Limits"]

TIMEOUT_HEADER = "x-request-timeout-seconds"
LONGEST_CONTEXT = 2**31 - 1
FIRST = 0.7
"""Share of the time in a client's header. Serve's proxy reads the header too, and would answer in plain text."""

AT_ONCE_SECONDS = 0.01
"""A body that is complete by then does not count as a body that is waited for."""

SMALL_BYTES = 2**16
"""A body up to this length is parsed in about a millisecond."""

Item = TypeVar("Item")
Request = TypeVar("Request", bound=Body)


@dataclass(slots=True, kw_only=True)
class Limits:
    """Bounds of each request at one ingress, and of all its requests together."""

    seconds: float
    body_bytes: int
    body_seconds: float = bounds.BODY_SECONDS
    bodies: int = bounds.BODIES
    """Bodies that are waited for at the same time."""
    choices: int = bounds.PROMPTS
    """Texts of one request; twice as many may be written for all requests together."""
    context_len: int = LONGEST_CONTEXT
    _bodies: int = 0
    _choices: int = 0
    _lane: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self, http: HttpRequest, kind: type[Request]) -> Request:
        """The request in a body. Raises RequestError for the first bound that it does not keep."""
        body = await self.body(http.headers, http.stream())
        request = await self._parsed(body, kind)
        if request.choices > self.choices:
            param = "prompt" if request.choices // request.copies > self.choices else "n"
            raise ParameterError(
                f"{request.choices} choices are requested, prompts times n; at most {self.choices} are generated for "
                "one request; send several requests",
                param,
            )
        if request.copies * len(body) > bounds.COPIES * self.body_bytes:
            raise ParameterError(
                f"n is {request.copies} and the body has {len(body)} bytes; n times the bytes may be "
                f"{bounds.COPIES * self.body_bytes}; request fewer choices",
                "n",
            )
        request.check_context(self.context_len)
        return request

    async def _parsed(self, body: bytes, kind: type[Request]) -> Request:
        """The request in a body. Large bodies are parsed one after another, and after each the event loop belongs to
        all other requests for as long as that took."""
        if len(body) <= SMALL_BYTES:
            return parse_request(body, kind)
        async with self._lane:
            began = time.perf_counter()
            try:
                return parse_request(body, kind)
            finally:
                await asyncio.sleep(time.perf_counter() - began)

    async def body(self, headers: Mapping[str, str], stream: AsyncIterator[bytes]) -> bytes:
        """The whole body. BodyTooLargeError as soon as it is known to be too long, RequestTimeoutError if late."""
        stated = headers.get("content-length", "")
        self._check(int(stated) if stated.isdecimal() else 0)
        whole = asyncio.ensure_future(self._joined(stream))
        try:
            await asyncio.wait([whole], timeout=AT_ONCE_SECONDS)
            if whole.done():
                return whole.result()
            return await self._awaited(whole, min(self.body_seconds, self._seconds(headers)))
        finally:
            whole.cancel()

    async def in_time(self, work: Awaitable[Item], headers: Mapping[str, str]) -> Item:
        """Result of `work`. Raises RequestTimeoutError if that takes too long, and CapacityError as `timed` does."""
        seconds = self._seconds(headers)
        with self._room(1):
            return await _in_seconds(work, seconds, _timeout(seconds))

    async def timed(
        self, items: AsyncGenerator[Item, None], headers: Mapping[str, str], choices: int = 1
    ) -> AsyncGenerator[Item, None]:
        """`items`, which are closed at their end or with this. RequestTimeoutError if all take too long, CapacityError
        if too many choices are in flight.

        choices  that the items belong to
        """
        seconds = self._seconds(headers)
        deadline = asyncio.get_running_loop().time() + seconds
        with self._room(choices):
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
        whole = bytearray()
        async for part in stream:
            whole += part
            self._check(len(whole))
        return bytes(whole)

    async def _awaited(self, whole: asyncio.Future[bytes], seconds: float) -> bytes:
        if self._bodies >= self.bodies:
            raise CapacityError(
                f"{self._bodies} bodies are on their way already, which is all that is waited for; wait"
            )
        self._bodies += 1
        late = RequestTimeoutError(f"the body was not complete after {seconds:g} s; send it faster, or less")
        try:
            return await _in_seconds(whole, seconds, late)
        finally:
            self._bodies -= 1

    @contextmanager
    def _room(self, choices: int) -> Iterator[None]:
        if self._choices + choices > 2 * self.choices:
            raise CapacityError(f"{self._choices} texts are being written and {choices} more do not fit; wait")
        self._choices += choices
        try:
            yield
        finally:
            self._choices -= choices

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
            seconds = float(stated)
        except ValueError:
            seconds = float("nan")
        if not seconds > 0:
            raise ParameterError(f"the header {TIMEOUT_HEADER} is {stated!r}; it must be a number above 0; drop it")
        return min(self.seconds, FIRST * seconds)


async def _in_seconds(work: Awaitable[Item], seconds: float, late: RequestTimeoutError) -> Item:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError as error:
        raise late from error


def _timeout(seconds: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"the request took longer than {seconds:g} s and was aborted; request fewer tokens or try again later"
    )

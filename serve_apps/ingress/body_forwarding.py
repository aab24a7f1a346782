"""The way of a request's body from Serve's proxy to the ingress.

Serve's proxy sends an ingress the head of a request, and the ingress fetches the body from the proxy's actor. This call
takes longer than the rest of the work on most bodies. So a body that is there at once goes along with the head.
`PrefetchBody` in the proxy puts it into the ASGI scope, and `ReplayBody` in the ingress returns it. Serve carries all
other bodies. A request whose client has left by then goes nowhere.
"""

import asyncio
from contextlib import suppress

from ray.exceptions import TaskCancelledError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.api.bounds import BODIES
from serve_apps.api.errors import problem_of
from tidar_core.errors import CapacityError

__all__ = ["PrefetchBody", "ReplayBody"]

KEY = "tidar.body"
MOST_BYTES = 2**20
WAIT_SECONDS = 0.01
"""Time for a body to arrive. Serve carries a body that arrives later."""


class PrefetchBody:
    """ASGI middleware of the proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._unfinished = 0
        """Requests with an incomplete body. Each holds one of the 1000 calls that Serve's actor of the proxy can take.
        Many more would stop all other requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body if that is here and not large."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = await _arrived(receive)
        if any(message["type"] == "http.disconnect" for message in messages):
            return  # thousands of clients that left would cost the ingress as much as clients that stay
        body, replayed = b"".join(message.get("body", b"") for message in messages), _after(messages, receive)
        if not messages or messages[-1].get("more_body"):
            await self._pass_unfinished(scope, replayed, send)
        elif len(body) <= MOST_BYTES:
            scope[KEY] = body
            await self._app(scope, receive, send)
        else:
            await self._app(scope, replayed, send)

    async def _pass_unfinished(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is on its way, or refuse it where too many are."""
        if self._unfinished >= BODIES:
            problem = problem_of(CapacityError(f"{BODIES} bodies are on their way already; wait"))
            refusal = JSONResponse(problem.body(), status_code=problem.status, headers=problem.headers)
            await refusal(scope, receive, send)
            return
        self._unfinished += 1
        counted = True

        async def counting() -> Message:
            nonlocal counted
            message = await receive()
            if counted and not message.get("more_body"):
                self._unfinished -= 1
                counted = False
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            self._unfinished -= counted


class ReplayBody:
    """ASGI middleware of the ingress."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, which reads its body as it would any other."""
        body = scope.pop(KEY, None)
        if body is not None:
            receive = _after([{"type": "http.request", "body": body, "more_body": False}], receive)
        await self._app(scope, _until_gone(receive), send)


def _until_gone(receive: Receive) -> Receive:
    """Messages of `receive`, with a disconnection in place of a cancelled call.

    If the proxy is called as an actor, a client that hangs up in its body cancels Serve's own call for the body."""

    async def next_message() -> Message:
        try:
            return await receive()
        except TaskCancelledError:
            return {"type": "http.disconnect"}

    return next_message


async def _arrived(receive: Receive) -> list[Message]:
    """Messages of the client within WAIT_SECONDS, up to the end of the body or beyond MOST_BYTES."""
    messages: list[Message] = []
    length = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(WAIT_SECONDS):
            while length <= MOST_BYTES and (not messages or messages[-1].get("more_body")):
                messages.append(await receive())
                length += len(messages[-1].get("body", b""))
    return messages


def _after(first: list[Message], receive: Receive) -> Receive:
    """The messages `first`, and then the messages of `receive`."""
    waiting = first[::-1]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message

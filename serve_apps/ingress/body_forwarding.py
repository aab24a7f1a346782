"""How does the body of a request come to the ingress?

Serve's proxy sends an ingress the head of a request, and the ingress asks the proxy's actor for the body: a call that
takes longer than all that is done with most bodies. So a body that is there at once goes along with the head:
`PrefetchBody` puts it into the ASGI scope, in the proxy, and `ReplayBody` hands it out in the ingress. Other bodies
go Serve's way.
"""

import asyncio

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
"""What is not there by then goes Serve's way."""


class PrefetchBody:
    """In the proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._unfinished = 0
        """Requests whose bodies are on their way. Each holds one of the calls that Serve's actor of the proxy can take,
        1000 in all, so that many more would stop every other request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body if that is here and not large."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                first = await receive()
        except TimeoutError:
            await self._pass_unfinished(scope, receive, send)
            return
        if first.get("more_body"):
            await self._pass_unfinished(scope, _after(first, receive), send)
        elif first["type"] == "http.request" and len(first.get("body", b"")) <= MOST_BYTES:
            scope[KEY] = first.get("body", b"")
            await self._app(scope, receive, send)
        else:
            await self._app(scope, _after(first, receive), send)

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
    """In the ingress."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, which reads its body as it would any other."""
        body = scope.pop(KEY, None)
        if body is not None:
            receive = _after({"type": "http.request", "body": body, "more_body": False}, receive)
        await self._app(scope, _until_gone(receive), send)


def _until_gone(receive: Receive) -> Receive:
    """What `receive` gives. A client that hangs up in its body cancels Serve's own call for it, where the proxy is
    called as an actor: that is a disconnection."""

    async def next_message() -> Message:
        try:
            return await receive()
        except TaskCancelledError:
            return {"type": "http.disconnect"}

    return next_message


def _after(first: Message, receive: Receive) -> Receive:
    """`first`, and then what `receive` gives."""
    waiting = [first]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message

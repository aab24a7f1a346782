"""How does an ingress end without cutting anybody short?

It counts who is inside: every request from its first byte to the last byte of its answer. Once it is closing, the
routes refuse who comes, and whoever ends the service waits until nobody is left.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve_apps.api.errors import HttpError

__all__ = ["DrainGate", "InFlightMiddleware"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Message, Receive, Send], Awaitable[None]]


class DrainGate:
    """Of one ingress."""

    def __init__(self) -> None:
        self.closing = False
        self.inside = 0
        """Requests that are being answered."""

    def check(self) -> None:
        """Raise HttpError if nobody may come in any more."""
        if self.closing:
            raise HttpError(503, "the service is ending and takes no more requests; ask again", {"Retry-After": "1"})


class InFlightMiddleware:
    """ASGI middleware that counts for a doorway."""

    def __init__(self, app: AsgiApp, doorway: DrainGate) -> None:
        self._app, self._doorway = app, doorway

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let one request through; what Serve tells the application of its life is none."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._doorway.inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._doorway.inside -= 1

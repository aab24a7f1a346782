"""The graceful end of an ingress: requests in flight are answered, new requests are refused.

A request is in flight from its first byte to the last byte of its response. The service ends once no request is in
flight.
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
    """The gate of one ingress: a count of the requests in flight, and whether more may come."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        """Number of requests in flight."""

    def check(self) -> None:
        """Raise HttpError if the ingress takes no more requests."""
        if self.draining:
            raise HttpError(503, "the service is ending and takes no more requests; try again", {"Retry-After": "1"})


class InFlightMiddleware:
    """ASGI middleware that counts the requests in flight."""

    def __init__(self, app: AsgiApp, gate: DrainGate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Count an HTTP request while it is in flight; lifespan events are not counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._gate.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.in_flight -= 1

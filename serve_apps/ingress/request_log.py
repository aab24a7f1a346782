"""The log of requests: one line for each response that has ended, however it ended.

Serve's JSON encoding makes an object of the line. Its `request_id` is in the client's header X-Request-Id.
"""

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.api.errors import CLIENT_GONE
from serve_apps.telemetry.tracing import note

__all__ = ["RequestLog"]

PROBES = ("/health", "/ready", "/metrics")
"""Routes that monitoring calls every few seconds. Such calls are not logged."""

logger = logging.getLogger("ray.serve")


class RequestLog:
    """ASGI middleware that logs; the outermost of the ingress. A route may leave its reply in the request's state."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log how it was answered."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        began, status, complete = time.monotonic(), 0, False
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status, complete
            status = message.get("status", status)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:  # Serve's word for a client that has hung up
            status = status or CLIENT_GONE
            raise
        finally:
            complete = complete and status != CLIENT_GONE
            facts = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "complete": complete,
                "seconds": round(time.monotonic() - began, 6),
            }
            if (reply := state.get("reply")) is not None:
                note(
                    gen_ai__response__id=reply.reply_id,
                    gen_ai__response__model=reply.card.id,
                    gen_ai__usage__input_tokens=reply.usage.prompt_tokens,
                    gen_ai__usage__output_tokens=reply.usage.completion_tokens,
                    tidar__complete=complete,
                )
                facts |= {
                    "reply_id": reply.reply_id,
                    "prompt_tokens": reply.usage.prompt_tokens,
                    "completion_tokens": reply.usage.completion_tokens,
                }
            logger.info("answered" if complete else "the client hung up", extra=facts)

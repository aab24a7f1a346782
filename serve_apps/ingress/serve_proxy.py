"""The work of Serve's proxies on a request before the ingress receives it.

Serve calls `of_proxies` in each proxy as it starts. From then on the proxy's HTTP server limits the head of
a request, and bodies go along with their requests. Errors of the proxy itself have the envelope of all other errors.
"""

import asyncio
import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_apps.api.bounds import HEAD_BYTES, HEAD_SECONDS
from serve_apps.api.errors import HttpError, problem_of
from serve_apps.ingress.body_forwarding import PrefetchBody

__all__ = ["CALLBACK", "BoundedHeads", "Enveloper", "of_proxies"]

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.of_proxies"}
"""The environment in which Serve's proxies find `of_proxies`."""
LOWEST_ERROR = 400


def of_proxies() -> list[Middleware]:
    """Serve's hook: the middleware of a proxy. Its HTTP server, which uvicorn chooses later, is replaced here as well,
    since Serve has no option for that."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHeads.__name__}"
    return [Middleware(Enveloper), Middleware(PrefetchBody)]


class BoundedHeads(HttpToolsProtocol):
    """One connection of uvicorn, whose request lines and headers have a largest size and a longest time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first head is awaited from now on."""
        super().connection_made(transport)
        self._refusal: HttpError | None = None
        self._fed = 0
        self._head_len: int | None = 0
        """Length of the head so far; `None` while a body is read."""
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._begun, self._head_len = True, 0
        self._deadline.cancel()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse_late)

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A body begins, or the next head."""
        self._deadline.cancel()
        self._head_len = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Feed data of the client to the parser. Chunks that complete no header count against the limit."""
        self._begun = False
        super().data_received(data)
        self._fed = 0 if self._begun or self._head_len is None else self._fed + len(data)
        if self._fed > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_too_large())

    def send_400_response(self, msg: str) -> None:
        """The parser refuses, or `_count` did."""
        self._refuse(self._refusal or HttpError(400, f"this is no HTTP request: {msg} Send another"))

    def _count(self, length: int) -> None:
        """Raising within the parser ends it."""
        self._head_len = (self._head_len or 0) + length
        if self._head_len > HEAD_BYTES:
            self._refusal = _too_large()
            raise self._refusal

    def _refuse_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(HttpError(408, f"the headers were not complete after {HEAD_SECONDS:g} s; send them faster"))

    def _refuse(self, error: HttpError) -> None:
        body = _body(error)
        head = f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class Enveloper:
    """Middleware that puts plain-text errors, which only the proxy itself sends, into the envelope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its response, or the same error in the envelope."""
        held: Message | None = None
        text = b""

        async def in_envelope(message: Message) -> None:
            nonlocal held, text
            if message["type"] == "http.response.start" and _is_plain_error(message):
                held = message
                return
            if held is None:
                await send(message)
                return
            text += message.get("body", b"")
            if message.get("more_body"):
                return
            body = _body(HttpError(held["status"], _words(text)))
            replaced = (b"content-type", b"content-length")
            kept = [(name, value) for name, value in held.get("headers", []) if name.lower() not in replaced]
            headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({**held, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, in_envelope if scope["type"] == "http" else send)


def _too_large() -> HttpError:
    return HttpError(431, f"request line and headers have more than {HEAD_BYTES} bytes; send fewer or shorter headers")


def _body(error: HttpError) -> bytes:
    return json.dumps(problem_of(error).body()).encode()


def _is_plain_error(start: Any) -> bool:
    kind = dict(start.get("headers", [])).get(b"content-type", b"text/plain")
    return bool(start["status"] >= LOWEST_ERROR and kind.startswith(b"text/plain"))


def _words(text: bytes) -> str:
    words = " ".join(text.decode(errors="replace").split()).strip("'\"")
    return f"the proxy of the service reports: {words or 'nothing'}; try again"

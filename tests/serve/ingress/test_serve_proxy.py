"""Serve's proxy bounds heads, and its own errors look like all others."""

import asyncio
import json
import socket

import pytest
import uvicorn
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serve_apps.api.bounds import HEAD_BYTES
from serve_apps.ingress import serve_proxy

HEAD = b"GET /x HTTP/1.1\r\nHost: x\r\n"


async def application(scope, receive, send):
    await PlainTextResponse(scope["path"])(scope, receive, send)


def answers(*parts):
    """Bytes that a connection gets back for the parts that it sends."""

    async def exchange():
        serve_proxy.of_proxies()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            config = uvicorn.Config(application, lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started:
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            for part in parts:
                try:
                    writer.write(part)
                    await writer.drain()
                except ConnectionError:  # refused before all was sent
                    break
            received = b""
            try:
                async with asyncio.timeout(3):
                    while chunk := await reader.read(4096):
                        received += chunk
            except (TimeoutError, ConnectionError):
                pass
            writer.close()
            server.should_exit = True
            await serving
            return received

    return asyncio.run(exchange())


def refusal(received):
    """Status and the envelope's message of a connection that was closed with an error."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "parts",
    [[HEAD + b"A: " + b"a" * HEAD_BYTES + b"\r\n\r\n"], [HEAD + b"A: b\r\n" * 40_000 + b"\r\n"],
     [b"GET /" + b"x" * HEAD_BYTES + b" HTTP/1.1\r\n\r\n"], [HEAD + b"A: ", *[b"a" * 50_000] * 40]],
    ids=["header", "headers", "path", "endless"],
)  # fmt: skip
def test_a_head_that_is_too_large_is_answered_431_before_it_is_whole(parts):
    status, error = refusal(answers(*parts))
    assert (status, error["type"]) == (431, "invalid_request_error")
    assert f"more than {HEAD_BYTES} bytes" in error["message"]


@pytest.mark.parametrize("parts", [[b""], [HEAD], [HEAD + b"Connection: keep-alive\r\n\r\n" + HEAD]])
def test_a_head_that_does_not_come_is_not_awaited(parts, monkeypatch):
    monkeypatch.setattr(serve_proxy, "HEAD_SECONDS", 0.3)
    received = answers(*parts)
    if parts[0].count(b"GET") == 2:
        received = received[received.index(b"/x") + 2 :]
    status, error = refusal(received)
    assert (status, "0.3 s" in error["message"]) == (408, True)


def test_a_head_within_the_bounds_and_a_body_of_any_size_pass():
    large = HEAD + b"A: " + b"a" * (HEAD_BYTES - 100) + b"\r\n\r\n"
    body = b"POST /y HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"
    received = answers(large, large, body, b"a" * 100_000, b"a" * 100_000, HEAD + b"Connection: close\r\n\r\n")
    assert received.count(b"HTTP/1.1 200") == 4


def test_what_is_no_http_is_refused_in_the_envelope():
    assert refusal(answers(b"\x16\x03\x01 no HTTP\r\n\r\n"))[0] == 400


def through(response):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.sleep(3)

    asyncio.run(serve_proxy.Enveloper(response)({"type": "http", "method": "GET"}, receive, send))
    start = sent[0]
    return start["status"], dict(start["headers"]), b"".join(message.get("body", b"") for message in sent)


async def parts(*texts):
    for text in texts:
        yield text


@pytest.mark.parametrize(
    "response",
    [PlainTextResponse("Internal Server Error", 500, {"x-request-id": "r"}),
     StreamingResponse(parts("Internal ", "Server Error"), 500, {"x-request-id": "r"}, "text/plain")],
)  # fmt: skip
def test_an_error_of_the_proxy_itself_has_the_envelope_and_its_status(response):
    status, headers, body = through(response)
    error = json.loads(body)["error"]
    assert (status, error["type"], error["param"]) == (500, "server_error", None)
    assert "Internal Server Error" in error["message"]
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"x-request-id"] == b"r"


@pytest.mark.parametrize(
    "response",
    [PlainTextResponse("metrics", 200), JSONResponse({"error": {}}, 500), StreamingResponse(parts("a", "b"))],
)
def test_all_else_passes_as_it_is(response):
    _, headers, body = through(response)
    assert body in (b"metrics", b'{"error":{}}', b"ab")
    assert headers.get(b"content-type") != b"application/json" or body == b'{"error":{}}'

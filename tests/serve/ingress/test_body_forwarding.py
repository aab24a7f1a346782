"""A body that is there goes along with its request; the ingress fetches any other body, as Serve does."""

import asyncio
import pickle
import socket
import time

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from serve_apps.ingress import body_forwarding
from serve_apps.ingress.body_forwarding import PrefetchBody, ReplayBody

BODY = b'{"prompt": "x"}'
END = {"type": "http.disconnect"}


class Client:
    """Messages of uvicorn for a proxy, each after some seconds."""

    def __init__(self, *messages):
        self.calls, self._messages = 0, list(messages)

    async def __call__(self):
        self.calls += 1
        seconds, message = self._messages[0]
        await asyncio.sleep(seconds)
        del self._messages[0]
        return message


def part(body, more=False, after=0.0):
    return after, {"type": "http.request", "body": body, "more_body": more}


def through(client, method="POST"):
    """Number of reads of the client's body before the ingress began, and the body that the application read."""
    calls, sent = [], []

    async def application(scope, receive, send):
        await PlainTextResponse(await Request(scope, receive).body())(scope, receive, send)

    async def to_ingress(scope, receive, send):
        calls.append(client.calls)
        await ReplayBody(application)(pickle.loads(pickle.dumps(scope)), receive, send)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/", "headers": [], "query_string": b""}
    asyncio.run(PrefetchBody(to_ingress)(scope, client, send))
    return calls, b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("body", [BODY, b""])
def test_a_body_that_is_there_goes_along(body):
    client = Client(part(body), (0.0, END))
    assert through(client) == ([1], body)
    assert client.calls == 1, "the ingress fetches no body from the proxy"


def test_serve_carries_a_body_in_parts_from_its_first_part_on():
    late = part(BODY[4:], after=30 * body_forwarding.WAIT_SECONDS)
    assert through(Client(part(BODY[:2], more=True), part(BODY[2:4], more=True), late)) == ([3], BODY)


def test_parts_that_are_there_go_along_as_one_body():
    client = Client(part(BODY[:4], more=True), part(BODY[4:]), (0.0, END))
    assert through(client) == ([2], BODY)
    assert client.calls == 2


@pytest.mark.parametrize("sent", [[], [part(b"{", more=True)]])
def test_a_request_whose_client_has_left_reaches_no_ingress(sent):
    assert through(Client(*sent, (0.0, END))) == ([], b"")


def test_a_body_that_is_late_is_not_waited_for_in_the_proxy():
    client = Client(part(BODY, after=30 * body_forwarding.WAIT_SECONDS))
    assert through(client) == ([1], BODY)
    assert client.calls == 2


def test_serve_carries_a_large_body(monkeypatch):
    monkeypatch.setattr(body_forwarding, "MOST_BYTES", len(BODY) - 1)
    seen = []

    async def to_ingress(scope, receive, send):
        seen.append((body_forwarding.KEY in scope, (await receive())["body"]))

    asyncio.run(PrefetchBody(to_ingress)({"type": "http", "method": "POST"}, Client(part(BODY)), None))
    assert seen == [(False, BODY)]


def test_a_request_that_brings_no_body_is_left_alone():
    client, seen = Client((0.0, END)), []

    async def to_ingress(scope, receive, send):
        seen.append((scope, await receive(), client.calls))

    asyncio.run(PrefetchBody(to_ingress)({"type": "http", "method": "GET"}, client, None))
    assert seen == [({"type": "http", "method": "GET"}, END, 1)]


def test_bodies_may_be_incomplete_up_to_the_limit_and_one_more_is_refused_in_the_proxy(monkeypatch):
    monkeypatch.setattr(body_forwarding, "BODIES", 2)

    async def crowd():
        end, statuses = asyncio.Event(), []

        async def ingress(scope, receive, send):
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message["body"], message["more_body"]
            await PlainTextResponse(body)(scope, receive, send)

        loader = PrefetchBody(ReplayBody(ingress))

        async def send_body(*messages):
            waiting = list(messages)

            async def receive():
                if not waiting:
                    await end.wait()
                    return {"type": "http.request", "body": b"!", "more_body": False}
                return {"type": "http.request", **waiting.pop(0)}

            async def send(message):
                statuses.extend([message["status"]] if "status" in message else [])

            await loader({"type": "http", "method": "POST", "headers": []}, receive, send)

        half = {"body": b"{", "more_body": True}
        unfinished = [asyncio.create_task(send_body(half)), asyncio.create_task(send_body())]
        await asyncio.sleep(5 * body_forwarding.WAIT_SECONDS)
        await send_body(half)
        await send_body({"body": b"{}", "more_body": False})
        assert statuses == [429, 200]
        end.set()
        await asyncio.gather(*unfinished)
        await send_body(half, {"body": b"}", "more_body": False})
        assert statuses == [429, 200, 200, 200, 200]

    asyncio.run(crowd())


@pytest.mark.ray
@pytest.mark.slow
def test_a_late_body_in_parts_is_read_by_a_running_service(service):
    body = b'{"model": "tiny-model", "prompt": "x", "max_tokens": 2}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    url = httpx.URL(service)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        for piece in (head.encode(), body[:9], body[9:]):
            connection.sendall(piece)
            time.sleep(3 * body_forwarding.WAIT_SECONDS)
        status_lines = b"".join(iter(lambda: connection.recv(4096), b""))
    assert status_lines.startswith(b"HTTP/1.1 200"), status_lines
    assert b'"completion_tokens":2' in status_lines


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("begun", [b"", b"{"])
def test_a_body_that_never_comes_ends_with_408(service, begun):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nX-Request-Timeout-Seconds: 1\r\n\r\n"
    url = httpx.URL(service)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(head + begun)
        status_lines = connection.recv(4096)
    assert status_lines.startswith(b"HTTP/1.1 408"), status_lines

"""A client that hangs up is a class of its own, wherever it does so: never a failure of the server's."""

import asyncio
import json
import logging
import socket
import time
from pathlib import Path

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from serve_apps.api.completion_response import ModelCard
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.messages.text_delta import TextDelta, UsageCounts

CARD = ModelCard(id="m", created=0, max_model_len=8, block_len=4, bundle_hash="h", mode="auto")
BODY = {"model": "m", "prompt": "a", "max_tokens": 4}


class Decoder:
    """Stand-in for a handle: sends some deltas, then nothing more."""

    def __init__(self, *pieces):
        self._pieces = pieces
        self.generate = self

    def options(self, **_):
        return self

    def remote(self, _):
        return self

    async def __aiter__(self):
        for piece in self._pieces:
            yield piece
        await asyncio.sleep(60)

    def cancel(self):
        pass


@pytest.fixture
def logged():
    """Records of the service's logger."""
    records, logger = [], logging.getLogger("ray.serve")
    handler = logging.Handler()
    handler.emit = records.append
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def hung_up(decoder, *, path="/v1/completions", body=None, cancelled=False):
    """Counts and messages for a client that hangs up after its body, or within a body that is not given."""
    app = HttpApp.__mro__[1](decoder, CARD, Limits(seconds=9, body_bytes=999), Access())  # without Serve's wrapping
    api, sent, request_options = app.__serve_build_asgi_app__(), [], []

    async def receive():
        request_options.append(1)
        if len(request_options) == 1:
            return {"type": "http.request", "body": b"{" if body is None else json.dumps(body).encode(),
                    "more_body": body is None}  # fmt: skip
        if cancelled:
            await asyncio.sleep(60)
        await asyncio.sleep(0.05 if body is not None else 0)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def run():
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
        response = asyncio.create_task(api(scope, receive, send))
        if cancelled:
            await asyncio.sleep(0.1)
            response.cancel()
        await asyncio.gather(response, return_exceptions=True)

    asyncio.run(run())
    families = text_string_to_metric_families(app._counters.exposition())
    counted = {
        (s.name.removeprefix("tidar:requests_"), s.labels.get("status") or s.labels.get("phase")): s.value
        for family in families for s in family.samples if s.name.startswith("tidar:requests_") and s.value
    }  # fmt: skip
    return counted, [message["status"] for message in sent if "status" in message]


@pytest.mark.parametrize(
    ("decoder", "request_options", "counted", "statuses"),
    [
        (None, {}, {("total", "499"): 1, ("abandoned_total", "body"): 1}, [499]),
        (None, {"cancelled": True}, {("total", "499"): 1, ("abandoned_total", "body"): 1}, []),
        (None, {"path": "/tokenize"}, {}, [499]),
        (None, {"path": "/detokenize"}, {}, [499]),
        (Decoder(), {"body": BODY, "cancelled": True}, {("total", "499"): 1, ("abandoned_total", "answer"): 1}, []),
        (Decoder(TextDelta("", None, UsageCounts(1))), {"body": BODY, "cancelled": True},
         {("total", "499"): 1, ("abandoned_total", "answer"): 1}, []),
        (Decoder(TextDelta("b", None, UsageCounts(1, 1))), {"body": BODY | {"stream": True}},
         {("total", "200"): 1, ("abandoned_total", "stream"): 1}, [200]),
        (Decoder(TextDelta("b", None, UsageCounts(1, 1))), {"body": BODY | {"stream": True}, "cancelled": True},
         {("total", "200"): 1, ("abandoned_total", "stream"): 1}, [200]),
    ],
)  # fmt: skip
def test_it_is_counted_by_its_phase_and_logged_in_one_line_at_info(logged, decoder, request_options, counted, statuses):
    assert hung_up(decoder, **request_options) == (counted, statuses)
    (record,) = logged
    assert (record.levelname, record.getMessage(), record.exc_info) == ("INFO", "the client hung up", None)
    assert (record.status, record.complete) == (200 if statuses == [200] else 499, False)


def counted_of(service):
    families = text_string_to_metric_families(httpx.get(f"{service}/metrics").text)
    return {
        (s.name.removeprefix("tidar:"), s.labels.get("status") or s.labels.get("phase")): s.value
        for family in families for s in family.samples if s.name.startswith("tidar:requests_")
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_a_running_service_counts_no_failure_and_writes_no_traceback(service):
    url, before = httpx.URL(service), counted_of(service)
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    logs = {path: path.stat().st_size for path in folder.glob("*.log")}
    whole = json.dumps({"model": "tiny-model", "prompt": "x", "max_tokens": 4000, "ignore_eos": True})
    streamed = json.dumps(json.loads(whole) | {"stream": True})
    for body, length in ((b"", 50), (b"{", 50), (whole.encode(), len(whole)), (streamed.encode(), len(streamed))):
        for path in ("/v1/completions", "/tokenize") if length == 50 else ("/v1/completions",):
            with socket.create_connection((url.host, url.port), timeout=10) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
                connection.sendall(head.encode() + body)
                time.sleep(0.3)
    more = {}
    deadline = time.monotonic() + 20
    while sum(more.values()) < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
        more = {name: n for name, value in counted_of(service).items() if (n := value - before.get(name, 0))}
    assert more == {
        ("requests_total", "499"): 3, ("requests_total", "200"): 1, ("requests_abandoned_total", "body"): 2,
        ("requests_abandoned_total", "answer"): 1, ("requests_abandoned_total", "stream"): 1,
    }  # fmt: skip
    logged_text = ""
    while logged_text.count("the client hung up") < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
        logged_text = "".join(path.read_bytes()[logs.get(path, 0) :].decode() for path in folder.glob("*.log"))
    assert logged_text.count("the client hung up") == 6
    assert "Traceback" not in logged_text
    assert '"ERROR"' not in logged_text

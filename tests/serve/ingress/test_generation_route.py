"""Responses when replicas die before the client has read anything, and the headers of a stream."""

import asyncio
import json

import httpx
import pytest
from ray.exceptions import ActorDiedError
from starlette.requests import Request

from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.completion_response import ModelCard
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.generation_route import Generation
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.streaming.completion_stream import CompletionReply
from serve_apps.telemetry.metrics import Counters

CARD = ModelCard(id="m", created=0, max_model_len=8, block_len=4, bundle_hash="h", mode="auto")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9}
DEATH = ActorDiedError()
ROUTES = {"/v1/completions": {"model": "m", "prompt": "a"}, "/v1/chat/completions": CHAT}


class Decoder:
    """In the place of a handle: each call is answered by the next script. A number is a pause in seconds."""

    def __init__(self, *scripts):
        self._scripts = iter(scripts)
        self.generate = self

    def options(self, **_):
        return self

    def remote(self, _):
        return Stream(next(self._scripts))


class Stream:
    def __init__(self, script):
        self._script = script

    async def __aiter__(self):
        for items in self._script:
            if isinstance(items, Exception):
                raise items
            if isinstance(items, float):
                await asyncio.sleep(items)
            else:
                yield items

    def cancel(self):
        pass


def answered(path, body, *scripts):
    api = HttpApp.__mro__[1](Decoder(*scripts), CARD, Limits(seconds=9, body_bytes=999), Access())
    transport = httpx.ASGITransport(api.__serve_build_asgi_app__())

    async def post():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return asyncio.run(post())


def events(answer):
    *chunks, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(chunk) for chunk in chunks] + ([] if last == "[DONE]" else [json.loads(last)])


def written(tokens, text, reason=None):
    return TextDelta(text, reason, UsageCounts(3, tokens))


ADMITTED = written(0, "")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("begun", [ADMITTED, written(1, ""), written(2, "wro")])
def test_an_answer_that_is_not_streamed_is_written_anew_whatever_the_dead_replica_had_written(path, begun):
    answer = answered(path, ROUTES[path], [begun, DEATH], [begun, DEATH], [written(2, "rig"), written(3, "ht", "stop")])
    assert answer.status_code == 200
    choice = answer.json()["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == "right"
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("path", ROUTES)
def test_of_several_choices_the_lost_one_alone_is_written_anew(path):
    scripts = [written(2, "one", "stop")], [written(9, "lost"), DEATH], [written(2, "two", "stop")]
    answer = answered(path, ROUTES[path] | {"n": 2}, *scripts)
    texts = [choice.get("text") or choice["message"]["content"] for choice in answer.json()["choices"]]
    assert (answer.status_code, sorted(texts), answer.json()["usage"]["completion_tokens"]) == (200, ["one", "two"], 4)


def test_a_stream_of_which_nothing_was_sent_begins_anew():
    body = ROUTES["/v1/completions"] | {"stream": True, "prompt": ["a", "b"], "stream_options": {"include_usage": True}}
    first = [written(2, "lost"), 0.05, DEATH]  # unsent, since the other text is not admitted yet
    late = [0.2, ADMITTED, 0.1, written(1, "x", "stop")]
    *chunks, usage = events(answered("/v1/completions", body, first, late, [written(1, "a"), written(2, "b", "stop")]))
    texts = {index: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index)
             for index in (0, 1)}  # fmt: skip
    assert texts == {0: "ab", 1: "x"}
    assert usage["usage"]["completion_tokens"] == 3


def test_a_chat_whose_role_and_no_word_was_sent_goes_on_with_another_replica():
    body = CHAT | {"stream": True, "tools": [TOOL]}
    held = [ADMITTED._replace(tool_form="hermes"), written(2, "<tool_c"), DEATH]
    anew = [ADMITTED._replace(tool_form="hermes"), written(1, "wo"), written(2, "rd", "stop")]
    deltas = [event["choices"][0]["delta"] for event in events(answered("/v1/chat/completions", body, held, anew))]
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert "".join(delta.get("content") or "" for delta in deltas) == "word"


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_of_which_text_was_sent_ends_with_one_error(path):
    body = ROUTES[path] | {"stream": True}
    *_, last = events(answered(path, body, [written(1, "a"), 0.05, DEATH], [written(1, "b", "stop")]))
    assert last["error"]["code"] == "replica_lost"


@pytest.mark.parametrize(("items", "broken"), [([0.05, DEATH], 1), ([written(2, "b", "stop")], 0)])
def test_a_stream_that_breaks_off_is_counted_as_one_and_a_whole_one_is_not(items, broken):
    counters = Counters("m")
    generation = Generation(Decoder([written(1, "a"), *items]), Limits(seconds=9, body_bytes=999), counters)
    reply = CompletionReply(reply_id="cmpl-1", card=CARD)
    http = Request({"type": "http", "headers": [], "state": {}})

    async def read():
        body = CompletionRequest.model_validate(ROUTES["/v1/completions"] | {"stream": True})
        answer = await generation.answer(http, reply, body)
        return [part async for part in answer.body_iterator]

    asyncio.run(read())
    assert f'requests_ended_early_total{{model_name="m"}} {broken:.1f}' in counters.exposition()


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_is_neither_cached_nor_buffered_by_proxies(path):
    done = [written(1, "a", "stop")]
    headers = answered(path, ROUTES[path] | {"stream": True}, done).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "x-accel-buffering" not in answered(path, ROUTES[path], done).headers

"""While eight clients run into a bound, another one is answered as if it were alone, a second later at most."""

import asyncio
import hashlib
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial

import httpx
import pytest
from serving import own_service

from serve_apps.api import bounds
from serve_apps.ingress.serve_proxy import CALLBACK

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

CLIENTS, SECONDS, ALONE_SECONDS, LATE = 8, 0.5, 2.0, 1.0
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MEGABYTES = 7 * 2**20
PER_MINUTE = 200
OVERLAPPING = 20
"""Tokens of texts that are still being written when the next client's request arrives."""
TABLE = {bound.part: bound for bound in bounds.TABLE}


def key(attack, client):
    """API key of a client during an attack: each has its own, so only clients that mean it reach a key's limit."""
    return f"{attack} {client}"


@pytest.fixture(scope="module")
def service(bundle, free_port, tmp_path_factory):
    """A service with a Ray of its own, whose proxies bound what they take (`serve_apps/ingress/serve_proxy.py`).

    A test can wait for its times. Attackers that hold one slot each leave some free. Its ingress waits for one body
    less than its proxy, so both refuse some.
    """
    clients = [key(attack, client) for attack in ("nothing", *ATTACKS) for client in (*range(CLIENTS), "second")]
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLBACK:
            patch.setenv(name, "short_heads.of_proxies")
        with own_service(
            tmp_path_factory.mktemp("service"), free_port, model=bundle, mode="single-pass", rows=12, max_waiting=20,
            max_waiting_tokens=7000, threads=1, num_cpus=0.5, stream_interval_seconds=0, request_seconds=6,
            body_seconds=2, max_bodies=bounds.BODIES - 1, requests_per_minute=PER_MINUTE,
            api_keys=[hashlib.sha256(each.encode()).hexdigest() for each in clients],
        ) as url:  # fmt: skip
            yield url


@pytest.fixture(scope="module")
def alone(service):
    """The longest that a probe took, and that a short completion took, without other clients."""
    until = time.monotonic() + ALONE_SECONDS
    return asyncio.run(second_client(service, "nothing", lambda: time.monotonic() > until))


def body(**fields):
    return json.dumps({"model": "tiny-model", "max_tokens": 2, **fields}).encode()


def in_a_loop(path, content, service, key, at_least=1):
    """Answers to one client. It costs little here, so that it does not delay the others' clocks."""
    answers, sent, until = set(), 0, time.monotonic() + SECONDS
    while sent < at_least or time.monotonic() < until:
        with closing(http.client.HTTPConnection(service.host, service.port, timeout=60)) as connection:
            with suppress(ConnectionError):  # refused before all was sent: the answer is there
                method = "GET" if content is None else "POST"
                connection.request(method, path, content, {"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            answers.add((response.status, response.read() if response.status != 200 else b""))
        sent += 1
    return answers


def completion(**fields):
    return partial(in_a_loop, COMPLETIONS, body(**{"prompt": "x", **fields}))


def chat(**fields):
    return partial(in_a_loop, CHATS, body(**{"messages": [{"role": "user", "content": "x"}], **fields}))


def tokenize(path="/tokenize", **fields):
    return partial(in_a_loop, path, json.dumps(fields).encode())


def values(member):
    members = b",".join([member] * (MEGABYTES // (len(member) + 1)))
    return partial(in_a_loop, COMPLETIONS, b'{"model":"tiny-model","prompt":[%s]}' % members)


def schema(properties, name_len=1):
    return {"type": "object", "properties": {f"p{i:0{name_len}}": {"type": "string"} for i in range(properties)}}


def function(name, **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def with_one_key(service, _):
    """All clients together send more requests than their key may send in a minute."""
    one = key("requests of one key", 0)
    return in_a_loop("/v1/models", None, service, one, at_least=PER_MINUTE // CLIENTS + 5)


def answer(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def endless_heads(service, _):
    """Heads without an end, megabytes of them."""
    answers, until = set(), time.monotonic() + SECONDS
    while time.monotonic() < until:
        with socket.create_connection((service.host, service.port), timeout=10) as connection:
            with suppress(ConnectionError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
                for _ in range(100):
                    connection.sendall(b"a" * 2**20)
            with suppress(ConnectionError):  # the connection may be reset before the answer is read
                answers.add(answer(connection))
    return answers


def begun(beginning, count, service, key):
    """Connections on which a request has begun that never ends."""
    connections = [socket.create_connection((service.host, service.port), timeout=10) for _ in range(count)]
    for connection in connections:
        connection.sendall(beginning.format(key=key).encode())
    return connections


def never_ending(beginning, count, service, key):
    """Requests that never end; their clients wait."""
    connections = begun(beginning, count, service, key)
    answers = {answer(connection) for connection in connections}
    for connection in connections:
        connection.close()
    return answers


def abandoned(beginning, count, service, key):
    """Requests that never end; their clients leave all at once."""
    connections = begun(beginning, count, service, key)
    time.sleep(SECONDS)
    for connection in connections:
        connection.close()
    return set()


HALF_HEAD = "GET /health HTTP/1.1\r\nHost: x\r\n"
HALF_BODY = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 9\r\n\r\n{{"

ATTACKS = {
    "heads": (endless_heads, {"request line and headers": "more than 65536 bytes"}),
    "half heads": (partial(never_ending, HALF_HEAD, 100), {"time until the headers are complete": "after 1 s"}),
    "half bodies": (
        partial(never_ending, HALF_BODY, 40),
        {"time until the body is complete": "after 2 s", "bodies that one ingress waits for": "63 bodies",
         "bodies that one proxy waits for": "64 bodies"}),
    "half bodies of clients that leave": (partial(abandoned, HALF_BODY, 100), {}),
    "long texts": (completion(max_tokens=4000, ignore_eos=True), {"time of the whole request": "longer than 6 s"}),
    "requests of one key": (with_one_key, {"requests of one key in a minute": f"may send {PER_MINUTE} requests"}),
    "long prompts": (
        completion(prompt=[[token] * 1500 for token in range(3)]),
        {"tokens that wait at a replica": "tokens would wait for a slot"}),
    "strings": (values(b'"a"'), {"JSON values and keys of a body": "more than 262144"}),
    "objects": (values(b"{}"), {"JSON values and keys of a body": "more than 262144"}),
    "numbers": (values(b"1"), {"JSON values and keys of a body": "more than 262144"}),
    "token ids": (completion(prompt=[1] * (bounds.VALUES - 100)), {"token ids of a prompt": "262044 tokens"}),
    "large bodies": (partial(in_a_loop, COMPLETIONS, b" " * (bounds.BODY_BYTES + 1)), {"body": "8388609 bytes"}),
    "deep bodies": (
        partial(in_a_loop, COMPLETIONS, b'{"prompt":%s%s}' % (b"[" * 900, b"]" * 900)), {"depth of JSON": "depth 901"}),
    "prompts": (completion(prompt=["a"] * 20_000), {"prompts": "20000 texts"}),
    "prompts that may wait": (
        completion(prompt=["a"] * 33), {"choices of a request (prompts times n)": "33 choices are requested"}),
    "prompts times n": (
        completion(prompt=["a"] * 3, n=16), {"choices of a request (prompts times n)": "48 choices are requested"}),
    "choices": (completion(n=10**9), {"choices of a prompt": "less than or equal to 128"}),
    "choices in flight": (
        completion(prompt=["a"] * 32, max_tokens=OVERLAPPING, ignore_eos=True),
        {"choices that one ingress has in flight": "texts are being written",
         "texts that wait at a replica": "20 requests wait already"}),
    "n times the body": (
        completion(prompt="a" * (bounds.BODY_BYTES - 100), n=8), {"n times the bytes of the body": "n is 8 and"}),
    "characters of a prompt": (
        completion(prompt="a " * (MEGABYTES // 2)), {"characters of a prompt or of messages": "7340032 characters"}),
    "most characters of a prompt": (
        completion(prompt="a " * (4096 * 32)),
        {"tokens of a prompt and of `max_tokens` together": "131073 tokens and max_tokens is 2"}),
    "characters of messages": (
        chat(messages=[{"role": "user", "content": "a " * (MEGABYTES // 2)}]),
        {"characters of a prompt or of messages": "7340032 characters"}),
    "messages": (chat(messages=[{"role": "user", "content": "x"}] * 40_000), {"messages": "40000 messages"}),
    "arguments of calls": (
        chat(messages=[{"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", **function("f", arguments='{"a":[' + "1," * 3_000_000 + "1]}")}]}]),
        {"JSON values and keys of all arguments of calls in messages": "more than 262144 JSON values"}),
    "length of a stop string": (completion(stop="x" * 2 * 2**20, n=8), {"stop strings": "at most 1024 characters"}),
    "most stop strings": (completion(stop=["x" * bounds.STOP_CHARS] * bounds.STOP_STRINGS, n=8), {}),
    "stop tokens": (completion(stop_token_ids=[1] * 200_000), {"stop tokens": "at most 1024 items"}),
    "bad words": (completion(bad_words=["x"] * 60_000), {"bad words": "at most 256 items"}),
    "most bad words": (completion(bad_words=["x" * bounds.BAD_WORD_CHARS] * bounds.BAD_WORDS, n=2), {}),
    "biased tokens": (
        completion(logit_bias={str(i): 1 for i in range(60_000)}), {"biased tokens": "at most 4096 items"}),
    "most biased tokens": (completion(logit_bias={str(i): 1 for i in range(300)}, n=8), {}),
    "choices of a grammar": (
        completion(guided_choice=[str(i) for i in range(60_000)]), {"choices of a grammar": "at most 1024 items"}),
    "most choices of a grammar": (completion(guided_choice=[f"{i:020}" for i in range(bounds.GRAMMAR_CHOICES)]), {}),
    "characters of a schema": (
        completion(guided_json=schema(20_000)),
        {"characters of a grammar, a schema, a regular expression": "at most 131072 are compiled"}),
    "most characters of a schema": (completion(guided_json=schema(400, 290)), {}),
    "time to compile a grammar": (
        completion(guided_json={"type": "integer", "multipleOf": 99999991}),
        {"time to compile a grammar": "takes more than 2 s"}),
    "characters of schemas of calls": (
        chat(tool_choice="required", tools=[function("f", parameters=schema(20_000))]),
        {"characters of schemas that calls must keep to": "at most 131072 are compiled"}),
    "functions": (chat(tools=[function(f"f{i}") for i in range(20_000)]), {"functions": "at most 128 items"}),
    "entries of metadata": (
        completion(metadata={str(i): "x" for i in range(60_000)}), {"entries of metadata": "at most 64 items"}),
    "characters of a name": (
        completion(user="x" * MEGABYTES), {"characters of `model`, `user` and the like": "at most 512 characters"}),
    "tokens of detokenize": (
        tokenize("/detokenize", tokens=[1] * 2**20), {"JSON values and keys of a body": "more than 262144"}),
    "characters of tokenize": (
        tokenize(prompt="a " * (MEGABYTES // 2)), {"characters of a prompt or of messages": "7340032 characters"}),
    "tokens of tokenize": (
        tokenize(prompt="\U00012000" * 100_000), {"tokens that /tokenize returns": "400000 tokens; at most 262144"}),
}  # fmt: skip
"""Each attack, and the bounds that it runs into with words of their errors; without bounds it keeps all of them."""

SHORT = body(prompt="a short one", max_tokens=4)


async def second_client(service, attack, ended):
    """The longest that a probe took, and that a short completion or its refusal took, until the attack has ended."""
    health = short = 0.0
    headers = {"Authorization": f"Bearer {key(attack, 'second')}"}
    async with httpx.AsyncClient(base_url=service, timeout=60, trust_env=False, headers=headers) as client:
        while not ended():
            began = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            health, began = max(health, time.monotonic() - began), time.monotonic()
            response = await client.post(COMPLETIONS, content=SHORT)
            short = max(short, time.monotonic() - began)
            assert response.status_code in (200, 429), response.text
            await asyncio.sleep(0.05)
    return health, short


async def beside(service, name):
    """Longest times of the second client while eight threads run an attack, and status and error of their answers."""
    with ThreadPoolExecutor(CLIENTS) as threads:
        run = partial(asyncio.get_running_loop().run_in_executor, threads, ATTACKS[name][0], service)
        attacks = asyncio.gather(*[run(key(name, client)) for client in range(CLIENTS)])
        longest = await second_client(service, name, attacks.done)
    answers = set[tuple[int, bytes]]().union(*await attacks)
    return longest, [(status, json.loads(content)["error"] if content else {}) for status, content in answers]


def refused_by(bound, words, status, error):
    """Whether an answer is the error of a bound, with its status, its field and these words."""
    fields = {"": {None}, "the field": {error.get("param")} - {None}}.get(bound.param, set(bound.param.split(" or ")))
    return status == bound.status and error["param"] in fields and words in error["message"]


def test_every_bound_of_the_table_is_run_into():
    assert {part for _, hit in ATTACKS.values() for part in hit} == set(TABLE)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_second_client_waits_for_a_second_at_most_while_eight_run_into_a_bound(service, alone, name):
    hit = ATTACKS[name][1]
    for _ in range(2):  # a busy machine can delay one measurement; a service that waits for the attack delays both
        (health, short), answers = asyncio.run(beside(service, name))
        health, short = health - alone[0], short - alone[1]
        print(f"{name}: /health {health:.2f} s, a completion {short:.2f} s")
        found = {part for part in hit if any(refused_by(TABLE[part], hit[part], *answer) for answer in answers)}
        assert found == set(hit), answers
        others = [a for a in answers if not any(refused_by(TABLE[part], hit[part], *a) for part in hit)]
        full = {TABLE[part].status for part in hit} <= {429}
        assert {status for status, _ in others} <= ({200, 429} if full else {429}), others
        assert hit or not answers or 200 in {status for status, _ in answers}
        if max(health, short) < LATE:
            break
    assert health < LATE
    assert short < LATE

"""Replicas die, are added, taken away and stopped, under a real Ray Serve; only the dead one's texts suffer."""

import asyncio
import contextlib
import functools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from serve_apps import app
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.messages.replica_load import Load
from serve_apps.messages.text_delta import TextDelta, UsageCounts
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s`:DeprecationWarning"),  # as in scaling.py
]

NAME, PROMPT = "tiny-model", "def add(a, b):\n    return"
ROWS = 2
ENDLESS = 4000
"""Tokens that take far longer than any test waits for."""
LONG = 1500
"""Tokens that take longer than a replica needs to be taken away."""
BACKGROUND = 10
"""Nice value of decoders that hold texts without an end: what starts beside them comes first."""


@pytest.fixture(scope="module")
def settings(bundle, free_port):
    return ServeSettings(
        model=bundle, port=free_port, mode="single-pass", rows=ROWS, max_waiting=16, threads=1,
        num_cpus=0.25, stream_interval_seconds=0, min_replicas=2, max_replicas=2, hang_seconds=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def service(ray_cluster, settings, free_port):
    """Base address of a service of two replicas."""
    app.run(settings, blocking=False)
    yield f"http://127.0.0.1:{free_port}"
    app.shutdown(drain_seconds=0)


@functools.cache
def decoder():
    return serve.get_deployment_handle("decoder", app_name=app.APP_NAME)


def loads():
    """Loads of all replicas that answer; empty while Serve has no replica."""
    try:
        reported = decoder().broadcast("load").results(timeout_s=5, return_exceptions=True)
    except (RayServeException, RuntimeError):
        return []
    return [load for load in reported if isinstance(load, Load)]


def two_with(holds):
    return len(reported := loads()) == 2 and all(map(holds, reported))


def replicas():
    """Number of running replicas, by Serve's own count."""
    return serve.status().applications[app.APP_NAME].deployments["decoder"].replica_states.get("RUNNING", 0)


def until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, loads()
        time.sleep(0.2)  # each look at the loads costs processor time, which the replicas need


class Stream(threading.Thread):
    """A client that reads a completion in a thread of its own, until it must hang up."""

    def __init__(self, service, max_tokens=ENDLESS):
        super().__init__(daemon=True)
        self.lines, self.wanted = [], True
        self._url = f"{service}/v1/completions"
        self._body = {"model": NAME, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, "stream": True,
                      "max_tokens": max_tokens, "stream_options": {"include_usage": True}}  # fmt: skip
        self.start()

    def run(self):
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as answer:
            for line in answer.iter_lines():
                self.lines += [line.removeprefix("data: ")] if line else []
                if not self.wanted:
                    return

    def hang_up(self):
        self.wanted = False
        self.join(30)

    @property
    def broken(self):
        return not self.is_alive() and self.wanted and self.lines[-1] != "[DONE]"


def move_to_background():
    """Gives the present decoders a low priority: texts without an end would slow everything that starts beside them."""
    for load in loads():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in psutil.Process(load.decoder_pid).threads():
                os.setpriority(os.PRIO_PROCESS, thread.id, BACKGROUND)


def fill(service):
    """Streams that hold every row of every replica."""
    move_to_background()
    streams = []
    while not two_with(lambda load: load.running == ROWS):
        streams.append(Stream(service))
        until(lambda: sum(load.running + load.waiting for load in loads()) == len(streams))
    return streams


def post(service, client, **fields):
    body = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 20} | fields
    return client.post(f"{service}/v1/completions", json=body, timeout=120)


def text_of(answer):
    """Whole, or of the pieces of a stream."""
    if "event-stream" not in answer.headers["content-type"]:
        return answer.json()["choices"][0]["text"]
    chunks = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert chunks.pop() == "[DONE]"
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("process", ["pid", "decoder_pid"])
def test_a_killed_replica_costs_the_texts_it_had_begun_and_no_other(service, oracle_text, process):
    streams = fill(service)

    async def kill_under_load():
        async with httpx.AsyncClient() as client:
            queued = [asyncio.create_task(post(service, client, stream=n % 2 == 0)) for n in range(6)]
            await asyncio.to_thread(until, lambda: sum(load.waiting for load in loads()) >= 6)
            victim = max(await asyncio.to_thread(loads), key=lambda load: load.waiting)
            os.kill(getattr(victim, process), signal.SIGKILL)
            await asyncio.to_thread(until, lambda: sum(stream.broken for stream in streams) >= ROWS)
            ended = [stream for stream in streams if stream.broken]
            for stream in streams:
                stream.hang_up()
            return victim, ended, await asyncio.gather(*queued)

    victim, ended, answers = asyncio.run(kill_under_load())
    for stream in ended:
        *pieces, last = map(json.loads, stream.lines)
        assert all("error" not in piece for piece in pieces)
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "replica_lost")
    assert [answer.status_code for answer in answers] == [200] * 6
    assert {text_of(answer) for answer in answers} == {oracle_text(PROMPT, 20)[0]}
    until(lambda: two_with(lambda load: load.pid != victim.pid))
    assert httpx.get(f"{service}/ready").status_code == 200


def test_an_answer_that_is_not_streamed_survives_the_replica_that_had_written_half_of_it(service, oracle_text):
    with ThreadPoolExecutor() as pool:
        calling = pool.submit(post, service, httpx, max_tokens=LONG, ignore_eos=True)
        until(lambda: any(load.running for load in loads()))
        time.sleep(0.3)  # tokens come, and none is sent
        os.kill(next(load for load in loads() if load.running).pid, signal.SIGKILL)
        answer = calling.result(120)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, LONG)
    assert text_of(answer).startswith(oracle_text(PROMPT, 200, ignore_eos=True)[0])
    until(lambda: two_with(lambda load: True))


def test_a_replica_that_hangs_is_replaced_and_its_begun_texts_end_with_one_error(service, oracle_text):
    streams = fill(service)
    victim = loads()[0]
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        until(lambda: sum(stream.broken for stream in streams) >= ROWS)
        ended = [stream for stream in streams if stream.broken]
        for stream in streams:
            stream.hang_up()
        for stream in ended:
            *pieces, last = map(json.loads, stream.lines)
            assert all("error" not in piece for piece in pieces)
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "replica_lost")
        until(lambda: two_with(lambda load: load.pid != victim.pid))
        assert post(service, httpx).json()["choices"][0]["text"] == oracle_text(PROMPT, 20)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGCONT)


def test_pieces_come_to_the_ingress_by_grpc_and_not_as_objects_of_ray(service, settings):
    @serve.deployment(name="named", ray_actor_options={"num_cpus": 0})
    class Named:
        """Deployment that returns the kind of its call: a task of its own by Ray, no task by gRPC."""

        async def generate(self, _):
            yield TextDelta("", None, UsageCounts(1))
            yield TextDelta(str(ray.get_runtime_context().get_task_name()), "stop", UsageCounts(1, 1))

    ingress = serve.deployment(name="http", ray_actor_options={"num_cpus": 0})(HttpApp)
    limits, access = Limits(seconds=60, body_bytes=1000), Access(keys=(), per_minute=None)
    serve.run(
        ingress.bind(Named.bind(), resolve_model(settings)[1], limits, access), name="named", route_prefix="/named"
    )
    handle = serve.get_deployment_handle("named", app_name="named").options(stream=True, _by_reference=True)
    *_, by_object = handle.generate.remote(None)
    assert "handle_request" in by_object.text
    for stream in (False, True):
        assert "handle_request" not in text_of(post(f"{service}/named", httpx, stream=stream))
    serve.delete("named")


def test_replicas_follow_the_queue_from_none_to_two_and_back_and_one_that_goes_finishes_first(
    service, settings, oracle_text
):
    hasty = {"min_replicas": 0, "rows": 4, "scale_queue_seconds": 0.5, "scale_up_seconds": 0.2,
             "scale_down_seconds": 1, "scale_look_seconds": 0.5}  # fmt: skip
    serve.run(app.build_app(settings.model_copy(update=hasty)), name=app.APP_NAME)
    until(lambda: replicas() == 0)
    until(lambda: httpx.get(f"{service}/ready", timeout=30).json() == {"status": "asleep"})
    woken = post(service, httpx)
    assert woken.json()["choices"][0]["text"] == oracle_text(PROMPT, 20)[0]

    move_to_background()
    lasting = [Stream(service, LONG)]
    until(lambda: lasting[0].lines)
    endless = [Stream(service) for _ in range(9)]
    until(lambda: len(loads()) == 2)
    while not two_with(lambda load: load.running):  # so that one lasts on each, whichever of them goes
        lasting.append(Stream(service, LONG))
        until(lambda: lasting[-1].lines or all(load.waiting for load in loads()))
    for stream in [*endless, *(stream for stream in lasting[:-1] if not stream.lines)]:
        stream.hang_up()
    lasting = [stream for stream in lasting if stream.wanted]
    until(lambda: replicas() == 1)
    for stream in lasting:
        stream.join(120)
        assert stream.lines[-1] == "[DONE]"
        assert json.loads(stream.lines[-2])["usage"]["completion_tokens"] == LONG


def test_a_service_that_ends_finishes_its_texts_piece_by_piece_and_begins_no_more(service):
    stream = Stream(service, LONG)
    until(lambda: len(stream.lines) > 1)
    ending = threading.Thread(target=app.shutdown)
    ending.start()
    until(lambda: httpx.get(f"{service}/ready", timeout=30).status_code == 503)
    refused = post(service, httpx)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["type"] == "server_error"
    assert httpx.get(f"{service}/health").status_code == 200
    stream.join(60)
    ending.join(60)
    assert stream.lines[-1] == "[DONE]"
    assert json.loads(stream.lines[-2])["usage"]["completion_tokens"] == LONG
    assert len(stream.lines) > 100  # a step has four tokens at most
    with pytest.raises(httpx.ConnectError):
        post(service, httpx)

"""An engine in a process of its own: the same answers, and neither process outlives the other."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from serve_apps.api.errors import ParameterError
from serve_apps.messages.generation_request import GenerationRequest, RequestedGrammar
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.replica.engine_client import EngineClient
from serve_apps.rollout.model_version import ServingTarget, resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.config import SamplingConfig
from tidar_core.errors import BundleError, ContextLengthError

pytestmark = pytest.mark.slow

PROMPT = "def add(a, b):\n    return"

REPLICA = """
import json, sys, time
from serve_apps.replica.engine_client import EngineClient
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
engine = EngineClient(resolve_model(ServeSettings(model=sys.argv[1], mode="single-pass", rows=2))[0], print)
print(engine._process.pid, flush=True)
time.sleep(600)
"""

CHATTER = """
import logging, threading, time
def say():
    while not logging.getLogger().handlers:
        time.sleep(0.001)
    logging.getLogger("chatter").warning("loading %d", 7)
threading.Thread(target=say, daemon=True).start()
"""
"""ParsedText by a process as soon as its log has somewhere to go."""


@pytest.fixture(scope="module")
def served(bundle):
    return resolve_model(ServeSettings(model=bundle, mode="single-pass", rows=2))[0]


@pytest.fixture(scope="module")
def app(served):
    app = DecoderApp(served)
    yield app
    app.pool.champion.engine.stop()


def request(max_tokens=20, **fields):
    sampling = SamplingConfig(max_tokens=max_tokens, **fields.pop("sampling", {}))
    return GenerationRequest(**{"request_id": "r", "prompt": PROMPT, "sampling": sampling} | fields)


async def collected(app, requested):
    return [event async for event in app.generate(requested)]


async def decoder_pid(app):
    return (await app.load()).decoder_pid


def ends(pid, seconds=30):
    """The process is gone, or waits for nothing but its parent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_texts_are_those_of_the_oracle_and_are_counted_here(app, oracle_text):
    requested = [request(sampling=sampling) for sampling in ({}, {"temperature": 0.8, "seed": 3})]

    async def together():
        named = [dataclasses.replace(one, request_id=str(place)) for place, one in enumerate(requested)]
        return await asyncio.gather(*[collected(app, one) for one in named])

    for one, pieces in zip(requested, asyncio.run(together())):
        options = {"temperature": one.sampling.temperature, "seed": one.sampling.seed}
        assert "".join(piece.text for piece in pieces) == oracle_text(PROMPT, 20, **options)[0]
        assert pieces[-1].timing.decode > 0
    (report,) = asyncio.run(app.versions())
    assert (report.totals.texts, report.totals.tokens) == (2, 40)


def test_the_process_is_another_and_reports_its_load(app):
    load = asyncio.run(app.load())
    assert load.pid == os.getpid() != load.decoder_pid
    assert asyncio.run(app.record_autoscaling_stats())["rows"] == 0
    asyncio.run(app.check_health())


def test_prompts_are_read_and_tokens_named_as_in_one_process(app, tokenizer, model):
    ids = tokenizer.encode(PROMPT)
    assert asyncio.run(app.tokenize(PROMPT, framed=False, spelled=False)).tokens == ids
    assert asyncio.run(app.detokenize(ids)) == PROMPT
    refused = asyncio.run(app.detokenize([1, 10**6])).error
    message = f"tokens names token 1000000; ids are 0..{model.config.vocab_size - 1}; drop it"
    assert (refused.param, str(refused)) == ("tokens", message)
    assert asyncio.run(app.tokenizer_info()).model_dump()["chat_template"]


def test_refusals_cross_as_themselves(app):
    (refused,) = asyncio.run(collected(app, request(5000)))
    assert isinstance(refused, GenerationFailed)
    assert isinstance(refused.error, ContextLengthError)
    grammar = RequestedGrammar("guided_json", "json_schema", {"type": "nothing"})
    (refused,) = asyncio.run(collected(app, request(grammar=grammar)))
    assert isinstance(refused.error, ParameterError)
    assert refused.error.param == "guided_json"


def test_a_text_that_nobody_waits_for_gives_its_row_back(app):
    async def leave():
        async with aclosing(app.generate(request(4000))) as pieces:
            await anext(pieces)
            while not (await app.load()).running:
                await asyncio.sleep(0.001)
        deadline = asyncio.get_running_loop().time() + 30
        load = await app.load()
        while (load.running or load.pages_held) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.001)  # slots and pages are read one after the other, while the decoder runs
            load = await app.load()
        return load.running, load.pages_held

    assert asyncio.run(asyncio.wait_for(leave(), 60)) == (0, 0)


def test_log_records_of_the_process_arrive_here_even_while_it_loads(served, tmp_path, monkeypatch, caplog):
    (tmp_path / "sitecustomize.py").write_text(CHATTER)
    monkeypatch.syspath_prepend(tmp_path)
    app = DecoderApp(served)
    assert [record.name for record in caplog.records if record.getMessage() == "loading 7"] == ["chatter"]
    assert asyncio.run(app.tokenizer_info()).model_dump()["chat_template"]
    app.pool.champion.engine.stop()


def test_a_load_error_of_the_process_is_raised_here(served):
    with pytest.raises(BundleError, match="restart"):
        DecoderApp(dataclasses.replace(served, bundle_hash="0" * 64))


def test_a_stopped_process_is_not_healthy_and_a_killed_one_ends_its_texts_and_its_replica(served, monkeypatch):
    hasty = dataclasses.replace(served, settings=served.settings.model_copy(update={"hang_seconds": 0.6}))
    ended = threading.Event()
    monkeypatch.setattr("os._exit", lambda code: ended.set())

    async def die():
        app = DecoderApp(hasty)
        pid = await decoder_pid(app)
        async with aclosing(app.generate(request(4000))) as pieces:
            await anext(pieces)
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(RuntimeError, match=r"has not answered for 0\.7 s"):
                await app.check_health()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="has ended with signal 9"):
                [piece async for piece in pieces]
        assert await asyncio.to_thread(ended.wait, 30)
        assert ends(pid)
        (report,) = await app.versions()
        assert report.totals.errors == 1

    asyncio.run(die())


def test_a_challenger_whose_process_dies_is_given_up_and_the_champion_goes_on(served, other_bundle, oracle_text):
    new = dataclasses.replace(resolve_model(ServeSettings(model=other_bundle))[0], settings=served.settings)

    async def lose():
        app = DecoderApp(served)
        app.pool.follow(ServingTarget(champion=served, challenger=new))
        await app.pool.followed()
        champion, challenger = [(await writer.engine.load("")).decoder_pid for writer in app.pool.generators]
        os.kill(challenger, signal.SIGKILL)
        assert await asyncio.to_thread(ends, challenger)
        assert (await app.load()).rows == served.settings.rows
        await app.check_health()
        states = {report.fingerprint: report.state for report in app.pool.reports()}
        assert states == {served.fingerprint: "champion", new.fingerprint: "failed"}
        pieces = await collected(app, request())
        assert "".join(piece.text for piece in pieces) == oracle_text(PROMPT, 20)[0]
        app.pool.champion.engine.stop()
        assert ends(champion)

    asyncio.run(lose())


@pytest.mark.parametrize("stopped", [False, True])
def test_the_process_ends_with_its_replica_even_if_it_can_do_nothing_itself(bundle, stopped):
    replica = subprocess.Popen([sys.executable, "-c", REPLICA, bundle], stdout=subprocess.PIPE)
    pid = int(replica.stdout.readline())
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    replica.kill()
    replica.communicate()
    assert ends(pid)


def test_a_message_that_cannot_be_handled_ends_the_process_and_its_calls(served):
    def report(line):
        raise LookupError(line)

    with pytest.raises(RuntimeError, match="the decoder's process has ended with signal 9"):
        EngineClient(served, lambda problem: None, report)

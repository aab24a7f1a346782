"""A service that follows its model's alias, with real Serve, a real registry and a change of weights under traffic."""

import asyncio
import re
import threading
import time

import httpx
import openai
import pytest
from frozen import save_drafts_bundle
from hf_folders import save_checkpoint
from openai.types import Completion
from ray import serve

from serve_apps import app
from serve_apps.messages.version_routing import Route, role_of
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.rollout.canary import CanarySettings
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.model.bundle_info import model_info, read_bundle_info
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.registry.mlflow_client import client_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAME = "tidar-tiny"
PROMPT = "def add(a, b):\n    return"
SAMPLING = {"temperature": 3.0, "seed": 5, "max_tokens": 24}
LONG = SAMPLING | {"max_tokens": 1500}
DRAFTED, NO_END = {"temperature": 0, "max_tokens": 24}, {"ignore_eos": True}
LIMITS = CanarySettings(weight=0.5, texts=30, tokens_per_forward=3.9)
"""Limits with more tokens per forward than random weights reach."""


@pytest.fixture(scope="module")
def tracking_uri(registry_uri, bundle, other_bundle):
    """Registry with the weights of `model` as version 1, the champion, and of `other_model` as version 2."""
    for place in (bundle, other_bundle):
        model_registry.publish_version(registry_uri, NAME, place, read_bundle_info(place), {})
    model_registry.promote(registry_uri, NAME, 1)
    return registry_uri


@pytest.fixture(scope="module")
def settings(tracking_uri, free_port):
    return ServeSettings(
        model=f"models:/{NAME}@champion", tracking_uri=tracking_uri, port=free_port, mode="single-pass", rows=3,
        threads=1, num_cpus=0.5, follow_alias_seconds=0.2, challenger=LIMITS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def service(ray_cluster, settings, free_port):
    app.run(settings, blocking=False)
    yield f"http://127.0.0.1:{free_port}"
    app.shutdown()


@pytest.fixture(scope="module")
def fingerprints(settings):
    """Fingerprints of versions 1 and 2."""
    return {number: resolve_model(settings, f"models:/{NAME}/{number}")[0].fingerprint for number in (1, 2)}


@pytest.fixture(scope="module")
def texts(fingerprints, oracle_text, model, other_model):
    """Text of each version, by its fingerprint."""
    weights = {1: model, 2: other_model}
    return {fingerprints[n]: oracle_text(PROMPT, model=weights[n], **SAMPLING)[0] for n in weights}


@pytest.fixture(scope="module")
def complete(service, texts):
    """Function that requests a completion and checks its text; returns the fingerprint, or the message of an error."""
    client = httpx.Client(timeout=60)

    def completed(**headers):
        body = {"model": NAME, "prompt": PROMPT, **SAMPLING}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = client.post(f"{service}/v1/completions", json=body, headers=names)
        if answer.status_code == 400:
            return answer.json()["error"]["message"]
        assert answer.status_code == 200, answer.text
        read = Completion.model_validate(answer.json(), strict=True)
        assert read.choices[0].text == texts[read.system_fingerprint]
        return read.system_fingerprint

    yield completed
    client.close()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(service, name):
    """Labels and value of each sample of a metric."""
    lines = re.findall(rf"^tidar:{name}{{(.*)}} (\S+)$", httpx.get(f"{service}/metrics").text, re.MULTILINE)
    return [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in lines]


def life(service):
    return {labels["step"]: value for labels, value in metrics(service, "model_life_total")}


def states(service):
    return {labels["version"]: labels["state"] for labels, _ in metrics(service, "model_version_info")}


def test_the_alias_moves_under_traffic_and_no_request_is_dropped(
    service, settings, complete, fingerprints, oracle_text, tracking_uri
):
    old, new = fingerprints[1], fingerprints[2]
    answers, swapped = [], threading.Event()

    def trickle():
        while not swapped.is_set():
            answers.append(complete())

    requesting = threading.Thread(target=trickle)
    with openai.OpenAI(base_url=f"{service}/v1", api_key="-", max_retries=0) as client:
        stream = client.completions.create(
            model=NAME, prompt=PROMPT, stream=True, extra_body={"ignore_eos": True}, **LONG
        )
        chunks = [next(iter(stream))]
        requesting.start()
        model_registry.promote(tracking_uri, NAME, 2)
        try:
            until(lambda: new in answers[-1:])
        finally:
            swapped.set()
            requesting.join()
        chunks += list(stream)
    assert {chunk.system_fingerprint for chunk in chunks} == {old}
    assert "".join(chunk.choices[0].text for chunk in chunks) == oracle_text(PROMPT, ignore_eos=True, **LONG)[0]
    assert set(answers) == {old, new}
    assert answers == sorted(
        answers, key=[old, new].index
    )  # after the first text of the new weights, the old weights serve no more
    until(lambda: states(service) == {"1": "gone", "2": "champion"})
    (listed,) = httpx.get(f"{service}/v1/models").json()["data"]
    assert listed["bundle_hash"] == resolve_model(settings)[0].bundle_hash
    assert life(service)["champion_changed"] == 1
    written = {labels["version"]: value for labels, value in metrics(service, "version_generation_tokens_total")}
    assert written["1"] > 1500


def test_a_replica_that_starts_later_serves_the_current_version(service, settings, fingerprints):
    at_the_start = resolve_model(settings, f"models:/{NAME}/1")[0]

    async def start():  # as Serve does; replicas of this service get their weights only here
        replica = DecoderApp(at_the_start, serve.get_deployment_handle("watcher", app_name=app.APP_NAME))
        await replica.reconfigure({"watched": True})
        return replica.pool.champion.served.fingerprint

    assert asyncio.run(start()) == fingerprints[2]


def test_a_challenger_serves_its_share_of_clients_and_is_rolled_back_automatically_if_it_fails_its_limits(
    service, settings, complete, fingerprints, tracking_uri
):
    champion, challenger = fingerprints[2], fingerprints[1]
    assert "no challenger is served here now" in complete(x_tidar_version="challenger")
    model_registry.set_challenger(tracking_uri, NAME, 1)
    until(lambda: states(service).get("1") == "challenger")
    assert complete(x_tidar_version="challenger") == challenger
    assert complete(x_tidar_version="champion") == champion
    hash_1 = resolve_model(settings, f"models:/{NAME}/1")[0].bundle_hash
    sent = {f"s{n}": role_of(Route(f"session s{n}"), hash_1, 0.5) for n in range(12)}
    assert set(sent.values()) == {"champion", "challenger"}
    for _ in range(2):  # fewer texts than a verdict needs
        answered = {session: complete(x_session_id=session) for session in sent}
        assert answered == {s: {"champion": champion, "challenger": challenger}[role] for s, role in sent.items()}
    assert model_registry.aliases(tracking_uri, NAME) == {"champion": 2, "challenger": 1}

    until(lambda: "no challenger is served here now" in complete(x_tidar_version="challenger"))
    until(lambda: model_registry.aliases(tracking_uri, NAME) == {"champion": 2})
    assert (
        "tokens per forward; at least 3.9 are required"
        in client_of(tracking_uri).get_model_version(NAME, "1").tags["withdrawn"]
    )
    assert {complete(x_session_id=session) for session in sent} == {champion}
    assert life(service)["challenger_rolled_back"] == 1
    ended = {(labels["version"], labels["outcome"]): value for labels, value in metrics(service, "version_texts_total")}
    assert ended["1", "texts"] >= LIMITS.texts
    until(lambda: states(service) == {"1": "gone", "2": "champion"})


def test_a_version_that_cannot_be_loaded_is_reported_and_the_old_weights_stay(
    service, complete, fingerprints, tracking_uri, tmp_path, model, tokenizer
):
    folder = tmp_path / "damaged"
    described = {"mask_id": model.config.mask_id, "objective": "dual", "lineage": {"shards": "others"}, "made_by": {}}
    info = save_bundle(str(folder), model, tokenizer, block_len=4, **described)
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = model_registry.publish_version(tracking_uri, NAME, str(folder), info, {})
    model_registry.promote(tracking_uri, NAME, damaged)
    until(lambda: life(service)["load_failed"] == 1)
    assert states(service)[str(damaged)] == "failed"
    assert complete() == fingerprints[2]
    model_registry.rollback(tracking_uri, NAME)
    until(lambda: life(service)["champion_changed"] == 3)
    assert complete() == fingerprints[2]


@pytest.fixture(scope="module")
def drafts(tracking_uri, settings, tmp_path_factory, tokenizer):
    """Two versions of one frozen checkpoint: the first holds a copy of it, the second its address alone."""
    folder = tmp_path_factory.mktemp("frozen")
    checkpoint = save_checkpoint(folder / "checkpoint", tokenizer)
    versions = []
    for seed, base_uri in enumerate((None, str(checkpoint))):
        uri = save_drafts_bundle(folder / f"drafts-{seed}", checkpoint, seed=seed, base_uri=base_uri)
        versions.append(model_registry.publish_version(tracking_uri, NAME, uri, read_bundle_info(uri), {}))
    return checkpoint, versions


def test_drafts_of_the_served_checkpoint_are_promoted_alone_under_traffic_and_change_no_text(
    service, settings, oracle_text, tracking_uri, drafts
):
    checkpoint, versions = drafts
    old, new = (resolve_model(settings, f"models:/{NAME}/{number}")[0].fingerprint for number in versions)
    model_registry.promote(tracking_uri, NAME, versions[0])
    until(lambda: states(service).get(str(versions[0])) == "champion")
    until(lambda: "leaving" not in states(service).values())
    (listed, *_) = [v for v in model_registry.list_versions(tracking_uri, NAME) if v.version == versions[1]]
    assert listed.base_hash == model_info(checkpoint).bundle_hash
    decoder, answers, swapped = decoder_pid(), [], threading.Event()

    def trickle():
        with openai.OpenAI(base_url=f"{service}/v1", api_key="-", max_retries=0) as client:
            while not swapped.is_set():
                answers.append(client.completions.create(model=NAME, prompt=PROMPT, **DRAFTED, extra_body=NO_END))

    requesting = threading.Thread(target=trickle)
    with openai.OpenAI(base_url=f"{service}/v1", api_key="-", max_retries=0) as client:
        long = DRAFTED | {"max_tokens": 900}
        stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True, extra_body=NO_END, **long)
        chunks = [next(iter(stream))]
        requesting.start()
        model_registry.promote(tracking_uri, NAME, versions[1])
        try:
            until(lambda: answers and answers[-1].system_fingerprint == new)
        finally:
            swapped.set()
            requesting.join()
        chunks += list(stream)
    greedy = load_bundle(checkpoint).model
    whole, short = (oracle_text(PROMPT, model=greedy, ignore_eos=True, **fields)[0] for fields in (long, DRAFTED))
    assert {chunk.system_fingerprint for chunk in chunks} == {old}
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert {answer.choices[0].text for answer in answers} == {short}
    assert {answer.system_fingerprint for answer in answers} <= {old, new}
    assert decoder_pid() == decoder  # no engine was started
    until(lambda: [states(service)[str(number)] for number in versions] == ["gone", "champion"])
    (card,) = httpx.get(f"{service}/v1/models").json()["data"]
    assert card["bundle_hash"] == listed.bundle_hash


def decoder_pid():
    """Process of the champion's engine."""
    decoder = serve.get_deployment_handle("decoder", app_name=app.APP_NAME)
    return decoder.load.remote().result(timeout_s=30).decoder_pid

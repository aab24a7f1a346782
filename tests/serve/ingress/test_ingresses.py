"""Ingresses beside each other: all report the same replicas, each counts its own requests."""

import asyncio
import pickle
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_apps.api.completion_response import ModelCard
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.messages.replica_load import Load
from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.telemetry import start_stage

CARD = ModelCard(id="m", created=0, max_model_len=8, block_len=4, bundle_hash="h", mode="auto")
LOAD = Load(**dict.fromkeys(Load.__slots__, 1) | {"replica": "a", "mode": "auto", "running": 3})
REPORT = VersionReport(
    replica="a", version="1", fingerprint="f", bundle_hash="h", state="champion", problem="", totals=VersionStats()
)
READY = {"load": [LOAD], "versions": [[REPORT]], "ready": [True]}


class Decoder:
    """In the place of a handle to replicas that return these values."""

    def __init__(self, **answers):
        self._answers = answers

    def broadcast(self, method):
        async def results(**_):
            return self._answers.get(method, [])

        return SimpleNamespace(results_async=results)


class Ingress:
    """One ingress process, as Serve starts it from the same arguments."""

    def __init__(self, decoder, access=None, limits=None, **options):
        limits = limits or Limits(seconds=9, body_bytes=999)
        access = pickle.loads(pickle.dumps(access or Access()))
        self.app = HttpApp.__mro__[1](decoder, CARD, limits, access, **options)
        self._api = self.app.__serve_build_asgi_app__()

    def post(self, method, path, **options):
        async def body():
            transport = httpx.ASGITransport(self._api)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(body())

    def metrics(self):
        families = text_string_to_metric_families(self.post("GET", "/metrics").text)
        return {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}


def named(metrics, *words):
    return {key: value for key, value in metrics.items() if key[0].split(":")[1] in words}


def test_each_ingress_reports_all_replicas_and_counts_its_own_requests_from_0():
    one, other = Ingress(Decoder(**READY)), Ingress(Decoder(**READY))
    assert one.post("POST", "/v1/completions", json={"model": "m"}).status_code == 400
    ours, theirs = one.metrics(), other.metrics()
    replicas = {key: value for key, value in ours.items() if "replica" in dict(key[1:])}
    assert {dict(key[1:])["replica"] for key in replicas} == {"a"}
    assert named(replicas, "num_requests_running", "model_version_info")
    assert replicas.items() <= theirs.items()  # max by (replica, version), not sum
    assert list(named(ours, "requests_total").values()) == [1]
    assert not any(named(theirs, "requests_total").values())


def test_each_ingress_counts_the_requests_of_a_key_for_itself():
    access = Access(per_minute=2)
    ingresses = Ingress(Decoder(), access), Ingress(Decoder(), access)
    statuses = [[ingress.post("GET", "/v1/models").status_code for _ in range(3)] for ingress in ingresses]
    assert statuses == [[200, 200, 429], [200, 200, 429]]


def test_readiness_names_the_stage_of_a_start_and_sleep(monkeypatch):
    monkeypatch.setattr(start_stage, "latest", lambda: "weights are loaded from s3://m")
    starting = Ingress(Decoder()).post("GET", "/ready")
    assert starting.status_code == 503
    assert "weights are loaded from s3://m" in starting.json()["error"]["message"]
    asleep = Ingress(Decoder(), sleeps=True).post("GET", "/ready")
    assert (asleep.status_code, asleep.json()) == (200, {"status": "asleep"})
    assert Ingress(Decoder(**READY)).post("GET", "/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_and_scrapes_are_answered_when_no_choice_and_no_body_more_is_taken(path):
    limits = Limits(seconds=9, body_bytes=999, choices=1, bodies=1)
    limits._choices, limits._bodies = 2, 1  # all that it takes is in flight
    ingress = Ingress(Decoder(**READY), limits=limits, access=Access(keys=("0" * 64,), per_minute=1))
    assert [ingress.post("GET", path).status_code for _ in range(3)] == [200] * 3

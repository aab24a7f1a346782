"""Each request has spans of OpenTelemetry in one trace if the settings name an exporter, and no spans otherwise."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import PIPE

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from serve_apps.deployment import serve_config
from serve_apps.ingress.body_forwarding import PrefetchBody
from serve_apps.ingress.serve_proxy import Enveloper
from serve_apps.settings import ServeSettings
from serve_apps.telemetry.tracing import note, otlp, proxy_tracing_env, tracing_config
from tidar_core.errors import ConfigError

CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
DECODER, INGRESS = "replica_handle_request decoder generate", "replica_handle_request http __call__"
SERVICE = """
import signal, sys, ray
from serve_apps import app
from serve_apps.settings import ServeSettings
app.run(ServeSettings.model_validate_json(sys.argv[1]), blocking=False)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
[proxy] = [each for each in ray.util.list_named_actors(all_namespaces=True) if "PROXY" in each["name"]]
options = ray.get(ray.get_actor(**proxy)._get_http_options.remote())
print([each.cls.__name__ for each in options.middlewares], flush=True)
try:
    sys.stdin.read()
finally:
    app.shutdown()
"""
"""Program of a service in a process of its own, with its own Ray. Proxies take the tracing configuration and their
middlewares from the environment that Ray starts in."""
BODY = {"model": "tiny-model", "prompt": "def add(", "max_tokens": 9, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def traced(bundle, free_port):
    """Base address of a service that writes spans to files, the folder of the files, and the leader of its group."""
    settings = ServeSettings(
        model=bundle, port=free_port, mode="single-pass", rows=1, max_waiting_tokens=60, threads=1, num_cpus=0.5,
        trace_exporter="file",
    )  # fmt: skip
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE, settings.model_dump_json()],
        stdin=PIPE, stdout=PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with service:
        folder = Path(service.stdout.readline().strip()) / "logs/serve/spans"
        yield f"http://127.0.0.1:{free_port}", folder, service
        service.stdin.close()


def spans(folder):
    """Spans that are written so far."""
    decoder, found = json.JSONDecoder(), []
    for path in folder.glob("*.json"):
        text = path.read_text().strip()
        while text:
            try:
                span, end = decoder.raw_decode(text)
            except json.JSONDecodeError:  # this span is not complete yet
                break
            found.append(span)
            text = text[end:].lstrip()
    return found


def chain(folder, seconds=30, **attributes):
    """The decoder's span with these attributes, its parent, and so on to the first span without a parent here."""
    deadline = time.monotonic() + seconds
    while True:
        known = {span["context"]["span_id"]: span for span in spans(folder)}
        wanted = [s for s in known.values() if s["name"] == DECODER and attributes.items() <= s["attributes"].items()]
        line = wanted[:1]
        while line and line[-1]["parent_id"] in known:
            line.append(known[line[-1]["parent_id"]])
        if line and "proxy" in line[-1]["name"]:
            return line
        assert time.monotonic() < deadline, sorted(span["name"] for span in known.values())
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
def test_the_proxy_of_a_service_that_starts_its_own_ray_sends_bodies_along(traced):
    *_, service = traced
    assert service.stdout.readline() == f"['{Enveloper.__name__}', '{PrefetchBody.__name__}']\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_request_is_one_trace_of_its_client_across_proxy_ingress_and_replica(traced):
    url, folder, _ = traced
    headers = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01", "x-request-id": "mine"}
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}, headers=headers) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    line = chain(folder, request_id="mine")
    assert {span["context"]["trace_id"] for span in line} == {f"0x{CLIENT_TRACE}"}
    assert line[-1]["parent_id"] == f"0x{CLIENT_SPAN}"
    assert INGRESS in [span["name"] for span in line]
    ingress = next(span for span in line if span["name"] == INGRESS)["attributes"]
    usage = {"gen_ai.usage.output_tokens": 9, "gen_ai.response.model": "tiny-model"}
    assert usage.items() <= line[0]["attributes"].items()
    assert usage.items() <= ingress.items()
    assert ingress["gen_ai.response.id"] == json.loads(lines[0])["id"]
    assert (ingress["request_id"], ingress["tidar.complete"], ingress["http.route"]) == (
        "mine",
        True,
        "/v1/completions",
    )
    decoder = line[0]["attributes"]
    assert (decoder["tidar.mode"], decoder["tidar.outcome"]) == ("single-pass", "texts")
    assert decoder["tidar.fingerprint"] == json.loads(lines[0])["system_fingerprint"]
    assert decoder["tidar.decode_seconds"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_request_of_a_client_without_traces_is_a_trace_of_its_own(traced):
    url, folder, _ = traced
    response = httpx.post(f"{url}/v1/completions", json=BODY | {"speculative": False}, headers={"x-request-id": "own"})
    line = chain(folder, request_id="own")
    assert {span["context"]["trace_id"] for span in line} != {f"0x{CLIENT_TRACE}"}
    assert len({span["context"]["trace_id"] for span in line}) == 1
    assert line[-1]["parent_id"] is None
    assert response.status_code == 200


@pytest.mark.ray
@pytest.mark.slow
def test_a_request_with_more_tokens_than_may_wait_is_refused_in_json_and_in_its_span(traced):
    url, folder, _ = traced
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"max_tokens": 4000, "stream": True}) as busy:
        lines = busy.iter_lines()
        next(lines)  # so this stream has the only slot, and keeps it while it is open
        much = BODY | {"prompt": [5] * 100}
        refused = httpx.post(f"{url}/v1/completions", json=much, headers={"x-request-id": "much"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert "tokens would wait for a slot; at most 60 may" in error["message"]
    assert chain(folder, request_id="much")[0]["attributes"]["tidar.outcome"] == "refused"


@pytest.mark.ray
@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_the_service_though_ray_is_gone_before_it(traced):
    *_, service = traced
    os.killpg(service.pid, signal.SIGTERM)
    assert service.wait(timeout=45) == 0  # a call to an ended Ray waits for 60 s and exits with 1


def test_tracing_is_off_by_default():
    plain = ServeSettings(model="m")
    assert tracing_config(plain) is None
    assert "tracing_config" not in serve_config(plain)
    before = dict(os.environ)
    with proxy_tracing_env(plain):
        assert os.environ == before


def test_a_cluster_and_its_proxies_receive_the_exporter(monkeypatch):
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    settings = ServeSettings(model="m", trace_exporter="mine.spans:processors", trace_share=0.25)
    expected = {"enabled": True, "exporter_import_path": "mine.spans:processors", "sampling_ratio": 0.25}
    assert serve_config(settings)["tracing_config"] == expected
    before = dict(os.environ)
    with proxy_tracing_env(settings):
        assert {name: value for name, value in os.environ.items() if name not in before} == {
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "mine.spans:processors",
            "RAY_SERVE_TRACING_SAMPLING_RATIO": "0.25",
            "OTEL_SERVICE_NAME": "tidar",
        }
    assert os.environ == before


def test_a_collector_receives_spans_by_http(monkeypatch):
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        provider = TracerProvider()
        (processor,) = otlp()
        provider.add_span_processor(processor)
        with provider.get_tracer("test").start_as_current_span("a text"):
            note(gen_ai__usage__output_tokens=9, tidar__queue_seconds=None)
        provider.shutdown()
        server.shutdown()
    [(path, export)] = received
    [span] = export.resource_spans[0].scope_spans[0].spans
    assert (path, span.name) == ("/v1/traces", "a text")
    assert [(fact.key, fact.value.int_value) for fact in span.attributes] == [("gen_ai.usage.output_tokens", 9)]
    assert tracing_config(ServeSettings(model="m", trace_exporter="otlp"))["exporter_import_path"].endswith(":otlp")


@pytest.mark.parametrize("wrong", [{"trace_exporter": "nowhere"}, {"trace_share": 2}])
def test_wrong_tracing_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="trace_"):
        ServeSettings(model="m", **wrong)

"""On a cluster of others a service takes its place beside them, and ends nothing that it has not started."""

import signal
import time
from pathlib import Path

import httpx
import pytest
from fast_ray_env import python_path
from hf_folders import save_checkpoint, their_text
from other_cluster import other_cluster
from ports import unused_port
from proxies import refusing_proxy
from serving import command, until_ready

from serve_apps import shared_cluster
from serve_apps.api.completion_response import ModelCard
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle_info import model_info
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.errors import ConfigError

ROOT = Path(__file__).parents[2]
SETTINGS = ServeSettings(model="m", port=8123)


def running(applications, **changes):
    """Serve's report of itself, with the route prefixes of applications by name."""
    return {
        "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": 8123},
        "applications": {name: {"route_prefix": prefix} for name, prefix in applications.items()}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "applications", [{}, {"other": "/other"}, {"inner": None}, {"other": "/v2", "more": "/v1beta"}]
)
def test_there_is_a_place_beside_applications_that_answer_elsewhere(applications):
    shared_cluster._check_beside(running(applications), SETTINGS)
    shared_cluster._check_beside(running(applications), SETTINGS.model_copy(update={"host": "localhost"}))


@pytest.mark.parametrize(
    ("serve_reports", "changes", "words"),
    [
        (running({}), {"port": 8124}, "listens on 127.0.0.1:8123, not on 127.0.0.1:8124; give that host and port"),
        (running({}), {"host": "0.0.0.0"}, "listens on 127.0.0.1:8123, not on 0.0.0.0:8123; give that host and port"),
        (running({}, proxy_location="Disabled"), {}, "without HTTP"),
        (running({}), {"trace_exporter": "file"}, "trace_exporter is 'file', and Serve"),
        (running({"tidar": "/"}), {}, "a service runs on this Ray cluster already, as application 'tidar' at 127"),
        (running({"default": "/"}), {}, "application 'default' answers at / of 127.0.0.1:8123, where a service would"),
        (running({"gate": "/v1"}), {}, "application 'gate' answers at /v1 "),
        (running({"gate": "/health/"}), {}, "application 'gate' answers at /health/ "),
    ],
)
def test_a_clash_is_refused_in_one_line_before_anything_is_deployed(serve_reports, changes, words):
    with pytest.raises(ConfigError) as caught:
        shared_cluster._check_beside(serve_reports, SETTINGS.model_copy(update=changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_route_of_the_service_counts_as_taken():
    card = ModelCard(id="m", created=0, max_model_len=8, block_len=4, bundle_hash="h", mode="auto")
    app = HttpApp.__mro__[1](None, card, Limits(seconds=1, body_bytes=9), Access())  # without Serve's wrapping
    served = {route.path.removesuffix("/{model_id:path}") for route in app.__serve_build_asgi_app__().routes}
    assert served == {"/", *shared_cluster.PATHS}


def test_a_proxy_may_take_longer_to_start_than_serve_allows_by_itself_unless_the_user_has_chosen(monkeypatch):
    variable = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
    for given, expected in (({}, "30"), ({variable: "7"}, "7")):
        monkeypatch.setattr("os.environ", environment := dict(given))
        shared_cluster._set_environment()
        assert environment[variable] == expected


@pytest.fixture(scope="module")
def cluster(free_port):
    """A Ray cluster whose Serve listens on `free_port` and runs an application of others."""
    with other_cluster(free_port) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A Hugging Face folder that was not converted."""
    return save_checkpoint(tmp_path_factory.mktemp("hf") / "tiny-model", tokenizer)


def texts(port):
    body = {"model": "tiny-model", "prompt": "x", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def left(cluster, port):
    """State of the others once a service has ended, or could not start."""
    return cluster.applications(), httpx.get(f"http://127.0.0.1:{port}/other", timeout=30).text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_service_that_ends_or_cannot_start_leaves_the_applications_of_others(cluster, free_port, bundle, tmp_path):
    environment = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token", "PYTHONPATH": python_path(ROOT)}
    others = (["other"], "other")
    settings = ("--rows", 2, "--mode", "autoregressive", "--threads", 1)
    with command("serve", bundle, "--port", free_port, *settings, **environment) as serving:
        until_ready(serving, free_port)
        assert texts(free_port)
        assert left(cluster, free_port) == (["other", "tidar"], "other")
        with command("serve", bundle, "--port", free_port, **environment) as second:
            _, stderr = second.communicate(timeout=60)
        assert (second.returncode, stderr.count("\n")) == (2, 1)
        assert "a service runs on this Ray cluster already" in stderr
        assert texts(free_port)
        serving.send_signal(signal.SIGTERM)
        _, stderr = serving.communicate(timeout=90)
        assert serving.returncode == 0, stderr
    assert left(cluster, free_port) == others

    with command("serve", bundle, "--port", free_port, *settings, **environment) as stopped:
        deadline = time.monotonic() + 60
        while "tidar" not in cluster.applications():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stopped.send_signal(signal.SIGTERM)  # while it starts
        _, stderr = stopped.communicate(timeout=90)
        assert (stopped.returncode, "Traceback" in stderr) == (0, False), stderr
    assert left(cluster, free_port) == others

    with command("serve", bundle, "--port", free_port + 1, **environment) as elsewhere:
        _, stderr = elsewhere.communicate(timeout=60)
    assert (elsewhere.returncode, stderr.count("\n")) == (2, 1)
    assert f"listens on 127.0.0.1:{free_port}" in stderr
    assert left(cluster, free_port) == others

    broken = tmp_path / "tiny-model"
    broken.mkdir()
    for path in Path(bundle).iterdir():
        content = path.read_bytes()
        damaged = content[:-1] + bytes([content[-1] ^ 1]) if path.suffix == ".safetensors" else content
        (broken / path.name).write_bytes(damaged)
    with command("serve", broken, "--port", free_port, *settings, **environment) as failing:
        _, stderr = failing.communicate(timeout=180)
    assert failing.returncode == 2, stderr
    assert "Traceback" not in stderr
    assert left(cluster, free_port) == others


def assert_answers_as_transformers(url, folder, tokenizer):
    """A completion and a chat are the greedy texts of transformers, and the card names the mode."""
    (card,) = httpx.get(f"{url}/models").json()["data"]
    assert (card["id"], card["mode"], card["block_len"]) == ("tiny-model", "autoregressive", 1)
    assert card["bundle_hash"] == model_info(folder).bundle_hash
    body = {"model": "tiny-model", "max_tokens": 8, "temperature": 0}
    done = httpx.post(f"{url}/completions", json=body | {"prompt": "import os"}, timeout=60).json()
    expected = their_text(folder, tokenizer.encode("import os"), 8)
    assert done["choices"][0]["text"] == tokenizer.decode(expected)
    messages = [{"role": "user", "content": "import os"}]
    ends = [tokenizer.eos_id, tokenizer.special_ids["<|im_end|>"]]
    done = httpx.post(f"{url}/chat/completions", json=body | {"messages": messages}, timeout=60).json()
    expected = their_text(folder, encode_chat(load_chat_template(folder), tokenizer, messages), 8, eos_token_id=ends)
    assert done["choices"][0]["message"]["content"] == tokenizer.decode(expected)


@pytest.mark.ray
@pytest.mark.slow
def test_a_checkpoint_is_served_by_a_ray_of_its_own_where_the_environment_names_a_proxy(
    checkpoint, tokenizer, monkeypatch
):
    port = unused_port()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with refusing_proxy(monkeypatch) as urls:
        environment = {"PYTHONPATH": python_path(ROOT)}
        with command("serve", checkpoint, "--port", port, "--threads", 1, **environment) as own:
            monkeypatch.setenv("no_proxy", "127.0.0.1")  # for the client of this test
            until_ready(own, port)
            assert_answers_as_transformers(f"http://127.0.0.1:{port}/v1", checkpoint, tokenizer)
            own.send_signal(signal.SIGTERM)  # perhaps before the command itself knows that it is ready
            _, stderr = own.communicate(timeout=90)
            assert (own.returncode, "SIGTERM" in stderr, "Traceback" in stderr) == (0, False, False), stderr
            assert "tiny-model does not draft yet, so it decodes in autoregressive mode" in stderr
        clouds = ("169.254.169.254", "metadata.google.internal")  # where Ray looks for the cloud it runs in
        assert [url for url in urls if not any(cloud in url for cloud in clouds)] == []

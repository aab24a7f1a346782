"""Connection to one cluster per process, and errors as they were raised."""

import socket
import time
from pathlib import Path

import psutil
import pytest
import ray

from pipelines.cluster.connection import connect, original_error
from tidar_core.artifacts.network.cluster_address import given_cluster
from tidar_core.errors import ConfigError, ShardError


def failing():
    raise ShardError("row 17 is short; run pack again")


def test_an_error_without_a_tidar_error_inside_is_itself():
    error = ValueError("x")
    error.__cause__ = KeyError("y")
    assert original_error(error) is error


def test_a_tidar_error_is_found_behind_others():
    inner, outer = ShardError("inner"), RuntimeError("outer")
    outer.__cause__ = inner
    assert original_error(outer) is inner


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_answers_is_one_line_at_once(monkeypatch, scheme):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"{scheme}127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS is {address}; nothing answers there .* or unset it") as caught:
        connect()
    assert time.monotonic() - began < 20  # Ray itself would try for a minute
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "reason"), [("garbage", "Ray refused it .*garbage"), ("no.such.host.invalid:6379", "nothing answers")]
)
def test_an_invalid_address_is_one_line(monkeypatch, address, reason):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=reason) as caught:
        connect()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [RuntimeError, ray.exceptions.AuthenticationError])
def test_a_cluster_that_requires_a_token_is_refused_with_a_hint_at_the_token(monkeypatch, kind):
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        words = f"{'the head node refused the connection, ' * 9}{ray.exceptions.AuthenticationError('no token')}"
        with pytest.raises(ConfigError, match="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or") as caught:  # noqa: SIM117
            with given_cluster():
                raise kind(words)
    assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_connecting_again_does_nothing_and_a_task_s_error_comes_back_as_itself(ray_cluster, capfd):
    before = ray.get_runtime_context().gcs_address
    connect()
    assert ray.get_runtime_context().gcs_address == before
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(ray.remote(failing).remote())
    original = original_error(caught.value)
    assert (type(original), str(original)) == (ShardError, "row 17 is short; run pack again")
    assert "logging.cc" not in capfd.readouterr().err


def test_a_local_cluster_has_no_process_for_logs_of_the_driver_or_for_a_dashboard(ray_cluster):
    programs = {Path(word).name for process in psutil.Process().children(recursive=True) for word in process.cmdline()}
    assert "raylet" in programs
    assert programs.isdisjoint({"log_monitor.py", "dashboard.py"})

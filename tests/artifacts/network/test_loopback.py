"""Connections to this machine's loopback interface never use the environment's proxy."""

import os
import urllib.error
import urllib.request

import pytest
from proxies import answering, refusing_proxy

from tidar_core.artifacts.network.loopback import exempt_loopback, is_loopback, open_direct, open_url
from tidar_core.artifacts.registry import mlflow_client


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/ready", True),
        ("http://127.8.9.1", True),
        ("http://localhost:8000", True),
        ("http://tidar.localhost/v1", True),
        ("http://[::1]:8000/", True),
        ("http://localhost.example.com", False),
        ("http://10.0.0.1:8000", False),
        ("http://example.com/127.0.0.1", False),
    ],
)
def test_loopback_addresses_are_addresses_that_never_leave_the_machine(url, expected):
    assert is_loopback(url) is expected


def test_a_loopback_address_is_opened_without_the_proxy_and_other_addresses_through_it(monkeypatch):
    with answering(lambda path: path) as server, refusing_proxy(monkeypatch) as proxied:
        for opened in (
            open_direct(f"{server}/a", timeout=5),
            open_url(urllib.request.Request(f"{server}/b"), timeout=5),
        ):
            with opened as answer:
                assert answer.read() in (b'"/a"', b'"/b"')
        assert proxied == []
        with pytest.raises(urllib.error.HTTPError, match="502"):
            open_url(urllib.request.Request("http://service.invalid/c"), timeout=5)
        assert proxied == ["http://service.invalid/c"]


def test_libraries_that_read_the_environment_exempt_loopback_and_keep_the_users_exceptions(monkeypatch):
    import httpx
    import requests

    with answering(lambda path: path) as server, refusing_proxy(monkeypatch) as proxied:
        monkeypatch.setenv("NO_PROXY", "example.com, 10.0.0.0/8")
        for _ in range(2):
            exempt_loopback()
        stated = "example.com,10.0.0.0/8,localhost,127.0.0.1,127.0.0.0/8,::1"
        assert [os.environ[name] for name in ("no_proxy", "NO_PROXY")] == [stated, stated]
        assert requests.get(f"{server}/r", timeout=5).json() == "/r"
        assert httpx.get(f"{server}/x", timeout=5).json() == "/x"
        assert proxied == []
        monkeypatch.setenv("no_proxy", "*")
        exempt_loopback()
        assert os.environ["no_proxy"] == "*"


def test_mlflows_client_reaches_a_server_on_loopback_without_the_proxy(monkeypatch):
    with answering(lambda path: {"experiments": []}) as server, refusing_proxy(monkeypatch) as proxied:
        client = mlflow_client.client_of(server)
        assert list(client.search_experiments()) == []
        assert proxied == []

"""Clients with a key are answered, up to the limit of the key."""

import asyncio
import hashlib
import pickle

import httpx
import pytest

from serve_apps.api.completion_response import ModelCard
from serve_apps.api.errors import ApiKeyError, RateLimitError, problem_of
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.settings import ServeSettings
from tidar_core.errors import ConfigError

KEYS = ("sk-first", "sk-second")
HASHES = tuple(hashlib.sha256(key.encode()).hexdigest() for key in KEYS)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_without_keys_requests_of_everyone_are_answered():
    assert Access().admit({}) is None


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_the_service(key):
    assert Access(keys=HASHES).admit(bearer(key)) is None
    assert Access(keys=HASHES).admit({"authorization": f"bearer  {key} "}) is None


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "à", "鍵\x85", "a b"])
def test_a_key_in_letters_of_any_script_opens_the_service_and_its_neighbour_does_not(key):
    """Headers are bytes: UTF-8 from the client, Latin-1 to whoever reads them."""
    access = Access(keys=(hashlib.sha256(key.encode()).hexdigest(),))
    assert access.admit(bearer(f" {key}\t".encode().decode("latin-1"))) is None
    with pytest.raises(ApiKeyError):
        access.admit(bearer((key + "é").encode().decode("latin-1")))


@pytest.mark.parametrize(
    ("headers", "words"),
    [({}, "no API key"), ({"authorization": "Basic sk-first"}, "no API key"), (bearer("sk-third"), "not known"),
     (bearer(HASHES[0]), "not known"), (bearer(""), "not known")],
)  # fmt: skip
def test_nothing_else_does(headers, words):
    with pytest.raises(ApiKeyError, match=words):
        Access(keys=HASHES).admit(headers)


def test_a_key_with_too_many_requests_waits_until_its_next_request_is_due():
    clock = Clock()
    access = Access(keys=HASHES, per_minute=3, clock=clock)
    for _ in range(3):
        access.admit(bearer("sk-first"))
    with pytest.raises(RateLimitError, match="3 requests a minute") as caught:
        access.admit(bearer("sk-first"))
    assert caught.value.seconds == pytest.approx(20)
    problem = problem_of(pickle.loads(pickle.dumps(caught.value)))
    assert (problem.status, problem.headers) == (429, {"Retry-After": "20"})
    access.admit(bearer("sk-second"))  # another key has its own count
    clock.now = 20.0
    access.admit(bearer("sk-first"))
    with pytest.raises(RateLimitError):
        access.admit(bearer("sk-first"))
    clock.now = 1000.0
    for _ in range(3):
        access.admit(bearer("sk-first"))
    with pytest.raises(RateLimitError):
        access.admit(bearer("sk-first"))


def sent_header(path, *, access, origins=(), method="GET", headers=()):
    """Response of an ingress without a decoder."""
    card = ModelCard(id="m", created=0, max_model_len=8, block_len=4, bundle_hash="h", mode="auto")
    plain = HttpApp.__mro__[1]  # without Serve's wrapping
    api = plain(None, card, Limits(seconds=1, body_bytes=9), access, origins).__serve_build_asgi_app__()

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            return await client.request(method, path, headers=dict(headers))

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/tokenizer_info"])
def test_routes_require_a_key(path):
    answer = sent_header(path, access=Access(keys=HASHES))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_routes_require_a_key_before_they_read_a_body(path):
    assert sent_header(path, access=Access(keys=HASHES), method="POST").status_code == 401
    answer = sent_header(path, access=Access(keys=HASHES), method="POST", headers=bearer("sk-first"))
    assert answer.status_code == 400  # there is no body


def test_a_key_is_answered():
    answer = sent_header("/v1/models", access=Access(keys=HASHES), headers=bearer("sk-second"))
    assert answer.json()["data"][0]["id"] == "m"


@pytest.mark.parametrize("path", ["/health", "/version", "/docs", "/openapi.json"])
def test_who_watches_the_service_needs_no_key(path):
    assert sent_header(path, access=Access(keys=HASHES)).status_code == 200


def test_the_document_states_whether_a_key_is_needed():
    assert sent_header("/openapi.json", access=Access(keys=HASHES)).json()["security"] == [{"key": []}]
    assert "security" not in sent_header("/openapi.json", access=Access()).json()


def test_pages_of_named_origins_may_send_requests_from_a_browser():
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    for path in ("/v1/models", "/v1/completions"):
        allowed = sent_header(
            path, access=Access(keys=HASHES), origins=["https://a.example"], method="OPTIONS", headers=headers
        )
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = sent_header(
            path, access=Access(keys=HASHES), origins=["https://b.example"], method="OPTIONS", headers=headers
        )
        assert "access-control-allow-origin" not in refused.headers


def test_a_key_in_the_clear_is_no_setting():
    with pytest.raises(ConfigError, match="api_keys"):
        ServeSettings(model="m", api_keys=("sk-first",))

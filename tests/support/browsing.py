"""Hands and eyes on the page of the service, in a tab of a browser that playwright drives."""

import json
import shutil
import time
from contextlib import contextmanager

import httpx
from prometheus_client.parser import text_string_to_metric_families

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
FETCHED = {"/", "/v1/models", "/tokenizer_info", "/v1/completions", "/v1/chat/completions"}
"""All paths that the page may request."""
CHAT = "/v1/chat/completions"
WAIT = 60_000


def fill(tab, fields):
    for name, value in fields.items():
        tab.fill(f"#{name}", str(value))


def write(tab, compare=True, **fields):
    """Start a completion."""
    fill(tab, fields)
    tab.set_checked("#compare", compare)
    tab.get_by_role("button", name="Write").click()


def send(tab, message, **fields):
    """Send a message of a chat."""
    fill(tab, fields | {"message": message})
    tab.press("#message", "Enter")


@contextmanager
def slow_network(tab):
    """Within it, a long text reaches the page at 200 tokens a second or so: a test can act while it is written."""
    session, limits = tab.context.new_cdp_session(tab), {"offline": False, "latency": 0, "uploadThroughput": -1}
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", limits | {"downloadThroughput": 50_000})
    try:
        yield
    finally:
        session.detach()


def finished(tab):
    """Wait until the page can send again."""
    tab.wait_for_selector("[type=submit]:enabled:visible")


def bodies(requests, route=CHAT):
    """Bodies of the requests that were sent to a route."""
    return [json.loads(request.post_data) for request in requests if request.url.endswith(route)]


def tokens(tab, run):
    """Class and text of each token that is shown."""
    return tab.eval_on_selector_all(f"{run} .text span", "all => all.map(s => [s.className, s.textContent])")


def figure(tab, run, name):
    return tab.inner_text(f"{run} .{name}")


def answer(service, route="/v1/completions", **fields):
    """The same text from the API: its choice, and the acceptance of its drafts."""
    requests = {"model": "tiny-model", "return_decoding": True, "return_token_ids": True} | fields
    answer = httpx.post(f"{service}{route}", json=requests, timeout=60).json()
    return answer["choices"][0], answer["metrics"]["speculative_decoding"]


def running(service):
    families = text_string_to_metric_families(httpx.get(f"{service}/metrics").text)
    return sum(s.value for f in families for s in f.samples if s.name == "tidar:num_requests_running")


def assert_nothing_runs(service):
    deadline = time.monotonic() + 10
    while running(service):
        assert time.monotonic() < deadline

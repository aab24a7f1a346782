"""The page at / in a real browser, against a real service: completions."""

import httpx
import pytest
from browsing import answer, assert_nothing_runs, bodies, figure, finished, running, slow_network, tokens, write

from serve_apps.ingress.playground import page

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = "def add(a, b):\n    return"
GREEDY = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
HOT = {"prompt": "zzz", "max_tokens": 40, "temperature": 3, "seed": 3}
"""Brings halves of characters, and an accepted draft."""
DRAFTED, PLAIN = "#output .drafted", "#output .plain-mode"


@pytest.fixture
def shown(opened):
    """The page with its completions, and all of its requests."""
    tab, requests = opened
    tab.click("#completion-tab")
    return tab, requests


@pytest.mark.parametrize("how", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_it_shows_the_text_and_of_each_token_whether_it_was_a_draft(shown, service, how):
    tab, _ = shown
    write(tab, **how)
    finished(tab)
    choice, drafts = answer(service, **how)
    spans = tokens(tab, DRAFTED)
    assert "".join(text for _, text in spans) == choice["text"]
    assert [kind for kind, _ in spans] == choice["decoding"]["origin"]
    assert len(spans) == len(choice["token_ids"]) == int(figure(tab, DRAFTED, "tokens"))
    assert {kind for kind, _ in spans} >= {"plain", "correction", *(["draft"] if how is HOT else [])}
    assert [kind for kind, _ in spans].count("draft") == drafts["num_accepted_draft_tokens"]
    forwards = drafts["num_spec_steps"] + 1  # the prefill
    assert figure(tab, DRAFTED, "per_forward") == f"{len(spans) / forwards:.2f}"
    accepted, of = drafts["num_accepted_draft_tokens"], drafts["num_draft_tokens"]
    assert figure(tab, DRAFTED, "mode").startswith(f"{accepted} of {of} drafts accepted")


def test_beside_it_stands_the_same_text_one_token_at_a_time(shown, service):
    tab, requests = shown
    write(tab, **GREEDY)
    finished(tab)
    plain, drafts = answer(service, **GREEDY, speculative=False)
    assert drafts["num_spec_steps"] == 0
    assert plain["decoding"]["forward"] == list(range(len(plain["token_ids"])))
    spans = tokens(tab, PLAIN)
    assert "".join(text for _, text in spans) == plain["text"] == answer(service, **GREEDY)[0]["text"]
    assert {kind for kind, _ in spans} == {"plain"}
    assert (figure(tab, PLAIN, "per_forward"), figure(tab, PLAIN, "mode")) == (
        "1.00",
        "no drafts · ended at max tokens",
    )
    for run in (DRAFTED, PLAIN):
        assert float(figure(tab, run, "per_second")) > 0
    assert tab.inner_text("#output .verdict").startswith(f"Same text, token for token: {len(spans)} of {len(spans)}.")
    sent = bodies(requests, "/v1/completions")
    assert [body.pop("speculative") for body in sent] == [True, False]
    assert sent[0] == sent[1]


def test_without_a_seed_both_texts_are_drawn_with_one_and_it_is_shown(shown):
    tab, requests = shown
    write(tab, prompt="x", max_tokens=12, temperature=3)
    finished(tab)
    seeds = {body["seed"] for body in bodies(requests, "/v1/completions")}
    assert f"seed {seeds.pop()}" in figure(tab, DRAFTED, "mode")
    assert not seeds
    assert tab.inner_text("#output .verdict").startswith("Same text")


def test_stop_ends_the_request_and_frees_its_row(shown, service):
    tab, _ = shown
    with slow_network(tab):
        write(tab, prompt=PROMPT, max_tokens=4000)
        tab.wait_for_selector(f"{DRAFTED} .text span >> nth=5")
        assert running(service) == 1
        tab.keyboard.press("Escape")
        finished(tab)
    assert tab.inner_text("#output .verdict") == "Stopped."
    assert 5 < int(figure(tab, DRAFTED, "tokens")) < 4000
    assert tab.query_selector(PLAIN) is None
    assert_nothing_runs(service)


def test_a_refusal_of_the_server_appears_in_its_words(shown, service):
    tab, _ = shown
    write(tab, prompt=PROMPT, max_tokens=100_000)
    finished(tab)
    requests = {"model": "tiny-model", "prompt": PROMPT, "max_tokens": 100_000}
    message = httpx.post(f"{service}/v1/completions", json=requests).json()["error"]["message"]
    assert tab.inner_text(f"{DRAFTED} .problem") == f"400: {message}"
    assert tab.get_attribute(f"{DRAFTED} .problem", "role") == "alert"


def test_the_key_goes_with_every_request_and_nowhere_else(shown):
    tab, requests = shown
    write(tab, compare=False, key="schlüssel-ключ", prompt=PROMPT, max_tokens=2)
    finished(tab)
    assert tab.query_selector(PLAIN) is None
    sent = [request.headers.get("authorization") for request in requests]
    header = "Bearer " + "schlüssel-ключ".encode().decode("latin-1")  # the bytes of the key
    first = sent.index(header)
    assert set(sent[:first]) == {None}
    assert set(sent[first:]) == {header}
    assert tab.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]


def test_text_can_never_be_markup_and_browsers_may_call_only_this_service(service):
    answer = httpx.get(service)
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; connect-src 'self'" in policy
    assert answer.text == page()
    assert not any(word in answer.text for word in ("innerHTML", "insertAdjacentHTML", "document.write", "http:"))


@pytest.mark.parametrize("panel", ["chat", "completion"])
def test_it_fits_a_phone(browser, service, panel):
    tab = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    tab.goto(service)
    tab.click(f"#{panel}-tab")
    assert tab.is_hidden("#settings")
    tab.click("summary >> nth=0")
    assert tab.is_visible("#settings")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 28)"
    tab.close()

"""The page at / in a real browser, against a real service: chats."""

import json

import pytest
from browsing import CHAT, answer, assert_nothing_runs, bodies, figure, finished, running, send, slow_network, tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST = "import os"
DRAFTED, PLAIN = "#turns li:last-child .drafted", "#turns li:last-child .plain-mode"
PROBLEM = "#turns li:last-child .problem"
VERDICT = "#turns li:last-child .verdict"
MARKUP = '<img src="x" onerror="alert(1)">&lt;\r\n\t<b>שלום 日本語</b>\n\n'


@pytest.fixture
def chat(opened):
    """The page as it opens for a model with a chat template, and all of its requests."""
    opened[0].wait_for_selector("#chat")
    return opened


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def shown_text(tab, run=DRAFTED):
    return "".join(text for _, text in tokens(tab, run))


def events(*data):
    return "".join(f"data: {part if isinstance(part, str) else json.dumps(part)}\n\n" for part in data)


def chunk(**choice):
    return {"system_fingerprint": "f", "choices": [{"delta": {}, "decoding": None, "token_ids": None} | choice]}


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 3, "seed": 3}], ids=["greedy", "sampled"])
def test_it_shows_the_answer_and_of_each_token_whether_it_was_a_draft(chat, service, how):
    tab, _ = chat
    send(tab, FIRST, max_tokens=40, system="Be brief.", **how)
    finished(tab)
    messages = [{"role": "system", "content": "Be brief."}, user(FIRST)]
    choice, drafts = answer(service, CHAT, messages=messages, max_tokens=40, **how)
    spans = tokens(tab, DRAFTED)
    assert "".join(text for _, text in spans) == choice["message"]["content"]
    assert [kind for kind, _ in spans] == choice["decoding"]["origin"]
    assert len(spans) == len(choice["token_ids"]) == int(figure(tab, DRAFTED, "tokens"))
    assert [kind for kind, _ in spans].count("draft") == drafts["num_accepted_draft_tokens"]
    forwards = drafts["num_spec_steps"] + 1  # the prefill
    assert figure(tab, DRAFTED, "per_forward") == f"{len(spans) / forwards:.2f}"
    assert float(figure(tab, DRAFTED, "per_second")) > 0
    assert tab.inner_text("#status").startswith(f"Done: {len(spans)} tokens.")


def test_every_turn_sends_the_answers_before_it_and_none_of_the_plain_texts(chat):
    tab, requests = chat
    tab.check("#compare-chat")
    send(tab, FIRST, max_tokens=8)
    finished(tab)
    assert tab.inner_text(VERDICT).startswith("Same text, token for token: 8 of 8.")
    assert shown_text(tab, PLAIN) == (first := shown_text(tab))
    send(tab, "two\nlines")
    finished(tab)
    sent = bodies(requests)
    assert [body["speculative"] for body in sent] == [True, False] * 2
    assert sent[2]["messages"] == [user(FIRST), assistant(first), user("two\nlines")]
    assert tab.inner_text("#turns li:last-child .question") == "two\nlines"
    assert tab.input_value("#message") == ""


def test_stop_strings_are_sent_with_their_line_ends_and_the_page_shows_which_ended_the_text(chat, service):
    tab, requests = chat
    sampled = {"max_tokens": 40, "temperature": 3, "seed": 3}
    text = answer(service, CHAT, messages=[user(FIRST)], **sampled)[0]["message"]["content"]
    word = next(word for word in text.split() if len(word) > 2 and text.index(word) > 3)
    send(tab, FIRST, **sampled, stop=f"{word}\na\\nb\\\\n\n\n")
    finished(tab)
    assert bodies(requests)[0]["stop"] == [word, "a\nb\\n"]
    assert shown_text(tab) == text[: text.index(word)]
    assert f"ended at stop string {json.dumps(word, ensure_ascii=False)}" in figure(tab, DRAFTED, "mode")


def test_stop_keeps_what_was_answered_and_frees_its_slot(chat, service):
    tab, requests = chat
    with slow_network(tab):
        send(tab, FIRST, max_tokens=3000)
        tab.wait_for_selector(f"{DRAFTED} .text span >> nth=5", state="attached")
        assert running(service) == 1
        tab.fill("#message", "typed meanwhile")
        tab.get_by_role("button", name="Stop").press("Enter")  # growing text moves the button
        finished(tab)
    assert tab.inner_text(VERDICT) == "Stopped."
    assert_nothing_runs(service)
    assert tab.input_value("#message") == "typed meanwhile"
    assert tab.evaluate("document.activeElement.textContent") == "Send"
    send(tab, "on", max_tokens=2)
    finished(tab)
    stopped = shown_text(tab, "#turns li:first-child")
    assert bodies(requests)[1]["messages"] == [user(FIRST), assistant(stopped), user("on")]


def test_the_last_turn_can_be_retried_and_edited_and_a_chat_begins_anew(chat):
    tab, requests = chat
    send(tab, FIRST, max_tokens=4, temperature=3)
    finished(tab)
    send(tab, "next")
    finished(tab)
    tab.get_by_role("button", name="Retry").click()
    finished(tab)
    first, second, again = bodies(requests)
    assert len({body.pop("seed") for body in (first, second, again)}) == 3
    assert again == second
    assert tab.locator("#turns li").count() == 2
    tab.fill("#message", "draft")
    tab.get_by_role("button", name="Edit last").click()
    assert tab.input_value("#message") == "next\ndraft"
    assert tab.locator("#turns li").count() == 1
    tab.get_by_role("button", name="New chat").click()
    assert tab.locator("#turns li").count() == 0
    assert tab.input_value("#message") == "next\ndraft"
    assert tab.get_by_role("button", name="Retry").is_disabled()
    tab.press("#message", "Enter")
    finished(tab)
    assert bodies(requests)[-1]["messages"] == [user("next\ndraft")]


def test_a_turn_that_was_refused_stays_on_the_page_and_out_of_the_conversation(chat):
    tab, requests = chat
    send(tab, FIRST, max_tokens=100_000)
    finished(tab)
    assert tab.inner_text(PROBLEM).startswith("400: prompt has ")
    assert tab.get_attribute(PROBLEM, "role") == "alert"
    assert "not part of the conversation" in tab.inner_text(VERDICT)
    assert tab.inner_text("#turns .question") == FIRST
    send(tab, "again", max_tokens=2)
    finished(tab)
    assert bodies(requests)[-1]["messages"] == [user("again")]
    assert tab.locator("#turns .question").all_inner_texts() == [FIRST, "again"]


def test_a_connection_that_breaks_and_a_stream_that_ends_early_are_reported(chat):
    tab, requests = chat
    tab.route("**" + CHAT, lambda route: route.abort("connectionreset"))
    send(tab, FIRST, max_tokens=2)
    finished(tab)
    assert tab.inner_text(PROBLEM).startswith("the connection to the server broke")
    part = chunk(delta={"content": "Par"}, decoding={"forward": [0], "origin": ["plain"], "text_offset": [0]},
                 token_ids=[5])  # fmt: skip
    tab.unroute("**" + CHAT)
    tab.route("**" + CHAT, lambda route: route.fulfill(body=events(part), content_type="text/event-stream"))
    tab.get_by_role("button", name="Retry").click()
    finished(tab)
    assert tab.inner_text(PROBLEM) == "the server ended the stream before the end of the text"
    assert shown_text(tab) == "Par"
    tab.unroute("**" + CHAT)
    send(tab, "on")
    finished(tab)
    assert bodies(requests)[-1]["messages"] == [user(FIRST), assistant("Par"), user("on")]


def test_markup_and_every_script_stay_text(chat):
    tab, requests = chat
    decoding = {"forward": [0] * len(MARKUP), "origin": ["plain"] * len(MARKUP), "text_offset": [*range(len(MARKUP))]}
    answered = events(
        chunk(delta={"role": "assistant", "content": ""}),
        chunk(delta={"content": MARKUP}, decoding=decoding, token_ids=[1] * len(MARKUP)),
        "[DONE]",
    )
    tab.route("**" + CHAT, lambda route: route.fulfill(body=answered, content_type="text/event-stream"))
    send(tab, MARKUP)
    finished(tab)
    assert shown_text(tab) == MARKUP
    assert tab.locator("#turns img, #turns b").count() == 0
    assert tab.text_content("#turns .question") == MARKUP.replace("\r\n", "\n")  # as fields have line ends
    tab.unroute("**" + CHAT)
    send(tab, "on", max_tokens=2)
    finished(tab)
    assert bodies(requests)[-1]["messages"][1] == assistant(MARKUP)


def test_a_model_without_a_template_has_completions_alone(browser, service):
    tab = browser.new_page()

    def without_template(route):
        route.fulfill(json=route.fetch().json() | {"chat_template": None})

    tab.route("**/tokenizer_info", without_template)
    with tab.expect_response("**/tokenizer_info"):
        tab.goto(service)
    assert tab.is_visible("#prompt")
    assert tab.get_by_role("tab").count() == 0
    tab.close()


def test_the_keyboard_alone_is_enough_and_every_control_has_a_name(chat):
    tab, requests = chat
    assert tab.evaluate("document.activeElement.id") == "message"
    tab.keyboard.type("a")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("b")
    tab.fill("#max_tokens", "2")
    tab.press("#max_tokens", "Enter")
    finished(tab)
    assert bodies(requests)[0]["messages"] == [user("a\nb")]
    tab.focus("#chat-tab")
    tab.keyboard.press("ArrowRight")
    assert tab.get_by_role("tab", selected=True).inner_text() == "Completion"
    assert tab.get_by_role("tabpanel", name="Completion").is_visible()
    tab.keyboard.press("ArrowRight")
    assert tab.get_by_role("tabpanel", name="Chat").is_visible()
    for name in ("System prompt", "Message", "Max tokens", "Temperature", "Seed", "Stop strings", "API key"):
        assert tab.get_by_label(name).is_visible(), name
    assert tab.get_by_role("list", name="Conversation").get_by_role("heading").all_inner_texts() == ["You", "Drafting"]


def test_a_wrong_setting_is_shown_even_if_the_settings_are_closed(chat):
    tab, requests = chat
    tab.fill("#max_tokens", "0")
    tab.click("summary >> nth=0")
    send(tab, "kept")
    assert tab.is_visible("#max_tokens")
    assert tab.evaluate("document.activeElement.id") == "max_tokens"
    assert tab.input_value("#message") == "kept"
    assert bodies(requests) == []

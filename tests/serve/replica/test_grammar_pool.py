"""A grammar is compiled if another process could do it in time; short prompts never wait for that."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from serve_apps.api.errors import ParameterError, problem_of
from serve_apps.messages.generation_request import Chat, RequestedGrammar
from serve_apps.replica.grammar_pool import GrammarPool
from serve_apps.replica.prompt_lanes import LONG, PromptLanes

pytestmark = [pytest.mark.slow, pytest.mark.alone]
"""Grammars have a limit of time, so nothing may run beside these tests."""

HOURS = {"type": "integer", "multipleOf": 99999991}
"""Forty characters, for which llguidance builds an automaton of a hundred million states."""


@pytest.fixture
def pool(tokenizer):
    pool = GrammarPool(tokenizer, seconds=0.5)
    yield pool
    pool.stop()


def grammar(content, kind="json_schema"):
    return RequestedGrammar("guided_json", kind, content)


def test_a_grammar_that_would_take_hours_is_given_up_and_the_next_is_tried_at_once(pool):
    pool.check(grammar({"type": "object"}))
    for _ in range(2):  # the second time nothing is tried
        began = time.monotonic()
        with pytest.raises(ParameterError, match=r"more than 0\.5 s") as caught:
            pool.check(grammar(HOURS))
        problem = problem_of(caught.value)
        assert (problem.status, problem.param) == (400, "guided_json")
    assert time.monotonic() - began < 0.1
    pool.check(grammar("a+", "regex"))


@pytest.mark.parametrize("wrong", ["(", "[a"])
def test_a_wrong_grammar_passes_to_its_compiler_which_raises_the_error(pool, wrong):
    pool.check(grammar(wrong, "regex"))
    pool.check(grammar("{", "json_schema"))


def test_a_probe_process_that_was_killed_is_started_again(pool):
    pool.check(grammar({"type": "object"}))
    pool._process.kill()
    pool._process.wait()
    pool.check(grammar("b+", "regex"))
    assert pool._process.poll() is None


class Reader:
    """Reads long prompts and grammars only once it may, short ones at once."""

    def __init__(self):
        self.may, self.read = threading.Event(), []

    def grammar(self, request_of):
        return request_of.grammar

    def request(self, request_of):
        if request_of.grammar is not None or len(request_of.prompt) > LONG:
            assert self.may.wait(10)
        self.read.append(request_of.prompt[:1])
        return request_of.prompt[:1]

    def check(self, _):
        pass

    def stop(self):
        pass


def request_of(prompt, grammar=None):
    return SimpleNamespace(prompt=prompt, grammar=grammar, bad_words=())


def test_short_prompts_pass_long_ones_and_grammars_and_who_left_is_not_read():
    async def crowd():
        reader = Reader()
        lanes = PromptLanes(reader, reader)
        slow = [request_of(letter * (LONG + 1)) for letter in "abc"] + [request_of(letter, "g") for letter in "def"]
        tasks = [asyncio.create_task(lanes.request(each)) for each in slow]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(lanes.request(request_of("x")), 5) == "x"
        for place in (1, 4):  # their clients leave
            tasks[place].cancel()
        await asyncio.sleep(0.1)
        reader.may.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        lanes.stop()
        return sorted(reader.read)

    assert asyncio.run(crowd()) == ["a", "c", "d", "f", "x"]


def test_no_more_tokens_are_returned_than_a_response_may_hold(monkeypatch):
    monkeypatch.setattr("serve_apps.replica.prompt_lanes.VALUES", 3)
    reader = Reader()
    reader.tokens = lambda prompt, framed: (1,) * 4
    for prompt, param in (("x", "prompt"), (Chat(messages=({"role": "user", "content": "x"},)), "messages")):
        with pytest.raises(ParameterError, match="4 tokens; at most 3") as caught:
            asyncio.run(PromptLanes(reader, reader).tokens(prompt, framed=False))
        assert caught.value.param == param

"""Prompts for general drafts: every kind is there, each prompt once, in the same order each time."""

from collections import Counter

from pipelines.research.chat_prompts import LENGTHS, QUESTIONS, chat_prompts


def test_prompts_are_of_all_kinds_and_come_in_the_same_order_each_time():
    given = ["A farmer has 3 cows.", "Name a colour."]
    found = chat_prompts(given)
    assert found == chat_prompts(given)
    kinds = Counter(prompt["kind"] for prompt in found)
    assert kinds["given"] == 2
    assert kinds["question"] == QUESTIONS
    assert min(kinds[kind] for kind in ("passage", "passages", "place", "code")) >= 50
    assert len({prompt["id"] for prompt in found}) == len(found)
    assert len({prompt["prompt"] for prompt in found}) > 0.98 * len(found)
    for prompt in found:
        assert prompt["prompt"].strip()
        assert prompt["kind"] not in ("question", "place", "code") or "{" not in prompt["prompt"], (
            "a form was not filled"
        )
        assert len(prompt["prompt"]) < 2 * LENGTHS.stop + 200

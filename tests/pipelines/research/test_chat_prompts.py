"""Prompts for general drafts: every kind is there, each prompt once, in the same order each time."""

import json
import sys
from collections import Counter

import pytest

from pipelines.research.chat_prompts import LENGTHS, QUESTIONS, chat_prompts, main


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


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["chat_prompts", *map(str, arguments)])
    return main()


def test_given_files_may_have_the_fields_of_public_data_sets(tmp_path, monkeypatch):
    given = tmp_path / "gsm8k.jsonl"
    given.write_text(
        '{"question": "A farmer has 3 cows.", "answer": "3"}\n\n{"turns": ["Name a colour.", "Another."]}\n'
    )
    assert run(monkeypatch, tmp_path / "found.jsonl", given) == 0
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {entry["prompt"] for entry in found if entry["kind"] == "given"} == {
        "A farmer has 3 cows.",
        "Name a colour.",
    }


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "prompts file {} does not exist; give a JSONL file"),
        ('{"prompt": "x"}\n{"prompt"', "{} line 2 "),
        ('{"answer": "x"}', "{} line 1 has none of prompt, question, turns, text with text"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, content, line):
    given = tmp_path / "given.jsonl"
    if content is not None:
        given.write_text(content)
    assert run(monkeypatch, tmp_path / "found.jsonl", given) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(line.format(given))
    assert not (tmp_path / "found.jsonl").exists()

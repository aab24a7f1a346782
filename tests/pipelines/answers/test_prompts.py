"""Prompts of every usual form, and the answers that each gets."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answering import answers_job

from pipelines.answers.answer_tasks import WorkFolder, read_prompts
from pipelines.answers.prompts import Prompt, prompt_of, questions
from pipelines.answers.variants import Variant, variants_of
from pipelines.packing.corpus import list_corpus, work_units

PLAIN = {"field": None, "system": None, "keep_answers": False}
USER, OTHER = {"content": "a", "role": "user"}, {"content": "b", "role": "user"}
ANSWER, SYSTEM = {"content": "c", "role": "assistant"}, {"content": "Be brief.", "role": "system"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"prompt": "a"}, [USER]),
        ({"question": "a", "answer": "never read"}, [USER]),
        ({"text": "a"}, [USER]),
        ({"turns": ["a", "b"]}, [USER, OTHER]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, [USER]),
        ({"messages": [SYSTEM, USER, ANSWER, OTHER, ANSWER]}, [SYSTEM, USER, OTHER]),
        ({"messages": json.dumps([USER])}, [USER]),
        ({"messages": [USER], "prompt": "not this"}, [USER]),
    ],
)
def test_a_prompt_is_the_conversation_without_its_answers_in_every_form(values, messages):
    assert prompt_of(values, **PLAIN).messages == messages


def test_a_prompt_keeps_given_answers_untrained_where_the_job_keeps_them():
    kept = prompt_of({"messages": [USER, ANSWER, OTHER]}, **(PLAIN | {"keep_answers": True}))
    assert kept.messages == [USER, ANSWER | {"weight": 0}, OTHER]
    assert [answered for _, answered in questions(kept.messages)] == [False, False, True]


def test_a_prompt_takes_the_job_s_field_and_system_message_and_the_entry_s_name():
    prompt = prompt_of({"id": 7, "body": "a", "text": "b"}, **(PLAIN | {"field": "body", "system": "Be brief."}))
    assert (prompt.messages, prompt.name) == ([SYSTEM, USER], "7")
    own = prompt_of({"messages": [SYSTEM | {"content": "own"}, USER]}, **(PLAIN | {"system": "Be brief."}))
    assert own.messages[0]["content"] == "own"
    assert Prompt.from_json(prompt.json) == prompt


def test_the_name_of_an_entry_does_not_change_its_key():
    same = {prompt_of({"prompt": "a", "id": name}, **PLAIN).key for name in ("x", "y", None)}
    assert len(same | {prompt_of({"messages": [USER]}, **PLAIN).key}) == 1
    assert prompt_of({"prompt": "b"}, **PLAIN).key not in same


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        (["a"], {}, "has no prompt, it is no object"),
        ({"body": "a"}, {}, "has no prompt under 'messages' or 'prompt' or .*; set prompt_field"),
        ({"prompt": ""}, {}, "has no prompt under"),
        ({"prompt": " \n"}, {}, "has a question without text"),
        ({"turns": ["a", ""]}, {}, "has a question without text"),
        ({"prompt": 5}, {}, "that is no text and no list"),
        ({"messages": "["}, {}, "no list of objects with a role"),
        ({"messages": "[" * 10**5}, {}, "no list of objects with a role"),
        ({"messages": [{"content": "a"}]}, {}, r"messages\.0 is .* must be an object with a role"),
        ({"messages": [SYSTEM]}, {}, "has no question that is to be answered"),
        ({"messages": [USER, ANSWER]}, {"keep_answers": True}, "has no question that is to be answered"),
        (
            {"messages": [USER, CALL, {"role": "tool", "content": "1"}]},
            {},
            "cannot be answered anew; set given_answers",
        ),
        ({"prompt": "a", "tools": "{"}, {}, "which is not JSON"),
        ({"prompt": "\ud800"}, {}, "half a surrogate pair"),
    ],
)
def test_an_entry_without_a_prompt_has_a_reason_in_one_line(values, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        prompt_of(values, **(PLAIN | changes))
    assert "\n" not in str(caught.value)


def test_a_result_of_a_tool_is_answered_where_given_messages_are_kept():
    values = {"messages": [USER, CALL, {"role": "tool", "content": "1"}]}
    kept = prompt_of(values, **(PLAIN | {"keep_answers": True})).messages
    assert [answered for _, answered in questions(kept)] == [False, False, True]


def share(seed, key):
    """The draw of a prompt in [0, 1), computed from the definition."""
    digest = hashlib.sha256(f"{seed}/{key}/share".encode()).hexdigest()
    return (int(digest[:16], 16) // 2) / 2**63


KEYS = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(2000)]


@pytest.mark.parametrize(("greedy", "sampled"), [(1, 0), (0.5, 0.5), (0, 2.3), (0.75, 0.25), (0.2, 1.5)])
def test_the_shares_of_greedy_and_sampled_answers_follow_the_draw_of_each_prompt(greedy, sampled):
    job = answers_job("p", "o", "m", greedy=greedy, sampled=sampled, seed=3)
    for key in KEYS:
        found = variants_of(job, key)
        expected_greedy = share(3, key) < greedy
        expected_sampled = int(sampled) + (share(3, key) >= 1 - sampled % 1)
        assert [variant.temperature == 0 for variant in found] == [True] * expected_greedy + [False] * expected_sampled
        if greedy + sampled == 1:
            assert len(found) == 1


def test_seeds_and_temperatures_differ_by_prompt_and_answer_and_follow_the_job_s_seed():
    job = answers_job("p", "o", "m", greedy=0, sampled=2, temperatures=(0.5, 0.7, 1.0))
    drawn = [variant for key in KEYS for variant in variants_of(job, key)]
    assert len({variant.seed for variant in drawn}) == len(drawn) == 2 * len(KEYS)
    counts = [sum(variant.temperature == t for variant in drawn) for t in job.temperatures]
    assert sum(counts) == len(drawn)
    assert min(counts) > 1200  # of 1333 expected; the standard deviation is 30
    assert variants_of(job, KEYS[0]) == drawn[:2]
    assert variants_of(job.model_copy(update={"seed": 1}), KEYS[0]) != drawn[:2]
    assert drawn[0].sampling(job, (0,)).temperature == drawn[0].temperature
    assert Variant(0.0, 5).sampling(job, (0,)).seed == 5


def test_entries_of_json_lines_and_parquet_become_units_of_equal_size_and_the_rest_is_left_out(tmp_path):
    rows = [{"id": str(n), "prompt": f"question {n}"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"no": 1}]))
    pq.write_table(pa.Table.from_pylist([*rows, {"id": "5", "prompt": None}]), tmp_path / "b.parquet")
    job = answers_job(tmp_path, tmp_path / "o", "m")
    folder = WorkFolder(str(tmp_path / "work"), 100, 4)
    (pieces,) = work_units(list_corpus(str(tmp_path), job.include), 2**20)
    outcome = read_prompts((0, pieces), job, folder)
    assert [(unit.name, unit.prompts) for unit in outcome.units] == [
        ("0000000-00000", 4), ("0000000-00001", 4), ("0000000-00002", 2),
    ]  # fmt: skip
    assert outcome.left_out.rows == 2
    assert outcome.left_out.named[0].startswith(f"line 6 of {tmp_path}/a.jsonl has no prompt under")
    assert outcome.left_out.named[1].startswith(f"row 6 of {tmp_path}/b.parquet has no prompt under")
    lines = [line for path in sorted((tmp_path / "work").rglob("*.jsonl")) for line in path.read_text().splitlines()]
    assert [Prompt.from_json(line).name for line in lines] == ["0", "1", "2", "3", "4"] * 2

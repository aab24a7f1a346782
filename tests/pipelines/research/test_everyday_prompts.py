"""Short prompts for drafts: five kinds in turns, none of a subject that is held out, in the same order each time."""

import json
from collections import Counter

import pytest

from pipelines.research.everyday_prompts import KINDS, everyday_prompts
from tidar_core.errors import ConfigError

HELD_OUT = [
    "Write a Python function `cube(x)` that returns the cube of x.",
    "List five insects.",
    "Rewrite this sentence in the past tense: The cat sleeps on the sofa.",
]


def test_prompts_come_in_turns_of_all_kinds_once_each_and_in_the_same_order_each_time():
    found = everyday_prompts(500, held_out=HELD_OUT)
    assert found == everyday_prompts(500, held_out=HELD_OUT)
    assert found != everyday_prompts(500, held_out=HELD_OUT, seed=1)
    assert Counter(prompt["kind"] for prompt in found[:15]) == dict.fromkeys(KINDS, 3)
    assert len({prompt["prompt"] for prompt in found}) == len({prompt["id"] for prompt in found}) == 500
    for prompt in found:
        assert "{" not in prompt["prompt"], "a form was not filled"
        assert "  " not in prompt["prompt"], "the source's line ends are left"
        assert len(prompt["prompt"]) < 260


def test_nothing_that_a_held_out_prompt_is_about_is_in_any_other_form():
    text = json.dumps(everyday_prompts(1_900, held_out=HELD_OUT))
    assert "`square(" in text
    for subject in ("`cube(", " insects.", "The cat sleeps on the sofa"):
        assert subject not in text
        assert subject in json.dumps(everyday_prompts(1_900, held_out=[])), "the test would pass without the rule"


def test_more_prompts_than_there_are_are_refused():
    with pytest.raises(ConfigError, match=r"kind python has 6[0-9]* different prompts, 2000 are needed"):
        everyday_prompts(10_000, held_out=[])

"""Prompts that the project ships: a few kinds to train on, others of the same kinds, and foreign ones."""

import json
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from pipelines.answers.prompts import prompt_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines/quickstart/prompts"
KINDS = {"arithmetic", "python", "rewriting", "extraction", "list"}


def entries(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "count", "kinds"), [("train", 800, KINDS), ("held_out", 40, KINDS), ("foreign", 40, {"foreign"})]
)
def test_each_file_holds_equally_many_prompts_of_each_of_its_kinds(name, count, kinds):
    found = entries(name)
    assert Counter(entry["kind"] for entry in found) == dict.fromkeys(kinds, count // len(kinds))
    assert len({entry["id"] for entry in found}) == count
    for entry in found:
        prompt = prompt_of(entry, field=None, system=None, keep_answers=False)
        assert prompt.name == entry["id"]
        assert 10 < len(entry["prompt"]) < 220


def test_no_prompt_is_in_two_files_or_twice_in_one():
    prompts = [entry["prompt"] for name in ("train", "held_out", "foreign") for entry in entries(name)]
    assert len(set(prompts)) == len(prompts)


def test_the_prompts_are_installed_with_the_project():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_namespace_packages(str(ROOT), include=tools["packages"]["find"]["include"])
    assert "pipelines.quickstart" in packages
    assert tools["package-data"]["pipelines.quickstart"] == [
        "prompts/*.jsonl",
        "shipped/tidar.json",
        "shipped/drafts/drafts.safetensors",
    ]

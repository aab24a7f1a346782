"""Results as people read them: rounded figures, texts as texts, lines that no log cuts."""

import pytest

from pipelines.evaluation.tables import print_memory, print_models, print_prompts, print_steps, print_values

LONG = "s3://models/" + "a" * 120


@pytest.fixture
def printed(capsys):
    """Lines that a function prints."""

    def call(show, facts):
        show(facts)
        return capsys.readouterr().out.splitlines()

    return call


def test_values_are_rounded_and_have_units_and_names_in_words(printed):
    facts = {
        "bundle": LONG, "ar_loss": 1.23456789, "tokens": 1234567, "greedy_equal": True, "peak_bytes": 3 * 2**30,
        "elapsed_seconds": 12.3456, "free": None,
    }  # fmt: skip
    assert printed(print_values, facts) == [
        f"bundle        {LONG}",
        "ar loss       1.235",
        "tokens        1,234,567",
        "greedy equal  yes",
        "peak          3.00 GiB",
        "elapsed       12.35 s",
        "free          not known",
    ]


def test_no_list_and_no_json_is_printed(printed):
    facts = {
        "memory_per_worker_gib": {"weights": 1.5, "total": 6.25},
        "acceptance_histogram": [3, 1],
        "completions": ["def main():\n    return 1", "[bold]"],
        "tasks": [{"task": "gsm8k", "score": 0.5}],
    }
    assert printed(print_values, facts) == [
        "memory per worker weights  1.5 GiB",
        "memory per worker total    6.25 GiB",
        "acceptance histogram       3, 1",
        "completions 1",
        "    def main():",
        "        return 1",
        "completions 2              [bold]",
        "tasks 1 task               gsm8k",
        "tasks 1 score              0.5",
    ]


def test_memory_of_a_replica_is_in_gib_or_mib(printed):
    assert printed(print_memory, {"device": "cpu", "weights": 2**31, "cache": 2**20, "free": None}) == [
        "device   cpu",
        "weights  2.00 GiB",
        "cache    1.0 MiB",
        "free     not known",
    ]


def test_tables_in_a_log_keep_every_address_and_column_whole(printed):
    version = {
        "name": "n" * 40, "version": 1, "status": "champion", "bundle_hash": "0" * 64, "base_hash": "",
        "bundle": LONG, "gates": {"tokens_per_forward": 3.14159, "greedy_equal": True},
    }  # fmt: skip
    lines = printed(print_models, {"models": [version]})
    assert any(LONG in line and "n" * 40 in line for line in lines)
    assert any("tokens_per_forward 3.142, greedy_equal yes" in line for line in lines)
    step = {"step": "autoregressive", "rows": 1, "seconds": 0.5, "over_ar": 1.0, "floor_share": 0.25}
    steps = [step | {"context": context, "batch": batch} for context in (512, 8192) for batch in (1, 4, 16, 64)]
    lines = printed(print_steps, {"shape": "s", "dtype": "fp32", "device": "cpu", "steps": steps})
    assert any("context 512, batch 1" in line and "context 8192, batch 64" in line for line in lines)


def test_times_of_long_prompts_stand_beside_those_of_transformers(printed):
    cost = {
        "prompt_tokens": 2048, "first_token_seconds": 1.7, "tokens_per_second": 1204.7, "first_chunk_seconds": 0.3,
        "last_chunk_seconds": 0.5, "step_seconds": 0.0141, "gap_steps": 1.8, "longest_gap_steps": 2.1,
        "peak_bytes": 2**30,
    }  # fmt: skip
    facts = {"device": "cpu", "weights": "int8", "threads": 2, "prompts": [cost]}
    lines = printed(print_prompts, facts)
    cells = ("2,048", "1.7", "1,205", "300.0, 500.0", "14.10", "1.80", "2.10", "1.00 GiB")
    assert any(all(cell in line for cell in cells) for line in lines)
    assert not any("transformers" in line for line in lines)
    facts["prompts"] = [cost | {"transformers_seconds": 3.4, "over_transformers": 2.0}]
    lines = printed(print_prompts, facts)
    assert any("transformers, s" in line for line in lines)
    assert any("3.40" in line and "2.00" in line for line in lines)

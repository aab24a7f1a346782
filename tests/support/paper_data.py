"""Data sets with the formats of the paper's twelve, a few examples each, in the hub's folder layout."""

import json
from pathlib import Path

HUMANEVAL = [
    {"task_id": "T/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one",
     "test": "def check(f):\n    assert f() == 1\n"},
    {"task_id": "T/1", "prompt": "def two():\n", "canonical_solution": "    return 2\n", "entry_point": "two",
     "test": "def check(f):\n    assert f() == 2\n"},
    {"task_id": "T/2", "prompt": "def six():\n", "canonical_solution": "    return 6\n", "entry_point": "six",
     "test": "def check(f):\n    assert f() == 7\n"},
]  # fmt: skip
"""Three problems; the test of the last one is wrong, so a correct solution fails it."""
GSM8K = [{"question": f"{a}+{b}?", "answer": f"It is so.\n#### {a + b}"} for a, b in ((1, 4), (2, 5), (3, 6))]
GSM8K = [*GSM8K, {"question": "3+7?", "answer": "It is not so.\n#### 11"}]
MBPP = {"task_id": 11, "code": "def one():\n    return 1", "test_list": ["assert one() == 1"] * 3}
MATH = {"problem": "What is 1+1?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"}
MMLU = {"question": "Which?", "choices": ["this", "that", "both", "none"], "answer": 2}
ARC = {"id": "a", "question": "Which?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "B"}
HELLASWAG = {"activity_label": "Walking", "ctx_a": "She walks", "ctx_b": "and then", "ctx": "She walks and then",
             "endings": ["runs.", "sits.", "flies.", "sinks."], "label": "1"}  # fmt: skip
PIQA = {"goal": "To sit", "sol1": "use a chair", "sol2": "use a pear", "label": 0}
WINOGRANDE = {"sentence": "Ann thanked Bea because _ was kind.", "option1": "Ann", "option2": "Bea", "answer": "2"}


def write_data_set(folder, configs):
    """Writes a folder like a copy of a data set on the hub, and returns its path.

    configs  name -> split -> examples
    """
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, examples in splits.items():
            path = Path(folder) / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(example) + "\n" for example in examples))
            lines += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (Path(folder) / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def write_paper_data(folder, math_subjects, mmlu_subjects):
    """Writes all data sets of the paper's tasks; returns task -> folder."""
    arc = {split: [ARC] * 2 for split in ("train", "validation", "test")}
    examples = [WINOGRANDE | {"sentence": f"Ann thanked Bea {n} times because _ was kind."} for n in range(6)]
    questions = [MMLU | {"question": f"Which {n}?"} for n in range(5)]
    chosen = {
        "humaneval": {"default": {"test": HUMANEVAL}},
        "humaneval_plus": {"default": {"test": HUMANEVAL}},
        "mbpp": {"full": {"test": [MBPP | {"text": "Give one.", "test_setup_code": ""}]}},
        "mbpp_plus": {"default": {"test": [MBPP | {"prompt": "Give one.", "test_imports": ["import math"]}]}},
        "gsm8k": {"main": {"train": GSM8K, "test": GSM8K}},
        "minerva_math": {name: {"train": [MATH], "test": [MATH]} for name in math_subjects},
        "mmlu": {name: {"dev": questions, "test": [MMLU]} for name in mmlu_subjects},
        "arc_easy": {"ARC-Easy": arc, "ARC-Challenge": arc},
        "arc_challenge": {"ARC-Easy": arc, "ARC-Challenge": arc},
        "hellaswag": {"default": {"train": [HELLASWAG], "validation": [HELLASWAG]}},
        "piqa": {"default": {"train": [PIQA], "validation": [PIQA]}},
        "winogrande": {"winogrande_xl": {"train": examples, "validation": [WINOGRANDE]}},
    }
    return {name: write_data_set(Path(folder) / name, configs) for name, configs in chosen.items()}

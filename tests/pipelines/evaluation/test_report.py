"""The report in words: the paper's tables, filled with what was measured."""

import pytest

from pipelines.evaluation import plots
from pipelines.evaluation.plots import quality_plot
from pipelines.evaluation.report import markdown, report_metrics

MODE = {
    "tokens_per_second": 10.0, "tokens_per_second_spread": (9.0, 11.0), "tokens_per_forward": 3.0,
    "tokens_per_round": 3.5, "time_to_first_token_seconds": 0.01, "equal_to_ar": True,
}  # fmt: skip


def figures(score, per_forward=None):
    return {"score": score, "stderr": 0.01, "tokens_per_forward": per_forward}


def task(name, title, modes, parent, isolation=None):
    return {"task": name, "title": title, "metric": "pass@1", "documents": 100, "shots": 0, "isolation": isolation,
            "modes": modes, "parent": parent, "modes_say_the_same": True,
            "texts": 0 if name == "piqa" else 100, "equal_to_parent": 97 if parent else None}  # fmt: skip


TASKS = [
    task("humaneval", "HumanEval", {"single-pass": figures(0.4329, 6.5), "autoregressive": figures(0.4329, 1.0)},
         figures(0.3598, 1.0), "namespaces"),
    task("gsm8k", "GSM8K", {"single-pass": figures(0.539, 5.07), "autoregressive": figures(0.539, 1.0)},
         figures(0.5474, 1.0)),
    task("piqa", "PIQA", {"single-pass": figures(0.7552)}, figures(0.7612)),
    task("riddles", "riddles", {"single-pass": figures(0.25, 2.0)}, None),
]  # fmt: skip
REPORT = {
    "bundle": "b", "bundle_hash": "h" * 64, "block_len": 16, "held_out_rows": 8, "ar_loss": 1.25,
    "diffusion_loss": 2.5, "prompts": 4, "prompts_shortened": 1, "prompts_equal": 4, "tokens_per_forward": 3.0,
    "tokens_per_round": 3.5, "speed_over_ar": 2.0, "batch": 1, "threads": 1, "tasks": TASKS,
    "modes": {"autoregressive": MODE | {"tokens_per_second": 5.0, "tokens_per_forward": 1.0}, "single-pass": MODE},
    "parent": {"location": "/models/p", "hash": "p" * 64, "is_start": True, "ar_loss": 1.2, "prompts_equal": 3,
               "logits_equal": 2,               "tokens_per_second": 5.0},
}  # fmt: skip


def test_texts_stand_as_in_table_2_and_choices_as_in_table_3():
    lines = markdown(REPORT).splitlines()
    for line in (
        "| model | HumanEval | HumanEval+ | MBPP | MBPP+ | GSM8K | Minerva Math | avg |",
        "| parent (AR) | 35.98 | - | - | - | 54.74 | - | 45.36 |",
        "| single-pass | 43.29 (6.50) | - | - | - | 53.90 (5.07) | - | 48.59 (5.79) |",
        "| autoregressive | 43.29 (1.00) | - | - | - | 53.90 (1.00) | - | 48.59 (1.00) |",
        "| model | MMLU | ARC-e | ARC-c | HellaSwag | PIQA | Winogrande | avg |",
        "| parent (AR) | - | - | - | - | 76.12 | - | 76.12 |",
        "| single-pass | - | - | - | - | 75.52 | - | 75.52 |",
        "| model | riddles | avg |",
        "| single-pass | 25.00 (2.00) | 25.00 (2.00) |",
        "| task | metric | shots | questions | standard error | modes agree | as the parent | programs ran in |",
        "| HumanEval | pass@1 | 0 | 100 | 1.00 | yes | 97 of 100 texts | namespaces |",
        "| PIQA | pass@1 | 0 | 100 | 1.00 | yes | - | - |",
        "| riddles | pass@1 | 0 | 100 | 1.00 | yes | - | - |",
    ):
        assert line in lines
    assert "| AR loss (nats per token, 8 rows) | 1.2500 | 1.2000 |" in lines
    assert "| prompts without their beginning, for the context | 1 of 4 |  |" in lines
    assert "| greedy texts equal to the plain AR loop | 4 of 4 prompts | equal on 3, logits on 2 |" in lines


def test_a_report_without_parent_and_tasks_has_no_empty_places_for_them():
    text = markdown(REPORT | {"parent": None, "tasks": []}, ["speed.png"])
    assert "parent" not in text
    assert "table 2" not in text
    assert text.endswith("![speed](speed.png)\n")


def test_every_number_has_a_name_of_its_own_for_a_tracking_server():
    metrics = report_metrics(REPORT)
    assert metrics["gsm8k/single-pass/tokens_per_forward"] == 5.07
    assert (metrics["humaneval/parent/score"], metrics["parent/ar_loss"], metrics["ar_loss"]) == (0.3598, 1.2, 1.25)
    assert "piqa/single-pass/tokens_per_forward" not in metrics
    assert metrics["tokens_per_second/single-pass"] == 10.0


@pytest.mark.parametrize("tasks", [TASKS[:2], TASKS[3:]], ids=["with a parent", "one point"])
def test_quality_is_drawn_against_tokens_per_forward_on_the_whole_scale(tasks, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    quality_plot(tasks)
    (axes,) = drawn[0].axes
    assert axes.get_ylim() == (0, 105)
    assert axes.get_xlim()[0] < 1 < 2 < axes.get_xlim()[1]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [row["title"] for row in tasks] + ["parent (AR)"] * any(row["parent"] for row in tasks)


def test_acceptance_is_drawn_at_whole_positions(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    plots.acceptance_plot([6, 3, 1, 0], [1.0, 0.4, 0.1, 0.0], [0.9, 0.5, 0.2, 0.1])
    left, right = drawn[0].axes
    assert [bar.get_height() for bar in left.patches] == [60, 30, 10, 0]
    assert list(right.lines[0].get_ydata()) == [100, 40, 10, 0]
    for axes in (left, right):
        assert all(tick == int(tick) for tick in axes.get_xticks())

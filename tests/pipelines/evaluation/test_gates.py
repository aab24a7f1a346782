"""Bars are met, missed or not measured; a release is refused with all that it misses."""

import copy

import pytest

from pipelines.evaluation.gates import bars
from pipelines.evaluation.job import PublishJob

REPORT = {
    "ar_loss": 2.5,
    "diffusion_loss": 3.5,
    "tokens_per_forward": 3.0,
    "greedy_equal": True,
    "prompts": 8,
    "prompts_equal": 8,
    "parent": {"ar_loss": 2.4},
    "tasks": [
        {
            "task": "gsm8k",
            "modes": {"single-pass": {"score": 0.5, "tokens_per_forward": 4.0},
                      "autoregressive": {"score": 0.5, "tokens_per_forward": 1.0}},
            "parent": {"score": 0.54, "tokens_per_forward": 1.0},
        },
        {"task": "piqa", "modes": {"single-pass": {"score": 0.7, "tokens_per_forward": None}}, "parent": None},
    ],
}  # fmt: skip


def missed(report=REPORT, **wanted):
    job = PublishJob(bundle="b", report="r", name="n", **wanted)
    return [bar.words for bar in bars(job, report) if not bar.met]


def test_a_good_report_misses_nothing():
    assert missed() == []
    assert missed(
        min_tokens_per_forward=3.0, max_ar_loss=2.5, max_diffusion_loss=3.5, max_ar_loss_over_parent=0.11,
        min_scores={"gsm8k": 0.5, "piqa": 0.7}, max_score_drop=0.05, min_task_tokens_per_forward={"gsm8k": 4.0},
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"min_tokens_per_forward": 3.1}, "tokens per forward is 3.000, the bar 3.1"),
        ({"max_ar_loss": 2.4}, "ar_loss is 2.5000, the bar 2.4"),
        ({"max_diffusion_loss": 3.4}, "diffusion_loss is 3.5000, the bar 3.4"),
        ({"max_ar_loss_over_parent": 0.05}, "ar_loss is 0.1000 above the parent's 2.4000, the bar 0.05"),
        ({"min_scores": {"gsm8k": 0.51}}, "score of gsm8k is 0.5000, the bar 0.51"),
        ({"max_score_drop": 0.01}, "score of gsm8k is 0.5000, 0.0400 below the parent's, the bar 0.01"),
        (
            {"min_task_tokens_per_forward": {"gsm8k": 4.5}},
            "tokens_per_forward of gsm8k is 4.0000, the bar 4.5",
        ),
        (
            {"min_scores": {"mmlu": 0.6}},
            "score of mmlu was not measured, the bar is 0.6: add the task to the evaluate job",
        ),
        (
            {"min_task_tokens_per_forward": {"piqa": 2.0}},
            "tokens_per_forward of piqa was not measured, the bar is 2.0: add the task to the evaluate job",
        ),
    ],
)
def test_each_missed_bar_names_the_measured_value(wanted, words):
    assert missed(**wanted) == [words]


def test_all_missed_bars_are_named_at_once():
    assert len(missed(min_tokens_per_forward=9, max_ar_loss=1, max_diffusion_loss=1, min_scores={"gsm8k": 1})) == 4


def test_unequal_texts_are_a_missed_bar():
    unequal = REPORT | {"greedy_equal": False, "prompts_equal": 6}
    assert missed(unequal) == ["greedy texts equal the AR mode's on 6 of 8 prompts"]
    assert missed(unequal, require_greedy_equal=False) == []


def test_a_loss_that_is_no_number_meets_no_bar():
    lost = REPORT | {"ar_loss": float("nan")}
    assert len(missed(lost, max_ar_loss=9.0, max_ar_loss_over_parent=9.0)) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
@pytest.mark.parametrize(
    ("figure", "wanted"),
    [
        ("ar_loss", {"max_ar_loss": 9.0}),
        ("ar_loss", {"max_ar_loss_over_parent": 9.0}),
        ("diffusion_loss", {"max_diffusion_loss": 9.0}),
        ("tokens_per_forward", {"min_tokens_per_forward": 1.0}),
        ("parent", {"max_ar_loss_over_parent": 9.0}),
        ("score", {"min_scores": {"gsm8k": 0.1}}),
        ("score", {"max_score_drop": 0.9}),
        ("tokens_per_forward of a task", {"min_task_tokens_per_forward": {"gsm8k": 1.0}}),
    ],
)
def test_no_bar_is_met_by_a_figure_that_is_not_finite_or_was_not_measured(figure, wanted, value):
    report = copy.deepcopy(REPORT)
    if figure == "parent":
        report["parent"]["ar_loss"] = value
    elif figure in ("score", "tokens_per_forward of a task"):
        if value is None:
            report["tasks"] = []
        else:
            for mode in report["tasks"][0]["modes"].values():
                mode[figure.split()[0]] = value
    else:
        report[figure] = value
    (words,) = missed(report, **wanted)
    assert ("was not measured" in words) is (value is None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_mode_that_is_not_finite_meets_no_bar_beside_others_that_are(value):
    report = copy.deepcopy(REPORT)
    report["tasks"][0]["modes"]["autoregressive"] = {"score": value, "tokens_per_forward": value}
    wanted = {"min_scores": {"gsm8k": 0.1}, "min_task_tokens_per_forward": {"gsm8k": 1.0}, "max_score_drop": 0.9}
    assert len(missed(report, **wanted)) == 3


def test_a_diffusion_loss_over_no_labels_and_equality_on_no_prompts_were_not_measured():
    assert missed(REPORT | {"diffusion_loss": 0.0}, max_diffusion_loss=1.0) == [
        "diffusion_loss was not measured, the bar is 1.0: pack more held-out rows"
    ]
    assert missed(REPORT | {"prompts": 0, "prompts_equal": 0}) == ["greedy texts equal the AR mode's on 0 of 0 prompts"]


def test_a_report_without_a_figure_misses_the_bars_about_it():
    assert len(missed({}, max_ar_loss=9.0, max_ar_loss_over_parent=9.0, max_score_drop=1.0)) == 5


def test_bars_about_a_parent_that_was_not_measured_are_missed():
    alone = REPORT | {"parent": None, "tasks": []}
    assert missed(alone, max_ar_loss_over_parent=0.1, max_score_drop=0.1) == [
        "ar_loss_over_parent was not measured, the bar is 0.1: name the parent in the evaluate job",
        "score_drop was not measured, the bar is 0.1: name the parent and tasks in the evaluate job",
    ]

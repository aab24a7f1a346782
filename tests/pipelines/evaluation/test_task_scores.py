"""Entries of a report for the tasks of an evaluation."""

from pipelines.evaluation.lm_eval_tasks import TaskScore
from pipelines.evaluation.task_scores import PARENT, task_entries


def score(task, *texts):
    return TaskScore(
        task=task, metric="exact_match", score=0.5, stderr=0.0, documents=len(texts), shots=0, tokens=9, forwards=3,
        acceptance_histogram=(3,), isolation=None, texts=texts,
    )  # fmt: skip


def test_texts_that_every_mode_generated_like_the_parent_are_counted():
    found = {
        "single-pass": [score("gsm8k", "a", "b", "c"), score("mine", "x")],
        "two-pass": [score("gsm8k", "a", "other", "c")],
        PARENT: [score("gsm8k", "a", "b", "changed")],
    }
    gsm8k, mine = task_entries(found)
    assert (gsm8k["texts"], gsm8k["equal_to_parent"], gsm8k["modes_say_the_same"]) == (3, 1, False)
    assert (mine["texts"], mine["equal_to_parent"], mine["modes_say_the_same"]) == (1, None, True)

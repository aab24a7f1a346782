"""The report on a checkpoint that does not draft: its autoregressive mode alone, as transformers computes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hf_folders import save_checkpoint, their_text
from memorised_bundle import write_lines, write_task
from tiny import save_tiny_shards

from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.job import EvaluateJob, PublishJob, TaskJob
from pipelines.evaluation.publish import publish
from tidar_core.artifacts.model.bundle_info import model_info
from tidar_core.artifacts.shards import ShardReader
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import BundleError, ConfigError

TASK = """output_type: generate_until
doc_to_text: "{{beginning}}"
doc_to_target: "{{end}}"
target_delimiter: ""
generation_kwargs: {until: ["no text holds this"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, shards of its tokenizer, and a task whose answers are the texts of transformers."""
    folder = tmp_path_factory.mktemp("parent")
    save_tiny_shards(folder / "shards")
    tokenizer = load_tokenizer(folder / "shards/tokenizer")
    save_checkpoint(folder / "checkpoint", tokenizer)
    rows = []
    for beginning in ("import ", "def save", "return "):
        answer = their_text(folder / "checkpoint", tokenizer.encode(beginning), 6)
        rows.append({"beginning": beginning, "end": tokenizer.decode(answer)})
    write_task(folder, "continuations", TASK)
    write_lines(folder / "continuations.jsonl", rows)
    return folder


def evaluation(folder, **changes):
    values = {"bundle": str(folder / "checkpoint"), "shards": str(folder / "shards"), "output": str(folder / "report"),
              "prompts": 2, "prompt_len": 2, "max_tokens": 6, "batch": 2, "repeats": 1, "loss_rows": 4}  # fmt: skip
    return EvaluateJob.model_validate(values | changes)


@pytest.fixture(scope="module")
def report(folder, ray_cluster):
    """The report on the checkpoint, with itself as parent, in a folder without a tokenizer."""
    bare = shutil.copytree(folder / "checkpoint", folder / "bare")
    (bare / "tokenizer.json").unlink()
    task = TaskJob(task=str(folder / "continuations.yaml"), data=str(folder / "continuations.jsonl"))
    return evaluate(evaluation(folder, parent=str(bare), tasks=(task,)))


def test_a_task_mode_that_drafts_is_refused_before_anything_runs(folder):
    with pytest.raises(ConfigError, match="mode is two-pass and the model does not draft") as caught:
        evaluate(evaluation(folder, task_modes=("autoregressive", "two-pass")))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_not_published(folder):
    with pytest.raises(BundleError, match=r"checkpoint holds no tidar\.json; give the folder of a bundle"):
        publish(PublishJob(bundle=str(folder / "checkpoint"), report=str(folder / "report"), name="m"))


@pytest.mark.slow
def test_the_loss_is_that_of_transformers_on_each_document_alone(report, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32).eval()
    rows = ShardReader(str(folder / "shards"), "held_out").rows(range(4))
    losses = []
    for ids, documents in zip(rows.input_ids_BS.long(), rows.document_ids_BS):
        for document in documents.unique():
            text = ids[documents == document]
            with torch.no_grad():
                logs = model(text[None]).logits[0].log_softmax(-1)
            losses += [-float(logs[place, token]) for place, token in enumerate(text[1:])]
    assert report["ar_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.slow
def test_what_drafts_alone_could_show_was_not_measured(report, folder):
    assert list(report["modes"]) == ["autoregressive"]
    assert (report["block_len"], report["diffusion_loss"], report["draft_accuracy"]) == (1, None, [None])
    assert (report["tokens_per_forward"], report["speed_over_ar"], report["greedy_equal"]) == (1.0, 1.0, True)
    assert report["bundle_hash"] == model_info(folder / "checkpoint").bundle_hash
    written = (folder / "report/report.md").read_text()
    assert "| diffusion loss (nats per token) | not measured |" in written
    assert "| tokens per forward (greedy, autoregressive) | 1.00 |" in written
    assert json.loads((folder / "report/made_by.json").read_text())["job"]["task_modes"] == ["autoregressive"]


@pytest.mark.slow
def test_tasks_have_the_texts_of_transformers(report):
    (entry,) = report["tasks"]
    assert list(entry["modes"]) == ["autoregressive"]
    assert entry["modes"]["autoregressive"]["score"] == entry["parent"]["score"] == 1.0


@pytest.mark.slow
def test_a_parent_without_a_tokenizer_has_that_of_the_model(report):
    parent = report["parent"]
    assert (parent["ar_loss"], parent["prompts_equal"]) == (report["ar_loss"], report["prompts"])
    assert Path(parent["location"]).name == "bare"
    assert parent["hash"] != report["bundle_hash"]

"""Two jobs never write one output: the second is refused before it touches what the first has."""

import json
import os

import pytest
from answering import answers_job, save_chat_bundle, write_prompts
from chat_templates import chat_tokenizer
from gguf_files import random_model, write_gguf
from hf_folders import save_checkpoint
from pack_jobs import job as pack_job
from tiny import save_tiny_bundle, save_tiny_shards

from pipelines.answers.answer import answer
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.job import EvaluateJob
from pipelines.importing.import_model import import_model
from pipelines.jobs import TrainJob
from pipelines.packing.pack import pack
from pipelines.training.train import train
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.errors import UserError

REFUSED = rf"another job writes .*out now \(process {os.getpid()} on .*\); wait until it ends, stop it, or give another"


def packs(tmp_path, tokenizer_folder):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "document"}))
    return lambda: pack(pack_job(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_folder))


def trains(tmp_path, tokenizer_folder):
    save_tiny_shards(tmp_path / "shards")
    values = {"shards": str(tmp_path / "shards"), "output": str(tmp_path / "out"), "shape": "tiny", "steps": 10}
    return lambda: train(TrainJob.model_validate(values | {"rows_per_step": 8}))


def evaluates(tmp_path, tokenizer_folder):
    save_tiny_bundle(tmp_path / "bundle")
    values = {name: str(tmp_path / name) for name in ("bundle", "shards")}
    return lambda: evaluate(EvaluateJob.model_validate(values | {"output": str(tmp_path / "out")}))


def answers(tmp_path, tokenizer_folder):
    save_chat_bundle(tmp_path / "chat")
    prompts = write_prompts(tmp_path / "prompts.jsonl", ["a"])
    return lambda: answer(answers_job(prompts, tmp_path / "out", tmp_path / "chat"))


def imports(tmp_path, tokenizer_folder):
    write_gguf(tmp_path / "x.gguf", random_model("llama"))
    return lambda: import_model(str(tmp_path / "x.gguf"), str(tmp_path / "out"))


def imports_a_dual_model(tmp_path, tokenizer_folder):
    tokenizer = chat_tokenizer("qwen2.5", trained_on=["a few plain words " * 9])
    save_checkpoint(tmp_path / "theirs", tokenizer)
    token = str(tokenizer.vocab_len)
    return lambda: import_model(str(tmp_path / "theirs"), str(tmp_path / "out"), mask_token=token, block_len=4)


STAGES = [packs, trains, evaluates, answers, imports, imports_a_dual_model]


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_job_on_an_output_is_refused_and_removes_nothing_of_the_first(tmp_path, tokenizer_folder, stage):
    run = stage(tmp_path, tokenizer_folder)
    work = tmp_path / ".out.0123456789abcdef/units-1000"
    work.mkdir(parents=True)
    (work / "tokens-0000000.json").write_text("the first job's")
    run_folder = tmp_path / "out.run/checkpoints/step-00000001"
    run_folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with output_lock(str(tmp_path / "out"), "manifest.json"):
        with pytest.raises(UserError, match=REFUSED) as caught:
            run()
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / ".out.lock"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_the_stage_did_not_make_is_refused_before_any_work(
    tmp_path, tokenizer_folder, monkeypatch, stage
):
    run = stage(tmp_path, tokenizer_folder)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")  # work on a cluster would end with another error
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out exists and holds no .* remove it or give another output folder"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

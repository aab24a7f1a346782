"""Two jobs never write one output: the second is refused before it touches what the first has."""

import json
import os

import pytest
from pack_jobs import job as pack_job
from tiny import save_tiny_bundle, save_tiny_shards

from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.job import EvaluateJob
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


@pytest.mark.parametrize("stage", [packs, trains, evaluates])
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

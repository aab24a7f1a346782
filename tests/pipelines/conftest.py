"""Small jobs from corpus to report, shared by the tests of pipelines: each fixture is a real run of a job."""

import asyncio
from pathlib import Path

import pytest
from memorised_bundle import write_lines, write_task

from pipelines.evaluation.job import EvaluateJob, TaskJob
from pipelines.jobs import PackJob, TrainBpe, TrainJob
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.config import SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """The folder that the jobs work in."""
    return tmp_path_factory.mktemp("workdir")


@pytest.fixture(scope="session")
def shards(workdir, ray_cluster):
    """The sources of asyncio, packed into rows of 64."""
    from pipelines.packing.pack import pack

    pack(PackJob(
        corpus=str(Path(asyncio.__file__).parent), include=("*.py",), output=str(workdir / "shards"),
        tokenizer=TrainBpe(vocab_size=320, max_bytes=100_000), row_len=64, held_out=0.2, workers=1,
    ))  # fmt: skip
    return str(workdir / "shards")


@pytest.fixture(scope="session")
def train_job(workdir, shards):
    """A small train job of two workers; keyword arguments change it."""

    def make(name, **changes):
        values = {
            "shards": shards, "output": str(workdir / name), "shape": "tiny", "objective": "ar", "block_len": 4,
            "steps": 30, "rows_per_step": 8, "rows_per_forward": 4, "learning_rate": 5e-3, "min_learning_rate": 5e-4,
            "precision": "fp32", "workers": 2, "checkpoint_every": 10, "log_every": 1, "warmup": 0.1,
            "tracking_uri": f"sqlite:///{workdir}/mlflow.db", "experiment": "tests",
        }  # fmt: skip
        return TrainJob.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def ar_bundle(train_job):
    """An autoregressive bundle from random weights, by two DeepSpeed workers under ZeRO 2."""
    from pipelines.training.train import train

    job = train_job("ar", zero_stage=2)
    train(job)
    return job


@pytest.fixture(scope="session")
def dual_bundle(train_job, ar_bundle):
    """The same model after dual-mode training under ZeRO 3."""
    from pipelines.training.train import train

    job = train_job("dual", objective="dual", shape=None, init_from=ar_bundle.output, steps=60, zero_stage=3)
    train(job)
    return job


CONTINUATIONS = """output_type: generate_until
doc_to_text: "{{beginning}}"
doc_to_target: "{{end}}"
target_delimiter: ""
generation_kwargs: {until: [")"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="session")
def continuations(workdir, dual_bundle):
    """A task of four questions; decoding one token at a time with `dual_bundle` answers three of them as expected."""
    bundle = load_bundle(dual_bundle.output)
    rows = []
    for beginning in ("def main(", "import ", "class Future:", "    return "):
        prompt, sampling = tuple(bundle.tokenizer.encode(beginning)), SamplingConfig(max_tokens=12)
        answer = bundle.tokenizer.decode(generate_autoregressive(bundle.model, prompt, sampling)).split(")")[0]
        rows.append({"beginning": beginning, "end": answer if len(rows) < 3 else f"{answer}?"})
    return TaskJob(
        task=write_task(workdir, "continuations", CONTINUATIONS),
        data=write_lines(workdir / "continuations.jsonl", rows),
    )


@pytest.fixture(scope="session")
def evaluate_job(workdir, shards, ar_bundle, dual_bundle, continuations):
    """The evaluation of `dual_bundle` against `ar_bundle`, which it was converted from."""
    return EvaluateJob(
        bundle=dual_bundle.output, shards=shards, output=str(workdir / "report"), parent=ar_bundle.output, prompts=3,
        prompt_len=16, max_tokens=24, batch=2, loss_rows=20, repeats=1, tasks=(continuations,),
        task_modes=("single-pass", "autoregressive"), tracking_uri=dual_bundle.tracking_uri, experiment="tests",
    )  # fmt: skip


@pytest.fixture(scope="session")
def report(evaluate_job):
    """The report on `dual_bundle`."""
    from pipelines.evaluation.evaluate import evaluate

    return evaluate(evaluate_job)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A small tokenizer, trained on the words of the small corpora."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(["the quick brown fox return a + b document lorem ipsum dolor " * 9]), 290).save(folder)
    return str(folder)

"""One small river for all tests of the stations: each fixture is a real run of one station."""

import asyncio
from pathlib import Path

import pytest

from pipelines.jobs import EvaluateJob, PackJob, TrainBpe, TrainJob


@pytest.fixture(scope="session")
def river(tmp_path_factory):
    """The folder that the stations work in."""
    return tmp_path_factory.mktemp("river")


@pytest.fixture(scope="session")
def shards(river, ray_cluster):
    """The sources of asyncio, packed into rows of 64."""
    from pipelines.pack import pack

    pack(PackJob(
        corpus=str(Path(asyncio.__file__).parent), include=("*.py",), output=str(river / "shards"),
        tokenizer=TrainBpe(vocab_size=320, max_bytes=100_000), row_len=64, held_out=0.2, workers=1,
    ))  # fmt: skip
    return str(river / "shards")


@pytest.fixture(scope="session")
def train_job(river, shards):
    """A small train job of two workers; keyword arguments change it."""

    def make(name, **changes):
        values = {
            "shards": shards, "output": str(river / name), "shape": "tiny", "objective": "ar", "block_len": 4,
            "steps": 30, "rows_per_step": 8, "rows_per_forward": 2, "learning_rate": 5e-3, "min_learning_rate": 5e-4,
            "precision": "fp32", "workers": 2, "checkpoint_every": 10, "log_every": 1, "warmup": 0.1,
            "tracking_uri": f"sqlite:///{river}/mlflow.db", "experiment": "tests",
        }  # fmt: skip
        return TrainJob.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def ar_bundle(train_job):
    """An autoregressive bundle from random weights, by two DeepSpeed workers."""
    from pipelines.train import train

    job = train_job("ar")
    train(job)
    return job


@pytest.fixture(scope="session")
def dual_bundle(train_job, ar_bundle):
    """The same model after dual-mode training."""
    from pipelines.train import train

    job = train_job("dual", objective="dual", shape=None, init_from=ar_bundle.output, steps=60)
    train(job)
    return job


@pytest.fixture(scope="session")
def evaluate_job(river, shards, dual_bundle):
    """The evaluation of `dual_bundle`."""
    return EvaluateJob(
        bundle=dual_bundle.output, shards=shards, output=str(river / "report"), prompts=3, prompt_len=16, max_tokens=24,
        batch=2, loss_rows=20, repeats=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def report(evaluate_job):
    """The report on `dual_bundle`."""
    from pipelines.evaluate import evaluate

    return evaluate(evaluate_job)

"""Job files: all that we ship are valid, and a wrong one is refused in one line that names the key."""

from pathlib import Path

import pytest

from pipelines.jobs import EvaluateJob, PackJob, PublishJob, TrainJob, read_job
from tidar_core.errors import ConfigError

JOBS = Path(__file__).parents[2] / "infra/jobs"
KINDS = {"pack": PackJob, "train": TrainJob, "evaluate": EvaluateJob, "publish": PublishJob}
TRAIN = "shards: s\noutput: o\nshape: tiny\nsteps: 4\nrows_per_step: 8\nrows_per_forward: 4\n"


@pytest.mark.parametrize("size", ["smoke", "small", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_station_has_a_valid_job_of_each_size(kind, size):
    job = read_job(KINDS[kind], JOBS / f"{kind}.{size}.yaml")
    assert type(job).model_validate(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TRAIN + "learning_rat: 1.0e-4\n", "unknown key 'learning_rat'"),
        ("output: o\nshape: tiny\nsteps: 4\nrows_per_step: 8\n", "key 'shards' is missing"),
        (TRAIN + "init_from: x\n", "give one of them"),
        (TRAIN.replace("shape: tiny\n", ""), "give one of them"),
        (TRAIN + "workers: 3\n", "multiple of workers x rows_per_forward = 3 x 4"),
        (TRAIN + "zero_stage: 4\n", "zero_stage is 4"),
        (TRAIN + "min_learning_rate: 1.0\n", "must not exceed"),
        (TRAIN.replace("steps: 4", "steps: 0"), "steps is 0"),
        ("- a list\n", "must be a mapping"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_a_wrong_job_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_job(TrainJob, path)
    assert "\n" not in str(caught.value)


def test_a_job_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_job(TrainJob, tmp_path / "missing.yaml")

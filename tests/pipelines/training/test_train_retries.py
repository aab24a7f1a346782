"""Restarts of the workers of a train job."""

from pipelines.jobs import TrainJob
from pipelines.training.train import _trainer


def test_failures_are_retried_as_often_as_the_job_allows_and_preemptions_without_limit():
    values = {"shards": "/shards", "output": "/out/bundle", "shape": "tiny", "steps": 10, "rows_per_step": 8}
    config = _trainer(TrainJob.model_validate(values | {"max_failures": 2}), "run", None).run_config.failure_config
    assert (config.max_failures, config.max_preemption_failures) == (2, -1)

"""Restarts of the workers of a train job."""

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from pipelines.jobs import TrainJob
from pipelines.training.train import _Retries, _trainer
from tidar_core.errors import ConfigError, DivergedError, StorageError


def test_failures_are_retried_as_often_as_the_job_allows_and_preemptions_without_limit():
    values = {"shards": "/shards", "output": "/out/bundle", "shape": "tiny", "steps": 10, "rows_per_step": 8}
    config = _trainer(TrainJob.model_validate(values | {"max_failures": 2}), "run", None).run_config.failure_config
    assert (config.max_failures, config.max_preemption_failures) == (2, -1)


@pytest.mark.parametrize(
    ("failures", "decision"),
    [
        ({1: RuntimeError("connection closed"), 0: ConfigError("wrong")}, FailureDecision.RAISE),
        ({0: DivergedError("no finite loss")}, FailureDecision.RAISE),
        ({0: StorageError("the store does not answer")}, FailureDecision.RETRY),
        ({0: RuntimeError("killed")}, FailureDecision.RETRY),
    ],
)
def test_an_error_that_would_come_again_is_not_retried(failures, decision):
    assert _Retries(FailureConfig(max_failures=1)).make_decision(WorkerGroupError("", failures)) == decision

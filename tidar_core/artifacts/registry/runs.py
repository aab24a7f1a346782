"""The runs that made and measured a bundle: their settings, metrics, files and data.

How did a training or an evaluation go, and which run was about this bundle?
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tidar_core.artifacts.registry.mlflow_client import client_of, experiment_id, in_one_line
from tidar_core.artifacts.store import locations

__all__ = [
    "PARENT_RUN",
    "STAGE_TAG",
    "end_run",
    "find_run",
    "log_artifact",
    "log_data",
    "log_metrics",
    "log_text",
    "start_run",
    "system_metrics",
]

PARENT_RUN = "mlflow.parentRunId"
"""Tag: the run below which MLflow's pages show this run."""
STAGE_TAG = "station"
"""Tag: the stage that made the run. Databases of users hold it by this name, and a search for runs needs one name."""
PARAMS_AT_ONCE = 100
"""Most parameters that MLflow accepts in one request."""
DIGEST_LEN = 36
"""Characters of a data set's digest that MLflow keeps; the data set's source has the whole identity."""


def start_run(tracking_uri: str, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Begins a run and returns its id; the experiment is created if it is new."""
    from mlflow.entities import Param

    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        run = client.create_run(experiment_id(client, tracking_uri, experiment), tags=dict(tags), run_name=name)
        given = [Param(key, str(value)) for key, value in params.items()]
        for first in range(0, len(given), PARAMS_AT_ONCE):
            client.log_batch(run.info.run_id, params=given[first : first + PARAMS_AT_ONCE])
        return run.info.run_id


def log_metrics(tracking_uri: str, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Logs metrics of a run at a train step."""
    from mlflow.entities import Metric

    now = round(time.time() * 1000)
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_batch(run_id, [Metric(key, value, now, step) for key, value in metrics.items()])


def log_artifact(tracking_uri: str, run_id: str, path: str) -> None:
    """Stores a small local file, such as a report, with a run."""
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_artifact(run_id, path)


def log_text(tracking_uri: str, run_id: str, name: str, text: str) -> None:
    """Stores a page of text with a run, in a file of that name, folders included."""
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_text(run_id, text, name)


def log_data(tracking_uri: str, run_id: str, uri: str, identity: str, context: str) -> None:
    """Logs the shards that a run read, by their manifest's identity, so that MLflow links the run and its data.

    context  purpose of the data, such as `training`
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": locations.absolute(uri), "identity": identity})
    data = Dataset(locations.name_of(uri), identity[:DIGEST_LEN], "tidar-shards", source)
    with in_one_line(tracking_uri):
        client_of(tracking_uri).log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])


@contextmanager
def system_metrics(tracking_uri: str, run_id: str, machine: str, seconds: float) -> Iterator[None]:
    """Measures load, memory, disk, network and GPUs of this machine while the context is open.

    machine  name between `system/` and the metric's name: a run may have several machines
    seconds  time between two measurements
    """
    client_of(tracking_uri)
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=seconds, resume_logging=True, node_id=machine, tracking_uri=tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def end_run(tracking_uri: str, run_id: str, status: str = "FINISHED", *, tags: Mapping[str, str] | None = None) -> None:
    """Closes a run as FINISHED, FAILED or KILLED; `tags` record its result."""
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        for key, value in (tags or {}).items():
            client.set_tag(run_id, key, value)
        client.set_terminated(run_id, status)


def find_run(tracking_uri: str, stage: str, bundle_hash: str) -> str | None:
    """The id of the latest finished run of a stage about a bundle; None if there is no such run."""
    wanted = f"tags.{STAGE_TAG} = '{stage}' and tags.bundle_hash = '{bundle_hash}' and attributes.status = 'FINISHED'"
    with in_one_line(tracking_uri):
        client = client_of(tracking_uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, wanted, max_results=1)  # the latest first
        return str(found[0].info.run_id) if found else None

"""Train jobs on a cluster: workers, failures, resumption. Only this file imports Ray Train."""

import os
from contextlib import nullcontext
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines.cluster.connection import connect, on_a_node, original_error
from pipelines.cluster.remote_progress import remote_progress, report_line, report_progress, report_start
from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import run_folder
from pipelines.training.precision import precise_job
from pipelines.training.train_start import absolute_job, check_start, finished_bundle
from pipelines.training.train_worker import Surroundings, train_worker
from tidar_core.artifacts.model.bundle_info import BUNDLE_JSON, BundleInfo, read_bundle_info
from tidar_core.artifacts.registry import runs
from tidar_core.artifacts.shards import Manifest, read_manifest, verify_shards
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.errors import StorageError, TidarError, UserError

__all__ = ["train"]

UNUSED = {"DatasetsCallback"}
"""Ray Train's actor that shares out Ray Data sets. Jobs have none, and each group of workers would wait for its
process."""
UNUSED_HERE = {"PlacementGroupCleanerCallback"}
"""Ray Train's actor that frees the places of a lost job. A cluster on this machine ends with its job."""
SHOWN = ("ar_loss", "diffusion_loss", "validation_loss", "tokens_per_second", "mfu", "memory_gib", "eta_seconds")


def train(job: TrainJob) -> BundleInfo:
    """Run the job to its bundle. A run that was stopped goes on from its last checkpoint; a finished one is reused."""
    job = absolute_job(job)
    manifest = read_manifest(job.shards)
    if (finished := finished_bundle(job, manifest)) is not None:
        return finished
    with output_lock(job.output, BUNDLE_JSON):
        return finished_bundle(job, manifest) or _trained(job, manifest)


def _trained(job: TrainJob, manifest: Manifest) -> BundleInfo:
    newest = check_start(job, manifest)
    connect()
    run_id = None
    try:
        job = precise_job(job, manifest, newest, on_cluster=True)
        on_a_node(verify_shards, job.shards)
        run_id = _mlflow_run(job, manifest)
        with remote_progress(f"train {job.objective}", total=job.steps, unit="steps") as reports:
            _trainer(job, run_id, reports).fit()
    except BaseException as error:
        if run_id is not None:
            runs.end_run(job.tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        original = original_error(_of_worker(error))
        raise original from (error if original is not error else None)
    info = read_bundle_info(job.output)
    made = {"bundle": job.output, "bundle_hash": info.bundle_hash, **info.lineage}
    runs.end_run(job.tracking_uri, run_id, tags=made)
    return info


def _trainer(job: TrainJob, run_id: str, reports: Any) -> TorchTrainer:
    parent, name = run_folder(job.output).rsplit("/", 1)
    resources = {"CPU": float(job.cpus_per_worker), "GPU": float(job.gpus_per_worker)}
    return _Trainer(
        _on_worker,
        train_loop_config={"job": job.model_dump(mode="json"), "run_id": run_id, "reports": reports},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if job.gpus_per_worker else "gloo"),
    )


class _Trainer(TorchTrainer):  # pyrefly: ignore[invalid-inheritance]
    """Ray Train with `_Retries`, and without the actors that a job has no use for.

    Each of these actors would be a process that loads Ray Train for seconds.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = UNUSED if os.environ.get("RAY_ADDRESS") else UNUSED | UNUSED_HERE
        callbacks: list[Any] = super()._create_default_callbacks()  # of Ray Train 2
        return [callback for callback in callbacks if type(callback).__name__ not in unused]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = _Retries(self.run_config.failure_config)  # of Ray Train 2
        return super()._initialize_and_run_controller(**arguments)


class _Retries(DefaultFailurePolicy):
    """Ray Train's retries of failed workers, but for an error that would come again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Retry, or raise the error of the workers."""
        if _comes_again(_of_worker(training_failed_error)):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def _on_worker(config: dict[str, Any]) -> None:
    """Run the job in a Ray Train worker; after a failure, again in its successor."""
    job = TrainJob.model_validate(config["job"])
    tracking, run_id = job.tracking_uri, config["run_id"]
    context = ray.train.get_context()
    machine = f"node_{context.get_node_rank()}" if job.system_metrics_every and not context.get_local_rank() else None

    def log(metrics: dict[str, float], step: int) -> None:
        shown = {name: metrics[name] for name in SHOWN if name in metrics}
        if metrics.get("skipped_updates"):
            shown["skipped_updates"] = metrics["skipped_updates"]
        report_progress(config["reports"], step, shown)
        runs.log_metrics(tracking, run_id, metrics, step)

    around = Surroundings(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        log=log,
        keep_text=lambda name, text: runs.log_text(tracking, run_id, name, text),
    )
    if around.rank == 0:
        report_start(config["reports"], "workers failed; new ones go on from the newest checkpoint")
    with runs.system_metrics(tracking, run_id, machine, job.system_metrics_every) if machine else nullcontext():
        try:
            train_worker(job, around)
        except Exception as error:
            if not _comes_again(error):
                reason = " ".join(str(error).split())
                report_line(config["reports"], f"worker {around.rank} failed: {type(error).__name__}: {reason}")
            raise


def _mlflow_run(job: TrainJob, manifest: Manifest) -> str:
    """The MLflow run of this output: a new run, or the run that a stopped job began."""
    note = locations.join(run_folder(job.output), "mlflow_run_id")
    if locations.exists(note):
        return locations.read_text(note)
    settings = {name: str(value) for name, value in job.model_dump(mode="json").items()}
    run_id = runs.start_run(
        job.tracking_uri, job.experiment, f"train {locations.name_of(job.output)}", settings, {runs.STAGE_TAG: "train"}
    )
    runs.log_data(job.tracking_uri, run_id, job.shards, manifest.identity, "training")
    locations.write_bytes(note, run_id.encode())
    return run_id


def _of_worker(error: BaseException) -> BaseException:
    """The error of the first failed worker."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [cause for cause in failures.values() if isinstance(original_error(cause), TidarError)]
    return causes[0] if causes else error


def _comes_again(error: BaseException) -> bool:
    """Whether another attempt would end with the same error. A store that refuses now may answer later."""
    original = original_error(error)
    return isinstance(original, UserError) and not isinstance(original, StorageError)

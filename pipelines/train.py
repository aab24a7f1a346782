"""How does a train job run on a cluster: scale, failures, resumption? The only home of Ray Train."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.board import pin, watched_board
from pipelines.cluster import connect, original_error
from pipelines.jobs import TrainJob
from pipelines.train_worker import Surroundings, train_worker
from tidar_core.artifacts import locations, registry
from tidar_core.artifacts.bundle import BUNDLE_JSON, BundleInfo, read_bundle_info, verify_bundle
from tidar_core.artifacts.made_by import MADE_BY
from tidar_core.artifacts.shards import Manifest, read_manifest, verify_shards
from tidar_core.artifacts.tokenizer import load_tokenizer
from tidar_core.errors import ConfigError, TidarError

__all__ = ["train"]

SHOWN = ("ar_loss", "diffusion_loss", "tokens_per_second")


def train(job: TrainJob) -> BundleInfo:
    """Run the job to its bundle. A run that was stopped goes on from its last checkpoint; a finished one is reused."""
    job = _absolute(job)
    manifest = read_manifest(job.shards)
    if (finished := _finished(job, manifest)) is not None:
        return finished
    if manifest.splits["train"].rows == 0:
        raise ConfigError(f"{job.shards} has no train rows; pack more text or lower held_out")
    _check_start(job, manifest)
    connect()
    run_id = None
    try:
        ray.get(ray.remote(verify_shards).remote(job.shards))
        run_id = _mlflow_run(job)
        with watched_board(f"train {job.objective}", total=job.steps, unit="steps") as board:
            _trainer(job, run_id, board).fit()
    except BaseException as error:
        if run_id is not None:
            registry.end_run(job.tracking_uri, run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        original = original_error(_of_worker(error))
        raise original from (error if original is not error else None)
    info = read_bundle_info(job.output)
    made = {"bundle": job.output, "bundle_hash": info.bundle_hash, **info.lineage}
    registry.end_run(job.tracking_uri, run_id, tags=made)
    return info


def _trainer(job: TrainJob, run_id: str, board: Any) -> TorchTrainer:
    run = locations.absolute(job.output + ".run")
    parent, name = run.rsplit("/", 1)
    resources = {"CPU": float(job.cpus_per_worker), "GPU": float(job.gpus_per_worker)}
    return TorchTrainer(
        _on_worker,
        train_loop_config={"job": job.model_dump(mode="json"), "run_id": run_id, "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.workers, use_gpu=job.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=job.keep_checkpoints),
        ),
        torch_config=TorchConfig(backend="nccl" if job.gpus_per_worker else "gloo"),
    )


def _on_worker(config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    job = TrainJob.model_validate(config["job"])
    context = ray.train.get_context()

    def keep(metrics: dict[str, float], folder: Path) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))

    def log(metrics: dict[str, float], step: int) -> None:
        pin(config["board"], step, {name: metrics[name] for name in SHOWN if name in metrics})
        registry.log_metrics(job.tracking_uri, config["run_id"], metrics, step)

    latest = ray.train.get_checkpoint()
    with latest.as_directory() if latest is not None else _nowhere() as folder:
        train_worker(
            job,
            Surroundings(
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                resume_from=Path(folder) if folder is not None else None,
                checkpoint=keep,
                log=log,
            ),
        )


@contextmanager
def _nowhere() -> Iterator[None]:
    yield None


def _check_start(job: TrainJob, manifest: Manifest) -> None:
    """Refuse a start that is no model folder, a bundle that is not whole, or a model of another tokenizer."""
    if job.init_from is None:
        return
    if not locations.exists(locations.join(job.init_from, "config.json")):
        raise ConfigError(f"init_from is {job.init_from}; it has no config.json; give a model folder or a bundle")
    if locations.exists(locations.join(job.init_from, BUNDLE_JSON)):
        verify_bundle(job.init_from)
    has_tokenizer = locations.exists(locations.join(job.init_from, "tokenizer.json"))
    if has_tokenizer and load_tokenizer(job.init_from).fingerprint != manifest.tokenizer:
        raise ConfigError(
            f"{job.shards} were packed with another tokenizer than that of {job.init_from}; pack with the model's own"
        )


def _absolute(job: TrainJob) -> TrainJob:
    """The same job with every location absolute: workers run in other folders."""
    changed = {name: locations.absolute(getattr(job, name)) for name in ("shards", "output")}
    if job.init_from is not None:
        changed["init_from"] = locations.absolute(job.init_from)
    return job.model_copy(update=changed | {"tracking_uri": registry.absolute_tracking_uri(job.tracking_uri)})


def _finished(job: TrainJob, manifest: Manifest) -> BundleInfo | None:
    """The bundle at the job's output, if this very job made it, of these shards."""
    if not locations.exists(locations.join(job.output, BUNDLE_JSON)):
        return None
    made_by = locations.read_json(locations.join(job.output, MADE_BY))
    info = read_bundle_info(job.output)
    if made_by["job"] != job.model_dump(mode="json") or info.lineage["shards"] != manifest.identity:
        raise ConfigError(
            f"{job.output} holds the bundle of another job or of other shards; give this one another output, or remove "
            f"{job.output} and {job.output}.run"
        )
    return info


def _mlflow_run(job: TrainJob) -> str:
    """The MLflow run of this output: a new one, or the one that a stopped job began."""
    note = locations.join(job.output + ".run", "mlflow_run_id")
    if locations.exists(note):
        return locations.read_text(note)
    settings = {name: str(value) for name, value in job.model_dump(mode="json").items()}
    run_id = registry.start_run(
        job.tracking_uri, job.experiment, f"train {locations.name_of(job.output)}", settings, {"station": "train"}
    )
    locations.write_bytes(note, run_id.encode())
    return run_id


def _of_worker(error: BaseException) -> BaseException:
    """What the first failed worker raised."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [cause for cause in failures.values() if isinstance(original_error(cause), TidarError)]
    return causes[0] if causes else error

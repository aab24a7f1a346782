"""Choice of the precision of a train job that leaves it to the machine.

Which precision trains faster here?

Processors differ: with matrix units for bf16 a train step is several times faster in bf16, without them often slower
than in fp32. So a CPU is timed, with two layers of the model and few tokens. GPUs train in bf16.
"""

from typing import Any

import ray

from pipelines.cluster.console import stderr
from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import Checkpoint
from pipelines.training.train_start import starting_config
from pipelines.training.train_step_time import sample_seconds
from tidar_core.artifacts.shards import Manifest
from tidar_core.config import ModelConfig

__all__ = ["fastest_job", "precise_job"]

PRECISIONS = ("fp32", "bf16")


def precise_job(job: TrainJob, manifest: Manifest, newest: Checkpoint | None, *, on_cluster: bool = False) -> TrainJob:
    """The same job with the precision that it trains in; the reason is written to standard error.

    newest      checkpoint that the job continues from: its precision stays
    on_cluster  time a node of the cluster instead of this machine
    """
    if job.precision != "auto":
        return job
    if newest is not None:
        return job.model_copy(update={"precision": newest.cursor.run["precision"]})
    return fastest_job(job, starting_config(job, manifest), manifest.row_len, on_cluster=on_cluster)


def fastest_job(job: TrainJob, model: ModelConfig, row_len: int, *, on_cluster: bool = False) -> TrainJob:
    """The same job with the precision whose train steps are the fastest here; the reason goes to standard error.

    model       configuration that training starts with
    on_cluster  time a node of the cluster instead of this machine
    """
    if job.gpus_per_worker:
        return job.model_copy(update={"precision": "bf16"})
    jobs = [job.model_copy(update={"precision": precision}) for precision in PRECISIONS]
    given: tuple[Any, ...] = (jobs, model, row_len)
    if on_cluster:
        timed = ray.remote(num_cpus=job.cpus_per_worker, max_retries=0)(sample_seconds)
        seconds = ray.get(timed.remote(*given))
    else:
        seconds = sample_seconds(*given)
    if seconds is None:
        stderr.print("precision: bf16; the model is too large for a sample to be timed here in seconds")
        return jobs[1]
    chosen = jobs[seconds.index(min(seconds))]
    times = " and ".join(f"{1000 * s:.0f} ms in {name}" for name, s in zip(PRECISIONS, seconds))
    stderr.print(f"precision: {chosen.precision}; two layers of the model took {times}", highlight=False)
    return chosen

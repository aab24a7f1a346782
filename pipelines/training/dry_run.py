"""Report on a train job before any worker starts: its work, and whether it can run. Nothing is written."""

from typing import Any

from pipelines.jobs import TrainJob
from pipelines.training.continuations import check_prompts, held_out_prompts
from pipelines.training.memory import estimated_memory, learned_count, parameter_count
from pipelines.training.precision import precise_job
from pipelines.training.train_start import absolute_job, check_start, finished_bundle, model_config, starting_config
from pipelines.training.train_step_time import estimated_step
from tidar_core.artifacts.model.bundle_info import BUNDLE_JSON
from tidar_core.artifacts.shards import TOKENIZER, ShardReader, check_sizes, read_manifest
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.output_folder import refuse_stranger, require_writable
from tidar_core.artifacts.text.tokenizer import load_tokenizer

__all__ = ["dry_run"]

GIB = 2**30


def dry_run(job: TrainJob) -> dict[str, Any]:
    """Steps, tokens, time and memory of the job, in plain values. Raises UserError if `train` would refuse the job."""
    job = absolute_job(job)
    manifest = read_manifest(job.shards)
    check_sizes(job.shards, manifest)
    finished = finished_bundle(job, manifest) is not None
    refuse_stranger(job.output, BUNDLE_JSON)
    require_writable(job.output)
    newest = check_start(job, manifest)
    model = model_config(newest.cursor) if newest is not None else starting_config(job, manifest)
    if job.sample_every:
        tokenizer = load_tokenizer(locations.local_copy(locations.join(job.shards, TOKENIZER)))
        check_prompts(tokenizer, model, job.sample_prompts, job.sample_tokens)
    if job.decoded_prompts:
        held_out_prompts(
            ShardReader(job.shards, "held_out"), job.decoded_prompts, model.context_len, job.decoded_tokens
        )
    job = precise_job(job, manifest, newest)
    memory = estimated_memory(job, model, manifest.row_len)
    count, learned = parameter_count(model), learned_count(model)
    tokens = job.rows_per_step * manifest.row_len
    return {
        "output": job.output,
        "finished": finished,
        "begins_at_step": newest.cursor.step if newest is not None else 0,
        "from": newest.uri if newest is not None else job.init_from or f"random weights of shape {job.shape}",
        "parameters": count,
        "learned_parameters": learned,
        "steps": job.steps,
        "tokens_per_step": tokens,
        "tokens": tokens * job.steps,
        "epochs": round(job.steps * job.rows_per_step / manifest.splits["train"].rows, 3),
        "warmup_steps": max(1, round(job.warmup * job.steps)),
        "forwards_per_step": job.rows_per_step // (job.row_groups * job.rows_per_forward),
        "workers": job.workers,
        "precision": job.precision,
        "train_step": estimated_step(job, model, manifest.row_len),
        "memory_per_worker_gib": {
            "weights": _gib(memory.weights),
            "gradients": _gib(memory.gradients),
            "optimizer": _gib(memory.optimizer),
            "activations": _gib(memory.activations),
            "total": _gib(memory.total),
            "offloaded": _gib(memory.offloaded),
        },
        "checkpoint_gib": _gib(12 * learned),
        "checkpoints_gib": _gib(
            12
            * learned
            * (job.keep_checkpoints + (job.keep_best if job.validate_every or job.decoded_prompts else 0) + 1)
        ),
    }


def _gib(count: int) -> float:
    return round(count / GIB, 3)

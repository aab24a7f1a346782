"""Checks of a train job before any worker runs."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import Checkpoint, Cursor, find_checkpoint, run_folder, whole_checkpoints
from tidar_core.artifacts.model import bundle_info
from tidar_core.artifacts.model.bundle_info import (
    BUNDLE_JSON,
    BundleInfo,
    DraftsInfo,
    base_location,
    is_bundle,
    model_info,
    read_bundle_info,
    verify_bundle,
)
from tidar_core.artifacts.model.hf_weights import check_weights, require_embeddings
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.shards import Manifest
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.provenance import MADE_BY
from tidar_core.artifacts.text.end_tokens import read_end_tokens
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.config import AdapterConfig, ModelConfig, RopeScaling
from tidar_core.errors import ConfigError
from tidar_core.training.recipe import Recipe, adapted_config, linked_config
from tidar_core.training.sequence_parallel import require_equal_heads, require_equal_runs
from tidar_core.transformer.shapes import named_shape

__all__ = [
    "absolute_job",
    "check_start",
    "finished_bundle",
    "model_config",
    "refuse_other_run",
    "require_drafts_of_start",
    "starting_config",
]

NOT_RECORDED = asdict(Recipe()) | {
    name: TrainJob.model_fields[name].default
    for name in (
        "drafts", "adapter_rank", "adapter_places", "adapter_shifted", "adapter_causal", "link_reads_state",
        "link_shares_tables",
    )
}  # fmt: skip
"""Fields of a run whose checkpoints do not name them, because it began before these fields existed."""


def absolute_job(job: TrainJob) -> TrainJob:
    """The same job with every location absolute: workers run in other folders."""
    changed: dict[str, Any] = {
        name: locations.absolute(getattr(job, name))
        for name in ("shards", "output", "init_from", "drafts_from", "base", "resume_from")
        if getattr(job, name) is not None
    }
    return job.model_copy(update=changed | {"tracking_uri": model_registry.absolute_tracking_uri(job.tracking_uri)})


def finished_bundle(job: TrainJob, manifest: Manifest) -> BundleInfo | None:
    """The bundle at the job's output, if this same job made it from these shards. Raises ConfigError for another."""
    if not locations.exists(locations.join(job.output, BUNDLE_JSON)):
        return None
    info = read_bundle_info(job.output)
    recorded = _recorded_job(job.output)
    if (
        _as_recorded(job.model_dump(mode="json"), recorded) != recorded
        or info.lineage.get("shards") != manifest.identity
    ):
        raise ConfigError(
            f"{job.output} holds the bundle of another job or of other shards; give this one another output, or remove "
            f"{job.output} and {run_folder(job.output)}"
        )
    return info


def _recorded_job(uri: str) -> dict[str, Any]:
    """The job in the made_by.json of a bundle; empty if it holds none, as in a bundle of others."""
    try:
        found = locations.read_json(locations.join(uri, MADE_BY))
    except ValueError:
        return {}
    job = found.get("job") if isinstance(found, dict) else None
    return job if isinstance(job, dict) else {}


def check_start(job: TrainJob, manifest: Manifest) -> Checkpoint | None:
    """The checkpoint that the job goes on from, if there is one.

    Raises an error for shards without rows, for a missing checkpoint or a checkpoint of another run, and for a folder
    without a model. A bundle that is not whole, another tokenizer, and a model or rows that the job cannot train are
    errors as well.
    """
    if manifest.splits["train"].rows == 0:
        raise ConfigError(f"{job.shards} has no train rows; pack more text or lower held_out")
    if job.validate_every and manifest.splits["held_out"].rows == 0:
        raise ConfigError(f"validate_every is {job.validate_every} and {job.shards} has no held-out rows; set it to 0")
    whole = whole_checkpoints(job.checkpoints)
    if not whole and job.resume_from is not None:
        whole = [find_checkpoint(job.resume_from)]
    if whole:
        refuse_other_run(job, whole[-1], manifest)
        _check_fit(job, model_config(whole[-1].cursor), manifest)
        return whole[-1]
    if job.init_from is not None:
        _check_source(job, job.init_from, manifest)
    _check_fit(job, starting_config(job, manifest), manifest)
    if job.init_from is not None:
        folder = locations.local_copy(base_location(job.init_from, model_info(job.init_from)))
        check_weights(folder)
        read_end_tokens(folder, eos_id=manifest.eos_id, vocab_len=manifest.vocab_len)
    return None


def refuse_other_run(job: TrainJob, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Raise ConfigError if the losses would differ from those of the checkpoint's run, had it not stopped."""
    cursor = checkpoint.cursor
    if cursor.shards != manifest.identity:
        raise ConfigError(
            f"{checkpoint.uri} was trained on other shards than {job.shards} holds now; give the job another output, "
            "or the shards it began with"
        )
    adapter = model_config(cursor).adapter
    held = {} if adapter is None else {"link_shares_tables": adapter.link_shares_tables}
    before = {**NOT_RECORDED, **held, **cursor.run}
    for name, value in _as_recorded(job.run, before).items():
        if _plain(before.get(name)) != value:
            raise ConfigError(
                f"{name} is {value} and was {before.get(name)} in the run of {checkpoint.uri}; a run goes on as it "
                "began: set it back, or begin a new run with init_from and another output"
            )
    if cursor.step > job.steps:
        raise ConfigError(f"steps is {job.steps}; {checkpoint.uri} is already at step {cursor.step}; give more steps")


def model_config(cursor: Cursor) -> ModelConfig:
    """Configuration of the model in a checkpoint."""
    values = dict(cursor.model)
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    if values.get("adapter") is not None:
        values["adapter"] = AdapterConfig(**values["adapter"] | {"places": tuple(values["adapter"]["places"])})
    return ModelConfig(**values)


def starting_config(job: TrainJob, manifest: Manifest) -> ModelConfig:
    """Configuration of the model that a new run begins with; its mask token may be added later."""
    if job.shape is not None:
        config = named_shape(job.shape, vocab_len=manifest.vocab_len)
    else:
        assert job.init_from is not None
        config = bundle_info.model_config(job.init_from)
    if job.drafts_from is not None:
        config = require_drafts_of_start(job).config(config)
    if job.adapter is not None:
        config = adapted_config(config, job.adapter)
    elif config.adapter is not None:
        raise ConfigError(
            f"init_from is {job.init_from}, the drafts of a frozen checkpoint, and drafts is whole; give drafts: "
            "adapter, or its checkpoint"
        )
    return config if job.link_rank is None else linked_config(config, job.link_rank)


def require_drafts_of_start(job: TrainJob) -> DraftsInfo:
    """The shape of the drafts that a job starts from.

    Raises ConfigError for a folder without drafts, for drafts of another checkpoint, and for a start that has its own.
    """
    assert job.init_from is not None, "the job checks that it names both"
    assert job.drafts_from is not None
    if bundle_info.model_config(job.init_from).drafting:
        raise ConfigError(f"drafts_from is {job.drafts_from} and {job.init_from} drafts already; leave drafts_from out")
    drafts, found = read_bundle_info(job.drafts_from).drafts, model_info(job.init_from).bundle_hash
    if drafts is None:
        raise ConfigError(
            f"drafts_from is {job.drafts_from}, whose drafts are not of a frozen checkpoint; leave it out"
        )
    if drafts.base_hash != found:
        raise ConfigError(
            f"drafts_from is {job.drafts_from}, trained for the checkpoint {drafts.base_hash[:12]}; {job.init_from} is "
            f"{found[:12]}; give that checkpoint, or leave drafts_from out"
        )
    return drafts


def _as_recorded(fields: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """These fields of a job with the recorded precision, if they leave it to the machine."""
    chosen = {"precision": recorded.get("precision")} if fields["precision"] == "auto" else {}
    return {**fields, **chosen}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _check_fit(job: TrainJob, model: ModelConfig, manifest: Manifest) -> None:
    """Raise an error if this model cannot train on these rows."""
    require_embeddings(model, manifest.vocab_len)
    row_len, dual = manifest.row_len, job.objective == "dual"
    if dual and job.block_len >= row_len:
        raise ConfigError(
            f"block_len is {job.block_len}; rows of {job.shards} have {row_len} tokens, and the first block of a row "
            "is never trained; give shorter blocks, or pack longer rows"
        )
    mask_len = job.recipe.mask_len(row_len, job.block_len) if dual else 0
    require_equal_runs(job.sequence_parallel, row_len, mask_len)
    require_equal_heads(job.sequence_parallel, model.heads)


def _check_source(job: TrainJob, folder: str, manifest: Manifest) -> None:
    if is_bundle(folder):
        verify_bundle(folder)
    elif not locations.exists(locations.join(folder, "config.json")):
        raise ConfigError(f"init_from is {folder}; it has no config.json; give a model folder or a bundle")
    if job.drafts_from is not None:
        verify_bundle(job.drafts_from)
    base = base_location(folder, model_info(folder))
    if job.base is not None and model_info(job.base).bundle_hash != model_info(base).bundle_hash:
        raise ConfigError(
            f"base is {job.base}, whose files differ from those of {base}; give an address of the same checkpoint"
        )
    has_tokenizer = locations.exists(locations.join(base, "tokenizer.json"))
    if has_tokenizer and load_tokenizer(base).fingerprint != manifest.tokenizer:
        raise ConfigError(
            f"{job.shards} were packed with another tokenizer than that of {folder}; pack with the model's own"
        )

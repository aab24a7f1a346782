"""One training worker from start to end.

Rows -> objective -> engine, step after step, from the cursor of the newest checkpoint; then the bundle. It does not
use Ray: `Surroundings` is its interface to the cluster. torch.distributed is up.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipelines.jobs import TrainJob
from pipelines.training.checkpoints import Checkpoint, CheckpointStore, Cursor, find_checkpoint, read_part
from pipelines.training.continuations import check_prompts, continued, held_out_prompts, tokens_per_forward
from pipelines.training.divergence import Health
from pipelines.training.train_engine import TrainEngine, from_rank_0, learning_rate
from pipelines.training.train_metrics import MetricsWindow, loss_metrics
from pipelines.training.train_start import model_config, refuse_other_run, require_drafts_of_start
from tidar_core.artifacts.model.bundle import save_bundle, save_frozen_bundle
from tidar_core.artifacts.model.bundle_info import base_location, model_info, read_bundle_info
from tidar_core.artifacts.model.drafts_file import attach_drafts
from tidar_core.artifacts.model.hf_weights import load_model, with_mask_token
from tidar_core.artifacts.shards import TOKENIZER, Manifest, ShardReader
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.provenance import made_by
from tidar_core.artifacts.text.end_tokens import EndTokens, read_end_tokens
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import ConfigError
from tidar_core.training.dual_mode import TrainBatch
from tidar_core.training.host_memory import keep_freed_memory
from tidar_core.training.losses import LossTotals, dual_mode_loss, label_counts
from tidar_core.training.objective import Objective
from tidar_core.training.recipe import start_draft_adapter, start_draft_link, start_mask_token
from tidar_core.training.row_order import rows_of_step, seeds_of_step
from tidar_core.training.sequence_parallel import SequenceParallel
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["Surroundings", "end_tokens", "starting_model", "train_worker"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Rank of a worker, and the receivers of its reports."""

    rank: int
    world_size: int
    log: Callable[[dict[str, float], int], None]
    """Logs metrics after a number of train steps; called on rank 0 only."""
    keep_text: Callable[[str, str], None]
    """Stores a page: the name of its file, and its text; called on rank 0 only."""


def train_worker(job: TrainJob, around: Surroundings) -> None:
    """Train to the job's last step and, on rank 0, write the bundle."""
    _Worker(job, around).run()


def starting_model(job: TrainJob, manifest: Manifest) -> tuple[TidarModel, str]:
    """The model that training starts from, able to draft, in fp32; and the identity of its source."""
    if job.shape is not None:
        model = TidarModel(named_shape(job.shape, vocab_len=manifest.vocab_len))
        model.init_weights(job.seed)
        return model, f"random weights of shape {job.shape}, seed {job.seed}"
    assert job.init_from is not None
    folder, info = locations.local_copy(job.init_from), model_info(job.init_from)
    model = load_model(locations.local_copy(base_location(folder, info)), mask_id=info.mask_id)
    if job.adapter is not None:
        if job.drafts_from is not None:
            require_drafts_of_start(job)
            folder, info = locations.local_copy(job.drafts_from), read_bundle_info(job.drafts_from)
        if info.drafts is not None:
            attach_drafts(model, folder, info.drafts)
        start_draft_adapter(model, job.adapter, seed=job.seed)
        return model, info.bundle_hash
    if info.mask_id is not None:
        return model, info.bundle_hash
    return with_mask_token(model, manifest.vocab_len, seed=job.seed), job.init_from


def end_tokens(job: TrainJob, manifest: Manifest, checkpoint: Checkpoint | None) -> EndTokens:
    """The end tokens of the model that the run began with."""
    if checkpoint is not None and (kept := checkpoint.cursor.ends) is not None:
        return EndTokens(tuple(kept["ids"]), kept["generation_config"])
    if job.init_from is None:
        return EndTokens((manifest.eos_id,))
    folder = locations.local_copy(base_location(job.init_from, model_info(job.init_from)))
    return read_end_tokens(folder, eos_id=manifest.eos_id, vocab_len=manifest.vocab_len)


def resumed_model(checkpoint: Checkpoint) -> TidarModel:
    """The model of a checkpoint, whose learned weights are not restored yet; a frozen checkpoint's weights are there.

    Raises ConfigError if the frozen checkpoint has changed since.
    """
    config, base = model_config(checkpoint.cursor), checkpoint.cursor.base
    if base is None:
        return TidarModel(config)
    if (found := model_info(base["uri"]).bundle_hash) != base["hash"]:
        raise ConfigError(
            f"{base['uri']} has hash {found[:12]}, and {checkpoint.uri} froze {base['hash'][:12]}; put the checkpoint "
            "back that the run began with"
        )
    model = load_model(locations.local_copy(base["uri"]))
    assert config.adapter is not None, "only the weights under an adapter are frozen"
    start_draft_adapter(model, config.adapter, seed=0)
    if config.link_rank:
        start_draft_link(model, config.link_rank, seed=0)
    return model.train()


class _Worker:
    def __init__(self, job: TrainJob, around: Surroundings) -> None:
        torch.set_num_threads(job.cpus_per_worker)
        if not job.gpus_per_worker:
            keep_freed_memory()
        self.job, self.around = job, around
        self.reader, self.held_out = ShardReader(job.shards), ShardReader(job.shards, "held_out")
        self.manifest = self.reader.manifest
        self.store = CheckpointStore(job.checkpoints, keep_last=job.keep_checkpoints, keep_best=job.keep_best)
        checkpoint = from_rank_0(self._newest_checkpoint() if around.rank == 0 else None)
        self.base: dict[str, str] | None = None
        if checkpoint is None:
            model, self.start = starting_model(job, self.manifest)
            if job.adapter is not None and job.init_from is not None:
                uri = base_location(job.init_from, model_info(job.init_from))
                self.base = {"uri": uri, "hash": model_info(uri).bundle_hash}
            if job.mask_start is not None:
                start_mask_token(model, job.mask_start, seed=job.seed)
            if job.link_rank is not None:
                start_draft_link(model, job.link_rank, seed=job.seed)
        else:
            refuse_other_run(job, checkpoint, self.manifest)
            model, self.start = resumed_model(checkpoint), checkpoint.cursor.start
            self.base = dict(checkpoint.cursor.base) if checkpoint.cursor.base else None
        model.recompute = job.activation_checkpointing
        self.config = model.config
        self.tokenizer = load_tokenizer(locations.local_copy(locations.join(job.shards, TOKENIZER)))
        self.ends = end_tokens(job, self.manifest, checkpoint)
        if job.sample_every:
            check_prompts(self.tokenizer, self.config, job.sample_prompts, job.sample_tokens)
        self.prompts: list[tuple[int, ...]] = []
        if job.decoded_prompts:
            room = self.config.context_len, job.decoded_tokens
            self.prompts = held_out_prompts(self.held_out, job.decoded_prompts, *room)
        dual = job.objective == "dual"
        sharers = job.sequence_parallel
        shared = SequenceParallel.among_neighbours(sharers) if sharers > 1 else None
        self.row_group, self.row_groups = around.rank // sharers, around.world_size // sharers
        ragged = job.gpus_per_worker == 0 and job.zero_stage < 3
        self.objective, self.plain = (  # the second one validates, by the paper's recipe for all jobs
            Objective(model, dual=dual, block_len=job.block_len, recipe=recipe, shared=shared, ragged=ragged)
            for recipe in (job.recipe, None)
        )
        self.engine = TrainEngine(self.objective.train(), job)
        self.done = 0
        if checkpoint is not None:
            self.engine.restore(
                [note.names for note in checkpoint.notes],
                lambda part: read_part(checkpoint, checkpoint.notes[part]),
                checkpoint.cursor.updates,
            )
            self.done = checkpoint.cursor.step
        updates = checkpoint.cursor.updates if checkpoint is not None else 0
        self.health = Health(job, skipped=self.done - updates, finite_step=self.done, logs=around.rank == 0)

    def run(self) -> None:
        """Train from the first step that is not done, and write the bundle."""
        job, window = self.job, MetricsWindow(self.engine, self.job, self.config, first_step=self.done)
        for step in range(self.done + 1, job.steps + 1):
            loss = self._train_step(step - 1, window)
            self.health.observe(step, applied=self.engine.applied, loss=loss)
            last = step == job.steps
            if last or self.health.lost or step % job.log_every == 0:
                self._log(window.close(step, learning_rate(job, step - 1), self.health.skipped), step)
            saves = (last or step % job.checkpoint_every == 0) and self.health.may_save(step)
            if self.health.lost or (last and not saves):
                self.store.wait()
                raise self.health.too_many(step)
            with window.pause():
                validation_loss = None
                if job.validate_every and (saves or step % job.validate_every == 0):
                    validation_loss = self._validate(step)
                if job.sample_every and (last or step % job.sample_every == 0):
                    self._sample(step)
                if saves:
                    self._save(step, validation_loss, self._decode(step) if self.prompts else None)
        self.store.wait()
        dist.barrier()
        if self.prompts:
            self._return_to_best()
        trained = self.engine.gathered_model()
        if trained is not None:
            self.store.prune()
            self._write_bundle(trained)
        dist.barrier()  # no worker may exit, and stop the others, before the bundle is written

    def _newest_checkpoint(self) -> Checkpoint | None:
        self.store.clear_unfinished()
        if (own := self.store.newest()) is not None or self.job.resume_from is None:
            return own
        return find_checkpoint(self.job.resume_from)

    def _train_step(self, step: int, window: MetricsWindow) -> float:
        """Forward, backward and update; the loss summed over the labels of all workers."""
        job, share = self.job, self.job.rows_per_step // self.row_groups
        rows = rows_of_step(step, rows_per_step=job.rows_per_step, rows=len(self.reader), seed=job.seed)
        seeds = seeds_of_step(step, rows_per_step=job.rows_per_step, seed=job.seed)
        batches = []
        for first in range(self.row_group * share, (self.row_group + 1) * share, job.rows_per_forward):
            some = slice(first, first + job.rows_per_forward)
            batches.append(self._batch(self.objective, self.reader, rows[some], seeds[some], step / job.steps))
        counts = torch.stack([torch.stack(label_counts(batch)) for batch in batches]).sum(0)
        ar_count, diffusion_count = self.engine.total(counts)
        self.engine.set_learning_rate(learning_rate(job, step))
        loss = torch.zeros((), device=self.engine.device)
        for batch in batches:
            sums = self.engine.forward(batch)
            self.engine.backward(dual_mode_loss(sums, self.objective.recipe.alpha, ar_count, diffusion_count))
            window.add(sums, batch)
            loss = loss + sums.ar_sum.detach() + sums.diffusion_sum.detach()
        return self.engine.total(loss).item()

    def _batch(
        self,
        objective: Objective,
        reader: ShardReader,
        rows: list[int],
        seeds: list[int] | None = None,
        share: float = 0.0,
    ) -> TrainBatch:
        packed, device = reader.rows(rows), self.engine.device
        trained_BS = None if packed.trained_BS is None else packed.trained_BS.to(device)
        tokens, documents = packed.input_ids_BS.to(device), packed.document_ids_BS.to(device)
        return objective.batch(tokens, documents, trained_BS, seed_B=seeds, share=share)

    @torch.no_grad()
    def _validate(self, step: int) -> float | None:
        """The weighted loss on held-out rows; None if no row has a label. Workers take groups in turn.

        Raises DivergedError for a loss that is not finite.
        """
        rows = list(range(min(self.job.validation_rows, len(self.held_out))))
        groups = [rows[i : i + self.job.rows_per_forward] for i in range(0, len(rows), self.job.rows_per_forward)]
        totals = LossTotals(self.job.block_len, self.engine.device)
        for first in range(0, len(groups), self.row_groups):
            mine = first + self.row_group
            sums = self.engine.forward(self._batch(self.plain, self.held_out, groups[min(mine, len(groups) - 1)]))
            if mine < len(groups):  # an extra forward: under ZeRO 3, every worker must take part in each forward
                totals.add(sums)
        means = loss_metrics(totals.means(self.engine.total(totals.parts)))
        alpha, ar_loss, loss = self.objective.recipe.alpha, means.get("ar_loss"), means.get("diffusion_loss")
        if ar_loss is not None:
            loss = ar_loss if loss is None else (alpha * ar_loss + loss) / (1 + alpha)
        logged = {f"validation_{name}": value for name, value in means.items()}
        self._log(logged if loss is None else logged | {"validation_loss": loss}, step)
        if loss is not None and not math.isfinite(loss):
            self.store.wait()
            raise self.health.diverged(step, f"the validation loss is {loss}")
        return loss

    def _sample(self, step: int) -> None:
        model = self.engine.gathered_model()
        if model is not None:
            continuations = continued(
                model.to(self.engine.device), self.tokenizer, self.job.sample_prompts, block_len=self.job.block_len,
                max_tokens=self.job.sample_tokens, end_ids=self.ends.ids, drafts=self.job.objective == "dual",
            )  # fmt: skip
            self.around.keep_text(f"samples/step-{step:08d}.md", continuations.page(step))
            self._log({"sample_tokens_per_forward": continuations.tokens_per_forward}, step)

    def _decode(self, step: int) -> float | None:
        """Tokens per forward of the held-out prompts. Rank 0 decodes; every worker must call."""
        job, model, found = self.job, self.engine.gathered_model(), None
        if model is not None:
            model = model.to(self.engine.device)
            found = tokens_per_forward(
                model, self.prompts, block_len=job.block_len, max_tokens=job.decoded_tokens, end_ids=self.ends.ids
            )
            self._log({"held_out_tokens_per_forward": found}, step)
        return from_rank_0(found)

    def _return_to_best(self) -> None:
        """Load the weights of the checkpoint that decoded best, unless they are the present ones."""
        best = from_rank_0(self.store.best() if self.around.rank == 0 else None)
        if best is None or best.cursor.step == self.job.steps:
            return
        logger.info(
            "the bundle holds the weights of train step %d: %.2f tokens per forward, the most of all checkpoints",
            best.cursor.step, best.cursor.tokens_per_forward,
        )  # fmt: skip
        self.engine.restore(
            [note.names for note in best.notes], lambda part: read_part(best, best.notes[part]), best.cursor.updates
        )

    def _save(self, step: int, validation_loss: float | None, tokens_per_forward: float | None) -> None:
        cursor = Cursor(
            step=step, updates=self.engine.updates, run=self.job.run, shards=self.manifest.identity, start=self.start,
            model=asdict(self.config), validation_loss=validation_loss, tokens_per_forward=tokens_per_forward,
            ends=asdict(self.ends), base=self.base,
        )  # fmt: skip
        self.store.write(self.engine.share_of_state(), cursor, part=self.around.rank, parts=self.around.world_size)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        if self.around.rank == 0:
            self.around.log(metrics, step)

    def _write_bundle(self, model: TidarModel) -> None:
        parents: dict[str, Any] = {"shards": self.manifest.identity, "start": self.start}
        made = made_by(self.job.model_dump(mode="json"), parents)
        if self.base is not None:
            save_frozen_bundle(
                self.job.output, model, self.base["uri"], block_len=self.job.block_len, lineage=parents, made_by=made,
                base_uri=self.job.base,
            )  # fmt: skip
            return
        mask_id = model.config.mask_id
        assert mask_id is not None
        save_bundle(
            self.job.output, model, self.tokenizer, block_len=self.job.block_len, mask_id=mask_id,
            objective=self.job.objective, lineage=parents,
            made_by=made, ends=self.ends,
        )  # fmt: skip

"""Experiments: variants of the recipe compared at equal budget.

    python -m pipelines.research.experiments infra/experiments/masking.yaml [--shape quickstart-small]

Every variant starts from the same bundle, or as an AR model of its own size trained on the same rows. It reads the
same rows in the same steps, and is measured on the same held-out text. Files with `token_slots` measure the cost of a
forward (`pipelines.research.token_slots`). A finished run is kept in `runs` beside the output. A stopped experiment
goes on with the next run, and two experiments share a run that both contain. The output is results.json, table.md and
plot.png.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, ValidationError, model_validator

from pipelines.evaluation.plots import experiment_plot
from pipelines.jobs import Job, TrainJob, read_job
from pipelines.research.token_slots import TokenSlotsJob, token_slots
from tidar_core.artifacts.model.bundle import DTYPES, load_bundle
from tidar_core.artifacts.shards import ShardReader
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.yaml_file import read_mapping
from tidar_core.config import SamplingConfig
from tidar_core.errors import ConfigError, ShardError, TidarError
from tidar_core.planning.mode_benchmark import compare_modes
from tidar_core.training.packing import PackedRows
from tidar_core.training.recipe import Recipe, start_draft_link, start_mask_token
from tidar_core.training.schedule import Schedule
from tidar_core.training.trainer import Optimisation, Phase, Progress, Trainer
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

__all__ = ["ExperimentJob", "experiment"]

Positive = Annotated[int, Field(ge=1)]
AR_SEED = 1000
"""Added to the seed in the AR phase, so that the two phases read the rows in different orders."""


class ExperimentJob(Job):
    """A bundle + shards -> one trained model per variant and seed, a table and a plot."""

    title: str
    shards: str
    init_from: str | None = None
    """Bundle that every variant without a `shape` starts from."""
    ar_steps: Annotated[int, Field(ge=0)] = 0
    """AR train steps from random weights before the variant's own, by the same schedule, if the variant has a `shape`
    (its own or by `--shape`)."""
    output: str
    train: dict[str, Any]
    """Keys of a train job that all variants share."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> keys of a train job in which the variant differs."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of rows and draws; a difference must exceed the range over seeds."""
    decode_lens: tuple[Positive, ...] = ()
    """Block lengths to decode with; empty: each variant's own."""
    prompts: Positive = 16
    prompt_len: Positive = 32
    max_tokens: Positive = 64
    held_out_rows: Positive = 128
    threads: Positive = 2
    device: str = "cpu"

    @model_validator(mode="after")
    def jobs_are_whole(self) -> Self:
        """Every variant is a train job."""
        for name in self.variants:
            try:
                self.job(name, self.seeds[0] if self.seeds else 0)
            except ValidationError as error:
                found = error.errors()[0]
                key = ".".join(map(str, found["loc"]))
                raise ValueError(f"variant {name!r}: {key + ': ' if key else ''}{found['msg']}") from error
        if auto := [name for name in self.variants if self.job(name, 0).precision == "auto"]:
            raise ValueError(f"variant {auto[0]!r}: precision is auto; variants are compared in one: give fp32 or bf16")
        return self

    def job(self, variant: str, seed: int) -> TrainJob:
        """The train job of a variant."""
        own = {"shards": self.shards, "output": self.output, "seed": seed, "precision": "bf16"}
        own |= self.train | self.variants[variant]
        return TrainJob.model_validate(own if "shape" in own else own | {"init_from": self.init_from})

    def on(self, shape: str) -> Self:
        """The same experiment at another size: each variant first trains an AR model of this shape."""
        if taken := [name for name, keys in self.variants.items() if "shape" in keys]:
            raise ConfigError(f"variant {taken[0]!r} has a shape of its own; run this file without --shape")
        if not self.ar_steps:
            raise ConfigError("--shape needs ar_steps, which this file does not have; add it, 200 for instance")
        return type(self).model_validate(
            self.model_dump()
            | {"title": f"{self.title}, {shape}", "output": f"{self.output}-{shape}", "init_from": None}
            | {"variants": {name: {"shape": shape} | keys for name, keys in self.variants.items()}}
        )

    def run_name(self, variant: str, seed: int) -> str:
        """Name of a run's file. Every other setting gives another name; a new field of jobs does not.

        A field of the recipe is a setting if its value is not the paper's.
        """
        unused = set() if "shape" in self.variants[variant] else {"ar_steps"}
        settings = self.model_dump(mode="json", exclude={"title", "variants", "seeds", "output", "threads", *unused})
        job, papers = self.job(variant, seed), asdict(Recipe())
        settings |= job.model_dump(mode="json", exclude={"output", *papers}, exclude_defaults=True)
        settings |= {name: value for name, value in asdict(job.recipe).items() if value != papers[name]}
        return hashlib.sha256(locations.canonical_json(settings).encode()).hexdigest()[:16]


def experiment(job: ExperimentJob) -> list[dict[str, Any]]:
    """Train and measure the runs that are missing; write table and plot. Returns an entry per variant and seed."""
    torch.set_num_threads(job.threads)
    output, runs = Path(job.output), Path(job.output).parent / "runs"
    for folder in (output, runs):
        folder.mkdir(parents=True, exist_ok=True)
    train, held_out = (ShardReader(job.shards, split) for split in ("train", "held_out"))
    rows = train.rows(range(len(train)))
    unseen = held_out.rows(range(min(job.held_out_rows, len(held_out))))
    found = []
    for seed in job.seeds:
        for variant in job.variants:
            kept = runs / f"{job.run_name(variant, seed)}.json"
            if not kept.exists():
                measured = _run(job, job.job(variant, seed), variant, rows, unseen)
                locations.write_json(str(kept), {"variant": variant, "seed": seed, **measured})
            found.append(json.loads(kept.read_text()) | {"variant": variant})
    (output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (output / "table.md").write_text(table(found))
    (output / "plot.png").write_bytes(experiment_plot(job.title, found))
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown table: a line for each variant and block length of decoding; means over seeds (least to most)."""
    lines = [
        "| variant | steps | AR loss | diffusion loss | second draft right | decoded with K | tokens per forward |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(run["variant"] for run in found):
        runs = [run for run in found if run["variant"] == variant]
        for block_len in runs[0]["tokens_per_forward"]:
            cells = (
                f"{runs[0]['steps']}",
                _mean([run["ar_loss"] for run in runs], 3), _mean([run["diffusion_loss"] for run in runs], 3),
                _mean([run["draft_accuracy"][min(1, len(run["draft_accuracy"]) - 1)] for run in runs], 3), block_len,
                _mean([run["tokens_per_forward"][block_len] for run in runs], 3),
            )  # fmt: skip
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; prints its table on standard output and progress on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.research.experiments", description=__doc__.splitlines()[0]
    )
    parser.add_argument("job", help="a file of infra/experiments")
    parser.add_argument("--shape", help="start from random weights of this shape, trained as an AR model first")
    given = parser.parse_args(arguments)
    try:
        if "token_slots" in read_mapping(given.job, "experiment", "infra/experiments/*.yaml"):
            if given.shape:
                raise ConfigError("--shape is given, and token slots are those of a bundle; name it in the file")
            print(token_slots(read_job(TokenSlotsJob, given.job)))
            return 0
        job = read_job(ExperimentJob, given.job)
        print(table(experiment(job.on(given.shape) if given.shape else job)))
    except TidarError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(job: ExperimentJob, train: TrainJob, variant: str, rows: PackedRows, unseen: PackedRows) -> dict[str, Any]:
    """Train one variant and measure it."""
    dtype = DTYPES[train.precision]
    schedule = Schedule(peak=train.learning_rate, minimum=train.min_learning_rate, warmup=train.warmup)

    def trainer_of(model: TidarModel) -> Trainer:
        optimisation = Optimisation(betas=train.adam_betas, weight_decay=train.weight_decay, clip_norm=train.clip_norm)
        model = model.to(job.device, dtype).train()
        return Trainer(model, block_len=train.block_len, optimisation=optimisation, compiled=job.device != "cpu")

    def phase(dual: bool, steps: int, seed: int) -> Phase:
        return Phase(
            dual=dual, schedule=schedule, rows_per_step=train.rows_per_step, rows_per_forward=train.rows_per_forward,
            steps=steps, recipe=train.recipe, seed=seed, report_every=max(1, steps // 10),
        )  # fmt: skip

    def report(progress: Progress) -> None:
        losses = progress.losses
        measured = {"AR": losses.ar_loss, "diffusion": losses.diffusion_loss}
        shown = [f"{name} loss {loss:.3f}" for name, loss in measured.items() if loss is not None]
        print(
            f"{variant}, seed {train.seed}: {progress.tokens:,} tokens, {', '.join(shown)}, "
            f"{progress.eta_seconds:.0f} s left",
            file=sys.stderr,
        )

    model = _start(train)
    if train.shape is not None and job.ar_steps:
        trainer_of(model).train(phase(False, job.ar_steps, AR_SEED + train.seed), rows, report)
    if train.mask_start is not None:
        start_mask_token(model, train.mask_start, seed=train.seed)
    if train.link_rank is not None:
        start_draft_link(model, train.link_rank, seed=train.seed)
    trainer = trainer_of(model)
    done = trainer.train(phase(train.objective == "dual", train.steps, train.seed), rows, report)
    means = trainer.evaluate(unseen, rows_per_forward=train.rows_per_forward)
    if means.diffusion_loss is None:
        raise ShardError(f"the held-out rows of {job.shards} have no document longer than a block; pack longer ones")
    model.float().eval()
    return {
        "steps": train.steps,
        "clean_tokens": done.tokens,
        "seconds": done.seconds,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "block_len": train.block_len,
        "ar_loss": means.ar_loss,
        "diffusion_loss": means.diffusion_loss,
        "draft_accuracy": means.draft_accuracy_K,
        "tokens_per_forward": dict(_decoded(job, trainer, unseen, job.decode_lens or (train.block_len,))),
    }


def _start(train: TrainJob) -> TidarModel:
    if train.shape is None:
        assert train.init_from is not None
        return load_bundle(train.init_from).model
    model = TidarModel(named_shape(train.shape, vocab_len=ShardReader(train.shards).manifest.vocab_len))
    model.init_weights(train.seed)
    return model


def _decoded(
    job: ExperimentJob, trainer: Trainer, unseen: PackedRows, block_lens: Sequence[int]
) -> Iterator[tuple[str, float]]:
    """Tokens per forward of greedy single-pass texts that continue the first held-out rows, by block length."""
    prompts = [tuple(row) for row in unseen.input_ids_BS[: job.prompts, : job.prompt_len].tolist()]
    for block_len in block_lens:
        modes = compare_modes(
            trainer.model, prompts, SamplingConfig(max_tokens=job.max_tokens), block_len=block_len,
            batch=len(prompts), repeats=1, modes=("single-pass",),
        )  # fmt: skip
        yield str(block_len), modes["single-pass"].tokens_per_forward


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    raise SystemExit(main())

"""Job files: their keys, defaults and checks.

A job is YAML read into a frozen model. Unknown keys are errors, so that a misspelt key never becomes a default. All
locations are URIs or local paths (see tidar_core/artifacts/store/locations.py).
"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tidar_core.artifacts.store.yaml_file import read_mapping
from tidar_core.config import ADAPTER_PLACES, AdapterConfig
from tidar_core.errors import ConfigError
from tidar_core.training.recipe import ADAPTER_RECIPE, Recipe

__all__ = ["Job", "PackJob", "Positive", "Source", "TrainBpe", "TrainJob", "read_job"]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Documents = Literal["text", "conversations"]


class Job(BaseModel):
    """Base of all job files: frozen; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainBpe(Job):
    """Train a byte-level BPE tokenizer on the corpus itself."""

    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Tokens of the tokenizer, the end-of-text token included."""
    max_bytes: Positive = 64 * 2**20
    """Text read for training, from the start of every file in turn."""


class Source(Job):
    """One corpus of a mixture."""

    path: str
    """File, folder (searched recursively) or glob; local, file:// or s3://."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Passes over its documents. With 2, `train` holds each document twice. With 0.3, it holds about three in ten of
    them, chosen by the hash of the text. With 2.3, it holds each twice, and three in ten a third time. `held_out` holds
    each document once for any weight."""
    documents: Documents | None = None
    """Default: the job's."""
    text_field: str | None = None
    """Default: the job's."""


class PackJob(Job):
    """Corpus -> packed shards.

    The shards follow from the corpus, the tokenizer and the keys below, except `unit_bytes` and `workers`.
    A job that was killed goes on from its finished tasks when it is started again.
    """

    corpus: Annotated[
        Annotated[str, Tag("path")] | Annotated[tuple[Source, ...], Tag("source")],
        Discriminator(lambda given: "path" if isinstance(given, str) else "source"),
    ]
    """File, folder (searched recursively) or glob; or a mixture, a list of sources. Local, file:// or s3://."""
    output: str
    """Folder for the shards; local, file:// or s3://."""
    tokenizer: str | TrainBpe
    """Folder of a Hugging Face tokenizer, or how to train one."""
    include: tuple[str, ...] = ("*.txt", "*.md", "*.jsonl", "*.ndjson", "*.parquet")
    """File-name patterns read from a folder; each also matches with .gz or .zst appended, and with suffixes in upper
    case. The part before a compression suffix gives the format. .jsonl, .ndjson and .parquet have one document an
    entry; any other file is one document. Links are followed."""
    exclude: tuple[str, ...] = ()
    """Patterns of file and folder names to leave out; everything below such a folder is left out too."""
    documents: Documents = "text"
    """`text`: each has one text, in its own file or under `text_field`, and every token is trained.
    `conversations`: entries of JSON lines or Parquet with `messages` (and perhaps `tools`), or with `prompt` and
    `response`. The tokenizer's chat template renders them, and only the assistant's tokens are trained. Entries that
    cannot be used are left out and counted in the manifest, and the first are named."""
    text_field: str = "text"
    """Key or column that holds the text."""
    dedup: bool = False
    """Leave out every document whose text an earlier document has, in the order of sources, files and entries. A
    document that its source's weight leaves out does not count as earlier. Of equal documents, the first taken document
    stays, as often as its own source's weight gives."""
    row_len: Positive = 4096
    """Tokens in a packed row (S)."""
    rows_per_shard: Positive = 8192
    held_out: Fraction = 0.01
    """Share of documents kept for evaluation, chosen by the hash of the text: equal texts are on the same side."""
    unit_bytes: Positive = 16 * 2**20
    """Input of one task. Does not change the output."""
    workers: Positive = 2
    """Tasks at a time, one core each. Does not change the output."""

    @model_validator(mode="after")
    def some_source(self) -> Self:
        """Check that there is at least one source."""
        if not self.corpus:
            raise ValueError(f"corpus is {self.corpus!r}; give a path, or a list of sources with a path each")
        return self

    @property
    def sources(self) -> tuple[Source, ...]:
        """The corpus as a mixture, each source with the defaults of the job."""
        given = (Source(path=self.corpus),) if isinstance(self.corpus, str) else self.corpus
        own = {"documents": self.documents, "text_field": self.text_field}
        return tuple(source.model_copy(update=own | source.model_dump(exclude_none=True)) for source in given)


NOT_OF_THE_RUN = {
    "shards", "output", "init_from", "drafts_from", "base", "shape", "resume_from", "mask_start", "steps",
    "rows_per_forward", "workers", "sequence_parallel", "gpus_per_worker", "cpus_per_worker", "zero_stage",
    "offload_optimizer", "activation_checkpointing",
    "checkpoint_every", "keep_checkpoints", "keep_best", "decoded_prompts", "decoded_tokens",
    "validate_every", "validation_rows", "sample_every",
    "sample_prompts", "sample_tokens", "max_failures", "max_skipped_updates", "log_every", "system_metrics_every",
    "peak_flops", "tracking_uri", "experiment",
}  # fmt: skip
"""Fields of a train job that may differ between the parts of a run; `steps` moves the schedule's end."""


class TrainJob(Job):
    """Packed shards (+ a start) -> checkpoints and a bundle.

    A job begins with exactly one of `init_from`, `shape` and `resume_from`. The first two begin a new run, from
    weights. `resume_from` continues a run, from its weights, moments and place in the data. A job that was stopped or
    killed continues by itself when it is started again: a checkpoint in `<output>.run` comes before any of the three.
    """

    shards: str
    output: str
    """Folder for the bundle; checkpoints lie beside it, in `<output>.run`."""
    objective: Literal["ar", "dual"] = "dual"
    init_from: str | None = None
    """Hugging Face folder or bundle to start from."""
    shape: str | None = None
    """Named shape to start from random weights instead; see `tidar_core.transformer.shapes`."""
    resume_from: str | None = None
    """Checkpoint to go on from, `.../checkpoints/step-00000500`, or a run, `OUTPUT.run`, for its newest.
    Every field that changes the losses must be as it was. `steps`, the number of workers, the ZeRO stage and other
    fields outside the run may differ."""
    drafts: Literal["whole", "adapter"] = "whole"
    """`whole`: all weights are trained, in both modes, as in the paper. `adapter`: the checkpoint of `init_from` stays
    as it is, bit for bit, and an adapter of its mask tokens is trained (`tidar_core.transformer.draft_adapter`)."""
    drafts_from: str | None = None
    """Folder of drafts that training starts from: a bundle, or tidar.json and the drafts of one without the rest. They
    must have been trained for the same checkpoint, in the shape that this job names."""
    adapter_rank: Positive = 32
    """Rank of the adapter's maps: about a sixteenth of the model's width."""
    adapter_places: tuple[str, ...] = ADAPTER_PLACES
    """Linear maps of each layer that have an adapter."""
    adapter_shifted: bool = False
    """Whether masks have the rotary phase of the position before theirs, and so predict the next token as the
    checkpoint's own tokens do."""
    adapter_causal: bool = False
    """Whether masks of an adapter see no later mask of their block, as the checkpoint's own tokens see no later one."""
    link_reads_state: bool = False
    """Whether the link of an adapter reads the mask's hidden state beside the token before it (arXiv 2507.11851)."""
    link_shares_tables: bool = True
    """Whether the tables of an adapter's link are maps of the checkpoint's own embedding table and head. Otherwise the
    link has tables of its own, with a row for each token of the vocabulary."""
    base: str | None = None
    """Address of the checkpoint's files, which the bundle of an adapter names instead of holding a copy of them."""
    block_len: Positive = 16
    """K of the diffusion half."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the AR loss against the diffusion loss (TiDAR, equation 3)."""
    random_phase: bool = True
    visits: Positive = 1
    masking: Literal["full", "random"] = "full"
    block_lens: tuple[Positive, ...] = ()
    position_weights: Literal["flat", "exponential", "dpace"] | None = None
    position_decay: float | None = None
    dpace_after: float = 0.1
    first_weight: float | None = None
    distillation: float | None = None
    unlinked: float | None = None
    consistency: float = 0.0
    block_share: float = 1.0
    mask_start: Literal["mean", "normal", "zero"] | None = None
    link_rank: Positive | None = None
    """The fields from `random_phase` on: see `tidar_core.training.recipe.Recipe`. The defaults are the paper's, but for
    the phase; with `drafts: adapter`, they are those of `ADAPTER_RECIPE` there."""
    steps: Positive
    """Train steps (optimiser updates) in all."""
    rows_per_step: Positive
    """Global batch in rows, for any number of workers."""
    rows_per_forward: Positive = 8
    """Rows in one forward of one worker; the rest is accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    min_learning_rate: Annotated[float, Field(ge=0)] = 3e-6
    warmup: Fraction = 0.01
    """Share of the steps spent on linear warm-up, before the cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 on GPUs; on a CPU the faster of both, timed before the start. A continued run keeps its own."""
    seed: int = 0
    workers: Positive = 1
    sequence_parallel: Positive = 1
    """Workers that share each row, with a run of its tokens each. It must divide `workers`, the row length and the
    model's heads. It reduces the memory that a long row needs on each worker. `rows_per_step` counts shared rows
    once."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Positive = 1
    zero_stage: Literal[1, 2, 3] = 1
    """State divided among workers: 1: the optimizer's, 2: also gradients, 3: also weights."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Place of the optimizer's state and update: beside the weights, or in the machine's memory."""
    activation_checkpointing: bool = False
    """Keep only each layer's input; the backward pass computes the rest again."""
    checkpoint_every: Positive = 500
    """Train steps between checkpoints, a multiple of `log_every`; the last step is always one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that stay."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Best checkpoints that stay as well: by decoding if it is measured, else by validation loss."""
    decoded_prompts: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts that each checkpoint continues greedily. The bundle then has the weights of the checkpoint with
    the most tokens per forward. 0: none, and the bundle has the last weights. Teacher-forced accuracy ranks drafts
    wrongly (docs/decisions/0008)."""
    decoded_tokens: Positive = 64
    """Most tokens of each of these continuations."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Train steps between validations on held-out rows; then every checkpoint is validated too. 0: none."""
    validation_rows: Positive = 256
    """Held-out rows of a validation, at most."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Train steps between continuations of `sample_prompts`, kept with the MLflow run. 0: none."""
    sample_prompts: tuple[str, ...] = ("Once upon a time", "def main():\n    ", "The answer is")
    sample_tokens: Positive = 64
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures survived before the job gives up."""
    max_skipped_updates: Positive = 10
    """Train steps in a row without a finite loss and gradient, whose updates are skipped, before the run stops."""
    log_every: Positive = 10
    system_metrics_every: Annotated[float, Field(ge=0)] = 10
    """Seconds between measurements of each machine's load, memory, disk and GPUs. 0: none."""
    peak_flops: Annotated[float, Field(gt=0)] | Literal["measure"] | None = None
    """Operations per second that a worker's device can do, for MFU; `measure` times a matrix product at the start.
    `None`: no MFU."""
    tracking_uri: str = "sqlite:///mlflow.db"
    experiment: str = "tidar"

    @property
    def run(self) -> dict[str, Any]:
        """Fields that determine the losses, except shards and start; a continued run must not change them."""
        recipe = self.recipe
        given = self.model_dump(mode="json", exclude=NOT_OF_THE_RUN)
        return {name: getattr(recipe, name, None) if value is None else value for name, value in given.items()}

    @property
    def recipe_fields(self) -> dict[str, Any]:
        """Fields of the recipe that are not the job's defaults, except `alpha`, which is of both halves."""
        given = {name: getattr(self, name) for name in Recipe.__dataclass_fields__ if name != "alpha"}
        return {name: value for name, value in given.items() if value != type(self).model_fields[name].default}

    @property
    def checkpoints(self) -> str:
        """Folder of this job's checkpoints."""
        return f"{self.output.rstrip('/')}.run/checkpoints"

    @property
    def row_groups(self) -> int:
        """Number of workers; workers that share rows are counted once."""
        return self.workers // self.sequence_parallel

    @property
    def adapter(self) -> AdapterConfig | None:
        """Shape of the adapter, if the job trains one."""
        if self.drafts == "whole":
            return None
        return AdapterConfig(
            rank=self.adapter_rank, block_len=self.block_len, places=self.adapter_places,
            shifted=self.adapter_shifted, causal=self.adapter_causal, link_reads_state=self.link_reads_state,
            link_shares_tables=self.link_shares_tables,
        )  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        """Recipe of the doubled row and its losses."""
        of_kind = ADAPTER_RECIPE if self.drafts == "adapter" else {}
        given = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        return Recipe(**of_kind | {name: value for name, value in given.items() if value is not None})

    @model_validator(mode="after")
    def one_recipe(self) -> Self:
        """Check that the recipe is valid, and that the objective has a mask half if a recipe is given."""
        try:
            self.recipe.checked(self.block_len)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.objective == "ar" and self.recipe_fields:
            given = ", ".join(f"{name}: {value}" for name, value in self.recipe_fields.items())
            raise ValueError(f"objective is ar and the recipe {given}; only objective: dual has one; leave it out")
        return self

    @model_validator(mode="after")
    def one_kind_of_drafts(self) -> Self:
        """Check that the fields fit the kind of drafts that the model learns."""
        kind = type(self).model_fields
        of_adapters = (
            "drafts_from",
            "adapter_rank",
            "adapter_places",
            "adapter_shifted",
            "adapter_causal",
            "link_reads_state",
            "link_shares_tables",
            "base",
        )
        given = [name for name in (*of_adapters, "alpha", "mask_start", "shape")
                 if getattr(self, name) != kind[name].default]  # fmt: skip
        try:
            if self.adapter is not None:
                self.recipe.frozen()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        for name in given:
            if (name in of_adapters) == (self.drafts == "whole"):
                raise ValueError(f"{name} is given and drafts is {self.drafts}, which has no use for it; leave it out")
        if self.drafts_from is not None and self.init_from is None:
            raise ValueError(f"drafts_from is {self.drafts_from} and there is no init_from; give the checkpoint")
        if self.link_reads_state and self.link_rank is None:
            raise ValueError("link_reads_state is true and there is no link_rank; give the rank of the link")
        if self.adapter is not None and self.objective == "ar":
            raise ValueError("objective is ar and drafts is adapter, which trains drafts alone; give objective: dual")
        return self

    @model_validator(mode="after")
    def best_by_decoding(self) -> Self:
        """Check that a run which decodes at its checkpoints has drafts, and keeps the best checkpoint."""
        if self.decoded_prompts and self.objective == "ar":
            raise ValueError("decoded_prompts is given and objective is ar, which trains no drafts; leave it out")
        if self.decoded_prompts and not self.keep_best:
            raise ValueError("decoded_prompts is given and keep_best is 0; give 1, so that the best checkpoint stays")
        return self

    @model_validator(mode="after")
    def one_start(self) -> Self:
        """Check for one start, a global batch that divides among workers, and logs that do not depend on stops."""
        starts = {name: getattr(self, name) for name in ("init_from", "shape", "resume_from")}
        if sum(start is not None for start in starts.values()) != 1:
            given = " and ".join(f"{name} {start!r}" for name, start in starts.items() if start is not None)
            raise ValueError(
                f"{given or 'no start'} given; give one of them: init_from, a folder of weights, or shape, for random "
                "ones, begin a new run; resume_from lets a run go on"
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every}; it must be a multiple of log_every, {self.log_every}, "
                "so that a resumed run logs what an unbroken one does"
            )
        if self.workers % self.sequence_parallel:
            raise ValueError(f"sequence_parallel is {self.sequence_parallel}; it must divide workers, {self.workers}")
        if self.rows_per_step % (self.row_groups * self.rows_per_forward):
            raise ValueError(
                f"rows_per_step is {self.rows_per_step}; it must be a multiple of workers x rows_per_forward = "
                f"{self.row_groups} x {self.rows_per_forward}"
                + (", workers that share rows counted once" if self.sequence_parallel > 1 else "")
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}; it must not exceed learning_rate {self.learning_rate}"
            )
        return self


J = TypeVar("J", bound=Job)


def read_job(kind: type[J], path: str | Path) -> J:
    """The job in the YAML file at `path`. Raises ConfigError with one line that names every wrong key."""
    values = read_mapping(path, "job file", "infra/jobs/*.yaml")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"job file {path}: {'; '.join(_in_words(e, kind) for e in error.errors())}") from error


def _in_words(error: ErrorDetails, kind: type[Job]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        where = Source if key.startswith("corpus.source.") else kind
        return f"unknown key {key!r}; {where.__name__} knows {', '.join(where.model_fields)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; add it"
    if not key:
        return error["msg"].removeprefix("Value error, ")
    return f"{key} is {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"

"""What does a job file say, and when is it refused?

A job is YAML read into a frozen model; unknown keys are errors, so that a misspelt one never becomes a default.
All locations are URIs or local paths (see tidar_core/artifacts/locations.py).
"""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tidar_core.errors import ConfigError

__all__ = ["EvaluateJob", "Job", "PackJob", "PublishJob", "TrainBpe", "TrainJob", "read_job"]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Job(BaseModel):
    """What all job files share: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainBpe(Job):
    """Train a byte-level BPE tokenizer on the corpus itself."""

    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Tokens of the tokenizer, the end-of-text token included."""
    max_bytes: Positive = 64 * 2**20
    """Text read for training, from the start of every file in turn."""


class PackJob(Job):
    """Corpus -> packed shards."""

    corpus: str
    """File, folder (searched recursively) or glob."""
    output: str
    tokenizer: str | TrainBpe
    """Folder of a Hugging Face tokenizer, or how to train one."""
    include: tuple[str, ...] = ("*.txt", "*.md", "*.jsonl", "*.parquet")
    """File-name patterns read from a folder; each also matches with .gz or .zst appended. The part before a
    compression suffix says the format: .jsonl and .parquet have one document a row, anything else one a file."""
    exclude: tuple[str, ...] = ()
    """Patterns of file and folder names that are left out, with all that is below such a folder."""
    text_field: str = "text"
    row_len: Positive = 4096
    """Tokens in a packed row (S)."""
    rows_per_shard: Positive = 8192
    held_out: Fraction = 0.01
    """Share of documents kept for evaluation, chosen by the hash of the text."""
    unit_bytes: Positive = 16 * 2**20
    """Input handled by one task. Does not change the output."""
    workers: Positive = 2
    """Tokenizer actors. Does not change the output."""


class TrainJob(Job):
    """Packed shards (+ a start) -> checkpoints and a bundle."""

    shards: str
    output: str
    """Folder for the bundle; checkpoints lie beside it, in `<output>.run`."""
    objective: Literal["ar", "dual"] = "dual"
    init_from: str | None = None
    """Hugging Face folder or bundle to start from."""
    shape: str | None = None
    """Named shape to start from random weights instead; see `tidar_core.shapes`."""
    block_len: Positive = 16
    """K of the diffusion half."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the AR loss against the diffusion loss (TiDAR, equation 3)."""
    steps: Positive
    """Train steps (optimiser updates) in all."""
    rows_per_step: Positive
    """Global batch, in rows, whatever the number of workers."""
    rows_per_forward: Positive = 8
    """Rows in one forward of one worker; the rest is accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    min_learning_rate: Annotated[float, Field(ge=0)] = 3e-6
    warmup: Fraction = 0.01
    """Share of the steps spent on linear warm-up, before the cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: int = 0
    workers: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    cpus_per_worker: Positive = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    checkpoint_every: Positive = 500
    """Train steps between checkpoints; the last step is always one."""
    keep_checkpoints: Positive = 2
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures survived before the job gives up."""
    log_every: Positive = 10
    tracking_uri: str = "sqlite:///mlflow.db"
    experiment: str = "tidar"

    @model_validator(mode="after")
    def one_start(self) -> Self:
        """Exactly one of `init_from` and `shape`; a global batch that the workers can share."""
        if (self.init_from is None) == (self.shape is None):
            raise ValueError(
                f"init_from is {self.init_from!r} and shape is {self.shape!r}; give one of them: a folder to start "
                "from, or the name of a shape for random weights"
            )
        if self.rows_per_step % (self.workers * self.rows_per_forward):
            raise ValueError(
                f"rows_per_step is {self.rows_per_step}; it must be a multiple of workers x rows_per_forward = "
                f"{self.workers} x {self.rows_per_forward}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}; it must not exceed learning_rate {self.learning_rate}"
            )
        return self


class EvaluateJob(Job):
    """Bundle + held-out shards -> report."""

    bundle: str
    shards: str
    output: str
    prompts: Positive = 16
    """Held-out documents whose beginnings are continued, greedily, by TiDAR and by the AR mode."""
    prompt_len: Positive = 64
    max_tokens: Positive = 128
    batch: Positive = 4
    """Prompts decoded together."""
    loss_rows: Positive = 128
    """Held-out rows that the losses are averaged over, at most."""
    repeats: Positive = 3
    """Times that each mode continues the prompts, for the speeds."""
    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Positive = 1


class PublishJob(Job):
    """Bundle + report -> registry version, if every bar is met."""

    bundle: str
    report: str
    name: str
    min_tokens_per_forward: Annotated[float, Field(ge=1)] = 1.0
    max_ar_loss: Annotated[float, Field(gt=0)] | None = None
    max_diffusion_loss: Annotated[float, Field(gt=0)] | None = None
    require_greedy_equal: bool = True
    tracking_uri: str = "sqlite:///mlflow.db"


J = TypeVar("J", bound=Job)


def read_job(kind: type[J], path: str | Path) -> J:
    """The job in the YAML file at `path`. Raises ConfigError with one line that names every wrong key."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"job file {path} does not exist; give the path of a YAML file such as infra/jobs/*.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"job file {path} holds {type(values).__name__}; it must be a mapping of keys to values")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"job file {path}: {'; '.join(_in_words(e, kind) for e in error.errors())}") from error


def _in_words(error: ErrorDetails, kind: type[Job]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {kind.__name__} knows {', '.join(kind.model_fields)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; add it"
    if not key:
        return error["msg"].removeprefix("Value error, ")
    return f"{key} is {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"

"""The keys of an answers job."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipelines.jobs import Job, Positive
from tidar_core.config import COLDEST

__all__ = ["OUTPUT_NEUTRAL", "AnswersJob"]

OUTPUT_NEUTRAL = {
    "prompts", "output", "model", "tracking_uri", "include", "exclude", "batch", "workers", "cpus_per_worker",
    "gpus_per_worker", "unit_bytes", "unit_prompts",
}  # fmt: skip
"""Keys that do not change an answer, beside the locations, whose content is hashed."""


class AnswersJob(Job):
    """Prompts -> the model's own answers, as conversations that pack reads.

    An answer follows from the model, the prompt and the keys below, except `batch`, `workers`, `unit_bytes` and
    `unit_prompts`. In fp32 this holds up to ties within rounding. A job that was killed goes on from its finished units
    when it is started again.
    """

    prompts: str
    """File, folder (searched recursively) or glob of JSON lines or Parquet; local, file:// or s3://. An entry has
    `messages` (and perhaps `tools`), or its prompt under `prompt`, `question`, `turns` (a list of texts) or `text`.
    Entries that cannot be used are left out and counted, and the first are named."""
    output: str
    """Folder for the answers; local, file:// or s3://."""
    model: str
    """Bundle or Hugging Face folder with a chat template, its URI, or models:/NAME@ALIAS."""
    tracking_uri: str = "sqlite:///mlflow.db"
    include: tuple[str, ...] = ("*.jsonl", "*.ndjson", "*.parquet")
    """File-name patterns read from a folder; each also matches with .gz or .zst appended."""
    exclude: tuple[str, ...] = ()
    """Patterns of file and folder names to leave out."""
    prompt_field: str | None = None
    """Key or column that holds the prompt; by default the first of the keys above that an entry has."""
    system: str | None = None
    """System message of every prompt that has none of its own."""
    given_answers: Literal["replace", "keep"] = "replace"
    """Messages of the assistant in a prompt: `replace` has every question answered anew. `keep` leaves them in place,
    with `weight` 0, so that pack does not train them; only questions without an answer are answered."""
    greedy: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the prompts that get a greedy answer, chosen by the hash of the prompt."""
    sampled: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Sampled answers for each prompt. With 0.5, half of the prompts get one; with 2.3, each gets two, and three in ten
    a third. If `greedy` and `sampled` are together 1, every prompt gets exactly one answer."""
    temperatures: tuple[Annotated[float, Field(ge=COLDEST, le=100)], ...] = (0.7, 1.0)
    """Temperatures of sampled answers; each answer draws one of them."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that the likeliest tokens of a sampled answer must reach together."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of likeliest tokens that sampled answers are drawn from; 0 keeps all."""
    max_tokens: Positive = 512
    """Most tokens of an answer."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer and are no part of it. The name of a special token ends an answer too. The model's own
    end tokens always end it."""
    cut: Literal["keep", "drop"] = "keep"
    """Answers that reach `max_tokens`: `keep` writes them with `finish_reason` length, and pack trains their text
    without an end. `drop` writes only the turns before. Either way the conversation ends there."""
    seed: int = 0
    """Seed of the job; an answer's draws follow from it and the prompt."""
    context_len: Positive = 2048
    """Most tokens of a prompt and its answer, as far as the model goes. Longer prompts are left out and counted."""
    mode: Literal["autoregressive", "single-pass", "two-pass", "auto"] = "autoregressive"
    """How a model that drafts decodes; in fp32 all modes give the same answers."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and arithmetic; in bf16 another `batch` may give other answers."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    entries_per_shard: Positive = 8192
    """Conversations in a file of the output."""
    batch: Positive = 8
    """Answers that a worker decodes together."""
    workers: Positive = 1
    """Actors, each with a copy of the model."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs of a worker; a share below 1 lets workers use one together."""
    unit_bytes: Positive = 16 * 2**20
    """Input of one task that reads prompts."""
    unit_prompts: Positive = 32
    """Prompts of a unit of work; a killed job repeats only unfinished units."""

    @model_validator(mode="after")
    def some_answer(self) -> Self:
        """Check that some answer is wanted, and that the context has room for a prompt."""
        if self.greedy == 0 and self.sampled == 0:
            raise ValueError("greedy and sampled are 0, so no prompt would be answered; give one of them a share")
        if self.sampled and not self.temperatures:
            raise ValueError("temperatures is []; sampled answers need a temperature; give one")
        if self.max_tokens >= self.context_len:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and context_len {self.context_len}; the context must hold a prompt "
                "as well; raise context_len"
            )
        return self

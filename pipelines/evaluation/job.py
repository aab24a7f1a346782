"""Job files of evaluation and publication: their keys, defaults and checks."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipelines.jobs import Job, Positive

__all__ = ["EvaluateJob", "PublishJob", "TaskJob"]


class TaskJob(Job):
    """One task of an evaluation."""

    task: str
    """A task of the paper, see `pipelines.evaluation.paper_tasks`, or the path of an lm-eval YAML file."""
    data: str | None = None
    """Its questions on disk: a folder with a copy of the data set as the hub has it, or a JSONL or Parquet file."""
    limit: Positive | None = None
    """Number of questions of each subject; all by default."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples before the question; the paper's number by default."""
    max_tokens: Positive | None = None
    """New tokens of an answer; the paper's number by default."""


class EvaluateJob(Job):
    """Bundle + held-out shards -> report."""

    bundle: str
    """Bundle, or an AR checkpoint (a Hugging Face folder), which is measured in autoregressive mode alone."""
    shards: str
    output: str
    parent: str | None = None
    """AR checkpoint that the bundle was converted from, a bundle or a Hugging Face folder; it is measured as well."""
    prompts: Positive = 16
    """Held-out documents whose beginnings are continued, greedily, by TiDAR and by the AR mode."""
    prompts_file: str | None = None
    """JSON lines of prompts to continue instead: users' messages, if the model has a chat template. By default the
    prompts are beginnings of held-out documents. A prompt that the context cannot hold with `max_tokens` loses its
    beginning; the report counts such prompts."""
    prompt_len: Positive = 64
    """Tokens of such a beginning."""
    max_tokens: Positive = 128
    batch: Positive = 4
    """Prompts decoded together, as far as there are so many."""
    loss_rows: Positive = 128
    """Held-out rows that the losses are averaged over, at most."""
    repeats: Positive = 3
    """Times that each mode continues the prompts, for the speeds."""
    tasks: tuple[TaskJob, ...] = ()
    task_modes: tuple[Literal["single-pass", "two-pass", "autoregressive"], ...] = ("single-pass",)
    """Modes that the tasks' answers are generated in; for an AR checkpoint the autoregressive mode by default."""
    task_batch: Positive = 8
    """Answers generated together; no score depends on it."""
    task_context: Positive = 4096
    """Most tokens of a task's prompt and answer, as far as the model goes; longer prompts lose their beginning."""
    service: str | None = None
    """A running service of this bundle, such as http://HOST:8000/v1. The tasks are sent to it too, over HTTP; only to
    it if `task_modes` is []."""
    service_model: str | None = None
    """Name of the bundle in the service; needed if it serves several models."""
    service_key_env: str | None = None
    """Environment variable, where the job runs, that holds the service's API key. The key itself is in no file."""
    allow_code_execution: bool = False
    """Run the programs that the model writes for code tasks, in a sandbox."""
    weights: Literal["int8", "int4"] | None = None
    """Round the weights of bundle and parent to so many bits first, as `tidar serve` does; on a CPU alone."""
    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Positive = 1
    tracking_uri: str | None = None
    """MLflow server or SQLite file that keeps the report as well, beside the training run; none by default."""
    experiment: str = "tidar"

    @model_validator(mode="after")
    def _fewer_bits_on_a_cpu(self) -> Self:
        if self.weights is not None and self.gpus:
            raise ValueError(f"weights is {self.weights} and gpus {self.gpus}; fewer bits need a CPU; leave one out")
        return self

    @model_validator(mode="after")
    def _tasks_have_a_model(self) -> Self:
        if self.tasks and not self.task_modes and self.service is None:
            raise ValueError(
                "task_modes is [] and no service is given; tasks need one of them; give a mode or a service"
            )
        return self


class PublishJob(Job):
    """Bundle + report -> registry version, if every bar is met."""

    bundle: str
    report: str
    name: str
    min_tokens_per_forward: Annotated[float, Field(ge=1)] = 1.0
    max_ar_loss: Annotated[float, Field(gt=0)] | None = None
    max_diffusion_loss: Annotated[float, Field(gt=0)] | None = None
    max_ar_loss_over_parent: float | None = None
    """Most that the AR loss may lie above the parent's, in nats; below 0 it must be better."""
    require_greedy_equal: bool = True
    min_scores: dict[str, float] = Field(default={})
    """Task -> score, from 0 to 1, that it must reach."""
    max_score_drop: Annotated[float, Field(ge=0)] | None = None
    """Most that any task's score may lie below the parent's."""
    min_task_tokens_per_forward: dict[str, float] = Field(default={})
    """Task -> tokens per forward that its answers must reach."""
    tracking_uri: str = "sqlite:///mlflow.db"

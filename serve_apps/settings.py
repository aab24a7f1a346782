"""What does a running service depend on?

One frozen model, validated here; deployments take it whole. All locations are URIs or local paths.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from serve_apps.api import bounds
from serve_apps.rollout.canary import CanarySettings
from tidar_core.errors import ConfigError

__all__ = ["DRAIN_SECONDS", "REGISTRY_SCHEME", "ServeSettings"]

Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
REGISTRY_SCHEME = "models:/"
DRAIN_SECONDS = 60.0


class ServeSettings(BaseModel):
    """Which model is served, where, and with how much of the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)]
    """Folder or URI of a bundle, or models:/NAME@ALIAS."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where models:/ is looked up."""
    model_name: Annotated[str, Field(min_length=1)] | None = None
    """What clients call the model; by default the registered name, or the last part of the bundle's location."""
    follow_alias_seconds: Annotated[float, Field(gt=0)] | None = None
    """Look that often which version the alias names, and serve that one from then on; by default the version that it
    names at the start stays. A replica needs memory for one bundle and one cache more than it serves."""
    challenger: CanarySettings | None = None
    """Serve a second version beside the champion to some clients, and take its alias away where it falls short."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000

    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest that a request may take, from its first byte to its last; then it is aborted and answered 408. A client's
    header X-Request-Timeout-Seconds may ask for less."""
    stream_interval_seconds: Annotated[float, Field(ge=0)] = 0.04
    """Text that a stream gets sooner than this after its last piece is told with the next: each piece costs time that
    the decoder does not get. Beside other texts it waits twice as long; the first text and the end never wait. 0 tells
    each decode step."""
    max_body_bytes: Annotated[int, Field(ge=1, le=2**30)] = bounds.BODY_BYTES
    """Longest body of a request; a longer one is answered 413."""
    body_seconds: Annotated[float, Field(gt=0)] = bounds.BODY_SECONDS
    """Longest that a body may take to arrive; then the request is answered 408."""
    max_bodies: Positive = bounds.BODIES
    """Bodies that an ingress waits for at the same time; one more is answered 429. A body that arrives together with
    its head is not counted."""
    api_keys: tuple[Sha256, ...] = ()
    """SHA-256 in hex of each key that opens the service (`printf %s KEY | sha256sum`); with none, everyone may ask."""
    requests_per_minute: Positive | None = None
    """Most requests of one key, or of all where there are no keys, at each ingress; one more is answered 429."""
    vllm_metric_names: bool = False
    """/metrics tells what concerns drafts as vllm:spec_decode_* too, for tools that know vLLM's names alone."""
    trace_exporter: Annotated[str, Field(pattern=r"^(file|otlp|[\w.]+:\w+)$")] | None = None
    """Where spans of OpenTelemetry go: `file` is a folder beside Serve's logs, `otlp` what OTEL_EXPORTER_OTLP_ENDPOINT
    names (tidar[tracing]), `module:function` a function that gives span processors; by default there are none."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Of the requests that become spans, where the client's `traceparent` does not say."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may ask from a browser, such as https://app.example.com; * for all."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Location of a Jinja file that takes the place of the bundle's own chat template."""
    tool_form: Literal["auto", "hermes", "llama3"] = "auto"
    """How the model writes calls of functions; by default as its chat template teaches."""

    mode: Literal["auto", "single-pass", "two-pass", "autoregressive"] = "single-pass"
    draft_kind: Literal["argmax", "sampled"] = "argmax"
    block_len: Positive | None = None
    """K of a draft; by default what the bundle was trained with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    context_len: Annotated[int, Field(ge=4)] | None = None
    """Most tokens of prompt and completion together; by default the model's own context."""
    rows: Positive = 8
    """Sequences that a replica decodes together."""
    pages: Positive | None = None
    """Pages of a replica's KV cache; by default enough for `rows` whole contexts. With fewer, the youngest sequences
    give way when there are none left, and are read again."""
    max_waiting: Annotated[int, Field(ge=0)] = 256
    """Sequences that may wait for a row of a replica; one more is answered 429."""
    max_waiting_tokens: Positive = 2**20
    """Tokens that may wait for a row of a replica: those of prompts, and those that are to be expected of texts, by how
    long texts are there; a request that brings more is answered 429."""
    own_process: bool = True
    """The decoder has a process of its own, so that it never waits for what its replica does for the clients; otherwise
    it shares the replica's, which takes less memory. While weights change, and beside a challenger, a GPU has two such
    processes: one that lets no two in (EXCLUSIVE_PROCESS) needs false."""
    timing_seconds: Annotated[float, Field(gt=0)] = 20.0
    """Longest that a replica times decode steps before its first request, where mode is `auto` and no latency table was
    kept. What is not timed is predicted, and corrected by the steps that are served."""
    threads: Positive | None = None
    """CPU threads of a replica; by default as many as num_cpus."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Positive = 1
    scale_queue_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Replicas are added until what waits will be worked off in this time, at the pace that is measured."""
    scale_kv_use: Annotated[float, Field(gt=0, le=1)] = 0.9
    """And until no more than this share of the pages of their caches is taken."""
    scale_up_seconds: Annotated[float, Field(ge=0)] = 30.0
    """More replicas must be needed for so long before they are started; the first one of none starts at once."""
    scale_down_seconds: Annotated[float, Field(ge=0)] = 600.0
    """Fewer replicas must be enough for so long before the others are stopped."""
    scale_look_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How often a replica says how busy it is."""
    hang_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest that one forward may take. A replica that shows none for so long, three times in a row, is ended, with
    all that it was writing, and another takes its place."""
    drain_seconds: Annotated[float, Field(ge=0)] = DRAIN_SECONDS
    """A replica or a service that is told to stop finishes what it has begun, for at most this long."""
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of a replica; with 0 it computes on the CPU."""

    @model_validator(mode="after")
    def replicas_in_order(self) -> Self:
        """max_replicas is no less than min_replicas."""
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas} and min_replicas {self.min_replicas}; max must be at least min"
            )
        return self

    @model_validator(mode="after")
    def something_to_follow(self) -> Self:
        """An alias can move; a folder or a version cannot."""
        if self.follow_alias_seconds is None and self.challenger is not None:
            raise ValueError("challenger is set and follow_alias_seconds is not; set it too, to 10 for instance")
        if self.follow_alias_seconds is not None and self.model_alias is None:
            raise ValueError(
                f"follow_alias_seconds is set and model is {self.model!r}, which never changes; "
                "give models:/NAME@ALIAS, or leave follow_alias_seconds out"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def in_one_line(cls, values: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        """What is wrong is said in our words, as a ConfigError. Last of the validators, so around them all."""
        try:
            return build(values)
        except ValidationError as error:
            raise ConfigError(f"serve settings: {'; '.join(_in_words(e) for e in error.errors())}") from error

    @property
    def shown_name(self) -> str:
        """What clients call the model."""
        if self.model_name is not None:
            return self.model_name
        if self.model.startswith(REGISTRY_SCHEME):
            return self.model.removeprefix(REGISTRY_SCHEME).split("@")[0].split("/")[0]
        return self.model.rstrip("/").rsplit("/", 1)[-1] or self.model

    @property
    def model_alias(self) -> tuple[str, str] | None:
        """Registered name and alias, where the model is given by them."""
        name, at, alias = self.model.removeprefix(REGISTRY_SCHEME).partition("@")
        return (name, alias) if at and self.model.startswith(REGISTRY_SCHEME) else None

    @property
    def device(self) -> str:
        """Where a replica computes."""
        return "cuda" if self.num_gpus else "cpu"


def _in_words(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        owner = CanarySettings if error["loc"][0] == "challenger" and len(error["loc"]) > 1 else ServeSettings
        return f"unknown key {key!r}; known are {', '.join(owner.model_fields)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key} is {error['input']!r}; {message[0].lower()}{message[1:]}" if key else message

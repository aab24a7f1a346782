"""Settings of a service: a frozen model that is validated here and passed whole to the deployments.

All locations are URIs or local paths.
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
    """Model to serve, address, limits, and resources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, Field(min_length=1)]
    """Folder or URI of a bundle or of an AR checkpoint, or models:/NAME@ALIAS."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Registry in which models:/ is looked up."""
    model_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the model for clients; by default the registered name, or the last part of the bundle's location."""
    follow_alias_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds between lookups of the alias. The service serves the version that the alias names; by default it keeps
    the version of its start. A replica needs memory for one more bundle and cache than it serves."""
    challenger: CanarySettings | None = None
    """Serve a second version beside the champion to some clients, and take its alias away if it fails its limits."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000

    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Timeout of a request, from its first byte to its last; then it is aborted with status 408. A client's header
    X-Request-Timeout-Seconds may set a shorter timeout."""
    stream_interval_seconds: Annotated[float, Field(ge=0)] = 0.04
    """Least time between two deltas of a stream, because each delta costs the decoder time. With several requests
    running, the interval is twice as long. The first text and the end never wait. 0: a delta for each decode step."""
    max_body_bytes: Annotated[int, Field(ge=1, le=2**30)] = bounds.BODY_BYTES
    """Longest body of a request; a longer body gets status 413."""
    body_seconds: Annotated[float, Field(gt=0)] = bounds.BODY_SECONDS
    """Timeout for the arrival of a body; then the request gets status 408."""
    max_bodies: Positive = bounds.BODIES
    """Bodies that an ingress waits for at the same time; one more gets status 429. A body that arrives together with
    its headers is not counted."""
    api_keys: tuple[Sha256, ...] = ()
    """SHA-256 in hex of each valid key (`printf %s KEY | sha256sum`); without keys the service is open to everyone."""
    requests_per_minute: Positive | None = None
    """Most requests of a key, or of all clients if there are no keys, at each ingress; one more gets status 429."""
    vllm_metric_names: bool = False
    """/metrics has metrics of drafts as vllm:spec_decode_* too, for tools that know only vLLM's names."""
    trace_exporter: Annotated[str, Field(pattern=r"^(file|otlp|[\w.]+:\w+)$")] | None = None
    """Exporter of spans of OpenTelemetry; by default there are no spans. `file`: a folder beside Serve's logs. `otlp`:
    the endpoint in OTEL_EXPORTER_OTLP_ENDPOINT (tidar[tracing]). `module:function`: a function that returns span
    processors."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests that become spans, unless the client's `traceparent` decides it."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may send requests from a browser, such as https://app.example.com; * for all."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Location of a Jinja file that replaces the bundle's own chat template."""
    tool_form: Literal["auto", "hermes", "llama3"] = "auto"
    """Form in which the model writes calls of functions; by default the form of its chat template."""

    mode: Literal["auto", "single-pass", "two-pass", "autoregressive"] = "auto"
    """Mode of decoding; `auto` takes the fastest one at the time. A checkpoint decodes in autoregressive mode: give
    that, auto or none."""
    draft_kind: Literal["argmax", "sampled"] = "argmax"
    block_len: Positive | None = None
    """K of a draft; by default the length that the bundle was trained with."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["int8", "int4"] | None = None
    """Bits of the weights of linear maps, rounded at load; on a CPU alone. By default weights have the dtype."""
    context_len: Annotated[int, Field(ge=4)] | None = None
    """Most tokens of prompt and completion together; by default the model's own context."""
    rows: Positive = 8
    """Slots of a replica: sequences that it decodes together."""
    pages: Positive | None = None
    """Pages of a replica's KV cache; by default enough for `rows` whole contexts. With fewer pages, the youngest
    sequences are preempted when no page is free, and are prefilled again later."""
    max_waiting: Annotated[int, Field(ge=0)] = 256
    """Sequences that may wait for a slot of a replica; one more gets status 429."""
    max_waiting_tokens: Positive = 2**20
    """Tokens that may wait for a slot of a replica: prompt tokens, and generated tokens that are expected from the
    length of earlier texts. A request that exceeds it gets status 429."""
    own_process: bool = True
    """The decoder runs in a process of its own, so that it never waits for its replica's work for clients. Otherwise it
    shares the replica's process, which takes less memory. While weights change, and beside a challenger, a GPU has two
    such processes. A GPU that admits only one process (EXCLUSIVE_PROCESS) needs false."""
    timing_seconds: Annotated[float, Field(gt=0)] = 20.0
    """Longest time for timing decode steps before the first request, if mode is `auto` and there is no latency table.
    A formula fitted to them gives the time of other steps; served steps correct it."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of a replica; by default as many as num_cpus."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Positive = 1
    scale_queue_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Replicas are added until the waiting tokens take at most this time at the measured throughput."""
    scale_kv_use: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Replicas are added until at most this share of the pages of their caches is in use."""
    scale_up_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Time for which more replicas must be needed before they start; without any replica the first starts at once."""
    scale_down_seconds: Annotated[float, Field(ge=0)] = 600.0
    """Time for which fewer replicas must be enough before the others stop."""
    scale_look_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two reports of a replica's load."""
    hang_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Timeout of a forward. After three failed checks in a row a replica is ended with all its requests, and another
    replica replaces it."""
    drain_seconds: Annotated[float, Field(ge=0)] = DRAIN_SECONDS
    """Longest time for which a replica or a service that stops finishes the requests that are in flight."""
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of a replica; with 0 it computes on the CPU."""

    @model_validator(mode="after")
    def replicas_in_order(self) -> Self:
        """Raise ValueError if max_replicas is less than min_replicas."""
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas} and min_replicas {self.min_replicas}; max must be at least min"
            )
        return self

    @model_validator(mode="after")
    def fewer_bits_on_a_cpu(self) -> Self:
        """Raise ValueError for quantised weights on a GPU."""
        if self.weights is not None and self.num_gpus:
            raise ValueError(f"weights is {self.weights} and num_gpus {self.num_gpus:g}; {self.weights} needs a CPU; "
                             "leave one of them out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def something_to_follow(self) -> Self:
        """Raise ValueError if there is no alias to follow; a folder or a version never changes."""
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
        """Raise a ConfigError of one line for any validation error. As the last validator it wraps the others."""
        try:
            return build(values)
        except ValidationError as error:
            raise ConfigError(f"serve settings: {'; '.join(_in_words(e) for e in error.errors())}") from error

    @property
    def shown_name(self) -> str:
        """Name of the model for clients."""
        if self.model_name is not None:
            return self.model_name
        if self.model.startswith(REGISTRY_SCHEME):
            return self.model.removeprefix(REGISTRY_SCHEME).split("@")[0].split("/")[0]
        return self.model.rstrip("/").rsplit("/", 1)[-1] or self.model

    @property
    def model_alias(self) -> tuple[str, str] | None:
        """Registered name and alias, if the model is given by them."""
        name, at, alias = self.model.removeprefix(REGISTRY_SCHEME).partition("@")
        return (name, alias) if at and self.model.startswith(REGISTRY_SCHEME) else None

    @property
    def device(self) -> str:
        """Device of a replica: `cuda` or `cpu`."""
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

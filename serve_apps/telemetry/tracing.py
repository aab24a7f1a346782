"""Spans of OpenTelemetry for requests.

Serve creates the spans of its proxy, of the ingress and of the decoder's replica if the settings name an exporter. They
form one trace, which continues the client's trace if the client sends `traceparent`. This module adds attributes of the
texts. By default no span is created.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from serve_apps.settings import ServeSettings
from tidar_core.errors import ConfigError

__all__ = ["note", "otlp", "proxy_tracing_env", "tracing_config"]

EXPORTERS = {
    "file": "ray.serve._private.tracing_utils:default_tracing_exporter",
    "otlp": "serve_apps.telemetry.tracing:otlp",
}
"""Import paths behind the short names in settings."""
OTLP = "opentelemetry.exporter"
"""Package that tidar[tracing] installs."""


def note(**facts: str | bool | float | None) -> None:
    """Add attributes to the current span of this request, if there is one. `__` in a name stands for a dot."""
    span = trace.get_current_span()
    if span.is_recording():
        known = {name.replace("__", "."): value for name, value in facts.items() if value is not None}
        span.set_attributes(known)


def tracing_config(settings: ServeSettings) -> dict[str, Any] | None:
    """Tracing configuration for Serve's start or its config file; None for no tracing. Raises ConfigError."""
    if settings.trace_exporter is None:
        return None
    if settings.trace_exporter == "otlp" and not _has_otlp():
        raise ConfigError("trace_exporter is 'otlp', which is not installed; pip install 'tidar[tracing]'")
    path = EXPORTERS.get(settings.trace_exporter, settings.trace_exporter)
    return {"enabled": True, "exporter_import_path": path, "sampling_ratio": settings.trace_share}


@contextmanager
def proxy_tracing_env(settings: ServeSettings) -> Iterator[None]:
    """Environment to start Ray in; Serve's proxies take the tracing configuration only from there."""
    config = tracing_config(settings)
    wanted = {} if config is None else {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": config["exporter_import_path"],
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(config["sampling_ratio"]),
        "OTEL_SERVICE_NAME": environ.get("OTEL_SERVICE_NAME", "tidar"),
    }  # fmt: skip
    before = {name: environ.get(name) for name in wanted}
    environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del environ[name]
            else:
                environ[name] = value


def otlp() -> list[SpanProcessor]:
    """Serve's hook: processors that send spans to OTEL_EXPORTER_OTLP_ENDPOINT by HTTP, in batches."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return [BatchSpanProcessor(OTLPSpanExporter())]


def _has_otlp() -> bool:
    try:
        return importlib.util.find_spec(f"{OTLP}.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False

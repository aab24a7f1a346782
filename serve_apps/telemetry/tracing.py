"""How does a request become spans of OpenTelemetry?

Serve makes them where it is told to: of its proxy, of the ingress and of the decoder's replica, in one trace, which is
the client's if it sends `traceparent`. What the texts were is noted here. By default no span is made.
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

__all__ = ["note", "otlp", "told_to_proxies", "tracing_config"]

EXPORTERS = {
    "file": "ray.serve._private.tracing_utils:default_tracing_exporter",
    "otlp": "serve_apps.telemetry.tracing:otlp",
}
"""Import paths behind the short names in settings."""
OTLP = "opentelemetry.exporter"
"""Which is there if tidar[tracing] is."""


def note(**facts: str | bool | float | None) -> None:
    """Attributes of the span that this request has here, if it has one; an underscore pair stands for a dot."""
    span = trace.get_current_span()
    if span.is_recording():
        known = {name.replace("__", "."): value for name, value in facts.items() if value is not None}
        span.set_attributes(known)


def tracing_config(settings: ServeSettings) -> dict[str, Any] | None:
    """What Serve is told, at its start or in its config; None for no tracing. Raises ConfigError."""
    if settings.trace_exporter is None:
        return None
    if settings.trace_exporter == "otlp" and not _has_otlp():
        raise ConfigError("trace_exporter is 'otlp', which is not installed; pip install 'tidar[tracing]'")
    path = EXPORTERS.get(settings.trace_exporter, settings.trace_exporter)
    return {"enabled": True, "exporter_import_path": path, "sampling_ratio": settings.trace_share}


@contextmanager
def told_to_proxies(settings: ServeSettings) -> Iterator[None]:
    """The environment in which Ray is to be started: Serve's proxies hear of tracing by it alone."""
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
    """Serve's hook: spans go to OTEL_EXPORTER_OTLP_ENDPOINT, by HTTP, in batches."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return [BatchSpanProcessor(OTLPSpanExporter())]


def _has_otlp() -> bool:
    try:
        return importlib.util.find_spec(f"{OTLP}.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False

"""Start and end of a service on a Ray cluster that may be shared.

A cluster at RAY_ADDRESS may run Serve applications of others. A service runs beside them, or is refused before anything
is deployed. It ends only the parts that it started.
"""

import logging
import os
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray._private import services
from ray._private.node import Node
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client  # no public call reads the HTTP options of a running Serve
from ray.serve.schema import LoggingConfig

from serve_apps.ingress.serve_proxy import CALLBACK
from serve_apps.settings import ServeSettings
from serve_apps.telemetry.tracing import proxy_tracing_env, tracing_config
from tidar_core.artifacts.network.cluster_address import given_cluster
from tidar_core.artifacts.network.local_cluster import start_local_cluster
from tidar_core.artifacts.store.muted import muted_stderr
from tidar_core.errors import ConfigError

__all__ = [
    "APP_NAME",
    "KILL_HUNG_REPLICAS_ENV",
    "PATIENT_START_ENV",
    "RAY_FAST_PATH_ENV",
    "UNBOUNDED_HEADERS_ENV",
    "address_of",
    "check_place",
    "deploy",
    "deployed_here",
    "end_own",
    "leave",
    "start_ray",
    "start_serve",
    "wide_actor",
]

APP_NAME = "tidar"
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/tokenizer_info", "/health",
    "/ready", "/version", "/metrics", "/docs", "/openapi.json",
)  # fmt: skip
"""Paths of a service, besides its page at /."""
OBJECT_STORE_BYTES = 256 * 2**20
QUIET_ENV = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else each worker without accelerators warns
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
}
RAY_FAST_PATH_ENV = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the service's code never blocks an event loop for long
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # deltas go from process to process, not through the object store
    "RAY_SERVE_LOG_TO_STDERR": "0",  # each line is in Serve's own logs already
    "grpc_proxy": "",  # so that gRPC uses no `http_proxy` for the addresses of the cluster's own nodes
} | CALLBACK
"""Environment that makes each request and each delta cheaper. A cluster's nodes have it in their manifests."""
UNBOUNDED_HEADERS_ENV = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}
"""Environment without gRPC's limit of 4 MiB, because bodies and responses pass between processes whole and may be
longer."""
KILL_HUNG_REPLICAS_ENV = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
"""Environment in which Serve does not drain a hung replica, since its clients would wait in vain."""
PATIENT_START_ENV = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30"}
"""Environment in which a proxy may take longer than 5 s to start, as on a busy machine; Serve would kill it."""


@dataclass(slots=True)
class _Own:
    """Parts that this process started. A process has a single Ray, so it has a single record."""

    ray: bool = False
    connection: bool = False
    """Connection to a Ray cluster that others started."""
    serve: bool = False
    application: bool = False


_own = _Own()


def address_of(settings: ServeSettings) -> str:
    """Host and port at which this machine reaches the service."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


def check_place(settings: ServeSettings) -> None:
    """Raise ConfigError if the service cannot listen, or cannot run beside the applications of the cluster.

    Connects to the cluster at RAY_ADDRESS if it is set; starts nothing.
    """
    connects = not ray.is_initialized() and bool(os.environ.get("RAY_ADDRESS"))
    if connects:
        _connect()
    try:
        running = _running_serve() if ray.is_initialized() else None
        if running is None:
            _check_port(settings)
        else:
            _check_beside(running, settings)
    except BaseException:
        if connects:
            leave()
        raise


def start_ray(settings: ServeSettings) -> None:
    """Start Ray on this machine, unless this process is connected to a cluster."""
    if ray.is_initialized():
        return
    _set_environment()
    os.environ.update(UNBOUNDED_HEADERS_ENV)
    start = partial(
        ray.init,
        address="local",  # never a cluster that happens to run here
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )
    with proxy_tracing_env(settings), muted_stderr():
        start_local_cluster(start, Node, services)
    _own.ray = True


def wide_actor() -> dict[str, Any]:
    """Options of an actor, for a cluster whose nodes do not have `UNBOUNDED_HEADERS_ENV` in their environment."""
    if not ray.is_initialized() or os.environ.keys() >= UNBOUNDED_HEADERS_ENV.keys():
        return {}
    return {"runtime_env": {"env_vars": UNBOUNDED_HEADERS_ENV}}


def start_serve(settings: ServeSettings) -> None:
    """Start Serve, unless it runs already."""
    if _running_serve() is not None:
        return
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=settings.host, port=settings.port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        tracing_config=tracing_config(settings),
    )
    _own.serve = True


def deploy(app: serve.Application) -> None:
    """Run the service's application and wait until it is up. Raises RuntimeError."""
    _own.application = True
    serve.run(app, name=APP_NAME, logging_config=LoggingConfig(encoding="JSON", enable_access_log=False))


def deployed_here() -> bool:
    """Whether this process has deployed the service."""
    return _own.application


def end_own() -> None:
    """End the application and the Serve that this process started; a Serve that others use keeps running."""
    if not ray.is_initialized():  # Serve would start a Ray of its own
        return
    if _own.ray:
        serve.shutdown()
        return
    if _own.application:
        serve.delete(APP_NAME)
    if _own.serve and not serve.status().applications:
        serve.shutdown()


def leave() -> None:
    """End the Ray that this process started, or the connection to a cluster of others."""
    global _own
    if _own.ray or _own.connection:
        ray.shutdown()
    _own = _Own()


def _connect() -> None:
    _set_environment()
    with given_cluster(), muted_stderr():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    _own.connection = True


def _set_environment() -> None:
    for name, value in (QUIET_ENV | RAY_FAST_PATH_ENV | KILL_HUNG_REPLICAS_ENV | PATIENT_START_ENV).items():
        os.environ.setdefault(name, value)


def _running_serve() -> dict[str, Any] | None:
    """Serve's report of itself on this cluster; None if it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.get_serve_details()


def _check_beside(running: dict[str, Any], settings: ServeSettings) -> None:
    options = running.get("http_options") or {}
    host, port = options.get("host"), options.get("port")
    where = f"{host}:{port}"
    if running.get("proxy_location") == "Disabled":
        raise ConfigError("Serve runs on this Ray cluster already, without HTTP; start a service on another cluster")
    if (_bare(host), port) != (_bare(settings.host), settings.port):
        raise ConfigError(
            f"Serve runs on this Ray cluster already and listens on {where}, not on {settings.host}:{settings.port}; "
            "give that host and port, or start a service on another cluster"
        )
    if settings.trace_exporter is not None:
        raise ConfigError(
            f"trace_exporter is {settings.trace_exporter!r}, and Serve, which makes the spans, runs on this Ray "
            "cluster already; leave it out, or start a service on another cluster"
        )
    for name, application in running["applications"].items():
        prefix = application["route_prefix"]
        if name == APP_NAME:
            raise ConfigError(
                f"a service runs on this Ray cluster already, as application {name!r} at {where}; end it first, with "
                f"serve.delete({name!r}), or start another one on another cluster"
            )
        if prefix is not None and any(f"{path}/".startswith(f"{prefix.rstrip('/')}/") for path in PATHS):
            raise ConfigError(
                f"application {name!r} answers at {prefix} of {where}, where a service would answer; give it another "
                "route_prefix, or start a service on another cluster"
            )


def _bare(host: str | None) -> str | None:
    return "127.0.0.1" if host == "localhost" else host


def _check_port(settings: ServeSettings) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{address_of(settings)} cannot be listened on: {error.strerror or error}; choose another host or port"
        ) from error

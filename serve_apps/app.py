"""Assembly, start and end of the service.

All that a user can get wrong (the port, the model's name, the bundle) is checked here before Ray starts anything.
"""

import contextlib
import io
import logging
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_apps.api.completion_response import ModelCard
from serve_apps.ingress.api_keys import Access
from serve_apps.ingress.http_app import HttpApp
from serve_apps.ingress.request_limits import Limits
from serve_apps.replica.autoscaling import autoscaling
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.rollout.model_version import ModelVersion, resolve_model
from serve_apps.rollout.watcher_app import DECODER, WatcherApp
from serve_apps.settings import DRAIN_SECONDS, ServeSettings
from serve_apps.shared_cluster import (
    APP_NAME,
    address_of,
    check_place,
    deploy,
    deployed_here,
    end_own,
    leave,
    start_ray,
    start_serve,
    wide_actor,
)
from serve_apps.telemetry import start_stage
from tidar_core import errors
from tidar_core.artifacts.model.bundle_info import no_drafts_note
from tidar_core.artifacts.network.loopback import open_direct
from tidar_core.errors import TidarError

__all__ = ["APP_NAME", "address_of", "build_app", "check_place", "run", "shutdown"]

INGRESS_CPUS = 0.1
UNBOUNDED = 10**6
"""Serve's bound on requests in flight at an ingress. The ingress counts them itself and returns 429. With a bound of
Serve's, probes would wait as well."""
DRAIN_LOOK_SECONDS = 0.2
STAGE_LOOK_SECONDS = 0.5

logger = logging.getLogger("ray.serve")
_level_before: int | None = None
"""Level of Serve's logger before `_quiet` raised it; `None` while it is not raised."""


def build_app(settings: ServeSettings) -> serve.Application:
    """Application of the ingress over the decoder, for `serve.run` here or a Serve config on a cluster.

    Looks up the model's name and reads the bundle's description, no weights. Raises RegistryError or BundleError.
    """
    return _build(settings, *resolve_model(settings))


def _build(settings: ServeSettings, served: ModelVersion, card: ModelCard) -> serve.Application:
    most = settings.rows + settings.max_waiting
    alias_watcher = None
    if settings.follow_alias_seconds is not None:
        deployment = serve.deployment(
            name="watcher",
            max_ongoing_requests=4 * settings.max_replicas + 100,  # calls of new replicas and of ingresses
            ray_actor_options={"num_cpus": INGRESS_CPUS},
        )(WatcherApp)
        alias_watcher = deployment.bind(served, card)
    decoder = serve.deployment(
        name=DECODER,
        user_config={}
        if alias_watcher is None
        else {"watched": True},  # makes Serve call `reconfigure` of new replicas
        max_ongoing_requests=2 * most,  # twice the decoder's own limit, which returns 429 in JSON
        ray_actor_options=wide_actor() | {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        autoscaling_config=autoscaling(settings),
        health_check_period_s=settings.hang_seconds / 3,
        health_check_timeout_s=settings.hang_seconds * 4 / 3,  # the check itself can report a hang before this timeout
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_SECONDS,
    )(DecoderApp)
    ingress = serve.deployment(
        name="http",
        max_ongoing_requests=UNBOUNDED,
        ray_actor_options=wide_actor() | {"num_cpus": INGRESS_CPUS},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=DRAIN_LOOK_SECONDS,
    )(HttpApp)
    limits = Limits(
        seconds=settings.request_seconds, body_bytes=settings.max_body_bytes, body_seconds=settings.body_seconds,
        bodies=settings.max_bodies, choices=most * settings.max_replicas, context_len=card.max_model_len,
    )  # fmt: skip
    access = Access(keys=settings.api_keys, per_minute=settings.requests_per_minute)
    return ingress.bind(
        decoder.bind(served, alias_watcher, configured=True), card, limits, access, settings.cors_origins,
        alias_watcher, sleeps=settings.min_replicas == 0, vllm_names=settings.vllm_metric_names,
    )  # fmt: skip


def run(settings: ServeSettings, *, blocking: bool = True) -> None:
    """Start the service and wait until it is ready.

    blocking  serve until Ctrl-C or SIGTERM, then end the service; otherwise return, and `shutdown` ends it
    """
    with _quiet():
        check_place(settings)
    served, card = resolve_model(settings)
    if not served.drafting:
        print(no_drafts_note(served.bundle_uri), file=sys.stderr)
    app = _build(settings, served, card)
    ended = False
    try:
        with _quiet():
            start_ray(settings)
        with _terminable():
            _start(settings, app)
            print(f"{settings.shown_name} is served at http://{address_of(settings)}/v1", file=sys.stderr)
            if blocking:
                _wait_for_signal()
        ended = blocking
    except KeyboardInterrupt:  # during the start
        ended = True
        if not blocking:
            raise
    except BaseException:
        ended = True
        raise
    finally:
        if ended:
            shutdown(settings.drain_seconds)


def shutdown(drain_seconds: float = DRAIN_SECONDS) -> None:
    """End the service that `run` started, and Serve and Ray if `run` started them.

    drain_seconds  timeout for requests in flight; new requests are not accepted
    """
    if ray.is_initialized():
        with _quiet():
            ending = threading.Thread(target=_end, args=(drain_seconds,), daemon=True)
            ending.start()
            while ending.is_alive() and _ray_answers():
                ending.join(DRAIN_LOOK_SECONDS)
            leave()


def start_error(message: str) -> TidarError:
    """Error of a replica, from the text of its traceback: the same TidarError, or a TidarError about another error."""
    last = [line.strip() for line in message.splitlines() if line.strip()][-1]
    kind, _, text = last.partition(": ")
    own = getattr(errors, kind.removeprefix(f"{errors.__name__}."), None)
    if isinstance(own, type) and issubclass(own, TidarError):
        return own(text)
    return TidarError(f"the service did not start: {last}; see the logs of Ray in /tmp/ray")


def _end(drain_seconds: float) -> None:
    if deployed_here():
        _drain(drain_seconds)
    try:
        end_own()
    except (RayServeException, RayError, RuntimeError, TimeoutError) as error:
        logger.warning("the service could not be ended cleanly: %s", error)


def _ray_answers() -> bool:
    """Whether Ray still runs. A signal to the process group can end it first; a call to it then waits for a minute."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=DRAIN_LOOK_SECONDS * 10).close()
    except OSError:
        return False
    return True


def _drain(seconds: float) -> None:
    """Wait until no request is in flight. Serve itself would end its proxies first, and all responses with them."""
    deadline = time.monotonic() + seconds
    try:
        ingress = serve.get_app_handle(APP_NAME)
        while ray.is_initialized() and any(ingress.broadcast("drain").results(timeout_s=seconds)):
            if time.monotonic() > deadline:
                break
            time.sleep(DRAIN_LOOK_SECONDS)
    except (RayServeException, RayError, RuntimeError, TimeoutError) as error:
        logger.info("no ingress runs that could drain: %s", error)
    time.sleep(DRAIN_LOOK_SECONDS)  # the last bytes are still in the proxy


def _start(settings: ServeSettings, app: serve.Application) -> None:
    with _quiet():
        start_serve(settings)
        try:
            with _stages_printed():
                deploy(app)
        except RuntimeError as error:
            raise start_error(_deployment_messages() or str(error)) from error
    _wait_until_ready(settings)


@contextlib.contextmanager
def _stages_printed() -> Iterator[None]:
    """Print the stages of the first replica to standard error until it is ready."""
    started = threading.Event()

    def look() -> None:
        shown = None
        while not started.wait(STAGE_LOOK_SECONDS):
            with contextlib.suppress(Exception):  # Ray may be ending
                if (stage := start_stage.latest()) is not None and stage != shown:
                    print(f"tidar: {stage}", file=sys.stderr, flush=True)
                    shown = stage

    looking = threading.Thread(target=look, name="start stages", daemon=True)
    looking.start()
    try:
        yield
    finally:
        started.set()
        looking.join()


def _wait_until_ready(settings: ServeSettings, seconds: float = 60) -> None:
    """Wait until /ready succeeds: the proxy learns of the replicas a moment after Serve reports them."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with open_direct(f"http://{address_of(settings)}/ready", timeout=seconds):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TidarError(f"{address_of(settings)} is not ready after {seconds:.0f} s: {error}") from error
            time.sleep(0.1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end a start as Ctrl-C does, so that a partial deployment is ended cleanly."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # other threads cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)  # replaces Ray's handler
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _wait_for_signal() -> None:
    signalled = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda *_: signalled.set()) for number in numbers}
    try:
        while not signalled.wait(timeout=1):  # on some platforms handlers do not run during a wait without timeout
            pass
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Ray's deprecation warnings and progress notes, which a user of the service cannot act on.

    Standard output is for the service's own JSON, so Ray's output there is dropped. Ray's logs have it too, and
    failures raise. Serve's logger stays at ERROR while a service of this process is deployed.
    """
    global _level_before
    if _level_before is None:
        _level_before = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            if not deployed_here():
                logger.setLevel(_level_before)
                _level_before = None


def _deployment_messages() -> str:
    """Serve's status message of the deployment that did not start: its replica's traceback, as text."""
    if APP_NAME not in (applications := serve.status().applications):
        return ""
    return "\n".join(d.message for d in applications[APP_NAME].deployments.values() if d.status != "HEALTHY")

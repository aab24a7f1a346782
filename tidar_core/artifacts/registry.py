"""Which bundle is the champion, and how did its training go? The only home of MLflow.

A registry version points at a bundle by its URI and carries its hash, its gates and its lineage as tags. The alias
`challenger` is the latest version that met its bars; `champion` is what serves. Promotion notes whom it replaced, on
the version itself, so that a rollback needs nobody's memory.

Clients are explicit: no call here reads or sets MLflow's global state.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidar_core.artifacts import locations
from tidar_core.artifacts.bundle import BundleInfo, read_bundle_info
from tidar_core.errors import BundleError, RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "FoundBundle",
    "RegistryVersion",
    "absolute_tracking_uri",
    "end_run",
    "find_bundle",
    "log_artifact",
    "log_metrics",
    "promote",
    "publish_version",
    "resolve",
    "rollback",
    "set_challenger",
    "start_run",
]

CHAMPION = "champion"
CHALLENGER = "challenger"

SQLITE = "sqlite:///"
MODEL_SCHEME = "models:/"
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql")
PREVIOUS = "previous_champion"
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
PARAMS_AT_ONCE = 100
"""What one MLflow request takes."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # of a server that does not answer: seconds, not minutes
}


@dataclass(frozen=True, slots=True)
class RegistryVersion:
    """A registered bundle."""

    name: str
    version: int
    bundle_uri: str
    bundle_hash: str


@dataclass(frozen=True, slots=True)
class FoundBundle:
    """Where a model's bundle lies, and what it says of itself."""

    uri: str
    info: BundleInfo


def absolute_tracking_uri(tracking_uri: str) -> str:
    """The same database or server whatever the working folder."""
    scheme = tracking_uri.partition("://")[0].partition("+")[0]
    if "://" not in tracking_uri or scheme not in SCHEMES:
        raise RegistryError(
            f"tracking_uri is {tracking_uri}; give sqlite:///FILE.db, http(s)://HOST:PORT, postgresql:// or mysql://"
        )
    if not tracking_uri.startswith(SQLITE):
        return tracking_uri
    return SQLITE + locations.absolute(tracking_uri.removeprefix(SQLITE))


def start_run(tracking_uri: str, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Begin a run and say its id; the experiment is made if it is new."""
    from mlflow.entities import Param

    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        run = client.create_run(_experiment_id(client, tracking_uri, experiment), tags=dict(tags), run_name=name)
        given = [Param(key, str(value)) for key, value in params.items()]
        for first in range(0, len(given), PARAMS_AT_ONCE):
            client.log_batch(run.info.run_id, params=given[first : first + PARAMS_AT_ONCE])
        return run.info.run_id


def log_metrics(tracking_uri: str, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Numbers of a run at a train step."""
    from mlflow.entities import Metric

    now = round(time.time() * 1000)
    with _in_one_line(tracking_uri):
        _client(tracking_uri).log_batch(run_id, [Metric(key, value, now, step) for key, value in metrics.items()])


def log_artifact(tracking_uri: str, run_id: str, path: str) -> None:
    """Keep a small local file, such as a report, with a run."""
    with _in_one_line(tracking_uri):
        _client(tracking_uri).log_artifact(run_id, path)


def end_run(tracking_uri: str, run_id: str, status: str = "FINISHED", *, tags: Mapping[str, str] | None = None) -> None:
    """Close a run: FINISHED, FAILED or KILLED; `tags` say what came of it."""
    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        for key, value in (tags or {}).items():
            client.set_tag(run_id, key, value)
        client.set_terminated(run_id, status)


def publish_version(
    tracking_uri: str,
    name: str,
    bundle_uri: str,
    info: BundleInfo,
    report_summary: Mapping[str, Any],
    run_id: str | None = None,
) -> int:
    """The version that points at a bundle: a new one, or the one that already does, with its gates renewed.

    report_summary  what the bundle was measured to be: its gates
    """
    tags = {
        "bundle_hash": info.bundle_hash,
        "block_len": str(info.block_len),
        "objective": info.objective,
        "lineage": json.dumps(dict(info.lineage)),
        "gates": json.dumps(dict(report_summary)),
    }
    bundle_uri = locations.absolute(bundle_uri)
    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        if not _named(client, name):
            client.create_registered_model(name)
        for known in _versions(client, name):
            if (known.source, known.tags.get("bundle_hash")) == (bundle_uri, info.bundle_hash):
                client.set_model_version_tag(name, str(known.version), "gates", tags["gates"])
                return int(known.version)
        return int(client.create_model_version(name, source=bundle_uri, run_id=run_id, tags=tags).version)


def set_challenger(tracking_uri: str, name: str, version: int) -> None:
    """Name the version that would serve next."""
    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        _require_version(client, tracking_uri, name, version)
        client.set_registered_model_alias(name, CHALLENGER, str(version))


def promote(tracking_uri: str, name: str, version: int) -> None:
    """Make the version champion; it remembers whom it replaced."""
    _require_database(tracking_uri, name)
    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        model = _require_version(client, tracking_uri, name, version)
        before = model.aliases.get(CHAMPION)
        if before is not None and int(before) == version:
            return
        if before is not None:
            client.set_model_version_tag(name, str(version), PREVIOUS, str(before))
        client.set_registered_model_alias(name, CHAMPION, str(version))


def rollback(tracking_uri: str, name: str) -> int:
    """Make the version that the champion replaced champion again; says which."""
    _require_database(tracking_uri, name)
    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        model = _require_model(client, tracking_uri, name)
        champion = model.aliases.get(CHAMPION)
        if champion is None:
            raise RegistryError(f"model {name} has no champion to roll back; promote one of {_numbers(client, name)}")
        previous = client.get_model_version(name, str(champion)).tags.get(PREVIOUS)
        if previous is None:
            raise RegistryError(
                f"model {name} version {champion} is its first champion; nothing to roll back to: "
                f"promote another of {_numbers(client, name)}"
            )
        client.set_registered_model_alias(name, CHAMPION, previous)
        return int(previous)


def resolve(tracking_uri: str, uri: str) -> RegistryVersion:
    """The bundle behind models:/NAME@ALIAS or models:/NAME/VERSION."""
    parts = MODEL_URI.fullmatch(uri)
    if not parts:
        raise RegistryError(f"model is {uri}; give models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias = parts["name"], parts["alias"]
    _require_database(tracking_uri, name)
    with _in_one_line(tracking_uri):
        client = _client(tracking_uri)
        model = _require_model(client, tracking_uri, name)
        if alias and alias not in model.aliases:
            known = ", ".join(f"{key} (version {value})" for key, value in sorted(model.aliases.items()))
            raise RegistryError(
                f"model {name} has no alias {alias!r}; it has {known or 'none'}, and versions {_numbers(client, name)}"
            )
        number = int(model.aliases[alias] if alias else parts["version"])
        _require_version(client, tracking_uri, name, number)
        found = client.get_model_version(name, str(number))
    if "bundle_hash" not in found.tags:
        raise RegistryError(f"model {name} version {number} has no bundle_hash; publish it with tidar publish")
    return RegistryVersion(name, number, str(found.source), found.tags["bundle_hash"])


def find_bundle(tracking_uri: str, model: str) -> FoundBundle:
    """The bundle that a user means: a folder or URI, or a registered model, of the hash it was registered with."""
    if not model.startswith(MODEL_SCHEME):
        return FoundBundle(locations.absolute(model), read_bundle_info(model))
    registered = resolve(tracking_uri, model)
    info = read_bundle_info(registered.bundle_uri)
    if info.bundle_hash != registered.bundle_hash:
        raise BundleError(
            f"{model} is registered with hash {registered.bundle_hash[:12]}; {registered.bundle_uri} has "
            f"{info.bundle_hash[:12]}; publish the new bundle as a version of its own"
        )
    return FoundBundle(locations.absolute(registered.bundle_uri), info)


def _require_database(tracking_uri: str, name: str) -> None:
    """Refuse to look a model up in a file that is not there: opening it would make it."""
    if tracking_uri.startswith(SQLITE) and not Path(tracking_uri.removeprefix(SQLITE)).exists():
        raise RegistryError(
            f"registry {tracking_uri} has no model {name!r}: the file does not exist; publish first, or name another"
        )


@cache
def _client(tracking_uri: str) -> "MlflowClient":
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient  # takes seconds: only who tracks pays

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    tracking_uri = absolute_tracking_uri(tracking_uri)
    if tracking_uri.startswith(SQLITE):
        Path(tracking_uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _experiment_id(client: "MlflowClient", tracking_uri: str, experiment: str) -> str:
    known = client.get_experiment_by_name(experiment)
    if known:
        return known.experiment_id
    database = absolute_tracking_uri(tracking_uri)
    folder = None  # a server has its own
    if database.startswith(SQLITE):
        folder = f"{database.removeprefix(SQLITE)}.artifacts"
    return client.create_experiment(experiment, artifact_location=folder)


def _require_model(client: "MlflowClient", tracking_uri: str, name: str) -> "RegisteredModel":
    if found := _named(client, name):
        return found
    known = ", ".join(model.name for model in client.search_registered_models()) or "none"
    raise RegistryError(f"registry {tracking_uri} has no model {name!r}; it has {known}")


def _named(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    models = client.search_registered_models(filter_string=f"name = '{name}'")
    return client.get_registered_model(name) if models else None  # the search leaves aliases out on some servers


def _require_version(client: "MlflowClient", tracking_uri: str, name: str, version: int) -> "RegisteredModel":
    model = _require_model(client, tracking_uri, name)
    if version not in [int(known.version) for known in _versions(client, name)]:
        raise RegistryError(f"model {name} has no version {version}; it has {_numbers(client, name)}")
    return model


def _versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    return list(client.search_model_versions(f"name = '{name}'"))


def _numbers(client: "MlflowClient", name: str) -> str:
    return (
        ", ".join(str(number) for number in sorted(int(known.version) for known in _versions(client, name))) or "none"
    )


@contextmanager
def _in_one_line(tracking_uri: str) -> Iterator[None]:
    """Say what MLflow refused, in one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error).split())[:300]
        raise RegistryError(f"registry {tracking_uri} refused: {reason}; check tracking_uri and the name") from error

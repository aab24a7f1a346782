"""The client of MLflow: its only home.

How is MLflow called, and how are its refusals reported?

Clients are explicit: no call here reads or sets MLflow's global state.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tidar_core.artifacts.network.loopback import exempt_loopback
from tidar_core.artifacts.store import locations
from tidar_core.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

__all__ = [
    "absolute_tracking_uri",
    "client_of",
    "experiment_id",
    "in_one_line",
    "named",
    "numbers",
    "require_database",
    "require_model",
    "require_name",
    "require_version",
    "versions",
]

SQLITE = "sqlite:///"
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql")

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that does not answer costs seconds, not minutes
}


def absolute_tracking_uri(tracking_uri: str) -> str:
    """The URI of the same database or server, independent of the working folder."""
    scheme = tracking_uri.partition("://")[0].partition("+")[0]
    if "://" not in tracking_uri or scheme not in SCHEMES:
        raise RegistryError(
            f"tracking_uri is {tracking_uri}; give sqlite:///FILE.db, http(s)://HOST:PORT, postgresql:// or mysql://"
        )
    if not tracking_uri.startswith(SQLITE):
        return tracking_uri
    return SQLITE + locations.absolute(tracking_uri.removeprefix(SQLITE))


def require_database(tracking_uri: str, name: str | None) -> None:
    """Raises RegistryError if the registry is a database file that does not exist: opening it would create it."""
    if tracking_uri.startswith(SQLITE) and not Path(tracking_uri.removeprefix(SQLITE)).exists():
        missing = "no models" if name is None else f"no model {name!r}"
        raise RegistryError(
            f"registry {tracking_uri} has {missing}: the file does not exist; publish first, or give another registry"
        )


@cache
def client_of(tracking_uri: str) -> "MlflowClient":
    """The client of a server or a database."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    exempt_loopback()
    from mlflow import MlflowClient  # takes seconds: imported only by processes that track

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    tracking_uri = absolute_tracking_uri(tracking_uri)
    if tracking_uri.startswith(SQLITE):
        Path(tracking_uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def experiment_id(client: "MlflowClient", tracking_uri: str, experiment: str) -> str:
    """The id of the experiment with that name, created if it is new."""
    known = client.get_experiment_by_name(experiment)
    if known:
        return known.experiment_id
    database = absolute_tracking_uri(tracking_uri)
    folder = None  # a server has its own
    if database.startswith(SQLITE):
        folder = f"{database.removeprefix(SQLITE)}.artifacts"
    return client.create_experiment(experiment, artifact_location=folder)


def require_name(name: str) -> None:
    """Raises RegistryError for a name that MLflow or `models:/NAME@ALIAS` could not find again."""
    if not name.strip() or name != name.strip() or not name.isprintable() or any(mark in name for mark in "/:@"):
        raise RegistryError(
            f"name is {name!r}; a model's name has printable characters, no space at either end, and none of / : @; "
            "give another"
        )
    _quoted(name)


def require_model(client: "MlflowClient", tracking_uri: str, name: str) -> "RegisteredModel":
    """The registered model. Raises RegistryError with the existing names if there is no such model."""
    if found := named(client, name):
        return found
    known = ", ".join(model.name for model in client.search_registered_models()) or "none"
    raise RegistryError(f"registry {tracking_uri} has no model {name!r}; it has {known}")


def named(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    """The registered model with its aliases, if there is one."""
    models = client.search_registered_models(filter_string=f"name = {_quoted(name)}")
    return client.get_registered_model(name) if models else None  # the search leaves aliases out on some servers


def require_version(client: "MlflowClient", tracking_uri: str, name: str, version: int) -> "RegisteredModel":
    """The model of an existing version. Raises RegistryError with the existing versions if there is no such version."""
    model = require_model(client, tracking_uri, name)
    if version not in [int(known.version) for known in versions(client, name)]:
        raise RegistryError(f"model {name} has no version {version}; it has {numbers(client, name)}")
    return model


def versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """All versions of a model, in ascending order."""
    found: list[ModelVersion] = []
    token: str | None = ""
    while token is not None:
        page = client.search_model_versions(f"name = {_quoted(name)}", page_token=token or None)
        found += page
        token = page.token or None
    return sorted(found, key=lambda known: int(known.version))


def numbers(client: "MlflowClient", name: str) -> str:
    """The version numbers of a model, as text for a message."""
    return ", ".join(str(known.version) for known in versions(client, name)) or "none"


def _quoted(name: str) -> str:
    """The name in quotation marks, as MLflow's filters read it: they know two marks and cannot escape either."""
    if "'" in name and '"' in name:
        raise RegistryError(f"model {name!r} has both ' and \" in its name; MLflow finds no such name; give another")
    return f'"{name}"' if "'" in name else f"'{name}'"


@contextmanager
def in_one_line(tracking_uri: str) -> Iterator[None]:
    """Raises RegistryError, in one line, for a call that MLflow refuses."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error).split())[:300]
        raise RegistryError(f"registry {tracking_uri} refused: {reason}; check tracking_uri and the name") from error

"""Whom does an alias name after several have changed it at once? The version that its tags say.

MLflow changes an alias without asking what it was. So each change is first a number on a version, in a tag, one above
all others; then the alias is put where the numbers say, by whoever changed them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tidar_core.artifacts.registry.mlflow_client import versions
from tidar_core.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["follow", "highest", "number", "numbered"]

ATTEMPTS = 20
"""To agree with others who change the alias at the same time; each takes one or two."""


def numbered(client: "MlflowClient", name: str, tag: str) -> dict[int, int]:
    """Version -> its number, of those that have that tag. Raises RegistryError for a tag that is no number."""
    found = {}
    for known in versions(client, name):
        if (given := known.tags.get(tag)) is not None:
            if not given.isdecimal():
                raise RegistryError(
                    f"model {name} version {known.version} has tag {tag} {given[:80]!r}; it must be a whole number; "
                    "set it back, or delete it in MLflow"
                )
            found[int(known.version)] = int(given)
    return found


def number(client: "MlflowClient", name: str, version: int, tag: str) -> None:
    """Give the version a number above all others."""
    last = max(numbered(client, name, tag).values(), default=0)
    client.set_model_version_tag(name, str(version), tag, str(last + 1))


def highest(client: "MlflowClient", name: str, tag: str) -> int:
    """The version of the highest number, the later one of two that took it at once."""
    found = numbered(client, name, tag)
    return max(found, key=lambda version: (found[version], version))


def follow(client: "MlflowClient", name: str, alias: str, wanted: Callable[[], int | None]) -> int | None:
    """Put the alias where `wanted` says, or take it away; says where it is then.

    Whoever changes the alias looks again at the tags, so the last one to change it has seen all that were written
    before: processes that write at once agree in the end. A change that is refused is one that another has made at the
    same moment, as a database says of a row that is there by now; or it is refused every time.
    """
    from mlflow.exceptions import MlflowException

    refused: MlflowException | None = None
    for _ in range(ATTEMPTS):
        version = wanted()
        found = client.get_registered_model(name).aliases.get(alias)
        if version == (None if found is None else int(found)):
            return version
        try:
            if version is None:
                client.delete_registered_model_alias(name, alias)
            else:
                client.set_registered_model_alias(name, alias, str(version))
            refused = None
        except MlflowException as error:
            refused = error
    if refused is not None:
        raise refused
    raise RegistryError(f"others kept changing who is {alias} of {name} for {ATTEMPTS} attempts; try again")

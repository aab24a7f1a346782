"""The order of changes to an alias, kept as numbers in the tags of versions.

Which version does an alias name after several processes have changed it at once?

MLflow changes an alias without comparing it with its old value. So each change first writes a number, one above all
others, into a tag of a version. Then the process that wrote the number moves the alias to the version that the numbers
select.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tidar_core.artifacts.registry.mlflow_client import versions
from tidar_core.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["follow", "highest", "number", "numbered", "numbered_by"]

ATTEMPTS = 20
"""Attempts to agree with processes that change the alias at the same time; each process needs one or two."""


def numbered(client: "MlflowClient", name: str, tag: str) -> dict[int, int]:
    """Version -> its number, for the versions that have the tag. Raises RegistryError for a tag that is no number."""
    return numbered_by(client, name, tag)[0]


def numbered_by(client: "MlflowClient", name: str, *tags: str) -> list[dict[int, int]]:
    """Results of `numbered` for several tags, all from one look at the versions."""
    found: list[dict[int, int]] = [{} for _ in tags]
    for known in versions(client, name):
        for tag, numbers in zip(tags, found):
            if (given := known.tags.get(tag)) is not None:
                if not given.isdecimal():
                    raise RegistryError(
                        f"model {name} version {known.version} has tag {tag} {given[:80]!r}; it must be a whole "
                        "number; set it back, or delete it in MLflow"
                    )
                numbers[int(known.version)] = int(given)
    return found


def number(client: "MlflowClient", name: str, version: int, tag: str) -> None:
    """Gives the version a number above all others."""
    last = max(numbered(client, name, tag).values(), default=0)
    client.set_model_version_tag(name, str(version), tag, str(last + 1))


def highest(client: "MlflowClient", name: str, tag: str) -> int:
    """The version with the highest number; the later version if two took that number at once."""
    found = numbered(client, name, tag)
    return max(found, key=lambda version: (found[version], version))


def follow(client: "MlflowClient", name: str, alias: str, wanted: Callable[[], int | None]) -> int | None:
    """Moves the alias to the version that `wanted` returns, or deletes it for None; returns the alias's version.

    Each process reads the tags again after it has changed the alias. So the last process to change it has seen all
    tags that were written before, and processes that write at once agree in the end. MLflow may refuse a change because
    another process made it at the same moment: the database has the entry already. Any other refusal comes at every
    attempt, and the last refusal is raised.
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
    raise RegistryError(
        f"alias {alias} of model {name} was changed by other processes during all of {ATTEMPTS} attempts; try again"
    )

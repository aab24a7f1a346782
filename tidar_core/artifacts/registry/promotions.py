"""The order of a model's champions, which interrupted promotions do not disturb.

Which version is champion, and which version was champion before it?

A promotion is a number on a version, one above all others, in two tags. `promoting` is written before the alias
changes, `promotion` after it. So a version whose promotion was killed in between was never champion, and no rollback
chooses it. The alias follows the highest number under either tag. Every write can be the last of a killed process: the
next promotion or rollback completes or removes the unfinished promotion.
"""

from typing import TYPE_CHECKING

from tidar_core.artifacts.registry.alias_order import follow, numbered, numbered_by

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CHAMPION", "PROMOTION", "promote_version", "roll_back_from"]

CHAMPION = "champion"
PROMOTION = "promotion"
"""Tag: the number of a promotion that was completed."""
PROMOTING = "promoting"
"""Tag: the number of a promotion that has begun."""


def promote_version(client: "MlflowClient", name: str, version: int, champion: int | None) -> int:
    """Makes the version champion and returns the champion: another version if that was promoted at the same time.

    champion  the version that the alias names now
    """
    if champion == version:
        _forget_unfinished(client, name, version)
    if champion is not None:
        _complete(client, name, champion)
    if champion != version:
        last = max(_all(client, name).values(), default=0)
        client.set_model_version_tag(name, str(version), PROMOTING, str(1 + last))
        _follow(client, name)
        _complete(client, name, version)
    return _follow(client, name)  # a rollback at the same moment has removed numbers that seemed unfinished


def roll_back_from(client: "MlflowClient", name: str, champion: int) -> int | None:
    """Makes the version before `champion` champion again, and returns it; None if `champion` is the first."""
    begun, completed = numbered_by(client, name, PROMOTING, PROMOTION)
    own = _latest(begun, completed).get(champion)
    before = completed.keys() - {champion}
    if own is not None:  # else it was made champion by hand, after all promotions
        before = {version for version in before if (completed[version], version) < (own, champion)}
    if not before:
        return None
    _forget_unfinished(client, name, champion)
    _remove(client, name, champion)
    return _follow(client, name)


def _all(client: "MlflowClient", name: str) -> dict[int, int]:
    """Version -> the number of its promotion, completed or not."""
    return _latest(*numbered_by(client, name, PROMOTING, PROMOTION))


def _latest(begun: dict[int, int], completed: dict[int, int]) -> dict[int, int]:
    return completed | {version: max(number, completed.get(version, number)) for version, number in begun.items()}


def _complete(client: "MlflowClient", name: str, version: int) -> None:
    """Numbers a version that is, or has been, champion: with the number of its begun promotion, else the last."""
    begun, completed = numbered_by(client, name, PROMOTING, PROMOTION)
    if version in begun:
        client.set_model_version_tag(name, str(version), PROMOTION, str(begun[version]))
        client.delete_model_version_tag(name, str(version), PROMOTING)
    elif version not in completed:
        last = max((begun | completed).values(), default=-1)
        client.set_model_version_tag(name, str(version), PROMOTION, str(1 + last))


def _forget_unfinished(client: "MlflowClient", name: str, champion: int) -> None:
    """Removes promotions that never reached the alias: begun promotions, and numbers above the champion's."""
    own = _all(client, name).get(champion)
    for version in numbered(client, name, PROMOTING).keys() - {champion}:
        client.delete_model_version_tag(name, str(version), PROMOTING)
    for version, number in numbered(client, name, PROMOTION).items():
        if own is not None and (number, version) > (own, champion):
            client.delete_model_version_tag(name, str(version), PROMOTION)


def _remove(client: "MlflowClient", name: str, version: int) -> None:
    for tag in (PROMOTING, PROMOTION):
        if version in numbered(client, name, tag):
            client.delete_model_version_tag(name, str(version), tag)


def _follow(client: "MlflowClient", name: str) -> int:
    """Moves the alias to the version with the highest promotion, and returns that version."""

    def highest() -> int:
        found = _all(client, name)
        return max(found, key=lambda version: (found[version], version))

    version = follow(client, name, CHAMPION, highest)
    assert version is not None, "a version has just been promoted, or stays so"
    return version

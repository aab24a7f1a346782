"""Promotions and rollbacks that are killed between any two of their writes, and registries changed by hand."""

import itertools
import sqlite3
from contextlib import closing

import pytest

from tidar_core.artifacts.model.bundle_info import BundleInfo
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.registry.mlflow_client import client_of
from tidar_core.errors import GateError, RegistryError

pytestmark = pytest.mark.slow

WRITES = ("set_model_version_tag", "delete_model_version_tag", "set_registered_model_alias")
names = (f"model-{n}" for n in itertools.count())


class Killed(BaseException):
    """Ends a command as SIGKILL does: nothing after it runs."""


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


def publish(uri, name, number, gates=None):
    info = BundleInfo(block_len=4, mask_id=9, objective="dual", lineage={}, files={}, bundle_hash=f"hash-{number}")
    return model_registry.publish_version(uri, name, f"/bundles/{number}", info, gates or {"ar_loss": 1.5})


def model_with_champion(uri, *promoted, versions=3):
    name = next(names)
    for number in range(1, versions + 1):
        publish(uri, name, number)
    for version in promoted:
        model_registry.promote(uri, name, version)
    return name


def champion(uri, name):
    return model_registry.aliases(uri, name)["champion"]


def killed(uri, change, writes):
    """Whether `change` was killed after `writes` writes, before the next one."""
    client, left = client_of(uri), [writes]
    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(client, name, _counted(getattr(client, name), left))
        try:
            change()
        except Killed:
            return True
    return False


def _counted(write, left):
    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return write(*args, **kwargs)

    return counted


def interrupted(uri, before, change):
    """The model after `change(name)` was killed, once for each write that a kill can precede; then it is as before."""
    name = model_with_champion(uri, *before)
    file = uri.removeprefix("sqlite:///")
    with closing(sqlite3.connect(":memory:")) as kept:
        with closing(sqlite3.connect(file)) as registry:
            registry.backup(kept)
        for writes in itertools.count():
            if not killed(uri, lambda: change(name), writes):
                assert writes > 1
                return
            yield name
            with closing(sqlite3.connect(file)) as registry:
                kept.backup(registry)


def test_no_rollback_after_a_killed_promotion_reaches_a_version_that_was_never_champion(uri):
    for name in interrupted(uri, (1, 2), lambda name: model_registry.promote(uri, name, 3)):
        reached = champion(uri, name)
        assert reached in (2, 3)
        champions = [reached]
        while champions[-1] != 1:
            champions.append(model_registry.rollback(uri, name))
            assert champion(uri, name) == champions[-1]
        assert champions == list(range(reached, 0, -1))
        with pytest.raises(RegistryError, match="is its first champion"):
            model_registry.rollback(uri, name)


def test_promoting_the_present_champion_repairs_a_killed_promotion(uri):
    for name in interrupted(uri, (1, 2), lambda name: model_registry.promote(uri, name, 3)):
        reached = champion(uri, name)
        assert model_registry.promote(uri, name, reached) == champion(uri, name) == reached
        status = {one.version: one.status for one in model_registry.list_versions(uri, name)}
        earlier = dict.fromkeys(range(1, reached), "earlier champion")
        assert status == {3: "", **earlier, reached: "champion"}
        assert model_registry.rollback(uri, name) == reached - 1


def test_a_killed_promotion_is_completed_by_the_same_command_and_ignored_by_another_promotion(uri):
    for name in interrupted(uri, (1, 2), lambda name: model_registry.promote(uri, name, 3)):
        assert model_registry.promote(uri, name, 3) == champion(uri, name) == 3
        assert model_registry.rollback(uri, name) == 2
    for name in interrupted(uri, (2,), lambda name: model_registry.promote(uri, name, 3)):
        reached = champion(uri, name)
        assert model_registry.promote(uri, name, 1) == champion(uri, name) == 1
        assert model_registry.rollback(uri, name) == reached


def test_a_killed_rollback_is_completed_by_the_same_command_or_undone_by_promoting_the_champion(uri):
    for name in interrupted(uri, (1, 2, 3), lambda name: model_registry.rollback(uri, name)):
        if champion(uri, name) == 3:
            assert model_registry.rollback(uri, name) == champion(uri, name) == 2
        assert model_registry.rollback(uri, name) == 1
    for name in interrupted(uri, (1, 2, 3), lambda name: model_registry.rollback(uri, name)):
        reached = champion(uri, name)
        assert model_registry.promote(uri, name, reached) == reached
        assert model_registry.rollback(uri, name) == champion(uri, name) == reached - 1


def test_a_killed_promotion_after_a_killed_promotion_leaves_no_trace_either(uri):
    for name in interrupted(uri, (1,), lambda name: model_registry.promote(uri, name, 2)):
        if killed(uri, lambda name=name: model_registry.promote(uri, name, 3), 1):
            reached = champion(uri, name)
            assert reached in (1, 2)
            if reached == 2:
                assert model_registry.rollback(uri, name) == 1
            with pytest.raises(RegistryError, match="version 1 is its first champion"):
                model_registry.rollback(uri, name)


def test_a_number_without_the_alias_left_by_an_earlier_release_makes_no_earlier_champion(uri):
    name = model_with_champion(uri, 1, 2)
    client_of(uri).set_model_version_tag(name, "3", "promotion", "3")  # killed before the alias was set
    assert model_registry.rollback(uri, name) == champion(uri, name) == 1
    with pytest.raises(RegistryError, match="version 1 is its first champion"):
        model_registry.rollback(uri, name)


def test_a_champion_set_by_hand_comes_after_all_versions_promoted_before(uri):
    name = model_with_champion(uri, 1, versions=4)
    client_of(uri).set_registered_model_alias(name, "champion", "2")
    model_registry.promote(uri, name, 3)
    assert [model_registry.rollback(uri, name), model_registry.rollback(uri, name)] == [2, 1]


def test_an_unchanged_champion_is_promoted_again_without_a_write(uri):
    name = model_with_champion(uri, 1, 2)
    assert not killed(uri, lambda: model_registry.promote(uri, name, 2), 0)


@pytest.mark.parametrize(
    ("tag", "value", "words"),
    [
        ("promotion", "first", "version 1 has tag promotion 'first'; it must be a whole number"),
        ("promoting", "", "version 1 has tag promoting ''; it must be a whole number"),
        ("trial.challenger", "1.5", "version 1 has tag trial.challenger '1.5'; it must be a whole number"),
        ("gates", "{ar_loss: 1}", "version 1 has tag gates '{ar_loss: 1}'; it must be a JSON object"),
        ("gates", "[1]", r"version 1 has tag gates '\[1\]'; it must be a JSON object"),
    ],
)
def test_a_wrong_tag_set_by_hand_is_reported_in_one_line(uri, tag, value, words):
    name = model_with_champion(uri, 1)
    client_of(uri).set_model_version_tag(name, "1", tag, value)
    changes = {
        "promotion": [lambda: model_registry.promote(uri, name, 2), lambda: model_registry.rollback(uri, name)],
        "promoting": [lambda: model_registry.promote(uri, name, 1), lambda: model_registry.rollback(uri, name)],
        "trial.challenger": [lambda: model_registry.set_challenger(uri, name, 2)],
        "gates": [lambda: model_registry.promote(uri, name, 1), lambda: model_registry.list_versions(uri, name)],
    }
    for change in changes[tag]:
        with pytest.raises(RegistryError, match=words) as caught:
            change()
        assert "\n" not in str(caught.value)
    client_of(uri).delete_model_version_tag(name, "1", tag)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_version_whose_gates_are_not_finite_is_never_promoted(uri, value):
    name = model_with_champion(uri, 1)
    diverged = publish(uri, name, 9, {"ar_loss": value, "tokens_per_forward": 3.0})
    with pytest.raises(GateError, match=rf"version {diverged} is not promoted: its gates have ar_loss {value}; "):
        model_registry.promote(uri, name, diverged)
    assert champion(uri, name) == 1


@pytest.mark.parametrize("name", ["it's", '17" screen', "' or '1' = '1", "a`b", "50% off", "a;b--c", "it's 5`", "日本"])
def test_a_name_with_quotation_marks_is_published_promoted_listed_and_found(uri, name):
    publish(uri, name, 1)
    publish(uri, name, 2)
    model_registry.set_challenger(uri, name, 2)
    assert [
        model_registry.promote(uri, name, 1),
        model_registry.promote(uri, name, 2),
        model_registry.rollback(uri, name),
    ] == [1, 2, 1]
    assert [one.name for one in model_registry.list_versions(uri, name)] == [name, name]
    assert model_registry.resolve(uri, f"models:/{name}@champion").version == 1


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "", "  ", " a", "a\nb", "a'b\"c"])
def test_a_name_that_could_not_be_found_again_is_refused_before_anything_is_registered(uri, name):
    with pytest.raises(RegistryError, match="give another") as caught:
        publish(uri, name, 1)
    assert "\n" not in str(caught.value)
    assert name not in {one.name for one in client_of(uri).search_registered_models(max_results=1000)}

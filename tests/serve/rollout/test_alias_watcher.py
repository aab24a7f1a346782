"""What is to be served by now, asked of a real registry; replicas are played by their reports."""

import asyncio
import dataclasses

import pytest

from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.rollout.alias_watcher import AliasWatcher
from serve_apps.rollout.canary import Trial
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle import read_bundle_info
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.registry.mlflow_client import client_of
from tidar_core.errors import BundleError, RegistryError

pytestmark = pytest.mark.slow


@pytest.fixture
def name(registry_uri, bundle, other_bundle, request):
    """A model of two versions; the first is its champion."""
    name = request.node.name[:40]
    for place in (bundle, other_bundle):
        model_registry.publish_version(registry_uri, name, place, read_bundle_info(place), {})
    model_registry.promote(registry_uri, name, 1)
    return name


@pytest.fixture
def watch(name, registry_uri):
    trial = Trial(texts=10, error_rate=0.1)
    settings = ServeSettings(
        model=f"models:/{name}@champion", tracking_uri=registry_uri, follow_alias_seconds=1, challenger=trial
    )
    return AliasWatcher(*resolve_model(settings))


def report(served, state, problem="", **totals):
    return VersionReport(
        replica="a", version=served.label, fingerprint=served.fingerprint, bundle_hash=served.bundle_hash, state=state,
        problem=problem, totals=VersionStats(**totals),
    )  # fmt: skip


def look(watch, *reports):
    """Ask once and tell once; gives what replicas were told, each time."""
    told = []

    async def tell(target):
        told.append(target)
        return reports

    async def once():
        await watch.ask()
        await watch.tell(tell)

    asyncio.run(once())
    return [tuple(None if s is None else s.version for s in (t.champion, t.challenger)) for t in told]


def steps(watch):
    return {step: count for step, count in watch.steps.items() if count}


def test_replicas_are_told_at_each_look_what_the_aliases_name(watch, name, registry_uri):
    assert look(watch) == [(1, None)]
    model_registry.set_challenger(registry_uri, name, 2)
    assert look(watch) == [(1, 2)]
    assert look(watch) == [(1, 2)]
    model_registry.promote(registry_uri, name, 2)
    assert look(watch) == [(2, None)]  # it is no challenger of itself
    model_registry.rollback(registry_uri, name)
    assert look(watch) == [(1, 2)]
    assert steps(watch) == {"champion_changed": 2, "challenger_changed": 3}
    assert watch.card.bundle_hash == watch.target.champion.bundle_hash


def test_without_a_trial_in_the_settings_the_challengers_alias_is_nobodys_business(watch, name, registry_uri):
    settings = watch.target.champion.settings.model_copy(update={"challenger": None})
    model_registry.set_challenger(registry_uri, name, 2)
    assert look(AliasWatcher(*resolve_model(settings))) == [(1, None)]


def test_a_registry_that_does_not_answer_changes_nothing_and_is_told_once(watch, name, registry_uri, tmp_path):
    model_registry.set_challenger(registry_uri, name, 2)
    look(watch)
    watch.settings = watch.settings.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/gone.db"})
    assert look(watch) == look(watch) == [(1, 2)]
    assert steps(watch) == {"challenger_changed": 1, "lookup_failed": 1}


def test_a_champion_that_is_not_where_the_registry_says_changes_nothing_and_is_told_once(
    watch, name, registry_uri, bundle
):
    info = dataclasses.replace(read_bundle_info(bundle), bundle_hash="0" * 64)
    model_registry.promote(registry_uri, name, model_registry.publish_version(registry_uri, name, "/gone", info, {}))
    assert look(watch) == look(watch) == [(1, None)]
    assert steps(watch) == {"lookup_failed": 1}


def test_a_challenger_comes_and_goes_while_the_champion_cannot_be_looked_up(watch, name, registry_uri, bundle):
    model_registry.set_challenger(registry_uri, name, 2)
    assert look(watch) == [(1, 2)]
    info = dataclasses.replace(read_bundle_info(bundle), bundle_hash="0" * 64)
    model_registry.promote(registry_uri, name, model_registry.publish_version(registry_uri, name, "/gone", info, {}))
    client_of(registry_uri).delete_registered_model_alias(name, "challenger")
    assert look(watch) == [(1, None)]
    model_registry.set_challenger(registry_uri, name, 2)
    assert look(watch) == [(1, 2)]
    client_of(registry_uri).delete_registered_model_alias(name, "champion")
    client_of(registry_uri).delete_registered_model_alias(name, "challenger")
    assert look(watch) == [(1, None)]
    assert steps(watch) == {"challenger_changed": 4, "lookup_failed": 2}


def test_a_challenger_that_is_promoted_goes_on_until_the_champion_can_be_looked_up(
    watch, name, registry_uri, monkeypatch
):
    model_registry.set_challenger(registry_uri, name, 2)
    look(watch)
    model_registry.promote(registry_uri, name, 2)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "_found", unreachable)
        assert look(watch) == [(1, 2)]
    assert look(watch) == [(2, None)]


def test_a_challenger_that_cannot_be_looked_up_keeps_no_champion_from_its_place(watch, name, registry_uri, bundle):
    info = dataclasses.replace(read_bundle_info(bundle), bundle_hash="0" * 64)
    gone = model_registry.publish_version(registry_uri, name, "/gone", info, {})
    model_registry.promote(registry_uri, name, 2)
    model_registry.set_challenger(registry_uri, name, gone)
    assert look(watch) == [(2, None)]


def test_an_alias_that_the_registry_does_not_take_away_keeps_no_champion_from_its_place(
    watch, name, registry_uri, monkeypatch
):
    model_registry.set_challenger(registry_uri, name, 2)
    champion, challenger = watch.target.champion, resolve_model(watch.target.champion.settings, f"models:/{name}/2")[0]
    monkeypatch.setattr(model_registry, "withdraw", refused)
    look(watch, report(champion, "champion"), report(challenger, "challenger"))
    assert look(watch, report(challenger, "challenger", errors=5)) == [(1, 2), (1, None)]
    model_registry.promote(registry_uri, name, 2)
    assert look(watch) == [(2, None)]


async def unreachable(version):
    raise BundleError("/bundles is not mounted")


def refused(*_):
    raise RegistryError("read only")


def test_what_a_replica_cannot_load_is_told_once_and_a_new_one_may_begin_with_what_another_has_served(
    watch, name, registry_uri
):
    first = watch.target.champion
    look(watch, report(first, "champion"))
    model_registry.promote(registry_uri, name, 2)
    watch_for_it = report(resolve_model(first.settings)[0], "failed", "out of memory")
    for _ in range(2):
        look(watch, report(first, "champion"), watch_for_it)
    assert steps(watch) == {"champion_changed": 1, "load_failed": 1}
    assert (watch.target.champion.version, watch.target.proven) == (2, first)


def test_a_challenger_that_fails_is_taken_away_from_the_replicas_and_from_the_registry(
    watch, name, registry_uri, caplog
):
    caplog.set_level("INFO", logger="ray.serve")
    model_registry.set_challenger(registry_uri, name, 2)
    champion, challenger = watch.target.champion, resolve_model(watch.target.champion.settings, f"models:/{name}/2")[0]
    before = {"texts": 500, "errors": 500}  # of another trial
    assert look(watch, report(champion, "champion"), report(challenger, "challenger", **before)) == [(1, 2)]
    now = {"texts": 509, "errors": 501}
    assert look(watch, report(champion, "champion"), report(challenger, "challenger", **now)) == [(1, 2)]
    now = {"texts": 510, "errors": 502}
    assert look(watch, report(champion, "champion"), report(challenger, "challenger", **now)) == [(1, 2), (1, None)]
    assert model_registry.aliases(registry_uri, name) == {"champion": 1}
    tags = client_of(registry_uri).get_model_version(name, "2").tags
    assert tags["withdrawn"] == "2 of 12 texts failed; at most 0.1 of all may"
    assert look(watch, report(champion, "champion"), report(challenger, "gone", **now)) == [(1, None)]
    assert steps(watch) == {"challenger_changed": 1, "challenger_rolled_back": 1}
    logged = [(record.model, record.step, record.getMessage()) for record in caplog.records]
    assert logged == [
        (name, "challenger_changed", f"model {name}: challenger_changed: version 2 after none"),
        (name, "challenger_rolled_back", f"model {name}: challenger_rolled_back: version 2: {tags['withdrawn']}"),
    ]

    model_registry.set_challenger(registry_uri, name, 2)  # by hand, once it is mended: another trial
    for _ in range(2):
        assert look(watch, report(champion, "champion"), report(challenger, "challenger", **now)) == [(1, 2)]


def test_a_rollback_that_the_registry_does_not_take_yet_holds_all_the_same_and_is_tried_again(
    watch, name, registry_uri, tmp_path
):
    model_registry.set_challenger(registry_uri, name, 2)
    champion, challenger = watch.target.champion, resolve_model(watch.target.champion.settings, f"models:/{name}/2")[0]
    look(watch, report(champion, "champion"), report(challenger, "challenger"))
    settings = watch.settings
    watch.settings = settings.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/gone.db"})
    failed = report(challenger, "challenger", errors=5)
    assert look(watch, report(champion, "champion"), failed) == [(1, 2), (1, None)]
    assert model_registry.aliases(registry_uri, name) == {"champion": 1, "challenger": 2}
    watch.settings = settings
    assert look(watch, report(champion, "champion"), failed) == [(1, None)]
    assert model_registry.aliases(registry_uri, name) == {"champion": 1}

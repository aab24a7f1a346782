"""The alias watcher with a real registry; reports stand for the replicas."""

import asyncio
import dataclasses

import pytest

from serve_apps.messages.version_stats import VersionReport, VersionStats
from serve_apps.rollout.alias_watcher import AliasWatcher
from serve_apps.rollout.canary import CanarySettings
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.artifacts.registry import model_registry
from tidar_core.artifacts.registry.mlflow_client import client_of
from tidar_core.errors import BundleError, RegistryError

pytestmark = pytest.mark.slow


@pytest.fixture
def name(registry_uri, bundle, other_bundle, request):
    """Name of a model with two versions; the first version is its champion."""
    name = request.node.name[:40]
    for place in (bundle, other_bundle):
        model_registry.publish_version(registry_uri, name, place, read_bundle_info(place), {})
    model_registry.promote(registry_uri, name, 1)
    return name


@pytest.fixture
def watch(name, registry_uri):
    canary = CanarySettings(texts=10, error_rate=0.1)
    settings = ServeSettings(
        model=f"models:/{name}@champion", tracking_uri=registry_uri, follow_alias_seconds=1, challenger=canary
    )
    return AliasWatcher(*resolve_model(settings))


def report(served, state, problem="", **totals):
    return VersionReport(
        replica="a", version=served.label, fingerprint=served.fingerprint, bundle_hash=served.bundle_hash, state=state,
        problem=problem, totals=VersionStats(**totals),
    )  # fmt: skip


def look(watch, *reports):
    """Look up and update once; returns the versions of each target that was sent."""
    sent = []

    async def send(target):
        sent.append(target)
        return reports

    async def once():
        await watch.look_up()
        await watch.update_replicas(send)

    asyncio.run(once())
    return [tuple(None if s is None else s.version for s in (t.champion, t.challenger)) for t in sent]


def steps(watch):
    return {step: count for step, count in watch.steps.items() if count}


def test_each_lookup_sends_the_versions_of_the_aliases_to_the_replicas(watch, name, registry_uri):
    assert look(watch) == [(1, None)]
    model_registry.set_challenger(registry_uri, name, 2)
    assert look(watch) == [(1, 2)]
    assert look(watch) == [(1, 2)]
    model_registry.promote(registry_uri, name, 2)
    assert look(watch) == [(2, None)]  # the champion cannot be its own challenger
    model_registry.rollback(registry_uri, name)
    assert look(watch) == [(1, 2)]
    assert steps(watch) == {"champion_changed": 2, "challenger_changed": 3}
    assert watch.card.bundle_hash == watch.target.champion.bundle_hash


def test_without_a_canary_in_the_settings_the_challengers_alias_is_ignored(watch, name, registry_uri):
    settings = watch.target.champion.settings.model_copy(update={"challenger": None})
    model_registry.set_challenger(registry_uri, name, 2)
    assert look(AliasWatcher(*resolve_model(settings))) == [(1, None)]


def test_a_failing_registry_changes_nothing_and_is_logged_once(watch, name, registry_uri, tmp_path):
    model_registry.set_challenger(registry_uri, name, 2)
    look(watch)
    watch.settings = watch.settings.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path}/gone.db"})
    assert look(watch) == look(watch) == [(1, 2)]
    assert steps(watch) == {"challenger_changed": 1, "lookup_failed": 1}


def test_a_champion_whose_bundle_is_missing_changes_nothing_and_is_logged_once(watch, name, registry_uri, bundle):
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
        patch.setattr(watch, "_resolved", unreachable)
        assert look(watch) == [(1, 2)]
    assert look(watch) == [(2, None)]


def test_a_failed_lookup_of_the_challenger_does_not_stop_the_champion(watch, name, registry_uri, bundle):
    info = dataclasses.replace(read_bundle_info(bundle), bundle_hash="0" * 64)
    gone = model_registry.publish_version(registry_uri, name, "/gone", info, {})
    model_registry.promote(registry_uri, name, 2)
    model_registry.set_challenger(registry_uri, name, gone)
    assert look(watch) == [(2, None)]


def test_a_failed_withdrawal_of_the_challenger_does_not_stop_the_champion(watch, name, registry_uri, monkeypatch):
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


def test_a_failed_load_is_logged_once_and_a_new_replica_may_start_with_the_proven_version(watch, name, registry_uri):
    first = watch.target.champion
    look(watch, report(first, "champion"))
    model_registry.promote(registry_uri, name, 2)
    watch_for_it = report(resolve_model(first.settings)[0], "failed", "out of memory")
    for _ in range(2):
        look(watch, report(first, "champion"), watch_for_it)
    assert steps(watch) == {"champion_changed": 1, "load_failed": 1}
    assert (watch.target.champion.version, watch.target.proven) == (2, first)


def test_a_failing_challenger_is_removed_from_the_replicas_and_from_the_registry(watch, name, registry_uri, caplog):
    caplog.set_level("INFO", logger="ray.serve")
    model_registry.set_challenger(registry_uri, name, 2)
    champion, challenger = watch.target.champion, resolve_model(watch.target.champion.settings, f"models:/{name}/2")[0]
    before = {"texts": 500, "errors": 500}  # of an earlier canary
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

    model_registry.set_challenger(registry_uri, name, 2)  # set by hand after a repair: a new canary begins
    for _ in range(2):
        assert look(watch, report(champion, "champion"), report(challenger, "challenger", **now)) == [(1, 2)]


def test_a_rollback_holds_although_the_registry_fails_and_is_retried(watch, name, registry_uri, tmp_path):
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

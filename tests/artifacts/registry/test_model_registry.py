"""Versions, aliases, promotion and rollback, on a SQLite registry."""

import json
import math

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tidar_core.artifacts.model.bundle_info import BundleInfo
from tidar_core.artifacts.registry import model_registry, runs
from tidar_core.artifacts.registry.mlflow_client import client_of
from tidar_core.errors import RegistryError


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('registry') / 'new' / 'mlflow.db'}"


def publish(uri, name, number):
    info = BundleInfo(
        block_len=4, mask_id=9, objective="dual", lineage={"shards": "s"}, files={}, bundle_hash=f"hash-{number}"
    )
    return model_registry.publish_version(uri, name, f"/bundles/{number}", info, {"ar_loss": 1.5})


def test_a_published_version_points_at_its_bundle_and_carries_its_hash_gates_and_lineage(uri):
    assert publish(uri, "points", 1) == 1
    assert model_registry.resolve(uri, "models:/points/1") == model_registry.RegistryVersion(
        "points", 1, "/bundles/1", "hash-1"
    )
    tags = client_of(uri).get_model_version("points", "1").tags
    assert (tags["bundle_hash"], tags["block_len"]) == ("hash-1", "4")
    assert (json.loads(tags["gates"]), json.loads(tags["lineage"])) == ({"ar_loss": 1.5}, {"shards": "s"})


def test_publishing_the_same_bundle_again_is_the_same_version(uri):
    assert [publish(uri, "same", number) for number in (1, 2, 1, 2, 3)] == [1, 2, 1, 2, 3]


def test_a_promotion_moves_the_champion_and_rollbacks_return_to_earlier_champions_in_order(uri):
    for number in (1, 2, 3):
        publish(uri, "walk", number)
    for number in (1, 2, 2, 3):
        model_registry.promote(uri, "walk", number)
        assert model_registry.resolve(uri, "models:/walk@champion").version == number
    assert model_registry.rollback(uri, "walk") == 2
    assert model_registry.resolve(uri, "models:/walk@champion").bundle_hash == "hash-2"
    assert model_registry.rollback(uri, "walk") == 1
    with pytest.raises(RegistryError, match="version 1 is its first champion; nothing to roll back to: promote anothe"):
        model_registry.rollback(uri, "walk")


def test_a_challenger_is_another_alias(uri):
    publish(uri, "duel", 1)
    publish(uri, "duel", 2)
    model_registry.promote(uri, "duel", 1)
    model_registry.set_challenger(uri, "duel", 2)
    assert model_registry.resolve(uri, "models:/duel@challenger").version == 2
    assert model_registry.resolve(uri, "models:/duel@champion").version == 1


@pytest.mark.parametrize("refusals", [1, 99])
def test_a_change_that_another_process_made_at_once_is_checked_again_and_a_constant_refusal_is_raised(
    uri, refusals, monkeypatch
):
    name = f"refused-{refusals}"
    publish(uri, name, 1)
    left, change = [refusals], MlflowClient.set_registered_model_alias

    def change_or_refuse(self, *args):
        left[0] -= 1
        if left[0] >= 0:
            raise MlflowException("UNIQUE constraint failed: registered_model_aliases.name")
        change(self, *args)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", change_or_refuse)
    if refusals == 1:
        model_registry.set_challenger(uri, name, 1)
        assert model_registry.aliases(uri, name) == {"challenger": 1}
    else:
        with pytest.raises(RegistryError, match="refused: UNIQUE constraint failed"):
            model_registry.set_challenger(uri, name, 1)


def test_an_alias_is_withdrawn_only_from_the_version_that_it_names(uri):
    publish(uri, "trial", 1)
    publish(uri, "trial", 2)
    model_registry.promote(uri, "trial", 1)
    model_registry.set_challenger(uri, "trial", 2)
    assert model_registry.aliases(uri, "trial") == {"champion": 1, "challenger": 2}
    model_registry.withdraw(uri, "trial", "challenger", 1, "another")
    assert model_registry.aliases(uri, "trial") == {"champion": 1, "challenger": 2}
    model_registry.withdraw(uri, "trial", "challenger", 2, "too slow")
    assert model_registry.aliases(uri, "trial") == {"champion": 1}
    assert client_of(uri).get_model_version("trial", "2").tags["withdrawn"] == "too slow"


def test_a_challenger_set_while_another_is_withdrawn_stays_challenger(uri, monkeypatch):
    for number in (1, 2):
        publish(uri, "swap", number)
    model_registry.set_challenger(uri, "swap", 1)
    client = client_of(uri)
    delete = client.delete_registered_model_alias

    def after_another_process(name, alias):
        monkeypatch.undo()
        model_registry.set_challenger(uri, name, 2)
        delete(name, alias)

    monkeypatch.setattr(client, "delete_registered_model_alias", after_another_process)
    model_registry.withdraw(uri, "swap", "challenger", 1, "too slow")
    assert model_registry.aliases(uri, "swap") == {"challenger": 2}


def test_a_withdrawn_version_may_be_challenger_again_and_an_alias_set_by_hand_may_be_withdrawn(uri):
    for number in (1, 2, 3):
        publish(uri, "again", number)
    model_registry.set_challenger(uri, "again", 1)
    model_registry.withdraw(uri, "again", "challenger", 1, "too slow")
    model_registry.set_challenger(uri, "again", 1)
    assert model_registry.aliases(uri, "again") == {"challenger": 1}
    assert "withdrawn" not in client_of(uri).get_model_version("again", "1").tags
    for by_hand in (2, 3, 2):
        client_of(uri).set_registered_model_alias("again", "challenger", str(by_hand))
        model_registry.withdraw(uri, "again", "challenger", by_hand, "too slow")
        assert model_registry.aliases(uri, "again") == {}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/nobody@champion", r"has no model 'nobody'; it has .*known"),
        ("models:/known@nope", r"model known has no alias 'nope'; it has champion \(version 1\), and versions 1, 2"),
        ("models:/known/7", r"model known has no version 7; it has 1, 2"),
        ("known@champion", r"model is known@champion; give models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_an_unknown_name_alias_or_version_is_refused_with_the_existing_ones(uri, model, message):
    publish(uri, "known", 1)
    publish(uri, "known", 2)
    model_registry.promote(uri, "known", 1)
    with pytest.raises(RegistryError, match=message) as caught:
        model_registry.resolve(uri, model)
    assert "\n" not in str(caught.value)


def test_a_version_that_does_not_exist_is_never_promoted(uri):
    publish(uri, "shy", 1)
    with pytest.raises(RegistryError, match="model shy has no champion to roll back; promote one of 1"):
        model_registry.rollback(uri, "shy")
    for change in (model_registry.promote, model_registry.set_challenger):
        with pytest.raises(RegistryError, match="model shy has no version 2; it has 1"):
            change(uri, "shy", 2)


def test_a_run_keeps_its_settings_metrics_and_files(uri, tmp_path, capfd):
    (tmp_path / "report.md").write_text("good")
    settings = {f"setting_{n}": n for n in range(120)}
    run_id = runs.start_run(uri, "trial", "train x", settings, {"station": "train"})
    runs.log_metrics(uri, run_id, {"loss": 2.0, "rate": 0.1}, 1)
    runs.log_metrics(uri, run_id, {"loss": 1.0}, 2)
    runs.log_artifact(uri, run_id, str(tmp_path / "report.md"))
    runs.end_run(uri, run_id, "FINISHED")
    client = client_of(uri)
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status, run.data.tags["station"]) == ("train x", "FINISHED", "train")
    assert run.data.params["setting_119"] == "119"
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert [entry.path for entry in client.list_artifacts(run_id)] == ["report.md"]
    assert capfd.readouterr().out == ""


def test_a_run_keeps_metrics_that_are_not_finite(uri):
    run_id = runs.start_run(uri, "trial", "train y", {}, {})
    runs.log_metrics(uri, run_id, {"loss": math.nan, "norm": math.inf, "skipped_updates": 3}, 1)
    found = client_of(uri).get_run(run_id).data.metrics
    assert math.isnan(found["loss"])
    assert found["norm"] >= 1e308  # MLflow's databases keep the largest number instead
    assert found["skipped_updates"] == 3


def test_a_relative_database_is_made_absolute_and_an_unknown_scheme_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_registry.absolute_tracking_uri("sqlite:///a/m.db") == f"sqlite:///{tmp_path}/a/m.db"
    assert model_registry.absolute_tracking_uri("http://host:5000") == "http://host:5000"
    for wrong in ("./mlruns", "databricks", "ftp://x"):
        with pytest.raises(RegistryError, match=r"give sqlite:///FILE\.db, http\(s\)://HOST:PORT"):
            model_registry.absolute_tracking_uri(wrong)


def test_a_server_that_does_not_answer_is_reported_in_one_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"registry http://127\.0\.0\.1:9 refused: ") as caught:
        model_registry.resolve("http://127.0.0.1:9", "models:/a@champion")
    assert "\n" not in str(caught.value)

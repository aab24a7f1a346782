"""Output of the commands of the registry."""

import json

import pytest
from typer.testing import CliRunner

import tidar
from tidar_core.artifacts.registry import model_registry

HASH = "0123456789abcdef" * 4
BASE = "fedcba9876543210" * 4


def printed(*words):
    done = CliRunner().invoke(tidar.app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("command", [["rollback", "m"], ["promote", "m", "3"]])
def test_a_promotion_and_a_rollback_print_the_version_that_is_champion_now(monkeypatch, command):
    monkeypatch.setattr(model_registry, command[0], lambda *_: 3)
    assert json.loads(printed(*command, "--json")) == {"name": "m", "registry_version": 3, "alias": "champion"}
    assert "registry version  3" in printed(*command)


def test_models_are_listed_with_their_status_hash_and_gates(monkeypatch):
    version = model_registry.ListedVersion(
        name="m", version=7, status="champion", bundle="/bundles/7", bundle_hash=HASH, base_hash=BASE,
        gates={"ar_loss": 1.5}, run_id=None,
    )  # fmt: skip
    monkeypatch.setattr(model_registry, "list_versions", lambda *_: [version])
    (listed,) = json.loads(printed("models", "--json"))["models"]
    facts = (listed["version"], listed["status"], listed["bundle_hash"], listed["base_hash"], listed["gates"])
    assert facts == (7, "champion", HASH, BASE, {"ar_loss": 1.5})
    monkeypatch.setenv("COLUMNS", "200")
    table = printed("models")
    assert all(word in table for word in ("champion", HASH[:12], BASE[:12], "ar_loss 1.5", "/bundles/7"))

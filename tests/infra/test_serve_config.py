"""The checked-in Serve config equals the command's output, and Serve accepts it."""

import shutil
from pathlib import Path

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema
from tiny import save_tiny_bundle

from serve_apps import app
from serve_apps.deployment import BUILDER, main, read_settings, serve_config
from tidar_core.errors import ConfigError

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "infra/serve.settings.yaml"
TARGETS = ["infra/serve.yaml", "infra/k8s/rayservice.yaml"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A writable copy of infra/."""
    shutil.copytree(ROOT / "infra", tmp_path / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_checked_in_files_equal_the_command_s_output(checkout):
    assert main(["infra/serve.settings.yaml", *TARGETS]) == 0
    for target in TARGETS:
        assert (checkout / target).read_text() == (ROOT / target).read_text()


def test_changed_settings_reach_both_files_and_leave_the_rest_of_the_manifest(checkout):
    before = yaml.safe_load((checkout / "infra/k8s/rayservice.yaml").read_text())
    settings = yaml.safe_load(SETTINGS.read_text()) | {"rows": 7}
    (checkout / "infra/serve.settings.yaml").write_text(yaml.safe_dump(settings))
    assert main(["infra/serve.settings.yaml", *TARGETS]) == 0
    config = yaml.safe_load((checkout / "infra/serve.yaml").read_text())
    assert config["applications"][0]["args"]["rows"] == 7
    after = yaml.safe_load((checkout / "infra/k8s/rayservice.yaml").read_text())
    assert yaml.safe_load(after["spec"].pop("serveConfigV2")) == config
    del before["spec"]["serveConfigV2"]
    assert after == before


@pytest.mark.parametrize("target", TARGETS)
def test_serve_s_own_schema_accepts_it_and_has_every_key(target):
    config = yaml.safe_load((ROOT / target).read_text())
    if target.endswith("rayservice.yaml"):
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(config)
    kept = parsed.model_dump(mode="json", exclude_unset=True)
    assert {key: kept[key] for key in config if key != "logging_config"} == {
        key: value for key, value in config.items() if key != "logging_config"
    }
    assert kept["logging_config"].items() >= config["logging_config"].items()
    assert parsed.applications[0].import_path == BUILDER


def test_serve_rolls_out_a_config_only_if_its_model_has_changed():
    def version(settings):
        (application,) = ServeDeploySchema.model_validate(serve_config(settings)).applications
        return get_app_code_version(application)

    settings = read_settings(SETTINGS)
    assert version(settings) == version(read_settings(SETTINGS))
    assert version(settings) != version(settings.model_copy(update={"model": "models:/m/2"}))


def test_the_import_path_is_a_builder_that_serve_calls_with_the_settings(tmp_path):
    module, _, name = BUILDER.partition(":")
    assert (module, getattr(app, name)) == (app.__name__, app.build_app)
    bundle = save_tiny_bundle(tmp_path / "tiny-model")
    args = serve_config(read_settings(SETTINGS))["applications"][0]["args"] | {"model": str(bundle)}
    built = call_user_app_builder_with_args_if_necessary(app.build_app, args)
    assert built._bound_deployment.name == "http"


def test_wrong_settings_are_refused_in_one_line_and_no_file_is_written(tmp_path, capsys):
    target = tmp_path / "serve.yaml"
    (tmp_path / "bad.yaml").write_text("model: m\nrow: 3\n")
    assert main([str(tmp_path / "bad.yaml"), str(target)]) == 2
    error = capsys.readouterr().err
    assert "unknown key 'row'" in error
    assert error.count("\n") == 1
    assert not target.exists()
    with pytest.raises(ConfigError, match="does not exist; give the path of a YAML file"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list; it must be a mapping"):
        read_settings(tmp_path / "list.yaml")
    assert main([str(SETTINGS)]) == 2

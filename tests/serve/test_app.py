"""Checks before the start of a service, and errors of a failed start."""

import logging
import socket

import pytest
from hf_folders import save_checkpoint
from proxies import answering, refusing_proxy

from serve_apps import app
from serve_apps.app import build_app, check_place, start_error
from serve_apps.rollout.model_version import resolve_model
from serve_apps.settings import ServeSettings
from serve_apps.tools import smoke_client
from tidar_core.artifacts.model.bundle import save_bundle
from tidar_core.artifacts.model.bundle_info import model_info, read_bundle_info
from tidar_core.artifacts.registry import model_registry
from tidar_core.errors import BundleError, ConfigError, TidarError

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
  File "bundle.py", line 130, in verify_bundle
    raise BundleError(f"{where} has hash")
"""


def test_a_taken_port_is_a_config_error_in_one_line_and_a_free_port_is_accepted():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = ServeSettings(model="m", port=listener.getsockname()[1])
        with pytest.raises(
            ConfigError, match=f"127.0.0.1:{settings.port} cannot be listened on: Address already"
        ) as caught:
            check_place(settings)
        assert "\n" not in str(caught.value)
    check_place(settings)


def test_an_address_of_another_machine_is_a_config_error():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77:8000 cannot be listened on"):
        check_place(ServeSettings(model="m", host="192.0.2.77"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_requests_to_the_own_port_use_no_proxy(monkeypatch, host):
    paths = []

    def respond(path):
        paths.append(path)
        return {"choices": [{"text": "a"}]}

    with answering(respond) as server, refusing_proxy(monkeypatch) as proxied:
        settings = ServeSettings(model="m", host=host, port=server.rsplit(":", 1)[1])
        app._wait_until_ready(settings, seconds=1)
        monkeypatch.setattr(smoke_client, "run", lambda settings, blocking: None)
        assert smoke_client.completions_over_http(settings, ["x"], max_tokens=2) == ["a"]
        assert (paths, proxied) == (["/ready", "/v1/completions"], [])


def test_a_tidar_error_of_a_replica_keeps_its_type_and_message():
    error = start_error(TRACEBACK + "tidar_core.errors.BundleError: model.safetensors has hash 1; fetch it again\n")
    assert type(error) is BundleError
    assert str(error) == "model.safetensors has hash 1; fetch it again"


def test_another_error_of_a_replica_becomes_a_tidar_error_of_one_line():
    error = start_error(TRACEBACK + "RuntimeError: out of memory")
    assert type(error) is TidarError
    assert "RuntimeError: out of memory" in str(error)
    assert "\n" not in str(error)


def test_serves_logger_is_quiet_while_a_service_is_deployed_and_gets_its_level_back(monkeypatch):
    levels, deployed = [], [False, True, True, False]
    monkeypatch.setattr(app, "deployed_here", iter(deployed).__next__)
    before = app.logger.level
    app.logger.setLevel(logging.INFO)
    for _ in deployed:
        with app._quiet():
            levels.append(app.logger.level)
        levels.append(app.logger.level)
    app.logger.setLevel(before)
    quiet, loud = logging.ERROR, logging.INFO
    assert levels == [quiet, loud, quiet, quiet, quiet, quiet, quiet, loud]


@pytest.mark.slow
def test_an_alias_is_served_under_its_registered_name_and_a_changed_bundle_is_refused(tmp_path, model, tokenizer):
    uri, tracking_uri = str(tmp_path / "bundle"), f"sqlite:///{tmp_path}/mlflow.db"
    described = {"mask_id": model.config.mask_id, "objective": "dual", "lineage": {}, "made_by": {}}
    save_bundle(uri, model, tokenizer, block_len=4, **described)
    version = model_registry.publish_version(tracking_uri, "tidar-tiny", uri, read_bundle_info(uri), {})
    model_registry.promote(tracking_uri, "tidar-tiny", version)
    settings = ServeSettings(model="models:/tidar-tiny@champion", tracking_uri=tracking_uri)
    served, card = resolve_model(settings)
    assert (served.bundle_uri, served.block_len, served.bundle_hash) == (uri, 4, read_bundle_info(uri).bundle_hash)
    assert (card.id, card.max_model_len, card.block_len) == ("tidar-tiny", model.config.context_len, 4)

    save_bundle(uri, model, tokenizer, block_len=2, **described)
    with pytest.raises(BundleError, match="publish the new bundle"):
        build_app(settings)


def test_a_checkpoint_is_served_in_the_autoregressive_mode_alone(tmp_path, tokenizer):
    folder = str(save_checkpoint(tmp_path / "own", tokenizer))
    for settings in ({}, {"mode": "auto", "block_len": 8}, {"mode": "autoregressive"}):
        served, card = resolve_model(ServeSettings(model=folder, **settings))
        assert (served.mode, served.block_len, served.drafting) == ("autoregressive", 1, False)
        assert (card.id, card.mode, card.block_len, card.max_model_len) == ("own", "autoregressive", 1, 1024)
        assert card.bundle_hash == model_info(folder).bundle_hash
    for mode in ("single-pass", "two-pass"):
        with pytest.raises(ConfigError, match=f"mode is {mode} and the model does not draft; give the mode auto"):
            resolve_model(ServeSettings(model=folder, mode=mode))


def test_a_service_without_a_mode_drafts_once_its_checkpoint_was_converted(tmp_path, bundle, tokenizer):
    folder = str(save_checkpoint(tmp_path / "own", tokenizer))
    served, _ = resolve_model(ServeSettings(model=folder, mode="auto"))
    assert resolve_model(served.settings, bundle)[0].mode == "auto"


def test_in_the_autoregressive_mode_a_block_is_one_token(bundle):
    served, card = resolve_model(ServeSettings(model=bundle, mode="autoregressive", block_len=8))
    assert (served.block_len, card.block_len, card.mode) == (1, 1, "autoregressive")
    assert resolve_model(ServeSettings(model=bundle, block_len=8))[0].block_len == 8

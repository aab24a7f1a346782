"""Settings of a service: defaults, checks, and their order of precedence."""

import pytest

from serve_apps.deployment import command_settings
from serve_apps.settings import ServeSettings
from tidar_core.errors import ConfigError


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/data/runs/champion", "champion"),
        ("s3://bucket/bundles/seven/", "seven"),
        ("models:/tidar-small@champion", "tidar-small"),
        ("models:/tidar-small/3", "tidar-small"),
    ],
)
def test_clients_see_the_last_part_of_the_location_or_the_registered_name(model, name):
    assert ServeSettings(model=model).shown_name == name
    assert ServeSettings(model=model, model_name="mine").shown_name == "mine"


def test_a_service_takes_the_fastest_mode_unless_one_is_given_however_it_is_started():
    assert ServeSettings(model="m").mode == command_settings(None, defaults={}, given={"model": "m"}).mode == "auto"


def test_it_listens_on_loopback_by_default():
    assert ServeSettings(model="m").host == "127.0.0.1"


def test_a_share_of_a_gpu_selects_the_gpu():
    assert (ServeSettings(model="m").device, ServeSettings(model="m", num_gpus=0.5).device) == ("cpu", "cuda")


ALIAS = {"model": "models:/m@champion"}


def test_an_alias_can_be_followed_and_compared_with_a_challenger():
    settings = ServeSettings(follow_alias_seconds=5, challenger={"weight": 0.1}, **ALIAS)
    assert settings.model_alias == ("m", "champion")
    assert (settings.challenger.alias, settings.challenger.weight) == ("challenger", 0.1)
    assert ServeSettings.model_validate(settings.model_dump(mode="json", exclude_unset=True)) == settings


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prot": 1}, "unknown key 'prot'; known are model, "),
        ({"port": 0}, "port is 0; "),
        ({"rows": 0}, "rows is 0; "),
        ({"pages": 0}, "pages is 0; "),
        ({"mode": "fast"}, "mode is 'fast'; "),
        ({"model": ""}, "model is ''; "),
        ({"weights": "int2"}, "weights is 'int2'; "),
        ({"weights": "int8", "num_gpus": 1}, "weights is int8 and num_gpus 1; int8 needs a CPU; leave one of them out"),
        ({"min_replicas": 2, "max_replicas": 1}, "max_replicas is 1 and min_replicas 2; "),
        ({"follow_alias_seconds": 0} | ALIAS, "follow_alias_seconds is 0; "),
        ({"follow_alias_seconds": 5}, "follow_alias_seconds is set and model is 'm', which never changes; "),
        (
            {"follow_alias_seconds": 5, "model": "models:/m/3"},
            "follow_alias_seconds is set and model is 'models:/m/3', ",
        ),
        ({"follow_alias_seconds": 5, "model": "s3://a@b"}, "follow_alias_seconds is set and model is 's3://a@b', "),
        ({"challenger": {}} | ALIAS, "challenger is set and follow_alias_seconds is not; "),
        ({"challenger": {"weight": 2}} | ALIAS, "challenger.weight is 2; "),
        ({"challenger": {"wait": 2}} | ALIAS, "unknown key 'challenger.wait'; known are alias, weight, "),
    ],
)
def test_the_error_names_an_unknown_or_impossible_setting_in_one_line(wrong, named):
    with pytest.raises(ConfigError) as caught:
        ServeSettings(**{"model": "m"} | wrong)
    assert str(caught.value).startswith(f"serve settings: {named}")
    assert "\n" not in str(caught.value)


def test_options_override_the_settings_file_and_the_file_overrides_the_defaults(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: /data/one\nrows: 4\nmode: two-pass\ncontext_len: 512\n")
    defaults = {"threads": 1, "tracking_uri": "sqlite:////x.db"}
    given = {"model": None, "rows": 2, "context_len": None}
    found = command_settings(file, defaults=defaults, given=given)
    assert (found.model, found.rows, found.mode, found.context_len, found.threads) == (
        "/data/one",
        2,
        "two-pass",
        512,
        1,
    )
    bare = command_settings(None, defaults=defaults, given=given | {"model": "/data/two", "context_len": 256})
    assert (bare.model, bare.rows, bare.mode, bare.context_len) == ("/data/two", 2, "auto", 256)


def test_a_service_without_a_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^no model is given; give one as argument, or a settings file with the key"):
        command_settings(None, defaults={}, given={"model": None})


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_budget_for_timing_is_positive(seconds):
    with pytest.raises(ConfigError, match=f"timing_seconds is {seconds}; "):
        ServeSettings(model="m", timing_seconds=seconds)

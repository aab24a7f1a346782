"""What a service may be told."""

import pytest

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


def test_it_listens_on_loopback_unless_told_otherwise():
    assert ServeSettings(model="m").host == "127.0.0.1"


def test_a_gpu_share_is_what_makes_it_compute_there():
    assert (ServeSettings(model="m").device, ServeSettings(model="m", num_gpus=0.5).device) == ("cpu", "cuda")


ALIAS = {"model": "models:/m@champion"}


def test_an_alias_can_be_followed_and_tried_against_another():
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
def test_what_is_unknown_or_impossible_is_named_in_one_line(wrong, named):
    with pytest.raises(ConfigError) as caught:
        ServeSettings(**{"model": "m"} | wrong)
    assert str(caught.value).startswith(f"serve settings: {named}")
    assert "\n" not in str(caught.value)

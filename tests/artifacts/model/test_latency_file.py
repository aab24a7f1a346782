"""A latency table is stored beside the bundle, for the device on which it was timed."""

import json

import pytest
from tiny import wide_model

from tidar_core.artifacts.model.latency_file import bundle_planner, bundle_table, stored_table, time_and_store
from tidar_core.config import DraftConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.errors import BundleError
from tidar_core.planning.planner import AUTO, AutoPlanner
from tidar_core.transformer.shapes import named_shape


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return wide_model(named_shape("tiny"))


def decoder_of(model, slots=2, block_len=4):
    return Decoder(model, DraftConfig(block_len=block_len), slots=slots, context_len=64)


def test_the_planner_uses_the_stored_table_and_nothing_is_timed_again(model, tmp_path, monkeypatch):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    assert stored_table(bundle, decoder) is None
    shapes = []
    uri = time_and_store(bundle, decoder, on_point=lambda: shapes.append(1))
    assert uri.startswith(f"{bundle}.latency/")
    assert len(shapes) == 2  # one sequence and two, at the only context
    monkeypatch.setattr(
        "tidar_core.artifacts.model.latency_file.decoding_latency", lambda *_, **__: pytest.fail("timed again")
    )
    planner = bundle_planner(AUTO, bundle, decoder)
    assert isinstance(planner, AutoPlanner)
    assert planner.latency.table == stored_table(bundle, decoder)
    assert isinstance(bundle_planner("two-pass", bundle, decoder), FixedMode)


def test_a_table_of_fewer_sequences_or_another_block_does_not_fit(model, tmp_path):
    bundle = str(tmp_path / "bundle")
    time_and_store(bundle, decoder_of(model))
    assert stored_table(bundle, decoder_of(model, slots=1)) is not None
    assert stored_table(bundle, decoder_of(model, slots=3)) is None
    assert stored_table(bundle, decoder_of(model, block_len=2)) is None


def test_a_table_of_another_torch_does_not_fit(model, tmp_path):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    path = tmp_path / time_and_store(bundle, decoder).removeprefix(f"{tmp_path}/")
    kept = json.loads(path.read_text())
    kept["made_with"]["torch"] = "1.0"
    path.write_text(json.dumps(kept))
    assert stored_table(bundle, decoder) is None


@pytest.mark.parametrize("points", [None, [], [{"rows": 1}], "none"])
def test_a_broken_table_is_named(model, tmp_path, points):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    path = tmp_path / time_and_store(bundle, decoder).removeprefix(f"{tmp_path}/")
    path.write_text("" if points is None else json.dumps(json.loads(path.read_text()) | {"points": points}))
    with pytest.raises(BundleError, match="tidar profile"):
        stored_table(bundle, decoder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("seconds", value) for value in (float("nan"), float("inf"), 0.0, -1.0, True, 1e-300)],
        *[("rows", value) for value in (float("nan"), 0, -1, 1.5, True, 2**70)],
        *[("batch", value) for value in (0, float("inf"))],
        *[("context", value) for value in (-1, float("nan"), [])],
        ("drafts", float("nan")),
    ],
)
def test_a_shape_or_a_time_that_nothing_can_have_is_damage(model, tmp_path, name, value):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    path = tmp_path / time_and_store(bundle, decoder).removeprefix(f"{tmp_path}/")
    kept = json.loads(path.read_text())
    kept["points"][0][name] = value
    path.write_text(json.dumps(kept))
    with pytest.raises(BundleError, match="holds no latency table"):
        stored_table(bundle, decoder)


def test_the_table_of_a_start_is_found_by_the_next_start_and_by_a_challenger_of_the_same_shape(
    model, tmp_path, monkeypatch
):
    lines = []
    table = bundle_table(str(tmp_path / "bundle"), decoder_of(model), report=lines.append)
    assert ["timed" in line for line in lines] == [True, True]
    monkeypatch.setattr(
        "tidar_core.artifacts.model.latency_file.decoding_latency", lambda *_, **__: pytest.fail("timed again")
    )
    assert bundle_table(str(tmp_path / "bundle"), decoder_of(model)) == table
    challenger = wide_model(named_shape("tiny"), seed=1)
    assert bundle_table(str(tmp_path / "challenger"), decoder_of(challenger)) == table
    assert not list(tmp_path.glob("*.latency"))  # nothing is written beside a bundle that is only served


def test_a_table_of_shorter_contexts_does_not_fit_a_longer_context(model, tmp_path):
    bundle = str(tmp_path / "bundle")
    bundle_table(bundle, decoder_of(model), context_len=32)
    assert stored_table(bundle, decoder_of(model), 32) is not None
    assert stored_table(bundle, decoder_of(model)) is None


def test_a_damaged_cache_is_timed_again(model, tmp_path):
    bundle = str(tmp_path / "bundle")
    bundle_table(bundle, decoder_of(model))
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text("{")
    assert bundle_table(bundle, decoder_of(model)).points
    assert stored_table(bundle, decoder_of(model)) is not None


def test_a_cache_that_cannot_be_written_is_reported_and_stops_nothing(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    lines = []
    assert bundle_table(str(tmp_path / "bundle"), decoder_of(model), report=lines.append).points
    assert "could not be stored" in lines[-1]

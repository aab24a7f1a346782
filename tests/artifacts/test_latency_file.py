"""A latency table is kept beside the bundle, for the device it was taken on."""

import json

import pytest
from tiny import wide_model

from tidar_core.artifacts.latency_file import bundle_planner, stored_table, time_and_store
from tidar_core.config import DraftConfig
from tidar_core.decoder import Decoder
from tidar_core.errors import BundleError
from tidar_core.modes import FixedMode
from tidar_core.planner import AUTO, AutoPlanner
from tidar_core.shapes import named_shape


@pytest.fixture(scope="module")
def model():
    return wide_model(named_shape("tiny"))


def decoder_of(model, rows=2, block_len=4):
    return Decoder(model, DraftConfig(block_len=block_len), rows=rows, context_len=64)


def test_what_was_timed_is_planned_with_and_nothing_is_timed_anew(model, tmp_path, monkeypatch):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    assert stored_table(bundle, decoder) is None
    shapes = []
    uri = time_and_store(bundle, decoder, on_point=lambda: shapes.append(1))
    assert uri.startswith(f"{bundle}.latency/")
    assert len(shapes) == 2  # one sequence and two, at the one context
    monkeypatch.setattr(
        "tidar_core.artifacts.latency_file.decoding_latency", lambda *_, **__: pytest.fail("timed anew")
    )
    planner = bundle_planner(AUTO, bundle, decoder)
    assert isinstance(planner, AutoPlanner)
    assert planner.table == stored_table(bundle, decoder)
    assert isinstance(bundle_planner("two-pass", bundle, decoder), FixedMode)


def test_a_table_of_fewer_sequences_or_another_block_does_not_serve(model, tmp_path):
    bundle = str(tmp_path / "bundle")
    time_and_store(bundle, decoder_of(model))
    assert stored_table(bundle, decoder_of(model, rows=1)) is not None
    assert stored_table(bundle, decoder_of(model, rows=3)) is None
    assert stored_table(bundle, decoder_of(model, block_len=2)) is None


def test_a_table_that_another_torch_took_does_not_serve(model, tmp_path):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    path = tmp_path / time_and_store(bundle, decoder).removeprefix(f"{tmp_path}/")
    kept = json.loads(path.read_text())
    kept["made_with"]["torch"] = "1.0"
    path.write_text(json.dumps(kept))
    assert stored_table(bundle, decoder) is None


@pytest.mark.parametrize("content", ["", "{}", '{"made_with": {}, "points": [{"rows": 1}]}'])
def test_a_broken_table_is_named(model, tmp_path, content):
    bundle, decoder = str(tmp_path / "bundle"), decoder_of(model)
    path = tmp_path / time_and_store(bundle, decoder).removeprefix(f"{tmp_path}/")
    path.write_text(content)
    with pytest.raises(BundleError, match="tidar profile"):
        stored_table(bundle, decoder)

"""The provenance of a folder is the same bytes each time."""

import json

from tidar_core.artifacts.store.provenance import code_revision, made_by, write_made_by


def test_the_same_work_leaves_the_same_bytes(tmp_path):
    content = made_by({"steps": 3}, {"shards": "abc"})
    for name in ("a", "b"):
        write_made_by(str(tmp_path / name), made_by({"steps": 3}, {"shards": "abc"}))
    assert (tmp_path / "a/made_by.json").read_bytes() == (tmp_path / "b/made_by.json").read_bytes()
    assert json.loads((tmp_path / "a/made_by.json").read_text()) == content
    assert (content["job"], content["parents"]) == ({"steps": 3}, {"shards": "abc"})


def test_an_image_states_its_revision(monkeypatch):
    monkeypatch.setenv("TIDAR_REVISION", "abc123")
    assert code_revision() == "abc123"
    monkeypatch.delenv("TIDAR_REVISION")
    assert code_revision() != "abc123"

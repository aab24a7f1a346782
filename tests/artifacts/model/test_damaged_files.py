"""Files of a model's folder that hold something else than they should are refused in one line by every reader."""

import json
import shutil

import pytest
import torch
from chat_templates import chat_tokenizer
from frozen import save_drafts_bundle
from hf_folders import save_checkpoint
from safetensors.torch import load_file, save_file

from serve_apps.replica.engine import _tokenizer_info
from tidar_core.artifacts.model.bundle import load_bundle, load_drafts
from tidar_core.artifacts.model.bundle_info import bundle_hash, read_bundle_info
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.errors import BundleError, UserError, WeightsError

DEEP = b"[" * 10**5
DAMAGES = {"empty": b"", "list": b"[]", "null": b"null", "deep": DEEP, "no UTF-8": b'{"a": "\xff"}', "cut": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tokenizer = chat_tokenizer("qwen2.5", trained_on=["a few plain words " * 9])
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "own", tokenizer)


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def saved_drafts(saved, tmp_path_factory):
    return save_drafts_bundle(tmp_path_factory.mktemp("saved") / "drafts", str(saved), seed=1)


@pytest.fixture
def drafts(saved_drafts, tmp_path):
    """A bundle of a frozen checkpoint and its drafts."""
    return shutil.copytree(saved_drafts, tmp_path / "drafts")


def assert_refused(read, words="", kind=UserError):
    with pytest.raises(kind, match=words) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_json_file_is_refused_by_its_name(checkpoint, name, damage):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-20] if DAMAGES[damage] is None else DAMAGES[damage])
    assert_refused(
        lambda: load_bundle(checkpoint), name.replace(".", r"\.") if name != "tokenizer.json" else "tokenizer"
    )
    if name == "tokenizer_config.json":
        assert_refused(lambda: load_chat_template(checkpoint), name)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bos_token": 5}, "a special token is 5"),
        ({"bos_token": {"text": "<s>"}}, "a special token is"),
        ({"chat_template": [{"template": "x"}]}, "chat template in .* cannot be read"),
        ({"chat_template": {"default": 5}}, "chat template in .* cannot be read"),
        ({"chat_template": 5}, "chat template in .* cannot be read"),
    ],
    ids=str,
)
def test_a_key_of_the_tokenizer_of_another_type_is_refused(checkpoint, keys, words):
    (checkpoint / "chat_template.jinja").unlink()
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "x"} | keys))
    assert_refused(lambda: load_chat_template(checkpoint), words)


def test_a_service_reads_the_settings_of_a_tokenizer_wherever_they_are(checkpoint):
    """The file tokenizer_config.json may be missing, and the service reads what every other reader reads."""
    config = checkpoint / "tokenizer_config.json"
    config.rename(checkpoint / "special_tokens_map.json")
    template = load_chat_template(checkpoint)
    found = _tokenizer_info(str(checkpoint), template)
    assert found.chat_template == template.sources["default"]
    assert found.tokenizer_class == "PreTrainedTokenizerFast"
    config.write_text('{"tokenizer_class": 5}')
    assert_refused(lambda: _tokenizer_info(str(checkpoint), template), "tokenizer_class 5")


def test_end_tokens_of_a_config_in_another_encoding_are_read_as_the_config_is(checkpoint):
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    path = checkpoint / "config.json"
    content = path.read_text()
    expected = load_bundle(checkpoint).end_ids
    path.write_text(content, encoding="utf-16")
    assert load_bundle(checkpoint).end_ids == expected


def sealed(folder, **keys):
    """Change keys of tidar.json, with the hashes that belong to them: only its types are wrong."""
    path = folder / "tidar.json"
    values = json.loads(path.read_text()) | keys
    found = {entry.name: locations.sha256(entry.uri) for entry in locations.list_files(str(folder))}
    values["files"] = keys.get("files", {name: digest for name, digest in found.items() if name != "tidar.json"})
    values["bundle_hash"] = bundle_hash(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "keys",
    [
        {"block_len": 0}, {"block_len": "4"}, {"block_len": True}, {"block_len": 2.5}, {"mask_id": "x"},
        {"objective": 5}, {"lineage": None}, {"files": []}, {"format_version": True}, {"format_version": 2.0},
        {"drafts": []}, {"drafts": {"base_uri": 5}}, {"drafts": {"base_hash": 5}}, {"drafts": {"link_rank": "4"}},
        {"drafts": {"adapter": {"rank": "4"}}}, {"drafts": {"adapter": {"shifted": "false"}}}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_type_in_tidar_json_is_damage(drafts, keys):
    given = json.loads((drafts / "tidar.json").read_text())["drafts"]
    if isinstance(changes := keys.get("drafts"), dict):
        adapter = given["adapter"] | changes.get("adapter", {})
        keys = {"drafts": given | changes | {"adapter": adapter}}
    sealed(drafts, **keys)
    assert_refused(lambda: load_bundle(drafts), r"tidar\.json is damaged", BundleError)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_drafts_of_another_dtype_are_refused_and_not_cast(drafts, dtype):
    path = drafts / "drafts/drafts.safetensors"
    held = load_file(path)
    name = sorted(held)[0]
    save_file(held | {name: torch.ones(held[name].shape).to(dtype)}, path)
    sealed(drafts)
    for read in (load_bundle, lambda folder: load_drafts(str(folder), read_bundle_info(folder))):
        assert_refused(lambda read=read: read(drafts), f"weight {name} is .*; floats of 16 bits", WeightsError)

"""The end tokens of a model come from its files, and a bundle keeps all of them."""

import json

import pytest
import torch
from tiny import varied_model
from transformers import AutoModelForCausalLM, GenerationConfig

from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.model.bundle_info import read_bundle_info, verify_bundle
from tidar_core.artifacts.text.end_tokens import EndTokens, read_end_tokens
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.errors import WeightsError

FILE = '{\n  "eos_token_id": [7, 0, 9],\n  "temperature": 0.6,\n  "note": "é"\n}'


def write(folder, config=..., generation=...):
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).unlink(missing_ok=True)
        if value is not ...:
            content = value if isinstance(value, str) else json.dumps({"eos_token_id": value})
            (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (..., ..., (0,)),
        (7, ..., (0, 7)),
        ([7, 9], ..., (0, 7, 9)),
        (7, [9, 8], (0, 9, 8)),
        ([7, 8], 9, (0, 9)),
        (7, None, (0, 7)),
        (7, "{}", (0, 7)),
        (None, [3, 0, 3], (0, 3)),
        (0, 0, (0,)),
        (7, [], (0,)),
    ],
)
def test_generation_config_comes_before_config_and_the_end_of_text_token_is_always_included(
    tmp_path, config, generation, expected
):
    write(tmp_path, config, generation)
    assert read_end_tokens(tmp_path, eos_id=0, vocab_len=10).ids == expected


@pytest.mark.parametrize("value", [10, -1, True, "7", [7, 10], [7, None], {"a": 1}, 7.0, "[1]", "{"], ids=str)
def test_invalid_end_tokens_are_refused_in_one_line(tmp_path, value):
    for name in ("config", "generation"):
        given = json.dumps({"eos_token_id": value}) if value == "7" else value
        write(tmp_path, **{name: given})
        with pytest.raises(WeightsError, match=f"{name}.*(0..9; use the file|is not JSON|no JSON object)") as caught:
            read_end_tokens(tmp_path, eos_id=0, vocab_len=10)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a few plain words " * 9], 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    return varied_model(tokenizer)


def save(folder, model, tokenizer, ends=None):
    made = {"block_len": 4, "mask_id": model.config.mask_id, "objective": "dual", "lineage": {}, "made_by": {}}
    return save_bundle(str(folder), model, tokenizer, **made, ends=ends)


def test_a_bundle_keeps_the_end_tokens_and_their_file_byte_for_byte(tmp_path, model, tokenizer):
    write(tmp_path, 5, FILE)
    ends = read_end_tokens(tmp_path, eos_id=0, vocab_len=270)
    assert ends == EndTokens((0, 7, 9), FILE)
    folder = tmp_path / "bundle"
    info = save(folder, model, tokenizer, ends)
    assert (folder / "generation_config.json").read_bytes() == FILE.encode()
    assert "generation_config.json" in info.files
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [0, 7, 9]
    verify_bundle(folder)
    assert load_bundle(folder).end_ids == (0, 7, 9)
    assert read_end_tokens(folder, eos_id=0, vocab_len=270) == ends  # also after training from it


def test_a_bundle_without_other_end_tokens_has_no_file_for_them(tmp_path, model, tokenizer):
    info = save(tmp_path / "bundle", model, tokenizer)
    assert json.loads((tmp_path / "bundle/config.json").read_text())["eos_token_id"] == 0
    assert "generation_config.json" not in info.files
    assert load_bundle(tmp_path / "bundle").end_ids == (0,)
    assert save(tmp_path / "same", model, tokenizer, EndTokens((0,))) == read_bundle_info(tmp_path / "bundle")


def test_transformers_ends_a_text_of_a_bundle_at_any_of_its_end_tokens(tmp_path, model, tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    save(tmp_path / "plain", model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    whole = theirs.generate(ids, do_sample=False, max_new_tokens=12)[0, 3:].tolist()
    end = next(token for token in whole if token != whole[0])
    save(tmp_path / "bundle", model, tokenizer, EndTokens((0, end), json.dumps({"eos_token_id": [0, end]})))
    assert GenerationConfig.from_pretrained(tmp_path / "bundle").eos_token_id == [0, end]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bundle", dtype=torch.float32)
    ended = theirs.generate(ids, do_sample=False, max_new_tokens=12)[0, 3:].tolist()
    assert ended == whole[: whole.index(end) + 1]

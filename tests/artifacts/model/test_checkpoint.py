"""A checkpoint loads as a bundle that does not draft; its files alone are its identity."""

import json
import os
import shutil

import pytest
import torch
from chat_templates import chat_tokenizer
from hf_folders import change_config, change_tensors, save_checkpoint

from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import model_config, model_info, verify_bundle
from tidar_core.artifacts.store import file_hashes, locations
from tidar_core.artifacts.store.file_hashes import file_sha256
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.errors import UserError

TEXT = "a few plain words " * 9


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("qwen2.5", trained_on=[TEXT])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "own", tokenizer)


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of the folder for one test."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def test_a_checkpoint_has_no_mask_token_and_blocks_of_one_token(checkpoint, tokenizer):
    loaded = load_bundle(checkpoint)
    assert (loaded.info.block_len, loaded.info.mask_id, loaded.info.objective) == (1, None, "ar")
    assert loaded.model.config == model_config(checkpoint)
    assert not loaded.model.config.drafting
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.end_ids == (tokenizer.eos_id,)


def test_end_tokens_come_from_generation_config(checkpoint, tokenizer):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert load_bundle(checkpoint).end_ids == (tokenizer.eos_id, 9, 7)


def test_the_identity_is_that_of_the_content_wherever_it_lies(checkpoint, s3_bucket, tmp_path):
    found = model_info(checkpoint)
    assert found == model_info(shutil.copytree(checkpoint, tmp_path / "again"))
    locations.upload_folder(checkpoint, f"{s3_bucket}/own")
    assert model_info(f"{s3_bucket}/own") == found
    loaded = load_bundle(f"{s3_bucket}/own")
    assert torch.equal(loaded.model.embedding.weight, load_bundle(checkpoint).model.embedding.weight)


def test_files_that_are_not_read_change_no_identity_and_each_that_is_read_does(checkpoint):
    found = model_info(checkpoint)
    (checkpoint / "README.md").write_text("words")
    (checkpoint / "pytorch_model.bin").write_bytes(b"other weights")
    assert model_info(checkpoint) == found
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert found.files.keys() == names | {"chat_template.jinja"}
    for name in sorted(found.files):
        path = checkpoint / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b" " + content[-1:])
        changed = model_info(checkpoint)
        assert changed.bundle_hash != found.bundle_hash
        assert {other for other in names if changed.files[other] != found.files[other]} == names & {name}
        path.write_bytes(content)
    assert model_info(checkpoint) == found


def test_weights_in_several_files_are_hashed_with_their_index(tmp_path, tokenizer):
    folder = save_checkpoint(tmp_path / "whole", tokenizer)
    loaded = load_bundle(folder)
    path = folder / "model.safetensors"
    shutil.copy(path, folder / "model-1-of-1.safetensors")
    names = dict.fromkeys(_names(path), "model-1-of-1.safetensors")
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert {"model-1-of-1.safetensors", "model.safetensors.index.json"} <= model_info(folder).files.keys()
    assert torch.equal(load_bundle(folder).model.embedding.weight, loaded.model.embedding.weight)
    (folder / "model-1-of-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-1-of-1\.safetensors is missing; fetch the folder again"):
        model_info(folder)


def _names(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_the_hash_of_a_large_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, read = tmp_path / "weights", []
    hashed = locations.sha256
    monkeypatch.setattr(file_hashes.locations, "sha256", lambda uri: read.append(uri) or hashed(uri))
    path.write_bytes(b"one")
    before = path.stat()
    first = [file_sha256(path, kept_bytes=3) for _ in range(3)]
    assert (len(set(first)), len(read)) == (1, 1)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy with times does
    assert file_sha256(path, kept_bytes=3) != first[0]
    assert file_sha256(path, kept_bytes=4) == file_sha256(path, kept_bytes=3)
    assert len(read) == 3
    (damaged,) = [entry for entry in (tmp_path / "cache/tidar/hashes").iterdir() if entry.read_text() != first[0]]
    damaged.write_text("nonsense")
    assert file_sha256(path, kept_bytes=3) == hashed(str(path))


def remove_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def leave_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def enlarge_tokenizer(folder):
    train_bpe([TEXT + "".join(map(chr, range(33, 1200)))], 2000).save(folder)


def test_a_checkpoint_is_refused_where_a_bundle_is_needed(checkpoint):
    with pytest.raises(UserError, match=r"holds no tidar\.json; give the folder of a bundle"):
        verify_bundle(checkpoint)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_tokenizer, r"holds no tokenizer\.json; give the folder of a Hugging Face fast tokenizer"),
        (leave_pickled_weights, r"has no model\.safetensors; give a folder with safetensors weights"),
        (enlarge_tokenizer, "ids and the model 2.. embeddings; use the tokenizer of this model"),
        (lambda folder: change_tensors(folder, drop=["model.norm.weight"]), r"tensor model\.norm\.weight .* missing"),
        (lambda folder: change_config(folder, tidar_link_rank=4), r"no tidar\.json, so it is part of a bundle; fetch"),
        (lambda folder: change_config(folder, model_type="gpt2"), "model_type is 'gpt2'; this project supports llama"),
        (
            lambda folder: change_config(
                folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=8
            ),
            "sliding-window attention over 8 tokens of 1024",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    ],
)
def test_a_checkpoint_that_is_not_whole_or_not_supported_is_refused_in_one_line(checkpoint, spoil, words):
    spoil(checkpoint)
    with pytest.raises(UserError, match=words) as caught:
        load_bundle(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_tokenizer_takes_the_one_that_is_given(checkpoint, tokenizer):
    remove_tokenizer(checkpoint)
    assert load_bundle(checkpoint, tokenizer=tokenizer).tokenizer is tokenizer

"""A bundle equals the training output byte for byte, or it is refused."""

import json

import pytest
import torch
from frozen import save_drafts_bundle
from hf_folders import save_checkpoint
from transformers import AutoModelForCausalLM

from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.model.bundle_info import read_bundle_info, verify_bundle
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.provenance import made_by
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.errors import BundleError
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a few plain words " * 9]), 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    tiny = TidarModel(named_shape("tiny", vocab_len=tokenizer.vocab_len))
    tiny.init_weights(0)
    return tiny.eval()


def save(uri, model, tokenizer, **changes):
    values = {"block_len": 4, "mask_id": model.config.mask_id, "objective": "dual", "lineage": {"shards": "abc"}}
    return save_bundle(
        str(uri), model, tokenizer, **(values | changes), made_by=made_by({"steps": 3}, {"shards": "abc"})
    )


@pytest.fixture
def bundle(model, tokenizer, tmp_path):
    save(tmp_path / "bundle", model, tokenizer)
    return tmp_path / "bundle"


def test_a_bundle_loads_as_the_model_that_was_saved_bit_for_bit(bundle, model, tokenizer):
    loaded = load_bundle(bundle)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert loaded.model.config == model.config
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert (loaded.info.block_len, loaded.info.mask_id) == (4, model.config.mask_id)
    assert (loaded.info.objective, loaded.info.lineage) == ("dual", {"shards": "abc"})
    assert json.loads((bundle / "made_by.json").read_text())["job"] == {"steps": 3}


def test_transformers_opens_a_bundle_unchanged(bundle):
    theirs = AutoModelForCausalLM.from_pretrained(bundle, local_files_only=True)
    assert theirs.config.eos_token_id == 0


def test_the_bundle_hash_is_deterministic_and_covers_everything(bundle, model, tokenizer, tmp_path):
    first = read_bundle_info(bundle)
    assert save(tmp_path / "again", model, tokenizer) == first
    assert save(tmp_path / "other", model, tokenizer, block_len=8).bundle_hash != first.bundle_hash
    assert save(tmp_path / "other", model, tokenizer, lineage={}).bundle_hash != first.bundle_hash
    assert set(first.files) >= {"config.json", "model.safetensors", "tokenizer.json", "made_by.json"}


def test_a_flipped_byte_in_any_file_is_found_and_the_file_named(bundle):
    verify_bundle(bundle)
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 3):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(BundleError, match=path.name.replace(".", r"\.")) as caught:
                load_bundle(bundle)
            assert "\n" not in str(caught.value)
        path.write_bytes(content)
    verify_bundle(bundle)


def test_a_missing_file_an_added_one_and_no_bundle_at_all_are_refused(bundle, tmp_path):
    (bundle / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"extra\.safetensors is not listed in tidar\.json; remove it"):
        verify_bundle(bundle)
    (bundle / "extra.safetensors").unlink()
    (bundle / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors is missing; fetch the bundle again"):
        verify_bundle(bundle)
    with pytest.raises(BundleError, match=r"holds no tidar\.json; give the folder of a bundle"):
        verify_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"holds neither tidar\.json nor config\.json; give the folder of a bundle"):
        load_bundle(tmp_path / "nowhere")


def test_a_mask_id_that_is_a_token_of_the_tokenizer_is_refused_and_nothing_is_left_behind(model, tokenizer, tmp_path):
    with pytest.raises(BundleError, match="is 5, a token of its tokenizer; it must be an unused id, 270 or above"):
        save(tmp_path / "bundle", model, tokenizer, mask_id=5)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_on_an_object_store_is_the_same_bundle(s3_bucket, model, tokenizer, bundle):
    assert save(f"{s3_bucket}/m/bundle", model, tokenizer) == read_bundle_info(bundle)
    assert verify_bundle(f"{s3_bucket}/m/bundle") == read_bundle_info(bundle)
    loaded = load_bundle(f"{s3_bucket}/m/bundle")
    assert torch.equal(loaded.model.state_dict()["embedding.weight"], model.state_dict()["embedding.weight"])
    assert {entry.name.rpartition("/")[0] for entry in locations.list_files(s3_bucket)} == {"m/bundle"}


def test_choices_of_an_adapter_are_read_as_they_were_written(tokenizer, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "base", tokenizer)
    choices = {
        "shifted": True,
        "causal": True,
        "link_reads_state": True,
        "link_shares_tables": True,
        "places": ("qkv", "down"),
    }
    loaded = load_bundle(save_drafts_bundle(tmp_path / "bundle", checkpoint, seed=1, **choices)).model
    assert {name: getattr(loaded.config.adapter, name) for name in choices} == choices
    assert loaded.link.state.shape == (4, loaded.config.hidden_size)
    assert loaded.link.state.abs().max() > 0
    assert loaded.link.after.shape == (loaded.config.hidden_size, 4)

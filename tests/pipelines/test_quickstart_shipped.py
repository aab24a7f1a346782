"""Drafts that the project ships: small, whole, of the shape that the quickstart trains, for one checkpoint alone."""

import torch
from frozen import save_drafts_bundle
from hf_folders import save_checkpoint, save_folder
from tiny import save_tiny_shards

from pipelines.quickstart.drafts import ADAPTER_RANK, BLOCK_LEN, LINK_RANK
from pipelines.quickstart.shipped import SHIPPED, drafts_of, ship
from tidar_core.artifacts.model.bundle_info import model_info, read_bundle_info, verify_bundle
from tidar_core.artifacts.model.drafts_file import DRAFTS
from tidar_core.artifacts.model.hf_files import float_tensors, read_tensor
from tidar_core.artifacts.text.tokenizer import load_tokenizer


def test_the_shipped_drafts_are_small_and_of_the_shape_that_the_quickstart_trains():
    info = verify_bundle(SHIPPED)
    assert (info.drafts.adapter.rank, info.drafts.link_rank, info.block_len) == (ADAPTER_RANK, LINK_RANK, BLOCK_LEN)
    assert info.drafts.adapter.shifted
    assert info.drafts.adapter.causal
    assert info.drafts.base_uri is None
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 12e6


def test_they_start_no_training_of_another_checkpoint(tmp_path, capsys):
    other = save_folder(tmp_path / "other")
    capsys.readouterr()
    assert drafts_of(str(other)) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"this one is {model_info(other).bundle_hash[:12]}; training starts from none" in lines[0]


def test_what_is_shipped_of_a_bundle_is_its_drafts_in_bf16(tmp_path):
    tokenizer = load_tokenizer(save_tiny_shards(tmp_path / "shards") + "/tokenizer")
    checkpoint, bundle = save_checkpoint(tmp_path / "checkpoint", tokenizer), tmp_path / "bundle"
    save_drafts_bundle(bundle, checkpoint, seed=0)
    ship(str(bundle), tmp_path / "shipped")
    info, whole = verify_bundle(tmp_path / "shipped"), read_bundle_info(bundle)
    assert info.drafts == whole.drafts
    assert list(info.files) == [DRAFTS]
    for name in float_tensors(bundle / DRAFTS):
        found = read_tensor(name, tmp_path / "shipped" / DRAFTS)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, read_tensor(name, bundle / DRAFTS).bfloat16())

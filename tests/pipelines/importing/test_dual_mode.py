"""Dual-mode checkpoints of other projects become bundles with the same AR logits and the same mask embedding."""

import json

import pytest
import torch
from hf_folders import IDS, save_folder, their_logits
from vocabularies import EOS, write_folder

from pipelines.importing.import_model import import_model
from tidar_core.artifacts.model.bundle import load_bundle
from tidar_core.artifacts.model.bundle_info import model_info
from tidar_core.artifacts.model.hf_weights import load_model
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.autoregressive import generate_autoregressive
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.errors import UserError
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout


def dual_folder(folder, kind="qwen3", vocab_size=400, **changes):
    """A plain folder of a model and a tokenizer, as if it had been trained as TiDAR elsewhere."""
    save_folder(folder, kind, vocab_size=vocab_size, **changes)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"eos_token_id": 0}))
    return write_folder(folder, "qwen2")


def bundle_of(tmp_path, mask_token, **folder):
    source = dual_folder(tmp_path / "theirs", **folder)
    facts = import_model(str(source), str(tmp_path / "bundle"), mask_token=str(mask_token), block_len=4)
    bundle = load_bundle(tmp_path / "bundle")
    assert (bundle.info.bundle_hash, bundle.info.block_len) == (facts["bundle_hash"], 4)
    assert (bundle.info.objective, bundle.info.mask_id) == ("dual", facts["mask_id"])
    return bundle, load_model(source)


def assert_same_distribution(bundle, source):
    """Asserts that the logits are those of transformers, but for the mask token, which is never sampled."""
    layout = causal_layout(torch.zeros_like(IDS))
    with torch.no_grad():
        logits = bundle.model.head(bundle.model(IDS, layout.position, DenseAttention(layout)))
    expected, mask_id = their_logits(source), bundle.info.mask_id
    assert (logits[..., mask_id] == float("-inf")).all()
    kept = [i for i in range(expected.shape[-1]) if i != mask_id]
    assert logits.shape[-1] == max(expected.shape[-1], mask_id + 1)
    # fp32 through two layers; the order of sums differs
    torch.testing.assert_close(logits[..., kept], expected[..., kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_entry_that_no_text_uses_is_the_mask_token_itself(tmp_path, kind):
    bundle, source = bundle_of(tmp_path, 350, kind=kind)
    assert bundle.info.mask_id == 350
    assert torch.equal(bundle.model.embedding.weight, source.embedding.weight)
    assert_same_distribution(bundle, tmp_path / "theirs")


@pytest.mark.parametrize("mask_token", ["<|end|>", 2])
def test_a_token_of_the_tokenizer_lends_its_embedding_to_a_free_entry(tmp_path, mask_token):
    bundle, source = bundle_of(tmp_path, mask_token)
    vocab_len = bundle.tokenizer.vocab_len
    assert bundle.info.mask_id == vocab_len == load_tokenizer(tmp_path / "theirs").vocab_len
    assert torch.equal(bundle.model.embedding.weight[vocab_len], source.embedding.weight[2])
    assert_same_distribution(bundle, tmp_path / "theirs")


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_table_grows_by_the_mask_token_alone(tmp_path, tied):
    vocab_len = load_tokenizer(write_folder(tmp_path / "words", "qwen2")).vocab_len
    bundle, source = bundle_of(tmp_path, "<|end|>", vocab_size=vocab_len, tie_word_embeddings=tied)
    assert bundle.model.config.vocab_size == vocab_len + 1
    assert torch.equal(bundle.model.embedding.weight[-1], source.embedding.weight[2])
    assert bundle.model.config.tied_head == tied
    assert_same_distribution(bundle, tmp_path / "theirs")


def test_greedy_drafts_end_in_the_text_of_the_ar_mode(tmp_path):
    bundle, _ = bundle_of(tmp_path, "<|end|>")
    sampling = SamplingConfig(max_tokens=12)
    request = Request(request_id="a", prompt=(5, 6, 7), sampling=sampling)
    [drafted] = complete(Scheduler(Decoder(bundle.model, DraftConfig(block_len=4), slots=1)), [request])
    assert tuple(drafted.token_ids) == generate_autoregressive(bundle.model, (5, 6, 7), sampling)


def test_provenance_holds_the_hash_of_the_checkpoint(tmp_path):
    bundle, _ = bundle_of(tmp_path, 350)
    made = json.loads((tmp_path / "bundle/made_by.json").read_text())
    assert made["parents"] == bundle.info.lineage == {"start": model_info(tmp_path / "theirs").bundle_hash}
    assert (made["job"]["mask_token"], made["job"]["block_len"]) == ("350", 4)


@pytest.mark.parametrize(
    ("mask_token", "words"),
    [("<|mask|>", "is no token"), ("400", "ids 0..399"), ("0", "is an end token"), (EOS, "is an end token")],
)
def test_a_wrong_mask_token_is_refused(tmp_path, mask_token, words):
    source = dual_folder(tmp_path / "theirs")
    with pytest.raises(UserError, match=words):
        import_model(str(source), str(tmp_path / "bundle"), mask_token=mask_token, block_len=4)
    assert not (tmp_path / "bundle").exists()


def test_a_template_with_a_syntax_error_is_refused_before_anything_is_written(tmp_path):
    source = dual_folder(tmp_path / "theirs")
    (source / "chat_template.jinja").write_text("{% for x in messages %}")
    with pytest.raises(UserError, match=r"the chat template cannot be read: Unexpected end of template.*; correct it"):
        import_model(str(source), str(tmp_path / "bundle"), mask_token="350", block_len=4)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_bundle_is_refused_as_a_source(tmp_path):
    bundle_of(tmp_path, 350)
    with pytest.raises(UserError, match="a bundle already"):
        import_model(str(tmp_path / "bundle"), str(tmp_path / "again"), mask_token="350", block_len=4)

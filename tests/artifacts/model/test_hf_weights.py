"""Weights and configs convert to and from transformers without a difference."""

import json

import pytest
import torch
import transformers
from tiny import wide_model

from tidar_core.artifacts.model import hf_writer
from tidar_core.artifacts.model.hf_config import config_from_hf
from tidar_core.artifacts.model.hf_weights import load_model, save_model, with_mask_token
from tidar_core.errors import WeightsError
from tidar_core.training.recipe import start_draft_link
from tidar_core.transformer.attention import DenseAttention
from tidar_core.transformer.layout import causal_layout
from tidar_core.transformer.shapes import named_shape

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied-biased": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama3-rope": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "linear-rope": transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-yarn": transformers.Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=10, tie_word_embeddings=False),
}


@pytest.fixture(params=FAMILIES, name="theirs")
def theirs_(request):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at constants that would hide a mix-up
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def our_logits(model, ids):
    layout = causal_layout(torch.zeros_like(ids))
    with torch.no_grad():
        return model.head(model(ids, layout.position, DenseAttention(layout)))


def test_logits_equal_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.5
    # fp32 through two layers, sums in another order
    torch.testing.assert_close(our_logits(load_model(tmp_path), ids), expected, rtol=0, atol=1e-4)


def test_a_saved_folder_opens_in_transformers_with_equal_logits(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", end_ids=(0,))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_weights_have_the_rights_of_any_new_file(tmp_path):
    save_model(wide_model(named_shape("tiny")), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_draft_link_lies_beside_weights_that_transformers_opens_as_before(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    start_draft_link(model, 5, seed=0)
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours", end_ids=(0,))
    again, loading_info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading_info.values())
    assert again.config.model_type == theirs.config.model_type
    read = load_model(tmp_path / "ours")
    assert read.config == model.config
    assert torch.equal(read.link.before, model.link.before)
    assert torch.equal(read.link.after, model.link.after)
    assert with_mask_token(read, 96).link is None  # the link was not trained with the new mask
    (tmp_path / "ours/tidar_link.tensors").write_bytes(b"half")
    with pytest.raises(WeightsError, match=r"tidar_link.tensors cannot be read"):
        load_model(tmp_path / "ours")


def test_a_config_of_transformers_4_means_the_same(tmp_path):
    new = FAMILIES["llama3-rope"].to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 5e4, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    assert config_from_hf(old) == config_from_hf(new)


def test_weights_in_many_files_are_read_and_written(tmp_path, monkeypatch):
    model = transformers.Qwen3ForCausalLM(FAMILIES["qwen3"]).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    ours = load_model(tmp_path / "theirs")
    monkeypatch.setattr(hf_writer, "FILE_BYTES", 20_000)
    (tmp_path / "ours").mkdir()
    save_model(ours, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    for name, value in load_model(tmp_path / "ours").state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize(("vocab_len", "vocab_size"), [(90, 96), (96, 128)])
def test_the_mask_token_takes_an_unused_id_or_a_new_id(theirs, tmp_path, vocab_len, vocab_size):
    theirs.save_pretrained(tmp_path)
    plain = load_model(tmp_path)
    masked = with_mask_token(plain, vocab_len)
    assert (masked.config.mask_id, masked.config.vocab_size) == (vocab_len, vocab_size)
    ids = torch.randint(0, 90, (1, 20), generator=torch.Generator().manual_seed(3))
    before, after = our_logits(plain, ids), our_logits(masked, ids)
    assert torch.equal(before[..., :vocab_len], after[..., :vocab_len])
    assert after[..., vocab_len].isneginf().all()
    weight = masked.embedding.weight.detach()
    spread = weight[:vocab_len].std(0)
    assert ((weight[vocab_len] - weight[:vocab_len].mean(0)).abs() < spread).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"use_sliding_window": True}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_unsupported_features_are_refused_in_one_line(change, words):
    settings = FAMILIES["qwen2"].to_dict() | change
    with pytest.raises(WeightsError, match=words) as caught:
        config_from_hf(settings)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["qwen2"].to_dict(), default=str))
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_model(tmp_path)

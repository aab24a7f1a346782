"""A config.json is read as transformers reads it, or refused in one line."""

import pytest
from hf_folders import assert_read_alike, change_config, save_folder

from tidar_core.artifacts.model.hf_config import MOST, MOST_OTHERWISE, config_from_hf, config_to_hf, read_config
from tidar_core.artifacts.model.hf_weights import load_model
from tidar_core.errors import UserError, WeightsError

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def settings(kind="qwen2", **changes):
    values = {
        "model_type": kind, "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return {name: value for name, value in (values | changes).items() if value is not ...}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": PLAIN, "rope_scaling": LINEAR},
        {"rope_parameters": YARN, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR | {"rope_theta": 5e4}, "rope_theta": 1e4},
        {"rope_parameters": LINEAR, "rope_theta": 5e4},
        {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 5e4},
        {"rope_parameters": PLAIN, "rope_scaling": {}},
        {"rope_parameters": YARN, "original_max_position_embeddings": 32},
        {
            "rope_parameters": {n: v for n, v in YARN.items() if n[:8] != "original"},
            "original_max_position_embeddings": 16,
        },
        {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}, "original_max_position_embeddings": 16},
        {"rope_parameters": YARN | {"factor": None}},
        {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}},
        {"rope_parameters": YARN | {"mscale": 1.2}},
        {"rope_parameters": YARN | {"beta_fast": 8, "beta_slow": None, "attention_factor": 1.3}},
    ],
    ids=str,
)
def test_rotary_keys_have_the_precedence_that_they_have_in_transformers(tmp_path, keys):
    change_config(save_folder(tmp_path), **keys)
    assert_read_alike(tmp_path)
    read = read_config(tmp_path)
    assert config_from_hf(config_to_hf(read)) == read


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}}, "differs by layer type"),
        ({"rope_scaling": {"full_attention": PLAIN}}, "differs by layer type"),
        ({"rope_parameters": PLAIN | {"rope_theta": 1e6}, "rope_scaling": LINEAR}, "rope_theta 1000000.0 is lost"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no factor"),
        ({"rope_scaling": LINEAR | {"factor": None}}, "factor None"),
        ({"rope_scaling": LINEAR | {"factor": "3"}}, "factor '3'"),
        ({"rope_scaling": LINEAR | {"factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, "no factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor None"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "must be larger"),
        ({"rope_scaling": {"factor": 4.0}}, "no rope_type"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, "mrope"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": None}, "rope_theta None"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings 0.5"),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_rotary_keys_are_refused_in_one_line(keys, words):
    with pytest.raises(UserError, match=words) as caught:
        config_from_hf(settings(**keys))
    assert "\n" not in str(caught.value)


REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("value", [..., None, "64", 0, 4.5, True, [64], 2**40, 2**70], ids=str)
@pytest.mark.parametrize("name", REQUIRED)
def test_a_size_that_is_missing_or_no_whole_number_is_refused_in_one_line(name, value):
    with pytest.raises(WeightsError, match=f"{name}.*must be a whole number") as caught:
        config_from_hf(settings(**{name: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "drop", "sizes"),
    [
        ("llama", ("num_key_value_heads", "head_dim"), {"num_key_value_heads": 6}),
        ("llama", ("rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"), {}),
        ("mistral", ("num_key_value_heads", "head_dim"),
         {"num_attention_heads": 8, "num_key_value_heads": 8, "sliding_window": None}),
        ("qwen2", ("num_key_value_heads", "layer_types", "hidden_act"),
         {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64}),
        ("qwen3", ("head_dim", "attention_bias", "architectures"), {}),
    ],
    ids=str,
)  # fmt: skip
def test_missing_keys_mean_what_they_mean_to_transformers(tmp_path, kind, drop, sizes):
    change_config(save_folder(tmp_path, kind, **sizes), drop)
    assert_read_alike(tmp_path)


def test_mistral_without_a_window_is_read_as_llama_and_with_one_it_is_refused(tmp_path):
    save_folder(tmp_path, "mistral", sliding_window=None, head_dim=16)
    assert_read_alike(tmp_path)
    assert read_config(tmp_path).architecture == "llama"
    change_config(tmp_path, sliding_window=64)  # the window is the whole context
    assert_read_alike(tmp_path)
    change_config(tmp_path, sliding_window=32)
    with pytest.raises(WeightsError, match="sliding-window attention over 32 tokens of 64"):
        load_model(tmp_path)
    change_config(tmp_path, drop=("sliding_window",), max_position_embeddings=8192)
    with pytest.raises(WeightsError, match="sliding-window attention over 4096 tokens of 8192"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, "names 1 layers"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding"),
        ({"model_type": "llama", "architectures": ["Qwen2ForCausalLM"]}, "LlamaForCausalLM is needed"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForCausalLM is needed"),
        ({"architectures": "Qwen2ForCausalLM"}, "Qwen2ForCausalLM is needed"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is .'llama'."),
        ({"num_hidden_layers": 2000}, "num_hidden_layers 2000; it must be a whole number, 1 to 1024"),
        ({"head_dim": 2**20}, "head_dim 1048576"),
        ({"attention_bias": "false"}, "attention_bias 'false'; it must be true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
        ({"model_type": "llama", "mlp_bias": 0}, "mlp_bias 0"),
        ({"use_sliding_window": "no"}, "use_sliding_window 'no'"),
        ({"num_key_value_heads": 4}, "multiple of kv_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": "8"}, "head_dim"),
        ({"hidden_size": 50}, "multiple"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"tidar_link_rank": "4"}, "tidar_link_rank"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"embedding_multiplier": 12}, "embedding_multiplier"),
        ({"attention_multiplier": 0.01}, "attention_multiplier"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"num_experts": 60}, "num_experts"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
    ],
    ids=str,
)
def test_a_key_that_changes_the_result_is_refused_by_name(change, words):
    with pytest.raises(UserError, match=words) as caught:
        config_from_hf(settings(**change))
    assert "\n" not in str(caught.value)


def test_keys_that_change_nothing_are_ignored():
    neutral = {
        "logit_scale": 1.0, "residual_multiplier": 1, "attn_logit_softcapping": None, "partial_rotary_factor": 1.0,
        "use_mrope": False, "num_experts": 0, "use_cache": True, "initializer_range": 0.02, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "pad_token_id": 3, "use_sliding_window": False, "sliding_window": 8,
        "max_window_layers": 1, "hidden_act": "swish", "attention_dropout": 0.0, "quantization_config": None,
    }  # fmt: skip
    assert config_from_hf(settings(**neutral)) == config_from_hf(settings())


def test_a_config_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    for content, words in (("{", "is not JSON"), ("[]", "no JSON object"), ("[" * 10**5, "nested too deeply")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=words):
            read_config(tmp_path)
    with pytest.raises(WeightsError, match="give the folder of a Hugging Face model"):
        read_config(tmp_path / "nowhere")


def test_the_largest_sizes_that_are_read_are_compared_with_the_weights_in_seconds(tmp_path):
    """Sizes are products in a model: none of them may overflow, and no loop may run for each of millions of layers."""
    largest = {
        name: MOST.get(name, MOST_OTHERWISE)
        for name in (*REQUIRED, "num_key_value_heads", "head_dim")
        if "layers" not in name
    }
    change_config(save_folder(tmp_path), **largest)
    with pytest.raises(WeightsError, match="use weights and config of one model"):
        load_model(tmp_path)

"""Quantised weights are dequantised by their scales, or refused by name."""

import json
import logging

import pytest
import torch
from hf_folders import change_config, change_tensors, save_folder
from safetensors.torch import load_file

from tidar_core.artifacts.model.bundle import load_for_decoding
from tidar_core.artifacts.model.hf_weights import load_model, save_model
from tidar_core.artifacts.model.quantised import Scaling, dequantised
from tidar_core.errors import ConfigError, WeightsError

E4M3 = torch.float8_e4m3fn
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 32]}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "kv_cache_scheme": None, "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": True, "type": "float"},
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "block_structure": None},
    }},
}  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def blocks(outputs, inputs, height, width):
    """Slices of the outputs and inputs of each block, one after another."""
    for top in range(0, outputs, height):
        for left in range(0, inputs, width):
            yield slice(top, top + height), slice(left, left + width)


def quantise(folder, suffix, height, width, quantization_config, dtype=torch.float32):
    """Store FP8 weights with a scale for each block; return the float weights that they represent, by a double loop."""
    meant, changed = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.removesuffix(".weight").endswith(LINEAR):
            meant[name] = weight
            continue
        outputs, inputs = weight.shape
        grid = torch.zeros(-(-outputs // height), -(-inputs // width))
        stored, meant[name] = torch.zeros_like(weight, dtype=E4M3), torch.zeros_like(weight)
        for down, across in blocks(outputs, inputs, height, width):
            scale = (weight[down, across].abs().max() / 448).to(dtype).float()
            grid[down.start // height, across.start // width] = scale
            stored[down, across] = (weight[down, across] / scale).to(E4M3)
            meant[name][down, across] = stored[down, across].float() * scale
        changed |= {name: stored, f"{name.removesuffix('.weight')}.{suffix}": grid.to(dtype)}
    change_tensors(folder, **changed)
    change_config(folder, quantization_config=quantization_config)
    return meant


def block_config(block):
    group = COMPRESSED["config_groups"]["group_0"]
    weights = group["weights"] | {"strategy": "block", "block_structure": block}
    return COMPRESSED | {"config_groups": {"group_0": group | {"weights": weights}}}


CASES = {
    "Qwen3's blocks": ("weight_scale_inv", 16, 32, FP8, torch.float32),
    "blocks that do not divide": (
        "weight_scale_inv", 20, 28, FP8 | {"weight_block_size": [20, 28]}, torch.bfloat16),
    "one block": ("weight_scale_inv", 128, 128, FP8 | {"weight_block_size": [128, 128]}, torch.float32),
    "channels": ("weight_scale", 1, 10**9, COMPRESSED, torch.bfloat16),
    "channels without a config": ("weight_scale", 1, 10**9, None, torch.float32),
    "tensors": ("weight_scale", 10**9, 10**9, COMPRESSED, torch.float32),
    "compressed-tensors' blocks": ("weight_scale", 16, 16, block_config([16, 16]), torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_fp8_weights_with_scales_are_the_floats_that_they_represent(tmp_path, caplog, case):
    suffix, height, width, config, dtype = CASES[case]
    save_folder(tmp_path, "qwen3", head_dim=10)
    meant = quantise(tmp_path, suffix, height, width, config, dtype)
    with caplog.at_level(logging.WARNING):
        read = load_model(tmp_path).state_dict()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: 14 FP8 weights are dequantised; the model is trained, saved and decoded in floats"
    ]
    for layer in range(2):
        theirs = f"model.layers.{layer}"
        qkv = torch.cat([meant[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(read[f"layers.{layer}.attention.qkv.weight"], qkv)
        assert torch.equal(read[f"layers.{layer}.attention.output.weight"], meant[f"{theirs}.self_attn.o_proj.weight"])
        assert torch.equal(read[f"layers.{layer}.mlp.down.weight"], meant[f"{theirs}.mlp.down_proj.weight"])


def test_a_weight_is_multiplied_by_the_scale_of_its_own_block():
    weight = torch.ones(3, 3).to(E4M3)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert dequantised("w", weight, scale, Scaling((2, 2))).tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    powers = torch.tensor([[2.0], [0.5], [4.0]]).to(torch.float8_e8m0fnu)
    assert dequantised("w", weight, powers, Scaling(None)).tolist() == [[2, 2, 2], [0.5, 0.5, 0.5], [4, 4, 4]]
    assert dequantised("w", weight, torch.tensor(3.0), Scaling(None)).tolist() == [[3] * 3] * 3


Q = "model.layers.0.self_attn.q_proj"
WEIGHT = {f"{Q}.weight": torch.ones(48, 48).to(E4M3)}
INT8 = {f"{Q}.weight": torch.ones(48, 48, dtype=torch.int8)}
GROUPS = {
    "group_0": COMPRESSED["config_groups"]["group_0"],
    "group_1": block_config([4, 4])["config_groups"]["group_0"],
}
REFUSED = {
    "int8 with scales": (
        INT8 | {f"{Q}.weight_scale": torch.ones(48, 1)}, None, "q_proj.weight is I8 and .*weight_scale"),
    "int8 alone": (INT8, None, "q_proj.weight is I8"),
    "bitsandbytes int8": (INT8 | {f"{Q}.SCB": torch.ones(48)}, {"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "bitsandbytes int8 without a config": (INT8 | {f"{Q}.SCB": torch.ones(48)}, None, "q_proj.weight is I8"),
    "an old config of bitsandbytes": ({}, {"load_in_8bit": True}, "load_in_8bit"),
    "GPTQ": ({}, {"quant_method": "gptq", "bits": 4}, "gptq"),
    "AWQ": ({}, {"quant_method": "awq"}, "awq"),
    "MXFP4": ({}, {"quant_method": "mxfp4"}, "mxfp4"),
    "another form of compressed-tensors": ({}, COMPRESSED | {"format": "pack-quantized"}, "pack-quantized"),
    "int8 of compressed-tensors": (
        {}, COMPRESSED | {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, "type 'int'"),
    "groups of different kinds": ({}, COMPRESSED | {"config_groups": GROUPS}, "2 groups"),
    "rotated weights": ({}, COMPRESSED | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
    "sparse weights": ({}, COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "a quantised cache": ({}, COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "a damaged config": ({}, COMPRESSED | {"config_groups": [1]}, "not of compressed-tensors' form"),
    "a block of three sides": ({}, FP8 | {"weight_block_size": [1, 2, 3]}, r"\[1, 2, 3\]"),
    "another float8": ({f"{Q}.weight": torch.ones(48, 48).to(torch.float8_e5m2)}, FP8, "q_proj.weight is F8_E5M2"),
    "FP8 without scales": (WEIGHT, FP8, "q_proj.weight is F8_E4M3; floats of 16 bits"),
    "FP8 with two kinds of scales": (
        WEIGHT | {f"{Q}.weight_scale": torch.ones(1), f"{Q}.weight_scale_inv": torch.ones(1)}, FP8, "is F8_E4M3 and"),
    "scales in integers": (
        WEIGHT | {f"{Q}.weight_scale": torch.ones(48, 1, dtype=torch.uint8)}, None, "weight_scale in U8"),
    "blocks of unknown size": (WEIGHT | {f"{Q}.weight_scale_inv": torch.ones(3, 2)}, None, "no .*weight_block_size"),
    "scales of another block": (WEIGHT | {f"{Q}.weight_scale_inv": torch.ones(2, 2)}, FP8, r"\[2, 2\].*\[3, 2\]"),
    "scales of other channels": (
        WEIGHT | {f"{Q}.weight_scale": torch.ones(47, 1)}, None, r"\[47, 1\].*\[48, 1\] or \[1\]"),
    "scales of float weights": ({f"{Q}.weight_scale": torch.ones(48, 1)}, None, "tensor .*q_proj.weight_scale of the"),
    "scales of activations": (
        WEIGHT | {f"{Q}.weight_scale": torch.ones(1), f"{Q}.input_scale": torch.ones(1)}, None, "q_proj.input_scale"),
    "a norm in FP8": ({"model.norm.weight": torch.ones(48).to(E4M3)}, FP8, "model.norm.weight is F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_quantised_weights_are_refused_in_one_line_that_names_them(tmp_path, case):
    tensors, config, words = REFUSED[case]
    save_folder(tmp_path, "llama")
    change_tensors(tmp_path, **tensors)
    change_config(tmp_path, quantization_config=config)
    with pytest.raises(WeightsError, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_quantised_already_are_not_rounded_again(tmp_path):
    save_folder(tmp_path, "qwen3", head_dim=10)
    quantise(tmp_path, "weight_scale_inv", 16, 32, FP8)
    with pytest.raises(ConfigError, match=r"weights is int8, and the weights of .* are quantised already"):
        load_for_decoding(tmp_path, weights="int8")


def test_a_saved_model_does_not_mention_the_quantisation_of_its_source(tmp_path):
    (tmp_path / "ours").mkdir()
    save_folder(tmp_path / "theirs")
    quantise(tmp_path / "theirs", "weight_scale_inv", 16, 32, FP8)
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())
    for name, value in load_model(tmp_path / "ours").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_blocks_are_dequantised_as_transformers_does_it():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 80, generator=generator).to(E4M3)
    scale = torch.rand(3, 5, generator=generator)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(dequantised("w", weight, scale, Scaling((16, 16))), theirs)

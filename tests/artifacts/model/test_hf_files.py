"""Every tensor of a checkpoint is used, or the checkpoint is refused."""

import json

import pytest
import torch
from hf_folders import assert_read_alike, change_config, change_tensors, save_folder
from safetensors.torch import load_file, save_file

from tidar_core.artifacts.model.hf_weights import check_weights, load_model
from tidar_core.errors import WeightsError

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def assert_refused(folder, words):
    for read in (load_model, check_weights):
        with pytest.raises(WeightsError, match=words) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def in_two_files(folder):
    """Split the weights into two files with an index; return the index."""
    held = load_file(folder / "model.safetensors")
    names, places = sorted(held), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    write_index(folder, places)
    return places


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize(
    "name",
    ["score.weight", "model.layers.2.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias",
     "model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "v_head.summary.weight",
     "model.layers.0.self_attn.q_proj.lora_A.weight"],
)  # fmt: skip
def test_a_tensor_that_the_model_does_not_use_is_refused_by_name(tmp_path, name):
    change_tensors(save_folder(tmp_path), **{name: torch.ones(4)})
    assert_refused(tmp_path, f"tensor {name} of the checkpoint is not part of the model")


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    change_tensors(save_folder(tmp_path), drop=(Q, HEAD))
    assert_refused(tmp_path, "tensor .* and 1 others of the model that config.json describes are missing")


def test_buffers_of_rotary_embeddings_are_ignored(tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    change_tensors(save_folder(tmp_path), **buffers, **{"model.rotary_emb.inv_freq": torch.ones(4)})
    assert_read_alike(tmp_path)


def test_a_part_of_a_stacked_matrix_must_have_its_own_shape(tmp_path):
    save_folder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    k, q = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kq")
    change_tensors(tmp_path, **{q: held[q][:-8].clone(), k: torch.cat([held[k], held[q][-8:]])})
    assert_refused(tmp_path, r"q_proj.weight has shape \[40, 48\]; config.json needs \[48, 48\]")


def test_a_tied_head_that_is_equal_is_ignored_and_another_is_refused(tmp_path):
    save_folder(tmp_path, tie_word_embeddings=True)
    table = load_file(tmp_path / "model.safetensors")[TABLE]
    change_tensors(tmp_path, **{HEAD: table.clone()})
    assert_read_alike(tmp_path)
    change_tensors(tmp_path, **{HEAD: table + 0.5})
    assert_refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight and tie_word_embeddings is true")
    change_config(tmp_path, tie_word_embeddings=False)
    assert_read_alike(tmp_path)


def test_a_single_file_comes_before_a_stale_index_as_in_transformers(tmp_path):
    save_folder(tmp_path / "new")
    save_folder(tmp_path / "old")
    change_tensors(tmp_path / "old", **{Q: torch.zeros(48, 48)})
    in_two_files(tmp_path / "old")
    for file in (tmp_path / "old").glob("model*"):
        file.rename(tmp_path / "new" / file.name)
    assert_read_alike(tmp_path / "new")


def test_files_of_an_index_are_read_whole(tmp_path):
    in_two_files(save_folder(tmp_path))
    assert_read_alike(tmp_path)
    extra = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(extra) | {"score.weight": torch.ones(2)}, extra, metadata={"format": "pt"})
    assert_refused(tmp_path, "tensor score.weight of the checkpoint is not part")


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    places = in_two_files(save_folder(tmp_path))
    write_index(tmp_path, places | {"score.weight": places[Q]})
    assert_refused(tmp_path, "has weight score.weight in model-0000.*, which lacks it")
    other = next(file for file in places.values() if file != places[Q])
    write_index(tmp_path, places | {Q: other})
    assert_refused(tmp_path, "q_proj.weight in model-0000.*, which lacks it")
    write_index(tmp_path, places)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    copied = load_file(first)[next(name for name, file in places.items() if file == first.name)]
    save_file(load_file(second) | {next(n for n, f in places.items() if f == first.name): copied}, second)
    assert_refused(tmp_path, "is in model-00001-of-00002.safetensors too")
    second.unlink()
    assert_refused(tmp_path, "model-00002-of-00002.safetensors cannot be read")
    first.rename(tmp_path.parent / "elsewhere.safetensors")
    for other in ("../elsewhere.safetensors", str(tmp_path.parent / "elsewhere.safetensors"), "..", ""):
        write_index(tmp_path, dict.fromkeys(places, other))
        assert_refused(tmp_path, "is no .safetensors file of its folder")
    for content in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert_refused(tmp_path, "is not JSON|holds no JSON object|has no weight_map")


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    (save_folder(tmp_path) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_refused(tmp_path, r"holds an adapter, adapter_config\.json; merge it")


def test_a_file_that_is_cut_is_refused(tmp_path):
    path = save_folder(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(tmp_path, "model.safetensors cannot be read")

"""GGUF files become Hugging Face folders with the same logits and the same ids."""

import json

import numpy as np
import pytest
import torch
import transformers
from gguf_files import SIZES, random_model, write_gguf
from hf_folders import IDS, our_logits, their_logits
from safetensors import safe_open
from vocabularies import ODD, TEXTS

from pipelines.importing.import_model import import_model
from tidar_core.artifacts.model.hf_weights import load_model
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import TokenizerError, UserError

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""Rows of Q4_K are multiples of 256."""
CASES = [(family, kind) for family in ("llama", "qwen2", "qwen3") for kind in ("F16", "Q8_0", "Q4_1")]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def imported(path, **options):
    """The folder of the import of a GGUF file."""
    import_model(str(path), str(path.parent / "folder"), **options)
    return path.parent / "folder"


def assert_logits_equal(folder, stored):
    """Asserts that TiDAR and transformers read the folder as the model with the values in the file."""
    expected = logits(stored)
    assert expected.std() > 0.5
    # fp32 through two layers; the order of sums differs
    torch.testing.assert_close(our_logits(folder), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(their_logits(folder), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), [*CASES, ("llama", "F32"), ("llama", "BF16"), ("qwen3", "BF16")])
def test_logits_equal_those_of_the_values_in_the_file(tmp_path, family, kind):
    stored = write_gguf(tmp_path / "x.gguf", random_model(family), kind)
    assert_logits_equal(imported(tmp_path / "x.gguf"), stored)


def test_logits_of_a_k_type_equal_those_of_the_values_in_the_file(tmp_path):
    stored = write_gguf(tmp_path / "x.gguf", random_model("llama", **WIDE), "Q4_K")
    assert_logits_equal(imported(tmp_path / "x.gguf"), stored)


@pytest.mark.parametrize(("family", "permuted"), [("llama", False), ("qwen2", True), ("qwen3", True)])
def test_the_wrong_order_of_rows_gives_other_logits(tmp_path, family, permuted):
    """The tests above would fail if a family's rows were put in another family's order."""
    stored = write_gguf(tmp_path / "x.gguf", random_model(family), "F32", permuted=permuted)
    assert (our_logits(imported(tmp_path / "x.gguf")) - logits(stored)).abs().max() > 0.1


def test_a_tied_head_stays_tied_and_biases_are_read(tmp_path):
    model = random_model("llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    stored = write_gguf(tmp_path / "x.gguf", model, "F32")
    folder = imported(tmp_path / "x.gguf")
    assert load_model(folder).config.tied_head
    assert_logits_equal(folder, stored)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "linear", "factor": 3.0, "named": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=str,
)
def test_scaled_rotary_embeddings_are_read(tmp_path, rope):
    rope, named = dict(rope), rope.get("named", True)
    rope.pop("named", None)
    model = random_model("qwen2", rope_parameters=rope | {"rope_theta": 5e3})
    keys = {"qwen2__rope__scaling__factor": rope["factor"]}
    if named:  # llama.cpp scales linearly by a factor without a type
        keys["qwen2__rope__scaling__type"] = rope["rope_type"]
    if original := rope.get("original_max_position_embeddings"):
        keys["qwen2__rope__scaling__original_context_length"] = original
    stored = write_gguf(tmp_path / "x.gguf", model, "F32", **keys)
    assert_logits_equal(imported(tmp_path / "x.gguf"), stored)


def test_llama3_scaling_is_recomputed_from_its_divisors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    model = random_model("llama", rope_parameters=rope)
    stored = write_gguf(tmp_path / "x.gguf", model, "F32", rope_freqs__weight=llama3_divisors(rope, 16))
    folder = imported(tmp_path / "x.gguf")
    found = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert found == rope
    assert_logits_equal(folder, stored)


def llama3_divisors(rope, head_size):
    """Divisors of a head's frequencies, one at a time, as llama.cpp's converter has them."""
    found = []
    for i in range(0, head_size, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_size)
        turns = rope["original_max_position_embeddings"] / wavelength
        share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        share = min(1.0, max(0.0, share))
        found.append(1 / ((1 - share) / rope["factor"] + share))
    assert any(1.01 < divisor < rope["factor"] - 0.01 for divisor in found)
    return np.array(found, np.float32)


def test_divisors_that_are_not_those_of_llama3_are_refused(tmp_path):
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    write_gguf(tmp_path / "x.gguf", random_model("llama"), rope_freqs__weight=divisors)
    with pytest.raises(UserError, match=r"no parameters of llama3"):
        imported(tmp_path / "x.gguf")


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "F16"), ("BF16", "BF16"), ("Q8_0", "F32"), ("F32", "F32")])
def test_weights_are_stored_in_the_smallest_dtype_that_holds_them_exactly(tmp_path, kind, dtype):
    model = random_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().half())  # norms, too, have values of both dtypes
    write_gguf(tmp_path / "x.gguf", model, kind)
    with safe_open(imported(tmp_path / "x.gguf") / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {dtype}  # noqa: SIM118


def test_norms_that_a_half_would_round_keep_the_folder_in_fp32(tmp_path):
    stored = write_gguf(tmp_path / "x.gguf", random_model("llama"), "BF16")
    model = load_model(imported(tmp_path / "x.gguf"))
    assert torch.equal(model.norm.weight, stored.model.norm.weight)
    assert torch.equal(model.embedding.weight, stored.model.embed_tokens.weight)


def test_a_folder_of_several_files_holds_all_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("tidar_core.artifacts.model.hf_writer.FILE_BYTES", 50_000)
    stored = write_gguf(tmp_path / "x.gguf", random_model("llama"), "F32")
    folder = imported(tmp_path / "x.gguf")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_logits_equal(folder, stored)


def test_provenance_names_the_file_its_hash_and_its_types(tmp_path):
    write_gguf(tmp_path / "x.gguf", random_model("llama"), "Q8_0")
    facts = import_model(str(tmp_path / "x.gguf"), str(tmp_path / "folder"))
    job = json.loads((tmp_path / "folder/made_by.json").read_text())["job"]
    assert (job["command"], job["file"], job["sha256"]) == ("import", "x.gguf", facts["sha256"])
    assert job["quantisation"] == facts["quantisation"] == {"Q8_0": 16, "F32": 5}
    assert facts["parameters"] == sum(p.numel() for p in random_model("llama").parameters())
    assert facts["warning"] is None


@pytest.mark.parametrize("form", ["smollm", "llama3", "llama2"])
def test_ids_equal_those_of_transformers_on_the_folder(tmp_path, form):
    write_gguf(tmp_path / "x.gguf", random_model("llama", vocab_size=512), form=form)
    folder = imported(tmp_path / "x.gguf")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in (*TEXTS, ODD, "0 12 345"):
        assert ours.encode_batch([text], framed=True) == [theirs(text).input_ids]


def test_a_file_and_its_folder_may_lie_on_an_object_store(tmp_path, s3_bucket):
    write_gguf(tmp_path / "x.gguf", random_model("llama"))
    locations.write_bytes(f"{s3_bucket}/models/x.gguf", (tmp_path / "x.gguf").read_bytes())
    import_model(f"{s3_bucket}/models/x.gguf", f"{s3_bucket}/folder")
    folder = locations.local_copy(f"{s3_bucket}/folder")
    assert torch.equal(our_logits(folder), our_logits(imported(tmp_path / "x.gguf")))
    import_model(f"{s3_bucket}/models/x.gguf", f"{s3_bucket}/folder")


def test_a_template_with_a_syntax_error_is_kept_with_a_warning_and_may_be_corrected(tmp_path):
    write_gguf(tmp_path / "x.gguf", random_model("llama"), "Q4_1", tokenizer__chat_template="{% for x in messages %}")
    folder = tmp_path / "folder"
    warning = import_model(str(tmp_path / "x.gguf"), str(folder))["warning"]
    assert warning.startswith("x.gguf holds Q4_1 weights; ")
    assert "; the chat template cannot be read: Unexpected end of template" in warning
    assert warning.endswith(f"in {folder}: until then chats are refused, and a service needs another chat_template")
    assert "\n" not in warning
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_chat_template(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert load_chat_template(folder).render([{"role": "user", "content": "x"}]) == "x"


def test_the_end_tokens_and_the_template_are_kept(tmp_path):
    write_gguf(tmp_path / "x.gguf", random_model("llama"), tokenizer__ggml__eot_token_id=2)
    folder = imported(tmp_path / "x.gguf")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert load_tokenizer(folder).templates == {"default": (folder / "chat_template.jinja").read_text()}
    assert SIZES["vocab_size"] == load_model(folder).config.vocab_size > load_tokenizer(folder).vocab_len

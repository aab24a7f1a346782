"""Tokenizers turn text into ids and back, at once and token by token."""

import json

import pytest
from transformers import AutoTokenizer

from tidar_core.artifacts.text.tokenizer import LONGEST_RUN, WORDS, load_tokenizer, train_bpe
from tidar_core.errors import TokenizerError

TEXT = "def f(x):\n        return  x + 12345  # é 日本語 🎉 👩‍👩‍👧\n\n\n    if\tx:\r\n"


@pytest.fixture(scope="module")
def tokenizer():
    code = "def f(x):\n        return x\n\n    if x:\n        pass\n" * 50
    return train_bpe(iter([code, "plain words and more words " * 20]), 290)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return tmp_path


def test_the_text_of_the_ids_of_a_text_is_the_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode_batch([TEXT, "", "a"]) == [tokenizer.encode(TEXT), [], tokenizer.encode("a")]


def test_an_indentation_is_one_token(tokenizer):
    texts = [tokenizer.decode([i]) for i in tokenizer.encode("):\n        return x")]
    assert texts == ["):\n", "       ", " return", " x"]


def test_the_end_of_text_is_id_0_and_text_that_spells_it_is_plain_text(tokenizer):
    assert tokenizer.eos_id == 0
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"


def test_vocab_len_is_the_first_unused_id_and_unused_ids_have_no_text(tokenizer):
    assert tokenizer.vocab_len == 290
    assert tokenizer.decode([*tokenizer.encode("a"), 290, 999]) == "a"


@pytest.mark.parametrize("cut", range(1, 9))
def test_deltas_of_a_stream_join_to_the_whole_text_wherever_it_stops(tokenizer, cut):
    ids = tokenizer.encode(TEXT)[:-cut]
    stream = tokenizer.stream()
    deltas = [stream.push(i) for i in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)
    assert "".join(deltas) + stream.flush() == tokenizer.decode(ids)


def test_deltas_of_bytes_that_are_not_utf_8_join_to_the_whole_text_too(tokenizer):
    byte = {tokenizer._fast.id_to_token(i): i for i in range(1, 257)}
    lead, tail = byte["æ"], byte["Ĺ"]  # E6, 97: the first two bytes of a three-byte character
    for ids in ([lead, *tokenizer.encode("a"), tail], [tail] * 9 + [lead, tail], [lead, tail, 0, lead], [0, lead, 999]):
        stream = tokenizer.stream()
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_returns_a_character_as_soon_as_its_last_byte_is_there(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("日a")
    assert [stream.push(i) for i in ids] == ["", "", "日", "a"]


def test_training_is_deterministic():
    texts = ["one two three four five " * 9, "six seven eight nine ten " * 9]
    assert train_bpe(iter(texts), 290).fingerprint == train_bpe(iter(texts), 290).fingerprint
    assert train_bpe(iter(texts), 290).fingerprint != train_bpe(iter(texts), 289).fingerprint


def test_a_saved_tokenizer_loads_here_and_in_transformers(tokenizer, folder):
    again = load_tokenizer(folder)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.vocab_len == 290
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.encode(TEXT, add_special_tokens=False) == tokenizer.encode(TEXT)
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs.encode("<|endoftext|>") == [0]


def test_a_tokenizer_without_an_end_of_text_token_is_refused(folder):
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["eos_token"]
    config.write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="names no end-of-text token"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_and_a_broken_one_are_refused(folder, tmp_path):
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(TokenizerError, match="vocab_size is 256; 256 bytes"):
        train_bpe(iter(["a"]), 256)


def test_the_name_of_a_special_token_can_be_encoded_as_the_token_and_decoded_as_its_name(tokenizer):
    assert tokenizer.special_ids == {"<|endoftext|>": 0}
    ids = tokenizer.encode_with_special("a<|endoftext|>b")
    assert ids == [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]
    assert tokenizer.encode("a<|endoftext|>b") != ids  # `encode` is not affected
    assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special=False)) == ("ab", "a<|endoftext|>b")
    stream = tokenizer.stream(skip_special=False)
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == "a<|endoftext|>b"


def test_the_bytes_of_all_tokens_of_a_text_join_to_its_bytes(tokenizer):
    assert b"".join(tokenizer.bytes_of(i) for i in tokenizer.encode(TEXT)) == TEXT.encode()
    assert (tokenizer.bytes_of(0), tokenizer.bytes_of(999)) == (b"<|endoftext|>", b"")


def test_a_framed_text_has_the_special_tokens_of_the_tokenizer_around_it():
    from tokenizers.processors import TemplateProcessing

    framing = train_bpe(iter(["a b c"]), 260)
    framing._fast.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    plain = framing.encode("a b")
    assert framing.encode_batch(["a b"], framed=True) == [[0, *plain]]


@pytest.mark.parametrize("sign", ["x", "-", "\n", " ", "\0", "é"])
def test_training_cuts_a_long_run_of_a_sign_and_encoding_does_not(sign):
    tokenizer = train_bpe([sign * 5000 + "a few words", "a few words"], 400)
    assert max(len(tokenizer.decode([token])) for token in range(tokenizer.vocab_len)) <= 2 * LONGEST_RUN
    long = sign * 700 + "a" + sign * 300
    assert tokenizer.decode(tokenizer.encode(long)) == long
    (words, _) = json.loads(tokenizer.fast_json)["pre_tokenizer"]["pretokenizers"]
    assert words["pattern"] == {"Regex": WORDS}

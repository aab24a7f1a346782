"""Tokenizers of GGUF files give the ids of the tokenizers that they were made from."""

from itertools import pairwise

import pytest
from gguf_files import PRE, made_tokenizer, tokenizer_keys
from vocabularies import EOS, ODD, SPACE, TEXTS

from tidar_core.artifacts.text.gguf_tokenizer import gguf_token_ids, gguf_tokenizer
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import TokenizerError

NUMBERS = "0 12 345 6789 x2024y \u0663\u0664\u0665 \u00bd\u00b2 1,234.5"
CASES = [*TEXTS, ODD, NUMBERS, "Don't SHOUT'LL i'Ve", "  leading", "trailing  ", "\n", "e\u0301"]


def changed(form, **keys):
    """The metadata of a tokenizer, with keys changed; None removes a key."""
    given = tokenizer_keys(form) | {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("form", PRE)
def test_ids_equal_those_of_the_tokenizer_that_made_the_file(form):
    ours, theirs = gguf_tokenizer(tokenizer_keys(form), "x.gguf"), made_tokenizer(form)
    for text in CASES:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_the_rules_differ_in_digits():
    """A wrong rule gives no error: only its ids are others."""
    pieces = {}
    for form in PRE:
        tokenizer = gguf_tokenizer(tokenizer_keys(form) | _merged_digits(form), "x.gguf")
        pieces[form] = [tokenizer.decode([token_id]) for token_id in tokenizer.encode("123456")]
    assert pieces == {
        "gpt2": ["123456"], "qwen2": list("123456"), "llama3": ["123", "456"], "smollm": list("123456"),
    }  # fmt: skip


def _merged_digits(form):
    """Tokens and merges that join the digits 1 to 6, as far as the rule lets them."""
    keys = tokenizer_keys(form)
    tokens, merges = list(keys["tokenizer.ggml.tokens"]), list(keys["tokenizer.ggml.merges"])
    known = set(tokens)
    for begin in (0, 3):
        for end in range(begin + 2, begin + 4):
            merges.append(f"{'123456'[begin : end - 1]} {'123456'[end - 1]}")
    merges.append("123 456")
    merges = list(dict.fromkeys(merges))
    tokens += [token for merge in merges if (token := merge.replace(" ", "")) not in known]
    types = keys["tokenizer.ggml.token_type"] + [1] * (len(tokens) - len(known))
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": types}


def test_sentence_piece_merges_the_piece_of_the_highest_score_first():
    keys = tokenizer_keys("llama2")
    ours = gguf_tokenizer(keys, "x.gguf")
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]))
    for text in CASES:
        assert [ours._fast.id_to_token(i) for i in ours.encode(text)] == pieces_by_score(text, scores)
        assert ours.decode(ours.encode(text)) == text.replace(SPACE, " ")


def pieces_by_score(text, scores):
    """SentencePiece's algorithm, one merge at a time: the neighbours of the highest score, from the left."""
    pieces = list(SPACE + text.replace(" ", SPACE))
    while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]:
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [name for piece in pieces for name in ([piece] if piece in scores else _bytes(piece))]


def _bytes(piece):
    return [f"<0x{byte:02X}>" for byte in piece.encode()]


def test_special_tokens_are_single_ids_and_their_names_in_text_are_text():
    for form in (*PRE, "llama2"):
        tokenizer = gguf_tokenizer(tokenizer_keys(form), "x.gguf")
        assert {EOS, "<s>", "<|end|>"} <= set(tokenizer.special_ids)
        for name, token_id in tokenizer.special_ids.items():
            assert tokenizer.encode_with_special(name)[-1:] == [token_id]
            assert token_id not in tokenizer.encode(name)


def test_user_defined_tokens_are_single_ids_that_have_a_text():
    keys = tokenizer_keys("qwen2")
    tokens = [*keys["tokenizer.ggml.tokens"], "<think>"]
    tokenizer = gguf_tokenizer(changed("qwen2", tokens=tokens, token_type=_types("qwen2", 4)), "x.gguf")
    assert tokenizer.encode("a<think>b")[1] == len(tokens) - 1
    assert tokenizer.decode([len(tokens) - 1]) == "<think>"


def _types(form, *more):
    return [*tokenizer_keys(form)["tokenizer.ggml.token_type"], *more]


def test_unused_ids_keep_their_place_and_have_no_text(tmp_path):
    tokens = [*tokenizer_keys("qwen2")["tokenizer.ggml.tokens"], "[PAD330]", "<|late|>", "[PAD332]"]
    tokenizer = gguf_tokenizer(changed("qwen2", tokens=tokens, token_type=_types("qwen2", 5, 3, 5)), "x.gguf")
    assert tokenizer.special_ids["<|late|>"] == len(tokens) - 2
    assert tokenizer.vocab_len == len(tokens) - 1
    assert tokenizer.decode([len(tokens) - 3, len(tokens) - 1]) == ""
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("form", "keys", "begin", "end"),
    [("llama2", {}, ["<s>"], []), ("llama2", {"add_bos_token": False}, [], []),
     ("llama3", {"add_bos_token": None}, ["<s>"], []), ("qwen2", {"add_bos_token": None}, [], []),
     ("qwen2", {"add_bos_token": True, "add_eos_token": True}, ["<s>"], [EOS])],
)  # fmt: skip
def test_texts_are_framed_as_the_file_states(form, keys, begin, end):
    tokenizer = gguf_tokenizer(changed(form, **keys), "x.gguf")
    special = tokenizer.special_ids
    framed = [special[name] for name in begin] + tokenizer.encode("abc") + [special[name] for name in end]
    assert tokenizer.encode_batch(["abc"], framed=True) == [framed]


def test_a_vocabulary_without_a_space_at_its_beginning_stays_without():
    tokenizer = gguf_tokenizer(changed("gemma", add_space_prefix=False), "x.gguf")
    assert tokenizer.encode("the") == made_tokenizer("gemma").encode("the", add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_end_tokens_are_those_of_the_keys_and_the_control_tokens_that_end_texts():
    keys = changed("qwen2", eos_token_id=2, eom_token_id=1)
    assert gguf_token_ids(keys) == {"eos_token_id": [2, 1, 0], "bos_token_id": 1, "pad_token_id": 2}
    assert gguf_token_ids(tokenizer_keys("qwen2"))["eos_token_id"] == 0
    assert gguf_token_ids(changed("qwen2", eos_token_ids=[0, 9, 7]))["eos_token_id"] == [0, 9, 7]


def test_named_chat_templates_are_kept():
    given = tokenizer_keys("qwen2") | {"tokenizer.chat_template.tool_use": "{{ tools }}"}
    assert gguf_tokenizer(given, "x.gguf").templates["tool_use"] == "{{ tools }}"
    with pytest.raises(TokenizerError, match="a word"):
        gguf_tokenizer(given | {"tokenizer.chat_template.../../x": ""}, "x.gguf")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model": "bert"}, "kind 'bert'"),
        ({"model": None}, "kind None"),
        ({"pre": "falcon"}, "rule 'falcon'"),
        ({"pre": None}, "rule None"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"tokens": None}, "tokens"),
        ({"token_type": [1, 2]}, "one for each token"),
        ({"merges": None}, "merges"),
        ({"merges": ["q q"]}, "does not fit together"),
        ({"eos_token_id": None}, "no tokenizer.ggml.eos_token_id"),
        ({"eos_token_id": 5000}, "which is no token"),
        ({"bos_token_id": "<s>"}, "which is no token"),
        ({"tokens": list(range(330))}, "does not fit together"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(keys, words):
    with pytest.raises(TokenizerError, match=words):
        gguf_tokenizer(changed("qwen2", **keys), "x.gguf")


def test_a_vocabulary_that_loses_text_is_refused():
    keys = tokenizer_keys("qwen2")
    tokens = ["\u0100\u0100" if token == "H" else token for token in keys["tokenizer.ggml.tokens"]]
    merges = [merge for merge in keys["tokenizer.ggml.merges"] if "H" not in merge]
    with pytest.raises(TokenizerError, match='turns "Hello world'):
        gguf_tokenizer(changed("qwen2", tokens=tokens, merges=merges), "x.gguf")


def test_two_tokens_of_one_text_are_refused():
    keys = tokenizer_keys("qwen2")
    with pytest.raises(TokenizerError, match="two tokens of the same text"):
        gguf_tokenizer(
            changed("qwen2", tokens=[*keys["tokenizer.ggml.tokens"], "a"], token_type=_types("qwen2", 1)), "x.gguf"
        )

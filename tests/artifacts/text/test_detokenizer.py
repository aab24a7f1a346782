"""The text of a completion is the text of prompt and completion without the text of the prompt."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from vocabularies import BYTE_LEVEL, EOS, ODD, SENTENCE_PIECE, SPACE, tokenizer_json

from tidar_core.artifacts.text.tokenizer import Tokenizer

FORMS = (*BYTE_LEVEL, *SENTENCE_PIECE)
PAIRS = {form: FastTokenizer.from_str(tokenizer_json(form)) for form in FORMS}
OURS = {form: Tokenizer(FastTokenizer.from_str(tokenizer_json(form)), {"eos_token": EOS}) for form in FORMS}
WRITTEN = st.text(alphabet=st.sampled_from("ab the\n.,é日🎉▁\u0301'<s>0x41"), max_size=24)
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def deltas_of(form, ids, prompt=(), **how):
    stream = OURS[form].stream(after=prompt, **how)
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_a_completion_keeps_its_first_space():
    tokens = {form: PAIRS[form].get_vocab() for form in ("llama2", "metaspace first", "unigram", "xlm-r")}
    for form, vocabulary in tokens.items():
        the, word = vocabulary[SPACE + "the"], vocabulary[SPACE + "s"]
        assert OURS[form].continued([the], [word, the]) == " s the"
        assert OURS[form].continued([], [the, word]) == "the s"
        assert OURS[form].continued([vocabulary[EOS]], [the]) == "the"  # no text before it


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_prompt_and_completion_join_to_the_whole_text_wherever_the_text_is_cut(form, cut):
    ids = PAIRS[form].encode(ODD, add_special_tokens=False).ids
    whole, begun = PAIRS[form].decode(ids), PAIRS[form].decode(ids[:cut])
    completion = "".join(deltas_of(form, ids[cut:], ids[:cut]))
    assert whole.endswith(completion)
    if whole.startswith(begun):  # the cut is within no character
        assert begun + completion == whole


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMS), WRITTEN, WRITTEN, st.booleans())
def test_random_texts_continue_as_their_tokens_decode(form, prompt, completion, skip_special):
    read = [PAIRS[form].encode(text, add_special_tokens=False).ids for text in (prompt, completion)]
    whole = PAIRS[form].decode([*read[0], *read[1]], skip_special_tokens=skip_special)
    begun = PAIRS[form].decode(read[0], skip_special_tokens=skip_special)
    deltas = deltas_of(form, read[1], read[0], skip_special=skip_special)
    assert begun + "".join(deltas) == whole
    assert UNDECODABLE in whole or not any(UNDECODABLE in delta for delta in deltas)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BYTE_LEVEL), st.data(), st.booleans())
def test_any_ids_of_a_byte_level_vocabulary_continue_as_they_decode(form, data, skip_special):
    ids = data.draw(st.lists(st.integers(0, 335), max_size=12))
    assert "".join(deltas_of(form, ids, skip_special=skip_special)) == PAIRS[form].decode(
        ids, skip_special_tokens=skip_special
    )


def test_broken_bytes_of_a_byte_fallback_vocabulary_leave_whole_characters_alone(form):
    if form not in ("llama2", "gemma", "unigram"):
        return
    byte = [PAIRS[form].token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    bee = PAIRS[form].token_to_id("b")
    assert deltas_of(form, [byte[0xE6], byte[0x97], byte[0xA5], byte[0xE6], bee]) == [
        "",
        "",
        "日",
        "",
        f"{UNDECODABLE}b",
        "",
    ]
    assert deltas_of(form, [byte[0xE6], byte[0x97], bee]) == ["", "", UNDECODABLE * 2 + "b", ""]
    assert PAIRS[form].decode([byte[0xE6], byte[0x97], bee]) == UNDECODABLE * 2 + "b"
    assert "".join(deltas_of(form, [byte[0xA5], bee], [byte[0xE6], byte[0x97]])) == "日b"


@pytest.mark.parametrize("form", ["gpt2", "llama2", "unigram"])
def test_detokenizing_takes_linear_time_whatever_the_bytes(form):
    """The time per token is the same for 500 and 16,000 tokens that never become UTF-8, or that are skipped."""
    name = "<0xE6>" if PAIRS[form].token_to_id("<0xE6>") else "æ"
    for token in (PAIRS[form].token_to_id(name), PAIRS[form].token_to_id(EOS)):
        few, many = (seconds(form, [token] * count) for count in (500, 16_000))
        assert many < 10 * 32 * few + 0.2  # 32 times as many; a quadratic stream would take a minute and more


def seconds(form, ids):
    began = time.perf_counter()
    deltas_of(form, ids)
    return time.perf_counter() - began


def test_every_token_has_a_name_of_its_own_and_bytes_that_join_to_the_text(form):
    ours = OURS[form]
    names = [ours.spell(token) for token in range(ours.vocab_len)]
    assert len(set(names)) == len(names)
    assert all(names)
    assert {ours.spell(token): token for token in ours.special_ids.values()} == ours.special_ids
    if form != "xlm-r":  # which has an unknown token
        ids = PAIRS[form].encode(ODD, add_special_tokens=False).ids
        assert b"".join(map(ours.bytes_of, ids)).decode().removeprefix(" ") == PAIRS[form].decode(ids).removeprefix(" ")


def test_names_keep_the_spaces_of_the_vocabularys_spelling():
    ours, vocabulary = OURS["llama2"], PAIRS["llama2"].get_vocab()
    spelled = {name: ours.spell(token) for name, token in vocabulary.items()}
    assert (spelled[SPACE + "s"], spelled["s"], spelled[SPACE]) == (" s", "s", " ")
    assert (spelled["<0x0A>"], spelled["<0xE6>"], spelled["\ufffd"]) == ("\n", r"bytes:\xe6", "\ufffd")
    assert spelled["<0x65>"] == r"bytes:\x65"  # e has a token of its own
    assert ours.bytes_of(vocabulary["<0x65>"]) == b"e"
    assert (ours.spell(9999), ours.bytes_of(9999)) == ("token_id:9999", b"")


def test_an_added_token_with_the_text_of_another_is_named_by_its_spelling():
    fast = FastTokenizer.from_str(tokenizer_json("llama2"))
    fast.add_tokens([" the", "  "])
    ours = Tokenizer(fast, {"eos_token": EOS})
    assert len({ours.spell(token) for token in range(ours.vocab_len)}) == ours.vocab_len
    assert ours.spell(fast.token_to_id(SPACE + "the")) == " the"


def test_decoders_of_other_kinds_continue_a_text_as_well():
    words = ["the", "##re", "and", ".", "[END]"]
    for decoder in (decoders.WordPiece(), decoders.BPEDecoder(suffix="e"), None):
        fast = FastTokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="the"))
        if decoder is not None:
            fast.decoder = decoder
        ours = Tokenizer(fast, {"eos_token": "[END]"})
        for cut in range(5):
            ids = [0, 1, 2, 3, 2]
            assert fast.decode(ids[:cut]) + ours.continued(ids[:cut], ids[cut:]) == fast.decode(ids), (decoder, cut)


def test_the_oracle_has_the_decoder_of_llama_2():
    parts = json.loads(tokenizer_json("llama2"))["decoder"]["decoders"]
    assert [part["type"] for part in parts] == ["Replace", "ByteFallback", "Fuse", "Strip"]

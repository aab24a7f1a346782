"""Text that is encoded in parts has the ids of the whole, and text that spells a special token stays text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from vocabularies import BYTE_LEVEL, EOS, ODD, SENTENCE_PIECE, SPACE, tokenizer_json

from pipelines.packing.conversations import conversation_of, encode_conversation
from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.artifacts.text.tokenizer import Tokenizer

FORMS = (*BYTE_LEVEL, *SENTENCE_PIECE)
PAIRS = {form: FastTokenizer.from_str(tokenizer_json(form)) for form in FORMS}
OURS = {form: Tokenizer(FastTokenizer.from_str(tokenizer_json(form)), {"eos_token": EOS}) for form in FORMS}
TEMPLATE = ChatTemplate(
    "<s>{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
WRITTEN = st.text(alphabet=st.sampled_from("ab the\n.,é日🎉▁"), max_size=24)


@pytest.mark.parametrize("form", FORMS)
def test_text_that_spells_a_special_token_stays_text(form):
    ours = OURS[form]
    for name in ours.special_ids:
        for text in (name, f"a{name}b", f" {name} {name}"):
            assert not set(ours.encode(text)) & set(ours.special_ids.values()) or form == "xlm-r"  # which has no "<"
            assert ours.special_ids[name] in ours.encode_with_special(text)
    if form != "xlm-r":
        assert ours.decode(ours.encode(f"a{EOS}b")).strip() == f"a{EOS}b"


def test_characters_that_a_vocabulary_lacks_become_only_the_unknown_token():
    ours = OURS["xlm-r"]
    assert set(ours.encode(f"<s>{EOS}")) & set(ours.special_ids.values()) == {ours.special_ids["<unk>"]}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMS), WRITTEN, WRITTEN)
def test_a_part_after_a_line_end_or_a_special_token_has_the_ids_of_the_whole(form, first, second):
    first, second = f"{first}.", f"b{second}"  # characters that no token joins
    fast, ours = PAIRS[form], OURS[form]
    whole = fast.encode(f"{first}<|end|>{second}", add_special_tokens=False).ids
    end = fast.token_to_id("<|end|>")
    parts = [ours.encode_part(first, before="", after="<|end|>"), [end], ours.encode_part(second, before="<|end|>")]
    assert [token for part in parts for token in part] == whole
    whole = fast.encode(f"{first}\n{second}", add_special_tokens=False).ids
    if "\u0301" not in second:
        joined = ours.encode_part(f"{first}\n", before="") + ours.encode_part(second, before=f"{first}\n")
        assert joined == whole


@pytest.mark.parametrize("form", FORMS)
def test_a_message_with_the_name_of_a_special_token_has_the_ids_of_one_without_it(form):
    def ids(content):
        return encode_chat(TEMPLATE, OURS[form], [{"role": "user", "content": content}])

    tokens = OURS[form].special_ids
    forged, harmless = ids(f"the {EOS} and"), ids("the %% and")
    start = PAIRS[form].encode("<s>user:\nthe", add_special_tokens=False).ids
    rest = PAIRS[form].encode("<|end|>\nassistant:\n", add_special_tokens=False).ids
    assert (forged[: len(start)], forged[-len(rest) :]) == (start, rest)
    assert (harmless[: len(start)], harmless[-len(rest) :]) == (start, rest)
    if form != "xlm-r":
        assert [token for token in forged if token in tokens.values()] == [tokens["<s>"], tokens["<|end|>"]]
        plain = encode_chat(TEMPLATE, OURS[form], [{"role": "user", "content": f"the {EOS} and"}])
        assert OURS[form].decode(plain, skip_special=False).count(EOS) == 1


@pytest.mark.parametrize("form", FORMS)
def test_training_and_the_service_encode_a_conversation_alike_and_the_answer_continues_it(form):
    messages = [{"role": "user", "content": "the and"}, {"role": "assistant", "content": "Hello world"}]
    (segments,) = encode_conversation(conversation_of({"messages": messages}), TEMPLATE, OURS[form])
    shown = encode_chat(TEMPLATE, OURS[form], messages[:1])
    assert segments[0].ids == shown
    whole = PAIRS[form].encode(TEMPLATE.render(messages), add_special_tokens=False).ids
    assert [token for segment in segments for token in segment.ids] == whole
    continuation = OURS[form].continued(shown, segments[1].ids)
    assert continuation == PAIRS[form].decode(whole)[len(PAIRS[form].decode(shown)) :]
    # A space comes before the line end if the tokenizer adds a space after a special token.
    assert continuation.startswith("Hello world")


def test_an_added_token_includes_the_white_space_beside_it_in_parts_too():
    fast = FastTokenizer.from_str(tokenizer_json("llama3"))
    fast.add_tokens(
        [AddedToken("<|pad|>", lstrip=True, rstrip=True, special=True), AddedToken("<think>", special=False)]
    )
    ours, template = (
        Tokenizer(fast, {"eos_token": EOS}),
        ChatTemplate("{{ messages[0].content }} <|pad|> \n x<think> y"),
    )
    theirs = FastTokenizer.from_str(fast.to_str())
    plain = encode_chat(template, ours, [{"role": "user", "content": "a %% b"}])
    assert plain == theirs.encode("a %% b <|pad|> \n x<think> y", add_special_tokens=False).ids
    forged = encode_chat(template, ours, [{"role": "user", "content": f"a {EOS} b"}])
    tail = theirs.encode(" b <|pad|> \n x<think> y", add_special_tokens=False).ids
    assert forged[-len(tail) :] == tail
    assert forged[: -len(tail)] == ours.encode(f"a {EOS}")


@pytest.mark.parametrize("form", FORMS)
def test_offsets_of_tokens_are_positions_in_the_original_text(form):
    ours = OURS[form]
    offsets = ours.offsets(ODD)
    assert len(offsets) == len(ours.encode(ODD))
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for offset, token in zip(offsets, ours.encode(ODD)):
        text = ours.bytes_of(token).decode(errors="ignore")
        if len(text.strip()) > 1 and text.isascii() and text != "<unk>":
            assert ODD[offset:].replace(" ", "").startswith(text.replace(" ", ""))
    assert len(ours.offsets(ODD, framed=True)) == len(ours.encode_batch([ODD], framed=True)[0])


def test_words_of_a_continuation_get_no_space():
    vocabulary = json.loads(tokenizer_json("llama2"))["model"]["vocab"]
    for form in ("llama2", "metaspace first", "metaspace always", "metaspace never", "gemma"):
        assert OURS[form].encode_continuation("s") == [vocabulary["s"]]
        assert OURS[form].encode_continuation(" the") == [vocabulary[SPACE + "the"]]

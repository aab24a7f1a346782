"""A completion goes on where its prompt ends, and ends at the name of a special token too."""

import json

import pytest
from chat_templates import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import wide_model
from tokenizers import Tokenizer as FastTokenizer
from vocabularies import EOS, SENTENCE_PIECE, SPACE, tokenizer_json

from pipelines.evaluation.lm_eval_model import LmEvalModel
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.replica.prompt_encoder import PromptEncoder
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from serve_apps.tools.offline_generation import OfflineGeneration
from tidar_core.artifacts.model.bundle import load_bundle, save_bundle
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import DecodeStep, TokenLogprob
from tidar_core.transformer.shapes import named_shape

END = "<|im_end|>"
FORMS = ("llama2", "metaspace first", "metaspace always", "unigram")


def tokenizer_of(form):
    return Tokenizer(FastTokenizer.from_str(tokenizer_json(form)), {"eos_token": EOS})


def written(tokenizer, prompt, tokens, *, reason="length", scored=(), **request_fields):
    """The one piece of a request whose tokens all came in one step."""
    request = GenerationRequest(**{"request_id": "r", "prompt": prompt, "sampling": SamplingConfig()} | request_fields)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    logprobs = tuple(TokenLogprob(token, -1.0, ((token, -1.0),)) for token in tokens)
    chunks = tuple(TokenLogprob(token, -2.0, ()) for token in ids[1:])
    step = DecodeStep("r", tuple(tokens), reason, len(tokens), 0, len(tokens), logprobs, chunks)
    return IncrementalDetokenizer(tokenizer, request, ids, block_len=4).add([step]).take()


@pytest.mark.parametrize("form", FORMS)
def test_a_completion_keeps_its_first_space_and_names_and_places_keep_theirs(form):
    tokenizer = tokenizer_of(form)
    the = tokenizer._fast.token_to_id(SPACE + "the")
    prompt = tokenizer.encode("the")
    for request_fields in ("the", tuple(prompt)):
        piece = written(tokenizer, request_fields, [the, the], logprobs=1)
        assert (piece.text, piece.logprobs.text_offset) == (" the the", [0, 4])
        assert piece.logprobs.tokens == [" the", " the"]
        echoed = written(tokenizer, request_fields, [the, the], logprobs=1, echo=True)
        assert echoed.text == "the the the"
        assert echoed.logprobs.text_offset[-3:] == [0, 3, 7]


FAST = {form: FastTokenizer.from_str(tokenizer_json(form)) for form in SENTENCE_PIECE}
READERS = {form: tokenizer_of(form) for form in SENTENCE_PIECE}
UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
WRITTEN = st.text(alphabet=st.sampled_from("ab the\n.,é日▁'"), max_size=20)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SENTENCE_PIECE), WRITTEN, WRITTEN, st.data())
def test_random_completions_have_the_text_the_places_and_the_ends_that_tokenizers_gives(form, prompt, more, data):
    """`tokenizers` decodes the whole and each of its beginnings; spaces are those of the whole text."""
    fast, ours = FAST[form], READERS[form]
    before, after = (fast.encode(text, add_special_tokens=False).ids for text in (prompt, more))
    begun, whole = fast.decode(before), fast.decode([*before, *after])
    expected = whole[len(begun) :]
    piece = written(ours, prompt, after, logprobs=1)
    assert (piece.text, written(ours, tuple(before), after).text) == (expected, expected)
    beginnings = [fast.decode([*before, *after[:count]]) for count in range(len(after))]
    if not any(UNDECODABLE in text for text in [whole, *beginnings]):  # no token is a part of a character
        assert piece.logprobs.text_offset == [len(text) - len(begun) for text in beginnings]
    assert piece.logprobs.tokens == [ours.spell(token) for token in after]
    echoed = written(ours, prompt, after, logprobs=1, echo=True)
    assert echoed.text == prompt + expected
    places = echoed.logprobs.text_offset
    assert places == sorted(places)
    assert places[len(before) :] == [len(prompt) + place for place in piece.logprobs.text_offset]
    assert written(ours, tuple(before), after, echo=True).text == whole
    if expected:
        stop = expected[(begin := data.draw(st.integers(0, len(expected) - 1))) : begin + 3]
        assert written(ours, prompt, after, stop=(stop,)).text == expected[: expected.index(stop)]


def test_an_echo_of_ids_that_end_within_a_character_goes_on_within_it():
    tokenizer = tokenizer_of("llama3")
    ids = tokenizer.encode("a 日b")
    assert written(tokenizer, tuple(ids[:3]), ids[3:], echo=True).text == "a 日b"
    assert written(tokenizer, tuple(ids[:3]), ids[3:]).text == "日b"
    assert written(tokenizer, tuple(ids[:3]), ids[-1:]).text == "b"  # what cannot be mended was shown with the prompt
    assert written(tokenizer, tuple(ids[:3]), [], echo=True, prompt_alone=True).text == "a \N{REPLACEMENT CHARACTER}"


def test_places_in_an_echo_are_places_in_the_prompt_as_it_was_written():
    tokenizer, prompt = tokenizer_of("qwen2"), "e\u0301 e\u0301 x"  # which NFC makes shorter
    piece = written(tokenizer, prompt, tokenizer.encode("!"), echo=True, logprobs=0)
    assert piece.text == prompt + "!"
    assert piece.logprobs.text_offset == [0, 0, 2, 3, 3, 5, 7]
    assert piece.logprobs.tokens == [r"bytes:\xc3", r"bytes:\xa9", " ", r"bytes:\xc3", r"bytes:\xa9", " x", "!"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with a chat template and the special token <|im_end|>."""
    folder = str(tmp_path_factory.mktemp("chatty") / "bundle")
    tokenizer = chat_tokenizer("qwen2.5")
    model = wide_model(named_shape("tiny", vocab_len=tokenizer.vocab_len))
    save_bundle(folder, model, tokenizer, block_len=4, mask_id=model.config.mask_id, objective="dual", lineage={},
                made_by={})  # fmt: skip
    return folder


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip_special", [False, True])
@pytest.mark.parametrize("mode", ["single-pass", "two-pass", "autoregressive"])
def test_a_stop_string_that_names_a_special_token_ends_a_text_at_the_token(bundle, mode, skip_special, include):
    loaded = load_bundle(bundle)
    end = loaded.tokenizer.special_ids[END]
    fields = {
        "prompt": "hi", "max_tokens": 8, "temperature": 0, "logit_bias": {str(end): 100}, "stop": [END],
        "skip_special_tokens": skip_special, "include_stop_str_in_output": include,
    }  # fmt: skip
    writing = OfflineGeneration(loaded, bundle, fields, mode=mode)
    text = "".join(writing.deltas())
    facts = writing.figures()
    assert (text, facts["finish_reason"], facts["stop_reason"]) == (END if include else "", "stop", END)
    assert facts["token_ids"] == [end]


def test_a_special_token_that_no_stop_string_names_ends_nothing(bundle):
    loaded = load_bundle(bundle)
    end = loaded.tokenizer.special_ids[END]
    fields = {"prompt": "hi", "max_tokens": 5, "logit_bias": {str(end): 100}, "stop": ["<|im_start|>"]}
    writing = OfflineGeneration(loaded, bundle, json.loads(json.dumps(fields)), mode="single-pass")
    assert "".join(writing.deltas()) == ""
    assert (writing.figures()["finish_reason"], len(writing.figures()["token_ids"])) == ("length", 5)


def test_chats_and_lm_eval_take_the_token_of_a_stop_string_as_well(bundle):
    loaded, template = load_bundle(bundle), load_chat_template(bundle)
    tokenizer, mask = loaded.tokenizer, loaded.tokenizer.special_ids["<|mask|>"]
    reader = PromptEncoder(tokenizer, template, vocab_size=400, context_len=100, tool_form=None)
    chat = Chat(messages=({"role": "user", "content": "hello"},))
    for prompt in (chat, "hello", (5, 6)):
        request_fields = GenerationRequest(
            request_id="r", prompt=prompt, sampling=SamplingConfig(), stop=("<|mask|>", "x"), ignore_eos=True
        )
        assert reader.request(request_fields).sampling.eos_ids == (mask,)
    model = LmEvalModel(loaded)
    text = model._text("0", type("Instance", (), {"args": ("a", {"until": ["<|mask|>", "\n"]}), "task_name": "t"})())
    assert text.request.sampling.eos_ids == (tokenizer.eos_id, mask)


def test_an_evaluation_ends_at_the_stop_string_that_is_complete_first_as_the_service_does(bundle):
    tokenizer = load_bundle(bundle).tokenizer
    fast = FastTokenizer.from_str(tokenizer.fast_json)
    fast.add_tokens(["abcde"])  # in one token
    ours = Tokenizer(fast, {"eos_token": "<|endoftext|>"})
    loaded = load_bundle(bundle)
    object.__setattr__(loaded, "tokenizer", ours)
    until = {"until": ["bcde", "cd"]}
    text = LmEvalModel(loaded)._text("0", type("Instance", (), {"args": ("x", until), "task_name": "t"})())
    tokens = ours.encode("abcde")
    assert len(tokens) == 1
    assert text.add(DecodeStep("0", tuple(tokens), None, 1, 0, 0))
    assert text.text == "ab"
    assert written(ours, "x", tokens, stop=("bcde", "cd")).text == "ab"

"""The text of one request from its decode steps."""

from itertools import accumulate, pairwise, product

import pytest

from serve_apps.api.completion_response import metrics_of, usage_of
from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from serve_apps.streaming.logprobs import score_models
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.config import SamplingConfig
from tidar_core.decoding.request import DecodeStep, TokenLogprob

TEXT = "Grüße, 日本語 🎉!"
PROMPT = "a 日"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["plain words, then more plain words"], 270)


@pytest.fixture
def transcript(tokenizer):
    return transcript_of(tokenizer)


def transcript_of(tokenizer, min_tokens=0, **fields):
    sampling = SamplingConfig(min_tokens=min_tokens, eos_ids=(tokenizer.eos_id, *tokenizer.encode("$")))
    request = GenerationRequest(**{"request_id": "r", "prompt": PROMPT, "sampling": sampling} | fields)
    prompt = tokenizer.encode(PROMPT) if isinstance(request.prompt, str) else request.prompt
    return IncrementalDetokenizer(tokenizer, request, prompt, block_len=4)


def steps_of(tokens, lengths, finish_reason, scored=False):
    """A prefill, then decode steps of these lengths, the last as long as the tokens are; i-th token at -i."""
    cuts = [0, *(min(cut, len(tokens)) for cut in accumulate([1, *lengths]))]
    steps = []
    for a, b in pairwise(cuts):
        counts = (1, 0, 0) if a == 0 else (b - a + 1, b - a, b - a + 1)
        logprobs = tuple(TokenLogprob(tokens[i], -float(i), ((7, -0.5), (8, -0.75))) for i in range(a, b))
        reason = finish_reason if b == len(tokens) else None
        steps.append(DecodeStep("r", tuple(tokens[a:b]), reason, *counts, logprobs if scored else ()))
        if b == len(tokens):
            break
    return steps


def deltas_of(transcript, steps):
    """All pieces, one taken after each step until the text ends."""
    pieces = []
    for step in steps:
        pieces.append(transcript.add([step]).take())
        if transcript.finish_reason is not None:
            break
    return pieces


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer, transcript):
    tokens = tokenizer.encode(TEXT)
    pieces = deltas_of(transcript, steps_of(tokens, [3] * len(tokens), "length"))
    assert text_of(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_text_cut_within_a_character_ends_as_its_tokens_decode(tokenizer, transcript):
    tokens = tokenizer.encode("🎉")[:2]
    assert transcript.add(steps_of(tokens, [1], "length")).take().text == tokenizer.decode(tokens)


def test_an_end_of_text_token_that_was_ignored_has_no_text(tokenizer, transcript):
    tokens = [*tokenizer.encode("a"), tokenizer.eos_id, *tokenizer.encode("b")]
    assert transcript.add(steps_of(tokens, [2], "length")).take().text == "ab"


def test_nothing_is_pending_until_a_character_is_whole(tokenizer, transcript):
    first, *rest = tokenizer.encode("é")
    assert not transcript.add([]).pending
    assert not transcript.add([DecodeStep("r", (first,), None, 1, 0, 0)]).pending
    assert transcript.add([DecodeStep("r", tuple(rest), None, 4, 1, 4)]).pending


def test_the_speculative_metrics_are_vllms(transcript):
    # decode steps accepted 4, 1, 1 and 2 drafts, the final first one included: 3, 0, 0 and 1 speculative tokens
    usage = transcript.add(steps_of([9] * 9, [4, 1, 1, 2], "length")).take().usage
    assert metrics_of(usage).speculative_decoding.model_dump() == {
        "mean_acceptance_length": 2.0,  # 8 tokens in 4 steps
        "draft_acceptance_rate": 4 / 12,
        "acceptance_histogram": [2, 1, 0, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 4,
        "num_draft_tokens": 12,
        "num_spec_tokens": 3,
    }
    assert usage_of(usage).completion_tokens == 9


@pytest.mark.parametrize(("include", "text"), [(False, "words"), (True, "words$")])
def test_a_stop_token_is_counted_and_named_and_has_text_only_if_requested(tokenizer, include, text):
    (stop,) = tokenizer.encode("$")
    tokens = [*tokenizer.encode("words"), stop]
    pieces = deltas_of(transcript_of(tokenizer, include_stop=include), steps_of(tokens, [len(tokens)], "stop"))
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].stop_reason) == (text, "stop", stop)
    assert pieces[-1].usage.completion_tokens == len(tokens)


@pytest.mark.parametrize(("ignored", "reason"), [(False, None), (True, 0)])
def test_the_end_of_text_token_is_no_stop_reason_unless_it_was_named_as_a_stop_token(tokenizer, ignored, reason):
    assert tokenizer.eos_id == 0
    tokens = [*tokenizer.encode("a"), tokenizer.eos_id]
    piece = deltas_of(transcript_of(tokenizer, ignore_eos=ignored), steps_of(tokens, [4], "stop"))[-1]
    assert (piece.finish_reason, piece.stop_reason) == ("stop", reason)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_at_any_place_ends_text_and_count_alike_for_every_division_into_steps(tokenizer, include):
    tokens = tokenizer.encode(TEXT)
    tokens_until = {}
    stream, certain = tokenizer.stream(), ""
    for count, token in enumerate(tokens, 1):
        certain += stream.push(token)
        tokens_until.setdefault(len(certain), count)
    for start, length in product(range(len(TEXT)), (1, 2, 4)):
        stop = TEXT[start : start + length]
        begin = TEXT.index(stop)
        count = next(n for end, n in sorted(tokens_until.items()) if end >= begin + len(stop))
        for lengths in ([1] * 40, [2] * 40, [4] * 40, [3, 1, 4] * 10, [1, 4] * 10):
            pieces = deltas_of(
                transcript_of(tokenizer, stop=(stop,), include_stop=include), steps_of(tokens, lengths, "length")
            )
            assert text_of(pieces) == TEXT[: begin + len(stop) if include else begin]
            last = pieces[-1]
            assert (last.finish_reason, last.stop_reason, last.usage.completion_tokens) == ("stop", stop, count)


def test_steps_after_the_stop_string_change_nothing(tokenizer):
    transcript = transcript_of(tokenizer, stop=("b",))
    steps = [DecodeStep("r", tuple(tokenizer.encode(text)), None, 4, 1, 4) for text in ("a", "b", "c")]
    piece = transcript.add(steps).take()
    assert (piece.text, piece.usage.completion_tokens, sum(piece.usage.histogram)) == ("a", 2, 2)
    assert transcript.add(steps).take().text == ""


def test_text_that_was_held_back_is_sent_when_the_text_ends_otherwise(tokenizer):
    tokens = tokenizer.encode("one ST")
    pieces = deltas_of(transcript_of(tokenizer, stop=("STOP",)), steps_of(tokens, [1] * 9, "length"))
    assert text_of(pieces) == "one ST"
    assert text_of(pieces[:-1]) == "one "


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab"), (6, "abababa")])
def test_a_stop_string_that_is_complete_within_the_first_min_tokens_is_not_looked_for(tokenizer, min_tokens, text):
    tokens = tokenizer.encode("abababa")
    assert len(tokens) == 7
    for lengths in ([1] * 9, [2] * 9, [4] * 9):
        transcript = transcript_of(tokenizer, min_tokens=min_tokens, stop=("ab",))
        assert text_of(deltas_of(transcript, steps_of(tokens, lengths, "length"))) == text


def test_log_probabilities_come_with_their_text_and_its_offset(tokenizer):
    tokens = tokenizer.encode("aü ST!")
    assert len(tokens) == 7
    transcript = transcript_of(tokenizer, logprobs=1, stop=("STOP",))
    pieces = deltas_of(transcript, steps_of(tokens, [1] * 9, "length", scored=True))
    names = [name for piece in pieces if piece.logprobs for name in piece.logprobs.tokens]
    assert names == ["a", r"bytes:\xc3", r"bytes:\xbc", " ", "S", "T", "!"]
    offsets = [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset]
    assert offsets == [0, 1, 1, 2, 3, 4, 5]
    assert [p.logprobs.tokens for p in pieces if p.text][-1] == ["S", "T", "!"]  # held back like their text


def test_every_counted_token_has_a_log_probability_those_of_a_stop_string_too(tokenizer):
    tokens = tokenizer.encode("ab STOP cd")
    pieces = deltas_of(
        transcript_of(tokenizer, logprobs=0, stop=("STOP",)), steps_of(tokens, [4] * 9, "length", scored=True)
    )
    names = [name for piece in pieces if piece.logprobs for name in piece.logprobs.tokens]
    assert (text_of(pieces), "".join(names)) == ("ab ", "ab STOP")
    assert len(names) == pieces[-1].usage.completion_tokens


def test_an_echoed_prompt_begins_the_text_and_its_first_token_has_no_log_probability(tokenizer):
    prompt, tokens = tokenizer.encode(PROMPT), tokenizer.encode("b!")
    scored = tuple(TokenLogprob(token, -10.0 - i, ((7, -0.5),)) for i, token in enumerate(prompt[1:]))
    first, *rest = steps_of(tokens, [4], "length", scored=True)
    steps = [DecodeStep("r", first.token_ids, None, 1, 0, 0, first.logprobs, scored), *rest]
    pieces = deltas_of(transcript_of(tokenizer, echo=True, logprobs=1, prompt_logprobs=0), steps)
    assert text_of(pieces) == PROMPT + "b!"
    assert pieces[0].logprobs.tokens == ["a", " ", r"bytes:\xe6", r"bytes:\x97", r"bytes:\xa5", "b"]
    assert pieces[0].logprobs.token_logprobs == [None, -10.0, -11.0, -12.0, -13.0, 0.0]
    assert pieces[0].logprobs.top_logprobs[0] is None
    assert pieces[0].logprobs.text_offset == [0, 1, 2, 2, 2, 3]
    assert pieces[1].logprobs.text_offset == [4]
    none, second, *_ = score_models(pieces[0].prompt_scores)
    assert none is None
    assert {i: s.model_dump() for i, s in second.items()} == {
        prompt[1]: {"logprob": -10.0, "rank": None, "decoded_token": " "}
    }
    assert pieces[1].prompt_scores is None


def test_an_echoed_prompt_of_tokens_is_their_text_and_no_stop_string_ends_it(tokenizer):
    prompt = tuple(tokenizer.encode("STOP 日"))
    fields = {"prompt": prompt, "echo": True, "stop": ("STOP", "P 日b")}
    pieces = deltas_of(transcript_of(tokenizer, **fields), steps_of(tokenizer.encode("b"), [], "length"))
    assert text_of(pieces) == "STOP 日b"


def test_a_prompt_that_was_requested_alone_comes_alone(tokenizer):
    transcript = transcript_of(tokenizer, echo=True, prompt_alone=True, logprobs=0)
    scored = tuple(TokenLogprob(token, -1.0, ()) for token in tokenizer.encode(PROMPT)[1:])
    (piece,) = deltas_of(transcript, [DecodeStep("r", (9,), "length", 1, 0, 0, scored[:1], scored)])
    assert len(piece.logprobs.tokens) == len(scored) + 1
    assert (piece.text, piece.finish_reason, piece.usage.completion_tokens) == (PROMPT, "length", 0)

"""Responses are the same in every mode: texts, ends, counts and log-probabilities."""

import asyncio
import json
import re

import pytest

from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.parsing import parse_request
from serve_apps.ingress.translate import generation_requests
from serve_apps.messages.text_delta import GenerationFailed
from serve_apps.replica.decoder_app import DecoderApp
from serve_apps.rollout.model_version import ModelVersion
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.model.bundle_info import read_bundle_info
from tidar_core.decoding.autoregressive import score

PROMPT = "def add(a, b):\n    return"
MODES = [("single-pass", 4), ("single-pass", 2), ("two-pass", 4), ("single-pass", 7)]
VARIED = {"prompt": "x", "frequency_penalty": 2}
"""Greedy, and yet the tiny model has more than one text."""
HOT = {"prompt": "x", "temperature": 3.0, "seed": 3}
CLOSE = 1e-4
"""fp32, keys summed in another order."""


@pytest.fixture(scope="module")
def replica(bundle):
    """A decoder of a mode and block length; one of each for the whole module."""
    replicas = {}

    def of(mode, block_len):
        if (mode, block_len) not in replicas:
            settings = ServeSettings(model=bundle, rows=8, mode=mode, context_len=160, own_process=False)
            bundle_hash = read_bundle_info(bundle).bundle_hash
            served = ModelVersion(settings=settings, bundle_uri=bundle, bundle_hash=bundle_hash, block_len=block_len)
            replicas[mode, block_len] = DecoderApp(served)
        return replicas[mode, block_len]

    return of


def answers(app, bodies):
    """Events of every text of every body, all requested at once."""

    async def collect(request):
        return [event async for event in app.generate(request)]

    async def together():
        requests = [request for place, body in enumerate(bodies) for request in prompts(f"{place}", body)]
        return await asyncio.gather(*[collect(request) for request in requests])

    return asyncio.run(together())


def prompts(name, body):
    whole = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 24} | body
    return generation_requests(parse_request(json.dumps(whole).encode(), CompletionRequest), name)


def whole(events):
    """Text, end and count."""
    assert not isinstance(events[-1], GenerationFailed), events[-1].error
    last = events[-1]
    text = "".join(piece.text for piece in events)
    return text, last.finish_reason, last.stop_reason, last.usage.completion_tokens


def scores(events):
    parts = [piece.logprobs for piece in events if piece.logprobs is not None]
    return {
        name: [x for part in parts for x in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    }


def same_everywhere(replica, bodies):
    """The answers of the autoregressive mode, once all others have given the same."""
    expected = answers(replica("autoregressive", 1), bodies)
    for mode in MODES:
        found = answers(replica(*mode), bodies)
        assert [whole(events) for events in found] == [whole(events) for events in expected], mode
    return [whole(events) for events in expected]


def text_of(replica, **body):
    return whole(answers(replica("autoregressive", 1), [body])[0])[0]


@pytest.mark.parametrize(
    ("how", "field", "value"),
    [
        (HOT, "min_p", 0.2),
        (HOT, "presence_penalty", 2),
        *[
            (how, field, value)
            for how in ({"prompt": "x"}, HOT)
            for field, value in (
                ("repetition_penalty", 2),
                ("frequency_penalty", 1.5),
                ("logit_bias", {"70": 30, "80": 30.5}),
                ("bad_words", ["x", "e", "on"]),
                ("stop_token_ids", list(range(40, 200))),
                ("guided_regex", "[a-w ]*"),
            )
        ],
    ],
)
def test_every_field_changes_the_text_in_every_mode_alike(replica, how, field, value):
    plain, found = same_everywhere(replica, [how, how | {field: value}])
    assert found != plain


def test_no_stop_token_comes_before_min_tokens(replica):
    body = HOT | {"stop_token_ids": list(range(1, 250))}
    (_, reason, stop_reason, count), (_, later_reason, _, later) = same_everywhere(
        replica, [body, body | {"min_tokens": 9}]
    )
    assert (reason, later_reason) == ("stop", "stop")
    assert stop_reason in range(1, 250)
    assert count <= 9 < later


def test_bad_words_come_in_no_mode(replica):
    ((plain, *_), (text_words, *_)) = same_everywhere(replica, [VARIED, VARIED | {"bad_words": ["exc", "th"]}])
    assert " exc" in plain
    assert not {"exc", "th"} & set(text_words.split())


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "how"), [(1, VARIED), (2, HOT)], ids=["greedy", "sampled"])
def test_a_stop_string_from_any_offset_ends_every_modes_text_at_its_first_occurrence(replica, tokenizer, stride, how):
    """Whether it lies within a block, begins in one and ends in another, or holds bytes of several tokens."""
    body = how | {"max_tokens": 30, "guided_regex": "(日本|ü🎉|[a-f]|xy){30,60}"}
    events = answers(replica("autoregressive", 1), [body | {"logprobs": 0}])[0]
    text, ends = whole(events)[0], scores(events)["text_offset"][1:]
    assert {"日", "🎉"} & set(text)
    drafted = answers(replica("single-pass", 4), [body])[0][-1].usage.histogram
    assert sum(drafted[1:]) > 3  # blocks that brought several tokens
    cuts = [(i, n) for i in range(0, len(text) - 1, stride) for n in (1, 3, 7)]
    stops = [text[i : i + n] for i, n in cuts]
    bodies = [body | {"stop": stop, "include_stop_str_in_output": n == 7} for stop, (_, n) in zip(stops, cuts)]
    for stop, (_, n), (text_words, reason, stop_reason, count) in zip(stops, cuts, same_everywhere(replica, bodies)):
        end = text.index(stop) + len(stop)
        assert (text_words, reason, stop_reason) == (text[: end if n == 7 else end - len(stop)], "stop", stop)
        assert count == next((i for i, offset in enumerate(ends, 1) if offset >= end), len(ends) + 1)


def test_of_several_stop_strings_the_first_to_be_complete_ends_the_text(replica):
    text = text_of(replica, **VARIED)
    late, early, never = text[12:17], text[6:9], "\0\1"
    end = min(text.index(late) + 5, text.index(early) + 3)
    ((text_words, _, stop_reason, _),) = same_everywhere(replica, [VARIED | {"stop": [late, never, early]}])
    assert text_words == text[: end - len(stop_reason)]


def test_no_stream_sends_the_beginning_of_a_stop_string_before_it_is_refuted(replica):
    text = text_of(replica, **VARIED)
    stop = text[5:11]
    bodies = [VARIED | {"stop": ending, "stream": True} for ending in (stop, text[5:10] + "\0")]
    ended, refuted = answers(replica("single-pass", 4), bodies)
    assert "".join(piece.text for piece in ended) == text[: text.index(stop)]
    assert "".join(piece.text for piece in refuted) == text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [{}, HOT | {"presence_penalty": 1, "stop": "e"}], ids=["greedy", "ruled"])
def test_log_probabilities_are_the_autoregressive_ones_and_those_of_a_plain_forward(
    replica, model, tokenizer, mode, how
):
    body = how | {"logprobs": 3, "echo": True}
    (expected,) = answers(replica("autoregressive", 1), [body])
    (found,) = answers(replica(*mode), [body])
    assert whole(found) == whole(expected)
    found, expected = scores(found), scores(expected)
    assert (found["tokens"], found["text_offset"]) == (expected["tokens"], expected["text_offset"])
    none, *logprobs = found["token_logprobs"]
    assert none is None
    assert logprobs == pytest.approx(expected["token_logprobs"][1:], abs=CLOSE)
    for mine, theirs in zip(found["top_logprobs"][1:], expected["top_logprobs"][1:]):
        assert mine == pytest.approx(theirs, abs=CLOSE)
    if not how:
        tokens = (*tokenizer.encode(PROMPT), *ids_of(tokenizer, found["tokens"][len(tokenizer.encode(PROMPT)) :]))
        assert logprobs == pytest.approx(score(model, tokens).logprob_L.tolist(), abs=CLOSE)


def ids_of(tokenizer, names):
    spelled = {tokenizer.spell(token): token for token in range(tokenizer.vocab_len)}
    return [spelled[name] for name in names]


def test_with_echo_and_no_new_tokens_the_prompt_alone_is_scored(replica, model, tokenizer):
    (events,) = answers(replica("single-pass", 4), [{"echo": True, "max_tokens": 0, "logprobs": 1}])
    assert whole(events) == (PROMPT, "length", None, 0)
    prompt = tuple(tokenizer.encode(PROMPT))
    none, *found = scores(events)["token_logprobs"]
    assert none is None
    assert found == pytest.approx(score(model, prompt).logprob_L.tolist(), abs=CLOSE)


def test_prompt_log_probabilities_are_those_of_a_plain_forward_by_rank(replica, model, tokenizer):
    (events,) = answers(replica("single-pass", 4), [{"prompt_logprobs": 2, "logprobs": 0}])
    none, *entries = next(piece.prompt_logprobs for piece in events if piece.prompt_logprobs)
    prompt = tuple(tokenizer.encode(PROMPT))
    plain = score(model, prompt, top=2)
    assert none is None
    for token, logprob, top, entry in zip(prompt[1:], plain.logprob_L, plain.top_token_LT, entries, strict=True):
        assert entry[token].logprob == pytest.approx(float(logprob), abs=CLOSE)
        assert entry[token].decoded_token == tokenizer.spell(token)
        assert {i: entry[i].rank for i in top.tolist()} == {top[0].item(): 1, top[1].item(): 2}
    assert all(len(top) == 1 for top in scores(events)["top_logprobs"])  # the token's own alone


def test_the_n_texts_of_a_prompt_differ_and_come_again_with_their_seed(replica):
    body = HOT | {"n": 4}
    first = same_everywhere(replica, [body])
    assert len({text for text, *_ in first}) == 4
    assert same_everywhere(replica, [HOT | {"seed": 5}]) == first[2:3]  # as in vLLM, seed + i


@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        ({"guided_regex": "[0-9]{3}-[0-9]{2}"}, lambda text: re.fullmatch("[0-9]{3}-[0-9]{2}", text)),
        ({"guided_choice": ["yes", "日本語", "no way"]}, lambda text: text in ("yes", "日本語", "no way")),
        ({"structured_outputs": {"grammar": 'start: "a" ("+" "a")~2'}}, lambda text: text == "a+a+a"),
        ({"structured_outputs": {"choice": ["one", "two"]}}, lambda text: text in ("one", "two")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
                "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["n"], "additionalProperties": False}}}},
            lambda text: list(json.loads(text)) == ["n"],
        ),
        ({"structured_outputs": {"json": {"enum": [1, "x"]}}}, lambda text: json.loads(text) in (1, "x")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [VARIED, HOT], ids=["greedy", "sampled"])
def test_a_text_keeps_to_its_grammar_in_every_mode(replica, grammar, holds, how):
    ((text, reason, _, _),) = same_everywhere(replica, [how | grammar | {"max_tokens": 120}])
    assert reason == "stop"
    assert holds(text)


def test_a_json_object_is_one_as_far_as_it_goes(replica):
    ((text, *_),) = same_everywhere(replica, [{"response_format": {"type": "json_object"}, "max_tokens": 30}])
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"100000": 5}}, "logit_bias"),
        ({"bad_words": ["  "]}, "bad_words"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
         "response_format"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_only_the_replica_can_see_is_refused_with_the_fields_name(replica, body, param):
    ((refused,),) = answers(replica("single-pass", 4), [body])
    assert isinstance(refused, GenerationFailed)
    assert refused.error.param == param
    assert "\n" not in str(refused.error)


@pytest.mark.parametrize("mode", [("autoregressive", 1), ("single-pass", 4)])
def test_a_stop_string_frees_row_and_pages_before_the_next_forward(replica, mode):
    app = replica(*mode)
    text = text_of(replica, **VARIED)
    scheduler = app.pool.champion.engine.scheduler
    forwards = []
    advance = scheduler.advance

    def counted():
        steps = advance()
        forwards.append(scheduler.running)
        return steps

    scheduler.advance = counted
    try:
        (events,) = answers(app, [VARIED | {"max_tokens": 100, "stop": text[6:9]}])
    finally:
        del scheduler.advance
    assert whole(events)[1] == "stop"
    load = asyncio.run(app.load())
    assert (load.running, load.waiting, load.pages_held) == (0, 0, 0)
    assert len(forwards) <= whole(events)[3]  # no forward after the one that completed it

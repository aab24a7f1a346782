"""Each part of a request is accepted at its bound and refused by name just beyond it."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.api import bounds
from serve_apps.api.chat_request import ChatRequest
from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.errors import BodyTooLargeError, ParameterError, problem_of
from serve_apps.api.json_text import count_values, parse
from serve_apps.api.parsing import parse_request
from serve_apps.api.tokenize_api import TokenizeRequest
from tidar_core.errors import TidarError
from tidar_core.given_json import unrepeated

OPERATIONS = Path(__file__).parents[3] / "docs/operations.md"
LONG = "x" * (bounds.NAME_CHARS + 1)


def completion(**fields):
    return CompletionRequest, {"model": "m", "prompt": "a", **fields}


def chat(**fields):
    return ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def assistant(*arguments):
    return chat(messages=[{"role": "assistant", "content": "", "tool_calls": [call(text) for text in arguments]}])


def tool(name, **function):
    return {"type": "function", "function": {"name": name, **function}}


def schema(chars):
    return {"type": "string", "description": "x" * chars}


def nested(depth):
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def read(kind, fields, context_len=100):
    request = parse_request(json.dumps(fields).encode(), kind)
    request.check_context(context_len)
    return request


def test_the_docs_hold_the_table_of_bounds_of_the_code():
    assert f"\n{bounds.table()}\n" in OPERATIONS.read_text(encoding="utf-8")


FITTING = [
    completion(prompt=["a"] * bounds.PROMPTS),
    completion(prompt=list(range(100))),
    completion(prompt="x" * 6400),
    completion(model=LONG[1:], user=LONG[1:]),
    completion(stop=["x" * bounds.STOP_CHARS] * bounds.STOP_STRINGS),
    completion(stop_token_ids=[0] * bounds.STOP_TOKEN_IDS),
    completion(bad_words=["x" * bounds.BAD_WORD_CHARS] * bounds.BAD_WORDS),
    completion(logit_bias={str(token): 1 for token in range(bounds.LOGIT_BIASES)}),
    completion(guided_regex="x" * bounds.GRAMMAR_CHARS),
    completion(guided_choice=["x"] * bounds.GRAMMAR_CHOICES),
    completion(metadata={str(entry): "x" for entry in range(bounds.METADATA_ENTRIES)}),
    chat(messages=[{"role": "user", "content": "a"}] * bounds.MESSAGES),
    chat(tools=[tool(f"f{i}") for i in range(bounds.TOOLS)]),
    chat(response_format={"type": "json_schema", "json_schema": {"schema": nested(bounds.DEPTH - 3)}}),
    assistant(json.dumps(nested(bounds.DEPTH))),
]
BEYOND = [
    (completion(prompt=["a"] * (bounds.PROMPTS + 1)), "prompt"),
    (completion(prompt=[[1]] * (bounds.PROMPTS + 1)), "prompt"),
    (completion(prompt=list(range(101))), "prompt"),
    (completion(prompt=[[1], list(range(101))]), "prompt"),
    (completion(prompt="x" * 6401), "prompt"),
    (completion(n=bounds.CHOICES + 1), "n"),
    (completion(model=LONG), "model"),
    *[(completion(**{name: LONG}), name) for name in ("user", "safety_identifier", "prompt_cache_key", "request_id")],
    (completion(stop="x" * (bounds.STOP_CHARS + 1)), "stop"),
    (completion(stop=["x"] * (bounds.STOP_STRINGS + 1)), "stop"),
    (completion(stop_token_ids=[0] * (bounds.STOP_TOKEN_IDS + 1)), "stop_token_ids"),
    (completion(bad_words=["x"] * (bounds.BAD_WORDS + 1)), "bad_words"),
    (completion(bad_words=["x" * (bounds.BAD_WORD_CHARS + 1)]), "bad_words"),
    (completion(logit_bias={str(token): 1 for token in range(bounds.LOGIT_BIASES + 1)}), "logit_bias"),
    (completion(metadata={str(entry): "x" for entry in range(bounds.METADATA_ENTRIES + 1)}), "metadata"),
    (completion(guided_regex="x" * (bounds.GRAMMAR_CHARS + 1)), "guided_regex"),
    (completion(guided_grammar="x" * (bounds.GRAMMAR_CHARS + 1)), "guided_grammar"),
    (completion(guided_json="x" * (bounds.GRAMMAR_CHARS + 1)), "guided_json"),
    (completion(guided_json=schema(bounds.GRAMMAR_CHARS)), "guided_json"),
    (completion(guided_choice=["x"] * (bounds.GRAMMAR_CHOICES + 1)), "guided_choice"),
    (completion(guided_choice=["x" * bounds.GRAMMAR_CHARS]), "guided_choice"),
    (completion(structured_outputs={"regex": "x" * (bounds.GRAMMAR_CHARS + 1)}), "structured_outputs"),
    (completion(structured_outputs={"choice": ["x"] * (bounds.GRAMMAR_CHOICES + 1)}), "structured_outputs.choice"),
    (chat(response_format={"type": "json_schema", "json_schema": {"schema": schema(bounds.GRAMMAR_CHARS)}}),
     "response_format"),
    (chat(messages=[{"role": "user", "content": "a"}] * (bounds.MESSAGES + 1)), "messages"),
    (chat(messages=[{"role": "user", "content": "x" * 3201}] * 2), "messages"),
    (chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 6401}]}]), "messages"),
    (chat(tools=[tool(f"f{i}") for i in range(bounds.TOOLS + 1)]), "tools"),
    (chat(tools=[tool("f", parameters=schema(bounds.GRAMMAR_CHARS), strict=True)]), "tools"),
    (chat(tools=[tool("f", parameters=schema(bounds.GRAMMAR_CHARS))], tool_choice="required"), "tools"),
    (assistant("[" + "1," * bounds.VALUES + "1]"), "messages"),
    (assistant(*["[" + "1," * (bounds.VALUES // 2) + "1]"] * 2), "messages"),
    (assistant(json.dumps(nested(bounds.DEPTH + 1))), "messages"),
    ((TokenizeRequest, {"prompt": "x" * 6401}), "prompt"),
    ((TokenizeRequest, {"messages": [{"role": "user", "content": "x" * 6401}]}), "messages"),
]  # fmt: skip


@pytest.mark.parametrize("body", FITTING, ids=lambda body: str(body[1])[:60])
def test_a_request_at_a_bound_is_accepted(body):
    assert read(*body).model == body[1]["model"]


@pytest.mark.parametrize(("body", "param"), BEYOND, ids=lambda value: value if isinstance(value, str) else "")
def test_a_request_just_beyond_a_bound_is_refused_with_a_short_message_that_names_the_field(body, param):
    with pytest.raises(TidarError) as caught:
        read(*body)
    problem = problem_of(caught.value)
    assert (problem.status, problem.param) == (400, param)
    assert len(problem.message) < 400


@pytest.mark.parametrize("member", ['"a"', "{}", "1", '{"a":[]}', "null"])
def test_megabytes_of_small_values_are_refused_before_the_values_are_created(member):
    body = b'{"model":"m","prompt":[%s]}' % b",".join([member.encode()] * (7 * 2**20 // (len(member) + 1)))
    began = time.process_time()
    with pytest.raises(BodyTooLargeError, match=f"{bounds.VALUES} JSON values"):
        parse_request(body, CompletionRequest)
    assert time.process_time() - began < 0.5  # creating them takes seconds, counting them 0.05 s


@pytest.mark.parametrize("text", ["a, b: [c] {d} " * 400_000, '"' * 2_000_000, "\\" * 2_000_000])
def test_json_syntax_inside_a_string_is_not_counted(text):
    body = json.dumps({"model": "m", "prompt": text}).encode()
    assert parse_request(body, CompletionRequest).prompt == [text]


def deep_bodies(depth):
    """Bodies with a field of this depth or deeper, and the field that the error names."""
    deep = '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)
    lists = "[" * depth + "]" * depth
    fields = [("prompt", lists), ("guided_json", deep), ("metadata", deep), ("nothing", lists)]
    for name, value in fields:
        yield CompletionRequest, f'{{"model": "m", "{name}": {value}}}', None
    fields = [
        ("response_format", f'{{"type": "json_schema", "json_schema": {{"schema": {deep}}}}}'),
        ("tools", f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'),
        ("messages", f'[{{"role": "user", "content": [{{"type": "text", "text": {lists}}}]}}]'),
        ("chat_template_kwargs", deep),
    ]
    for name, value in fields:
        yield ChatRequest, f'{{"model": "m", "{name}": {value}}}', None
    yield ChatRequest, json.dumps(assistant(deep)[1]), "messages"


@pytest.mark.parametrize("depth", [bounds.DEPTH + 1, 150, 300, 498, 700, 900, 980, 1100, 5000, 100_000])
def test_too_deep_json_is_refused_at_any_depth_and_in_any_field(depth):
    for kind, body, param in deep_bodies(depth):
        with pytest.raises(ParameterError, match="depth") as caught:
            parse_request(body.encode(), kind)
        assert caught.value.param == param


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},:é\n'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\,:{'), inner, max_size=4),
)


def counted(value):
    """Number of values and keys; an empty list or object counts as two."""
    if isinstance(value, dict):
        return 1 + sum(1 + counted(inner) for inner in value.values()) + (not value)
    return 1 + (sum(map(counted, value)) + (not value) if isinstance(value, list) else 0)


def depth_of(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_the_count_of_values_equals_the_number_that_a_parser_creates(value, ascii_alone):
    text = json.dumps(value, ensure_ascii=ascii_alone)
    assert count_values(text, 2**30) == counted(value)
    assert parse(text.encode(), 2**30) == value
    assert depth_of(value) < bounds.DEPTH


@given(st.text('ab"\\[]{},: 1\n', max_size=40))
def test_text_that_is_not_json_raises_only_a_parameter_error(text):
    try:
        expected = json.loads(text, object_pairs_hook=unrepeated)
    except ValueError:
        with pytest.raises(ParameterError, match=r"not JSON|twice"):
            parse(text.encode(), 2**30)
    else:
        assert parse(text.encode(), 2**30) == expected


@pytest.mark.parametrize("fields", ['"seed": 1, "seed": 2', '"guided_json": {"seed": 1, "type": "x", "seed": 1}'])
def test_a_key_that_is_given_twice_is_refused_by_name(fields):
    with pytest.raises(ParameterError, match="the body gives the key 'seed' twice; give each key once"):
        parse_request(f'{{"model": "m", "prompt": "a", {fields}}}'.encode(), CompletionRequest)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_values_are_counted_in_every_encoding_of_json(encoding):
    body = json.dumps({"model": "m", "prompt": ['"\\'] * bounds.VALUES}).encode(encoding)
    with pytest.raises(BodyTooLargeError):
        parse_request(body, CompletionRequest)


def test_an_error_message_quotes_little_of_the_request():
    body = json.dumps({"model": "m", "prompt": "a", "x" * 10**6: 1}).encode()
    with pytest.raises(ParameterError) as caught:
        parse_request(body, CompletionRequest)
    assert len(problem_of(caught.value).body()["error"]["message"]) <= 2000

"""Every field of a completion request is honoured or refused, never ignored."""

import json

import pytest
from openai.types import CompletionCreateParams

from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.errors import ParameterError
from serve_apps.api.parsing import parse_request
from serve_apps.ingress.translate import generation_requests

NEUTRAL = CompletionRequest.NEUTRAL
SMALLEST = {"model": "m", "prompt": "a"}


def read(**fields):
    return parse_request(json.dumps(SMALLEST | fields).encode(), CompletionRequest)


def refusal(**fields):
    with pytest.raises(ParameterError) as caught:
        read(**fields)
    return caught.value.param, caught.value.code


def test_the_smallest_request_has_openais_defaults():
    request = read()
    (prompt,) = generation_requests(request, "cmpl-1")
    assert prompt.request_id == "cmpl-1-0"
    assert prompt.prompt == "a"
    sampling = prompt.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    assert not request.stream


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ("", [""]),
    ],
)
def test_a_prompt_has_four_forms(given, read_as):
    assert [p.prompt for p in generation_requests(read(prompt=given), "id")] == read_as


@pytest.mark.parametrize("given", [[], [[]], ["a", 1], [1, "a"], [[1], 2], 7, {"a": 1}, [True], [1.5], [["a"]]])
def test_a_prompt_of_another_form_is_refused(given):
    assert refusal(prompt=given) == ("prompt", None)


def test_all_honoured_fields_reach_the_sampler():
    fields = {
        "max_tokens": 9, "min_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "seed": -5,
        "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 0.5,
    }  # fmt: skip
    request = read(**fields, ignore_eos=True, stop_token_ids=[4, 9], logit_bias={"5": 1, "07": -100}, user="me")
    (prompt,) = generation_requests(request, "id")
    assert {name: getattr(prompt.sampling, name) for name in fields} == fields
    assert prompt.sampling.eos_ids == (4, 9)
    assert prompt.sampling.logit_bias == ((5, 1), (7, -100))
    assert prompt.ignore_eos


def test_all_fields_for_the_replica_reach_it():
    (prompt,) = generation_requests(
        read(
            stop=["a", "b"], include_stop_str_in_output=True, bad_words=["c"], echo=True, logprobs=5, prompt_logprobs=2
        ),
        "id",
    )
    assert (prompt.stop, prompt.include_stop, prompt.bad_words, prompt.echo) == (("a", "b"), True, ("c",), True)
    assert (prompt.logprobs, prompt.prompt_logprobs) == (5, 2)
    assert (prompt.sampling.logprobs, prompt.sampling.prompt_logprobs) == (5, True)
    assert generation_requests(read(stop="a"), "id")[0].stop == ("a",)
    (prompt,) = generation_requests(
        read(add_special_tokens=True, skip_special_tokens=False, return_token_ids=True), "id"
    )
    assert (prompt.framed, prompt.skip_special, prompt.token_ids) == (True, False, True)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, (None, False)),
        ({"logprobs": 0}, (0, False)),
        ({"logprobs": 2, "echo": True}, (2, True)),
        ({"echo": True}, (None, False)),
        ({"prompt_logprobs": 20, "logprobs": 1}, (20, True)),
        ({"prompt_logprobs": 0}, (0, True)),
    ],
)
def test_the_sampler_reports_the_logprobs_that_any_part_of_the_response_needs(fields, sampling):
    wanted = read(**fields).sampling(0)
    assert (wanted.logprobs, wanted.prompt_logprobs) == sampling


def test_zero_new_tokens_may_be_requested_with_echo_alone():
    (prompt,) = generation_requests(read(echo=True, max_tokens=0), "id")
    assert (prompt.prompt_alone, prompt.sampling.max_tokens) == (True, 1)
    assert refusal(max_tokens=0) == ("max_tokens", None)


def test_the_choices_of_a_prompt_are_adjacent_and_each_has_its_own_seed():
    prompts = generation_requests(read(prompt=["a", "b"], n=3, seed=7, best_of=3), "x")
    assert [(p.request_id, p.prompt, p.sampling.seed) for p in prompts] == [
        ("x-0", "a", 7), ("x-1", "a", 8), ("x-2", "a", 9), ("x-3", "b", 7), ("x-4", "b", 8), ("x-5", "b", 9),
    ]  # fmt: skip
    last = 2**63 - 1
    assert [p.sampling.seed for p in generation_requests(read(n=2, seed=last), "x")] == [last, -last]


def test_without_a_seed_every_text_gets_a_fresh_one():
    prompts = generation_requests(read(prompt=["a", "a"], n=2), "x") + generation_requests(read(prompt=["a", "a"]), "y")
    assert len({p.sampling.seed for p in prompts}) == 6


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("response_format", "json_object", None)),
        (
            {"response_format": {"type": "json_schema",
                                 "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
            ("response_format", "json_schema", SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("structured_outputs", "json_schema", SCHEMA)),
        ({"structured_outputs": {"json": "{}", "disable_any_whitespace": False, "regex": None}},
         ("structured_outputs", "json_schema", "{}")),
        ({"structured_outputs": {"regex": "a+"}}, ("structured_outputs", "regex", "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, ("structured_outputs", "choice", ["a"])),
        ({"structured_outputs": {"grammar": "g"}}, ("structured_outputs", "grammar", "g")),
        ({"structured_outputs": {"json_object": True}}, ("structured_outputs", "json_object", True)),
        ({"guided_json": SCHEMA}, ("guided_json", "json_schema", SCHEMA)),
        ({"guided_regex": "a"}, ("guided_regex", "regex", "a")),
        ({"guided_choice": ["a", "b"]}, ("guided_choice", "choice", ["a", "b"])),
        ({"guided_grammar": "g", "response_format": {"type": "text"}}, ("guided_grammar", "grammar", "g")),
    ],
)  # fmt: skip
def test_each_field_that_requests_a_grammar_is_honoured(fields, expected):
    (prompt,) = generation_requests(read(**fields), "id")
    grammar = prompt.grammar
    assert (grammar and (grammar.param, grammar.kind, grammar.content)) == expected


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"guided_regex": "a", "guided_json": {}}, ("guided_regex", None)),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, ("structured_outputs", None)),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, ("response_format", None)),
        ({"structured_outputs": {}}, ("structured_outputs", None)),
        ({"structured_outputs": {"json": None, "json_object": False}}, ("structured_outputs", None)),
        ({"structured_outputs": {"whitespace_pattern": " "}},
         ("structured_outputs.whitespace_pattern", "unsupported_parameter")),
        ({"structured_outputs": {"regex": 5}}, ("structured_outputs.regex", None)),
        ({"structured_outputs": "a"}, ("structured_outputs", None)),
        ({"guided_choice": []}, ("guided_choice", None)),
        ({"response_format": {"type": "structural_tag"}}, ("response_format.type", None)),
        ({"response_format": {}}, ("response_format.type", None)),
        ({"response_format": {"type": "json_schema"}}, ("response_format.json_schema", None)),
        ({"response_format": {"type": "text", "json_schema": False}}, ("response_format.json_schema", None)),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
         ("response_format.json_schema.schema", None)),
    ],
)  # fmt: skip
def test_a_grammar_requested_wrongly_or_twice_is_refused(fields, refused):
    assert refusal(**fields) == refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_json": True}, "guided_json is true; it should be a valid string or a valid object"),
        ({"stop": 5}, "stop is 5; it should be a valid list"),
        ({"metadata": "a"}, 'metadata is "a"; it should be a valid object'),
        ({"stream_options": 5}, "stream_options is 5; it should be a valid object"),
        ({"seed": -(2**63)}, f"must be from {-(2**63) + 1} to {2**63 - 1}"),
    ],
)
def test_the_error_names_each_type_that_a_field_may_have_and_the_whole_range(fields, message):
    with pytest.raises(ParameterError) as caught:
        read(**fields)
    assert message in str(caught.value)


def test_top_k_may_be_minus_one_for_off_and_longer_than_any_vocabulary():
    assert read(top_k=-1).sampling(0).top_k == 0
    assert read(top_k=10**30).sampling(0).top_k < 2**31


def test_a_temperature_too_low_to_divide_by_is_greedy():
    assert read(temperature=1e-40).sampling(0).temperature == 0
    assert read(temperature=1e-5).sampling(0).temperature == 1e-5


@pytest.mark.parametrize("name", [*CompletionRequest.model_fields, *NEUTRAL])
def test_null_is_the_default(name):
    if name not in SMALLEST:
        assert read(**{name: None}) == read()


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in NEUTRAL.items() for v in values])
def test_a_neutral_value_is_accepted(name, value):
    assert read(**{name: value}) == read()


REQUESTS_NOTHING = [
    {"stream_options": {}}, {"stream_options": {"include_usage": False}}, {"stream_options": {"include_usage": None}},
    {"stream_options": {"include_obfuscation": False}}, {"prompt_cache_retention": "in_memory"},
    {"prompt_cache_options": {"mode": "implicit"}}, {"reasoning_effort": "none"}, {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}}, {"thinking": {"type": "disabled"}}, {"store": False}, {"service_tier": "auto"},
    {"service_tier": "default"}, {"verbosity": "medium"}, {"modalities": ["text"]}, {"extra_body": {}},
    {"prediction": None}, {"logit_bias": None}, {"logit_bias": {}}, {"stop": []}, {"n": None},
    {"a_field_of_tomorrow": None},
]  # fmt: skip
"""Fields that clients send by default: OpenAI, LangChain, LiteLLM, Vercel, LibreChat, Open WebUI and others."""
CLIENT_RECORDS = [
    {"user": "u-1"}, {"safety_identifier": "s-1"}, {"prompt_cache_key": "k-1"},
    {"metadata": {"trace": "a", "nested": {"b": [1]}}},
]  # fmt: skip


@pytest.mark.parametrize("fields", [*REQUESTS_NOTHING, {"logprobs": False}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_values_that_request_nothing_are_accepted(fields, stream):
    assert read(stream=stream, **fields) == read(stream=stream)


@pytest.mark.parametrize("fields", CLIENT_RECORDS, ids=str)
def test_fields_for_the_clients_own_records_change_no_text(fields):
    assert generation_requests(read(seed=1, **fields), "id") == generation_requests(read(seed=1), "id")


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"include_obfuscation": 0}}, "stream_options.include_obfuscation"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"verbosity": "low"}, "verbosity"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ({"extra_body": {"top_k": 1}}, "extra_body"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"metadata": "a"}, "metadata"),
        ({"prompt_cache_key": 5}, "prompt_cache_key"),
    ],
    ids=str,
)
def test_the_error_names_a_field_that_requests_an_unsupported_feature(fields, refused):
    assert refusal(**fields)[0] == refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2), ("suffix", "x"), ("use_beam_search", True), ("priority", 1), ("cache_salt", "s"),
        ("allowed_token_ids", [1]), ("length_penalty", 2),
        ("guided_whitespace_pattern", " "), ("max_completion_tokens", 5), ("tempreature", 1),
        ("logprob_token_ids", [5]),
    ],
)  # fmt: skip
def test_the_error_names_an_unsupported_field(name, value):
    assert refusal(**{name: value}) == (name, "unsupported_parameter")


def test_every_parameter_of_openais_completions_is_honoured_or_refused():
    kinds = CompletionCreateParams.__args__
    official = {name for kind in kinds for name in kind.__annotations__}
    assert official <= set(CompletionRequest.model_fields) | set(NEUTRAL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", "16"), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -1),
        ("temperature", "hot"), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("seed", 2**63), ("n", 0), ("n", 129), ("n", True), ("logprobs", 6), ("logprobs", -1), ("logprobs", True),
        ("prompt_logprobs", 21), ("echo", 1), ("min_p", 2), ("min_tokens", 17), ("min_tokens", -1), ("stop", ""),
        ("stop", ["a", ""]), ("stop", ["a"] * 65), ("stop", 5), ("stop", [5]), ("bad_words", "a"), ("bad_words", [""]),
        ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"5": 101}), ("logit_bias", {"5": "a"}),
        ("logit_bias", {"5": 1, "05": 1}), ("presence_penalty", 2.1), ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0), ("stream", "yes"), ("stop_token_ids", ["a"]), ("model", 5), ("stream_options", 1),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_parameter(name, value):
    assert refusal(**{name: value}) == (name, None)


def test_the_error_holds_the_path_of_a_wrong_nested_field():
    assert refusal(stream=True, stream_options={"include_usage": 1}) == ("stream_options.include_usage", None)
    assert refusal(stream=True, stream_options={"foo": 1}) == ("stream_options.foo", "unsupported_parameter")


def test_stream_options_need_a_stream():
    assert refusal(stream_options={"include_usage": True}) == ("stream_options", None)
    assert read(stream=True, stream_options={"include_usage": True}).stream_options.include_usage


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe\xfd", b"[" * 100_000, b"null"])
def test_a_body_that_is_not_a_json_object_is_refused(body):
    with pytest.raises(ParameterError, match="body"):
        parse_request(body, CompletionRequest)


def test_the_error_names_a_missing_field():
    for name in SMALLEST:
        with pytest.raises(ParameterError) as caught:
            parse_request(json.dumps({k: v for k, v in SMALLEST.items() if k != name}).encode(), CompletionRequest)
        assert (caught.value.param, str(caught.value)) == (name, f"{name} is missing; give it")


@pytest.mark.parametrize("body", [rb'{"model": "m", "prompt": "\ud800"}', rb'{"\udfff": 1}'])
def test_half_a_character_is_refused(body):
    with pytest.raises(ParameterError) as caught:
        parse_request(body, CompletionRequest)
    str(caught.value).encode()


def test_the_document_allows_null_in_stream_options_too():
    options = CompletionRequest.model_json_schema()["$defs"]["StreamOptions"]["properties"]
    assert all({"type": "null"} in field["anyOf"] for field in options.values())

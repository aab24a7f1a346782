"""What a request may say: honoured or refused, never passed over."""

import json

import pytest
from openai.types import CompletionCreateParams

from serve_apps.errors import ParameterError
from serve_apps.schemas import NEUTRAL, CompletionRequest, read_request

SMALLEST = {"model": "m", "prompt": "a"}


def read(**fields):
    return read_request(json.dumps(SMALLEST | fields).encode())


def refusal(**fields):
    with pytest.raises(ParameterError) as caught:
        read(**fields)
    return caught.value.param, caught.value.code


def test_the_smallest_request_has_openais_defaults():
    request = read()
    (prompt,) = request.prompts("cmpl-1")
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
    assert [p.prompt for p in read(prompt=given).prompts("id")] == read_as


@pytest.mark.parametrize("given", [[], [[]], ["a", 1], [1, "a"], [[1], 2], 7, {"a": 1}, [True], [1.5], [["a"]]])
def test_a_prompt_of_another_form_is_refused(given):
    assert refusal(prompt=given) == ("prompt", None)


def test_all_that_is_honoured_reaches_the_sampler():
    request = read(
        max_tokens=3, temperature=0, top_p=0.5, top_k=7, seed=-5, ignore_eos=True, stop_token_ids=[4, 9], user="me"
    )
    (prompt,) = request.prompts("id")
    sampling = prompt.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.0, 0.5, 7)
    assert sampling.seed == -5
    assert sampling.eos_ids == (4, 9)
    assert prompt.ignore_eos


def test_without_a_seed_every_prompt_gets_a_fresh_one():
    prompts = read(prompt=["a", "a"]).prompts("x") + read(prompt=["a", "a"]).prompts("y")
    assert len({p.sampling.seed for p in prompts}) == 4
    assert {p.sampling.seed for p in read(prompt=["a", "a"], seed=7).prompts("x")} == {7}


def test_top_k_may_be_off_in_vllms_way_and_longer_than_any_vocabulary():
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("n", True), ("best_of", 2), ("logprobs", 0), ("logprobs", 1), ("logprobs", False), ("echo", True),
        ("suffix", "x"), ("stop", "\n"), ("stop", ["a"]), ("logit_bias", {"5": 1}), ("presence_penalty", 0.1),
        ("frequency_penalty", -1), ("repetition_penalty", 1.1), ("min_p", 0.1), ("min_tokens", 3),
        ("prompt_logprobs", 1), ("structured_outputs", {"json": {}}), ("max_completion_tokens", 5), ("tempreature", 1),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(name, value):
    assert refusal(**{name: value}) == (name, "unsupported_parameter")


def test_every_parameter_of_openais_completions_is_decided_upon():
    kinds = CompletionCreateParams.__args__
    official = {name for kind in kinds for name in kind.__annotations__}
    assert official <= set(CompletionRequest.model_fields) | set(NEUTRAL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", "16"), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -1),
        ("temperature", "hot"), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("seed", 2**63), ("stream", "yes"), ("stop_token_ids", ["a"]), ("model", 5), ("stream_options", 1),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_parameter(name, value):
    assert refusal(**{name: value}) == (name, None)


def test_the_way_to_a_wrong_field_inside_is_named():
    assert refusal(stream=True, stream_options={"include_usage": 1}) == ("stream_options.include_usage", None)
    assert refusal(stream=True, stream_options={"foo": 1}) == ("stream_options.foo", "unsupported_parameter")


def test_stream_options_need_a_stream():
    assert refusal(stream_options={"include_usage": True}) == ("stream_options", None)
    assert read(stream=True, stream_options={"include_usage": True}).stream_options.include_usage


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe\xfd", b"[" * 100_000, b"null"])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(ParameterError, match="body"):
        read_request(body)


def test_what_is_missing_is_named():
    for name in SMALLEST:
        with pytest.raises(ParameterError) as caught:
            read_request(json.dumps({k: v for k, v in SMALLEST.items() if k != name}).encode())
        assert (caught.value.param, str(caught.value)) == (name, f"{name} is missing; give it")


@pytest.mark.parametrize("body", [rb'{"model": "m", "prompt": "\ud800"}', rb'{"\udfff": 1}'])
def test_half_a_character_is_no_text(body):
    with pytest.raises(ParameterError) as caught:
        read_request(body)
    str(caught.value).encode()

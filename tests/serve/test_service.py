"""The service from end to end: a real Ray Serve application, called by OpenAI's own client."""

import asyncio
import json
import time

import httpx
import openai
import pytest
import ray
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from serve_apps import app
from serve_apps.settings import ServeSettings
from tidar_core.decoding.autoregressive import score
from tidar_core.errors import BundleError, ConfigError, RegistryError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAME = "tiny-model"
ROWS = 3
"""Name of the model of the service in conftest."""
ENDLESS = 4000
"""Tokens that take far longer than any test waits for."""
PROMPT = "def add(a, b):\n    return"


@pytest.fixture
def greedy(client):
    def create(prompt=PROMPT, **fields):
        return client.completions.create(
            **{"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 20} | fields
        )

    return create


def running_and_waiting():
    load = serve.get_deployment_handle("decoder", app_name=app.APP_NAME).load.remote().result()
    return load.running, load.waiting


def until(state, seconds=10):
    deadline = time.monotonic() + seconds
    while running_and_waiting() != state:
        assert time.monotonic() < deadline, running_and_waiting()
        time.sleep(0.02)


def tokens_written(service):
    families = text_string_to_metric_families(httpx.get(f"{service}/metrics").text)
    return next(s.value for f in families for s in f.samples if s.name == "tidar:generation_tokens_total")


def test_a_greedy_completion_is_the_autoregressive_text(greedy, oracle_text, tokenizer):
    text, tokens, reason = oracle_text(PROMPT, 20)
    answer = greedy()
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (text, reason, None)
    prompt_tokens = len(tokenizer.encode(PROMPT))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        prompt_tokens,
        tokens,
        prompt_tokens + tokens,
    )


def test_a_sampled_completion_is_the_autoregressive_text_of_its_seed(greedy, oracle_text):
    sampling = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    text, _, _ = oracle_text(PROMPT, 20, top_k=40, **sampling)
    assert greedy(**sampling, extra_body={"top_k": 40}).choices[0].text == text


def test_without_a_seed_texts_differ(greedy):
    assert len({greedy(temperature=5.0).choices[0].text for _ in range(3)}) > 1


def test_a_response_is_strictly_openais_and_has_the_statistics_of_its_drafts(service):
    body = {"model": NAME, "prompt": PROMPT, "temperature": 0}
    answer = httpx.post(f"{service}/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
    Completion.model_validate(answer.json(), strict=True)
    drafts = answer.json()["metrics"]["speculative_decoding"]
    assert drafts["num_spec_tokens"] == 3
    assert sum(drafts["acceptance_histogram"]) == drafts["num_spec_steps"] >= 4
    assert 1 <= drafts["mean_acceptance_length"] <= 4


def test_pieces_of_a_stream_join_to_the_whole_text(greedy):
    whole = greedy()
    *chunks, last = list(greedy(stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert {chunk.id for chunk in chunks} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert last.metrics == whole.metrics


def test_a_stream_ends_with_done(service):
    body = {"model": NAME, "prompt": PROMPT, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{service}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_several_prompts_of_text_or_tokens_have_a_choice_each(greedy, oracle_text, tokenizer):
    prompts = ["import os", PROMPT, "x"]
    expected = [oracle_text(prompt, 12)[0] for prompt in prompts]
    for given in (prompts, [tokenizer.encode(prompt) for prompt in prompts]):
        answer = greedy(given, max_tokens=12)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == expected
    texts = {0: "", 1: "", 2: ""}
    for chunk in greedy(prompts, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == expected


def test_a_stop_token_ends_the_text_without_being_in_it(greedy, model):
    answer = greedy(extra_body={"stop_token_ids": list(range(model.config.vocab_size))})
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("", "stop", 1)


def test_an_ignored_end_of_text_token_ends_nothing(greedy, oracle_text, tokenizer):
    text, tokens, reason = oracle_text([tokenizer.eos_id], 40, ignore_eos=True)
    answer = greedy([tokenizer.eos_id], max_tokens=40, extra_body={"ignore_eos": True})
    assert (answer.choices[0].text, answer.usage.completion_tokens, answer.choices[0].finish_reason) == (
        text,
        tokens,
        reason,
    )
    assert (tokens, reason) == (40, "length")


def test_a_stop_string_ends_the_text_before_it_streamed_or_whole(greedy, oracle_text):
    text, _, _ = oracle_text("x", 20, frequency_penalty=2.0)
    stop = text[6:9]
    fields_given = {"prompt": "x", "frequency_penalty": 2.0, "stop": [stop, "\0\1\2"]}
    whole = greedy(**fields_given)
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[: text.index(stop)], "stop", stop)
    *chunks, last = list(greedy(**fields_given, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert (chunks[-1].choices[0].stop_reason, last.usage) == (stop, whole.usage)
    included = greedy(**fields_given, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert included.text == choice.text + stop
    until((0, 0), seconds=2)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_an_echoed_prompt_and_its_completion_are_those_of_a_plain_forward(
    greedy, model, tokenizer, stream
):
    answer = greedy(echo=True, logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    logprobs = {
        name: [entry for choice in choices for entry in getattr(choice.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    text = "".join(choice.text for choice in choices)
    prompt = tokenizer.encode(PROMPT)
    spelled = {tokenizer.spell(token): token for token in range(tokenizer.vocab_len)}
    tokens = (*prompt, *(spelled[name] for name in logprobs["tokens"][len(prompt) :]))
    assert logprobs["tokens"][: len(prompt)] == [tokenizer.spell(token) for token in prompt]
    first, *rest = logprobs["token_logprobs"]
    assert first is None
    assert rest == pytest.approx(score(model, tokens).logprob_L.tolist(), abs=1e-4)  # fp32, another order of sums
    assert logprobs["top_logprobs"][0] is None
    assert {len(top) for top in logprobs["top_logprobs"][1:]} <= {2, 3}
    for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert name.startswith("bytes:") or text[offset:].startswith(name) or offset == len(text)


def test_a_likelihood_request_of_lm_eval_is_answered_in_its_shape(greedy, model, tokenizer):
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("import os")]
    answer = greedy(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        scores = score(model, tuple(prompt), top=1)
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(scores.logprob_L.tolist(), abs=1e-4)
        greedy_too = [max(top.values()) for top in choice.logprobs.top_logprobs[1:-1]]
        assert greedy_too == pytest.approx(scores.top_logprob_LT[:, 0].tolist(), abs=1e-4)


def test_each_of_n_choices_is_the_text_of_its_own_seed_streamed_or_whole(greedy, oracle_text):
    prompts = ["x", PROMPT]
    expected = [oracle_text(p, 12, temperature=3.0, seed=5 + i)[0] for p in prompts for i in range(3)]
    fields_given = {"temperature": 3.0, "seed": 5, "n": 3, "max_tokens": 12}
    answer = greedy(prompts, **fields_given)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    assert answer.usage.prompt_tokens == greedy(prompts, max_tokens=1).usage.prompt_tokens
    texts = [""] * 6
    for chunk in greedy(prompts, **fields_given, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_a_response_with_everything_in_it_is_strictly_openais(service):
    body = {"model": NAME, "prompt": ["x", PROMPT], "n": 2, "best_of": 2, "logprobs": 5, "prompt_logprobs": 1,
            "seed": 1, "stop": ["e"], "presence_penalty": 1, "min_p": 0.01, "repetition_penalty": 1.1,
            "logit_bias": {"70": -5}, "bad_words": ["self"], "min_tokens": 2}  # fmt: skip
    answer = httpx.post(f"{service}/v1/completions", json=body)
    assert answer.status_code == 200
    read = Completion.model_validate(answer.json(), strict=True)
    assert [choice.index for choice in read.choices] == [0, 1, 2, 3]
    assert sum(len(choice.logprobs.tokens) for choice in read.choices) == read.usage.completion_tokens
    assert all(choice.prompt_logprobs[0] is None for choice in read.choices)


def test_a_json_schema_is_kept_to(greedy):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    fields_given = {"type": "json_schema", "json_schema": {"name": "number", "strict": True, "schema": schema}}
    (choice,) = greedy("x", max_tokens=120, extra_body={"response_format": fields_given}).choices
    assert choice.finish_reason == "stop"
    assert json.loads(choice.text)["n"] in (1, 2)
    (choice,) = greedy("x", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).choices
    assert choice.text in ("yes", "no")


def test_metrics_have_the_state_of_the_replica(service, greedy):
    greedy(max_tokens=2)
    lines = httpx.get(f"{service}/metrics").text.splitlines()
    values = {line.split("{")[0]: line for line in lines if not line.startswith("#")}
    assert values["tidar:num_requests_running"].endswith(" 0.0")
    assert values["tidar:kv_cache_usage_perc"].endswith(" 0.0")
    assert 'mode="single-pass"' in values["tidar:decode_mode"]


def test_concurrent_requests_of_different_lengths_are_all_exact(service, oracle_text):
    wanted = [(PROMPT + " a" * n, 3 + 9 * n, n % 2 == 0) for n in range(6)]

    async def create(client, prompt, max_tokens, stream):
        fields = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        if not stream:
            return (await client.completions.create(**fields)).choices[0].text
        chunks = await client.completions.create(**fields, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{service}/v1", api_key="-", max_retries=0) as client:
            return await asyncio.gather(*[create(client, *each) for each in wanted])

    assert asyncio.run(together()) == [oracle_text(prompt, n)[0] for prompt, n, _ in wanted]


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 5000, "stream": True}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix", "unsupported_parameter"),
        ({"logprobs": 6}, openai.BadRequestError, "logprobs", None),
        ({"best_of": 2}, openai.BadRequestError, "best_of", "unsupported_parameter"),
        ({"logit_bias": {"999": 1}}, openai.BadRequestError, "logit_bias", None),
        ({"extra_body": {"guided_regex": "("}, "stream": True}, openai.BadRequestError, "guided_regex", None),
        ({"extra_body": {"tempreature": 2}}, openai.BadRequestError, "tempreature", "unsupported_parameter"),
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", None),
        ({"prompt": ""}, openai.BadRequestError, "prompt", None),
        ({"prompt": [1, 2, 303]}, openai.BadRequestError, "prompt", None),  # the mask token
        ({"extra_body": {"stop_token_ids": [999]}}, openai.BadRequestError, "stop_token_ids", None),
        ({"prompt": ["good", ""]}, openai.BadRequestError, "prompt", None),
        ({"prompt": [5, 10**20]}, openai.BadRequestError, "prompt", None),
    ],
)
def test_a_wrong_request_raises_openais_error(greedy, fields, error, param, code):
    with pytest.raises(error) as caught:
        greedy(**fields)
    raised = caught.value
    assert (raised.param, raised.code, raised.type) == (param, code, "invalid_request_error")


def test_a_flood_is_answered_429_with_retry_after_and_the_rest_is_exact(service, oracle_text):
    expected = oracle_text(PROMPT, 300)[0]
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 300, "temperature": 0}

    async def flood():
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*[client.post(f"{service}/v1/completions", json=body) for _ in range(24)])

    answers = asyncio.run(flood())
    full = [answer for answer in answers if answer.status_code == 429]
    assert full
    assert {answer.headers["retry-after"] for answer in full} == {"1"}
    assert {answer.json()["error"]["code"] for answer in full} == {"rate_limit_exceeded"}
    assert {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200} == {expected}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(service, stream):
    until((0, 0))
    written = tokens_written(service)
    body = {"model": NAME, "prompt": [PROMPT] * (ROWS + 2), "max_tokens": ENDLESS, "temperature": 0, "stream": stream,
            "ignore_eos": True}  # fmt: skip
    with httpx.Client() as client:
        try:
            with client.stream(
                "POST", f"{service}/v1/completions", json=body, timeout=10 if stream else 0.15
            ) as answer:
                first_line = next(answer.iter_lines())
                assert answer.status_code == 200, first_line
                assert json.loads(first_line.removeprefix("data: "))["choices"], first_line
        except httpx.ReadTimeout:
            assert not stream
    until((0, 0), seconds=3)
    assert tokens_written(service) - written < (ROWS + 2) * ENDLESS  # the texts were cut, not finished


def test_the_model_is_listed_and_found_by_name(client):
    (listed,) = client.models.list().data
    assert client.models.retrieve(NAME) == listed
    assert (listed.id, listed.object, listed.max_model_len, listed.block_len) == (NAME, "model", 4096, 4)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("folder/other")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/ready", None, 200),
        ("GET", "/version", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/nothing", b"{}", 404),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", rb'{"model": "\ud800", "prompt": "a"}', 400),
        ("POST", "/v1/completions", b"[]", 400),
    ],
)
def test_every_route_answers_and_every_refusal_has_the_envelope(service, method, path, body, status):
    answer = httpx.request(method, service + path, content=body)
    assert answer.status_code == status
    if status >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_taken_port_is_reported_in_one_line_before_ray_starts(service, bundle):
    port = httpx.URL(service).port
    with pytest.raises(ConfigError, match=str(port)) as caught:
        app.run(ServeSettings(model=bundle, port=port), blocking=False)
    assert "\n" not in str(caught.value)


def test_a_missing_bundle_or_alias_keeps_its_own_error(tmp_path, bundle):
    with pytest.raises(BundleError):
        app.build_app(ServeSettings(model=str(tmp_path / "nothing")))
    with pytest.raises(ConfigError, match="4096"):
        app.build_app(ServeSettings(model=bundle, context_len=4097))
    with pytest.raises(RegistryError):
        app.build_app(ServeSettings(model="models:/nothing@champion", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))


def test_a_replica_that_dies_ends_its_streams_with_an_error_and_is_replaced(service, greedy, oracle_text):
    stream = greedy(max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    name = next(name for name in names_of_actors() if "#decoder#" in name)
    ray.kill(ray.get_actor(name, namespace="serve"))
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.type == "server_error"
    deadline = time.monotonic() + 60
    while httpx.get(f"{service}/ready", timeout=30).status_code != 200:
        assert time.monotonic() < deadline
    assert greedy().choices[0].text == oracle_text(PROMPT, 20)[0]


def names_of_actors():
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]

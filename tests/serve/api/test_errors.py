"""Each exception becomes a status and OpenAI's envelope."""

import json
import pickle

import pytest
from openai.types.shared import ErrorObject

from serve_apps.api.errors import (
    ApiKeyError,
    BodyTooLargeError,
    HttpError,
    ModelNotFoundError,
    ParameterError,
    RequestTimeoutError,
    problem_of,
)
from tidar_core.errors import CapacityError, ContextLengthError, PromptError, RequestError, TidarError

SECRET = "/home/someone/key.pem"


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (ParameterError("n is 2", "n", "a_code"), 400, "invalid_request_error", "n", "a_code"),
        (RequestError("no tokens"), 400, "invalid_request_error", None, None),
        (ContextLengthError("too long"), 400, "invalid_request_error", "max_tokens", "context_length_exceeded"),
        (PromptError("no tokens"), 400, "invalid_request_error", "prompt", None),
        (ModelNotFoundError("no such model"), 404, "invalid_request_error", "model", "model_not_found"),
        (HttpError(405, "not by GET", {"allow": "POST"}), 405, "invalid_request_error", None, None),
        (ApiKeyError("no key"), 401, "invalid_request_error", None, "invalid_api_key"),
        (RequestTimeoutError("60 s"), 408, "timeout_error", None, "request_timeout"),
        (BodyTooLargeError("9 bytes"), 413, "invalid_request_error", None, "request_too_large"),
        (CapacityError("full"), 429, "rate_limit_error", None, "rate_limit_exceeded"),
        (TidarError(f"lost {SECRET}"), 500, "server_error", None, None),
        (RuntimeError(f"lost {SECRET}"), 500, "server_error", None, None),
    ],
)  # fmt: skip
def test_an_error_has_its_status_and_its_envelope(error, status, kind, param, code):
    problem = problem_of(error)
    assert problem.status == status
    envelope = json.loads(json.dumps(problem.body()))
    assert set(envelope) == {"error"}
    read = ErrorObject.model_validate(envelope["error"], strict=True)
    assert (read.type, read.param, read.code) == (kind, param, code)
    assert SECRET not in read.message
    assert status == 500 or read.message == str(error)


def test_a_full_server_sends_the_time_to_retry_and_a_failed_request_must_not_be_retried():
    assert problem_of(CapacityError("full")).headers == {"Retry-After": "1"}
    assert problem_of(ValueError()).headers == {"x-should-retry": "false"}
    assert problem_of(RequestTimeoutError("60 s")).headers == {"x-should-retry": "false"}
    assert problem_of(ApiKeyError("no key")).headers == {"WWW-Authenticate": "Bearer"}
    assert problem_of(HttpError(405, "not by GET", {"allow": "POST"})).headers == {"allow": "POST"}


def test_errors_pickle():
    for error in (ParameterError("n is 2", "n", "c"), HttpError(404, "no", {"a": "b"}), ModelNotFoundError("m")):
        copy = pickle.loads(pickle.dumps(error))
        assert problem_of(copy) == problem_of(error)
        assert str(copy) == str(error)

"""Exceptions of requests, and their HTTP responses.

Only here does an exception become a status and OpenAI's envelope, {"error": {message, type, param, code}}.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from tidar_core.errors import CapacityError, ContextLengthError, PromptError, RequestError, TidarError

__all__ = [
    "CLIENT_GONE",
    "ApiKeyError",
    "BodyTooLargeError",
    "ErrorBody",
    "HttpError",
    "ModelNotFoundError",
    "ParameterError",
    "Problem",
    "RateLimitError",
    "ReplicaLostError",
    "RequestTimeoutError",
    "problem_of",
    "shortened",
]

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
RETRY_AFTER_SECONDS = 1
CLIENT_GONE = 499
"""nginx's status of a request whose client disconnected before the response began."""
MOST_CHARS = 2000
"""Longest message, because some messages quote values that a client sent."""
QUOTED_CHARS = 60
ONCE = {"x-should-retry": "false"}
"""Header that makes OpenAI's clients not retry, since a retry would cost the same work again."""


class ParameterError(RequestError):
    """A request parameter that cannot be honoured; the client receives `param` and `code`."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message, self.param, self.code = message, param, code

    def __str__(self) -> str:
        return self.message


class ModelNotFoundError(RequestError):
    """A model name that is not served here."""


class ApiKeyError(RequestError):
    """A request without a key that opens this service."""


class RateLimitError(CapacityError):
    """A key with more requests than its limit; its next request is accepted after `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message, seconds)
        self.message, self.seconds = message, seconds

    def __str__(self) -> str:
        return self.message


class ReplicaLostError(TidarError):
    """The replica that generated a text died, and no other replica may restart the text."""


class BodyTooLargeError(RequestError):
    """A body that is longer than the service accepts."""


class RequestTimeoutError(RequestError):
    """A request that was aborted at its timeout."""


class HttpError(RequestError):
    """A request that matches no route."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.status, self.message, self.headers = status, message, dict(headers or {})

    def __str__(self) -> str:
        return self.message


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    """Field of the request that is wrong."""
    code: str | None


class ErrorBody(BaseModel):
    """Body of every response to a request that is refused or fails."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Failure of a request as its client receives it."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON body of the response; also the data of a server-sent event that ends a stream."""
        message = self.message if len(self.message) <= MOST_CHARS else self.message[: MOST_CHARS - 3] + "..."
        detail = ErrorDetail(message=message, type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()


def problem_of(error: BaseException) -> Problem:
    """Response for `error`. An unexpected error is reported without its message."""
    match error:
        case ParameterError():
            return Problem(status=400, message=error.message, param=error.param, code=error.code)
        case ModelNotFoundError():
            return Problem(status=404, message=str(error), param="model", code="model_not_found")
        case ApiKeyError():
            return Problem(
                status=HTTPStatus.UNAUTHORIZED,
                message=str(error),
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        case BodyTooLargeError():
            return Problem(status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message=str(error), code="request_too_large")
        case RequestTimeoutError():
            return Problem(
                status=HTTPStatus.REQUEST_TIMEOUT,
                message=str(error),
                type="timeout_error",
                code="request_timeout",
                headers=ONCE,
            )
        case HttpError():
            kind = INVALID_REQUEST if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else SERVER_ERROR
            return Problem(status=error.status, message=error.message, type=kind, headers=error.headers)
        case PromptError():
            return Problem(status=400, message=str(error), param="prompt")
        case ContextLengthError():
            return Problem(status=400, message=str(error), param="max_tokens", code="context_length_exceeded")
        case RequestError():
            return Problem(status=400, message=str(error))
        case CapacityError():
            seconds = error.seconds if isinstance(error, RateLimitError) else RETRY_AFTER_SECONDS
            return Problem(
                status=HTTPStatus.TOO_MANY_REQUESTS,
                message=str(error),
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil(seconds))},
            )
        case ReplicaLostError():
            return Problem(
                status=HTTPStatus.INTERNAL_SERVER_ERROR,
                message=str(error),
                type=SERVER_ERROR,
                code="replica_lost",
                headers=ONCE,
            )
        case _:
            return Problem(
                status=HTTPStatus.INTERNAL_SERVER_ERROR,
                message="the server failed on this request; its log has the reason, under the X-Request-Id",
                type=SERVER_ERROR,
                headers=ONCE,
            )


def shortened(value: Any) -> str:
    """A value of a request as an error message quotes it, cut to QUOTED_CHARS characters."""
    if isinstance(value, str):
        value = value[:QUOTED_CHARS]
    text = ""
    for part in json.JSONEncoder().iterencode(value):  # part by part: a value may be large
        text += part[:QUOTED_CHARS]
        if len(text) > QUOTED_CHARS:
            return text[: QUOTED_CHARS - 3] + "..."
    return text

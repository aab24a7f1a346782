"""How does the body of a request become a request, or a refusal?

A field is honoured or refused, never passed over: one that is known but not honoured here may only have the value that
asks for nothing. A refusal names the first field that is wrong.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from serve_apps.errors import ParameterError
from serve_apps.grammars import JsonSchema, ResponseFormat, StructuredOutputs
from serve_apps.schemas import CompletionRequest, StreamOptions
from tidar_core.errors import RequestError

__all__ = ["NEUTRAL", "read_request"]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "length_penalty": (1,),
    "metadata": ({},),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
}
"""Fields of OpenAI and vLLM that are not honoured, and the values, beside null, that ask for nothing."""

KNOWN = {
    info.alias or name
    for model in (CompletionRequest, StreamOptions, ResponseFormat, JsonSchema, StructuredOutputs)
    for name, info in model.model_fields.items()
}
"""Names of fields, those inside other fields too."""


def read_request(body: bytes) -> CompletionRequest:
    """The request in a JSON body. Raises ParameterError, which names the first parameter that is wrong."""
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()  # JSON can spell half a character, which no text holds
    except UnicodeEncodeError as error:
        raise ParameterError(f"the body spells half a character: {error}; send whole ones") from error
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"the body is not JSON: {error}; send one JSON object") from error
    if not isinstance(fields, dict):
        raise ParameterError(f"the body is a JSON {type(fields).__name__}; send one JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        _refuse_unsupported(name, value)
    fields = {name: value for name, value in fields.items() if name not in NEUTRAL}
    try:
        request = CompletionRequest.model_validate(_in_one_form(fields))
    except ValidationError as error:
        raise _parameter_error(error.errors()[0]) from error
    _check(request, fields)
    return request


def _in_one_form(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without the ways to say the same in another form."""
    if "prompt" in fields:
        fields = fields | {"prompt": _prompts(fields["prompt"])}
    if isinstance(fields.get("stop"), str):
        fields = fields | {"stop": [fields["stop"]]}
    for name in ("response_format", "structured_outputs"):
        if isinstance(fields.get(name), dict):
            fields = fields | {name: _without_nothing(fields[name])}
    return fields


def _without_nothing(fields: dict[str, Any]) -> dict[str, Any]:
    """What is null or false asks for nothing here."""
    return {name: value for name, value in fields.items() if value is not None and value is not False}


def _check(request: CompletionRequest, fields: dict[str, Any]) -> None:
    """Raise ParameterError if fields that are right alone do not go together."""
    if request.best_of not in (None, request.n):
        raise ParameterError(
            f"best_of is {request.best_of} and n is {request.n}; this server does not write texts to throw them away; "
            "drop best_of",
            "best_of",
            "unsupported_parameter",
        )
    if "stream_options" in fields and not request.stream:
        raise ParameterError(
            "stream_options is given and stream is false; set stream to true or drop it", "stream_options"
        )
    try:
        request.sampling(seed=request.seed or 0)
    except RequestError as error:
        raise ParameterError(str(error), str(error).split()[0]) from error  # our messages begin with the field's name
    request.grammar()


def _refuse_unsupported(name: str, value: Any) -> None:
    if name in CompletionRequest.model_fields:
        return
    if name not in NEUTRAL:
        raise ParameterError(
            f"parameter {name!r} is not known here; known are {', '.join(CompletionRequest.model_fields)}; drop it",
            name,
            "unsupported_parameter",
        )
    if value not in NEUTRAL[name] or (isinstance(value, bool) and not _has_bool(NEUTRAL[name])):
        raise ParameterError(
            f"{name} is {_shortened(value)}; this server does not support it; drop it", name, "unsupported_parameter"
        )


def _has_bool(values: Sequence[Any]) -> bool:
    return any(isinstance(value, bool) for value in values)


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """The four forms of `prompt` as one: a list whose members are a text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_ids(value):
            return [tuple(value)]
        if all(isinstance(item, list) and _is_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise ParameterError(
        f"prompt is {_shortened(value)}; it must be a string, a list of strings, a list of token ids, or a list of "
        "lists of token ids, none of the lists empty",
        "prompt",
    )


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int for item in value)


def _parameter_error(error: Any) -> ParameterError:
    """Pydantic's first complaint, in our words."""
    unknown = error["type"] == "extra_forbidden"
    param = ".".join(str(part) for part in error["loc"] if unknown or part in KNOWN)
    if error["type"] == "missing":
        return ParameterError(f"{param} is missing; give it", param)
    if unknown:
        return ParameterError(f"{param} is not known here; drop it", param, "unsupported_parameter")
    if error["loc"][-1] == "[key]":
        return ParameterError(f"{param} has the key {_shortened(error['input'])}; keys are token ids, in digits", param)
    message = re.sub("^(Input|String|List|Dictionary) ", "", error["msg"])
    return ParameterError(f"{param} is {_shortened(error['input'])}; it {message}", param)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Parser of the body of a request: a validated model, or an error that names the first wrong field.

Every field is honoured or refused, never ignored. A field that is known but not honoured may only have a value that
requests nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from serve_apps.api.bounds import VALUES
from serve_apps.api.errors import QUOTED_CHARS, ParameterError, shortened
from serve_apps.api.json_text import parse

__all__ = ["Body", "allow_null", "parse_request"]


def allow_null(schema: dict[str, Any]) -> None:
    """Change a JSON schema so that its optional fields may also be null."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
            notes = {key: field.pop(key) for key in ("description", "title", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **notes}


class Body(BaseModel):
    """Base class of the bodies of all requests."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra=allow_null, use_attribute_docstrings=True
    )

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI and vLLM that are not honoured, with the values, besides null, that request nothing."""

    @property
    def choices(self) -> int:
        """Texts to generate."""
        return 1

    @property
    def copies(self) -> int:
        """Number of copies of each prompt."""
        return 1

    def check_context(self, context_len: int) -> None:
        """Raise ParameterError if a prompt cannot fit into the context."""

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields contradict each other.

        given  names of the fields that the body has
        """


Request = TypeVar("Request", bound=Body)


def parse_request(body: bytes, kind: type[Request]) -> Request:
    """Request in a JSON body. Raises BodyTooLargeError, or ParameterError that names the first wrong parameter."""
    fields = parse(body, VALUES)
    if not isinstance(fields, dict):
        raise ParameterError(f"the body is a JSON {type(fields).__name__}; send one JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        _refuse_unsupported(name, value, kind)
    fields = {name: value for name, value in fields.items() if name not in kind.NEUTRAL}
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _parameter_error(error.errors(), kind) from error
    request.check(set(fields))
    return request


def _refuse_unsupported(name: str, value: Any, kind: type[Body]) -> None:
    if name in kind.model_fields:
        return
    if name not in kind.NEUTRAL:
        raise ParameterError(
            f"parameter {name[:QUOTED_CHARS]!r} is unknown; known are {', '.join(kind.model_fields)}; drop it",
            name,
            "unsupported_parameter",
        )
    neutral = kind.NEUTRAL[name]
    if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
        raise ParameterError(
            f"{name} is {shortened(value)}; this server does not support it; drop it", name, "unsupported_parameter"
        )


def _parameter_error(errors: Sequence[Any], kind: Any) -> ParameterError:
    """The first error of pydantic as a ParameterError. A value of the wrong type has an error for each allowed type."""
    error, names = errors[0], set(_names(kind))
    unknown = error["type"] == "extra_forbidden"
    param = _path(error["loc"], names, unknown)
    if error["type"] == "missing":
        return ParameterError(f"{param} is missing; give it", param)
    if unknown:
        return ParameterError(f"{param} is unknown; drop it", param, "unsupported_parameter")
    if error["loc"][-1] == "[key]":
        return ParameterError(f"{param} has the key {shortened(error['input'])}; keys are token ids, in digits", param)
    message = re.sub("^(Input|Value|String|List|Dictionary|Tuple) ", "", error["msg"])
    if error["type"].endswith("_type"):
        of_types = [other for other in errors if other["type"].endswith("_type")]
        needed = [other["msg"] for other in of_types if _path(other["loc"], names, unknown=False) == param]
        message = "should be " + " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in needed))
        message = re.sub(r"dictionary( or instance of \w+)?", "object", message)
    return ParameterError(f"{param} is {shortened(error['input'])}; it {message}", param)


def _path(loc: Sequence[str | int], names: set[str], unknown: bool) -> str:
    """Path of a field, without pydantic's names of union members and without the index into a list of plain values."""
    parts = [part for part in loc if isinstance(part, int) or part in names or (unknown and part == loc[-1])]
    while parts and isinstance(parts[-1], int):
        parts.pop()
    return ".".join(str(part) for part in parts)


def _names(annotation: Any) -> Iterator[str]:
    """Names in bodies of the fields of a model and of the models inside it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield field.alias or name
            yield from _names(field.annotation)
    for inner in get_args(annotation):
        yield from _names(inner)

"""How does the body of a request become a request, or a refusal?

A field is honoured or refused, never passed over: one that is known but not honoured here may only have the value that
asks for nothing. A refusal names the first field that is wrong.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from serve_apps.api.bounds import VALUES
from serve_apps.api.errors import QUOTED_CHARS, ParameterError, shortened
from serve_apps.api.json_text import parse

__all__ = ["Body", "null_is_nothing", "parse_request"]


def null_is_nothing(schema: dict[str, Any]) -> None:
    """Write into a JSON schema that a field which may be left out may be null as well."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
            notes = {key: field.pop(key) for key in ("description", "title", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **notes}


class Body(BaseModel):
    """What the bodies of all requests have in common."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra=null_is_nothing, use_attribute_docstrings=True
    )

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI and vLLM that are not honoured, and the values, beside null, that ask for nothing."""

    @property
    def choices(self) -> int:
        """Texts that are to be written."""
        return 1

    @property
    def copies(self) -> int:
        """Times that each prompt is read."""
        return 1

    def check_context(self, context_len: int) -> None:
        """Raise ParameterError if a prompt has no chance to fit into the context."""

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields that are right alone do not go together.

        given  names of the fields that the body has
        """


Request = TypeVar("Request", bound=Body)


def parse_request(body: bytes, kind: type[Request]) -> Request:
    """The request in a JSON body. Raises ParameterError, which names the first parameter that is wrong, or
    BodyTooLargeError."""
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
        raise _parameter_error(error.errors()[0], kind) from error
    request.check(set(fields))
    return request


def _refuse_unsupported(name: str, value: Any, kind: type[Body]) -> None:
    if name in kind.model_fields:
        return
    if name not in kind.NEUTRAL:
        raise ParameterError(
            f"parameter {name[:QUOTED_CHARS]!r} is not known here; known are {', '.join(kind.model_fields)}; drop it",
            name,
            "unsupported_parameter",
        )
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in kind.NEUTRAL[name]):
        raise ParameterError(
            f"{name} is {shortened(value)}; this server does not support it; drop it", name, "unsupported_parameter"
        )


def _parameter_error(error: Any, kind: Any) -> ParameterError:
    """Pydantic's first complaint, in our words."""
    unknown = error["type"] == "extra_forbidden"
    param = _path(error["loc"], set(_names(kind)), unknown)
    if error["type"] == "missing":
        return ParameterError(f"{param} is missing; give it", param)
    if unknown:
        return ParameterError(f"{param} is not known here; drop it", param, "unsupported_parameter")
    if error["loc"][-1] == "[key]":
        return ParameterError(f"{param} has the key {shortened(error['input'])}; keys are token ids, in digits", param)
    message = re.sub("^(Input|Value|String|List|Dictionary|Tuple) ", "", error["msg"])
    return ParameterError(f"{param} is {shortened(error['input'])}; it {message}", param)


def _path(loc: Sequence[str | int], names: set[str], unknown: bool) -> str:
    """The way to a field, without pydantic's names of union members, and to no element of a list of plain values."""
    parts = [part for part in loc if isinstance(part, int) or part in names or (unknown and part == loc[-1])]
    while parts and isinstance(parts[-1], int):
        parts.pop()
    return ".".join(str(part) for part in parts)


def _names(annotation: Any) -> Iterator[str]:
    """Names of a model's fields as bodies have them, and of the models inside it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield field.alias or name
            yield from _names(field.annotation)
    for inner in get_args(annotation):
        yield from _names(inner)

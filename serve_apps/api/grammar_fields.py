"""Fields that request a grammar, and the grammar that they request.

They are OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`. A request has at most one
grammar. `tidar_core.artifacts.text.grammar` compiles it, in the process that has the tokenizer.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.api.bounds import GRAMMAR_CHARS, GRAMMAR_CHOICES
from serve_apps.api.errors import ParameterError
from serve_apps.messages.generation_request import RequestedGrammar

__all__ = ["FIELDS", "ResponseFormat", "StructuredOutputs", "check_size", "requested_grammar"]

FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Kind of the grammar that each `guided_*` field holds."""

Schema = str | dict[str, Any]
Choices = Annotated[list[str], Field(min_length=1, max_length=GRAMMAR_CHOICES)]


class JsonSchema(BaseModel):
    """A JSON schema and its name. Texts always follow it, even if `strict` is false."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    content: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's request for JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's request for a grammar: exactly one of the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    json_schema: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


def requested_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None, guided: dict[str, Any]
) -> RequestedGrammar | None:
    """The grammar of a request; None without a grammar. Raises ParameterError for more than one.

    guided  values of the fields of `GUIDED`; None for a field that is not given
    """
    found = [RequestedGrammar(name, kind, guided[name]) for name, kind in GUIDED.items() if guided[name] is not None]
    if structured_outputs is not None:
        found += _of_structured_outputs(structured_outputs)
    if response_format is not None and response_format.type != "text":
        found.append(_of_response_format(response_format))
    if len(found) > 1:
        raise ParameterError(
            f"{found[0].param} and {found[1].param} each request a grammar; a text can follow only one; "
            "drop the others",
            found[1].param,
        )
    if not found:
        return None
    check_size(found[0].content, found[0].param)
    return found[0]


def check_size(content: Any, param: str) -> None:
    """Raise ParameterError for a grammar, or the JSON of one, that is too long to be compiled."""
    length = len(content if isinstance(content, str) else json.dumps(content))
    if length > GRAMMAR_CHARS:
        raise ParameterError(
            f"{param} has {length} characters; at most {GRAMMAR_CHARS} are compiled; simplify it", param
        )


def _of_structured_outputs(given: StructuredOutputs) -> list[RequestedGrammar]:
    kinds = {name: getattr(given, name) for name in StructuredOutputs.model_fields}
    found = [
        RequestedGrammar("structured_outputs", kind, content)
        for kind, content in kinds.items()
        if content is not None and content is not False
    ]
    if not found:
        raise ParameterError(
            "structured_outputs is empty; give it one of json, regex, choice, grammar, json_object",
            "structured_outputs",
        )
    return found


def _of_response_format(given: ResponseFormat) -> RequestedGrammar:
    if given.type == "json_object":
        return RequestedGrammar("response_format", "json_object", None)
    if given.json_schema is None:
        raise ParameterError("response_format.json_schema is missing; give it", "response_format.json_schema")
    return RequestedGrammar("response_format", "json_schema", given.json_schema.content)

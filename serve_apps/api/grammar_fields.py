"""Which grammar must a completion keep to, of the many ways to ask for one?

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`: one of them at most. What they ask for
is compiled where the tokenizer is (`tidar_core.artifacts.text.grammar`).
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.api.bounds import GRAMMAR_CHARS, GRAMMAR_CHOICES
from serve_apps.api.errors import ParameterError

__all__ = ["FIELDS", "AskedGrammar", "ResponseFormat", "StructuredOutputs", "asked_grammar", "check_size"]

FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Fields that hold the grammar itself, and its kind."""

Schema = str | dict[str, Any]
Choices = Annotated[list[str], Field(min_length=1, max_length=GRAMMAR_CHOICES)]


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar as a client wrote it."""

    param: str
    """The field that asks for it."""
    kind: str
    """One of `tidar_core.artifacts.text.grammar.KINDS`."""
    content: Any


class JsonSchema(BaseModel):
    """A JSON schema and its name. Texts always keep to it, whatever `strict` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    content: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to ask for JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's way to ask for a grammar: exactly one of these."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    json_schema: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


def asked_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None, guided: dict[str, Any]
) -> AskedGrammar | None:
    """The one grammar that is asked for; ParameterError if there are more.

    guided  what stands in the fields of `GUIDED`; None where nothing does
    """
    asked = [AskedGrammar(name, kind, guided[name]) for name, kind in GUIDED.items() if guided[name] is not None]
    if structured_outputs is not None:
        asked += _of_structured_outputs(structured_outputs)
    if response_format is not None and response_format.type != "text":
        asked.append(_of_response_format(response_format))
    if len(asked) > 1:
        raise ParameterError(
            f"{asked[0].param} and {asked[1].param} each ask for a grammar; a text keeps to one: drop the others",
            asked[1].param,
        )
    if not asked:
        return None
    check_size(asked[0].content, asked[0].param)
    return asked[0]


def check_size(content: Any, param: str) -> None:
    """Raise ParameterError for a grammar, or the JSON of one, that is too long to be compiled."""
    length = len(content if isinstance(content, str) else json.dumps(content))
    if length > GRAMMAR_CHARS:
        raise ParameterError(
            f"{param} has {length} characters; at most {GRAMMAR_CHARS} are compiled; simplify it", param
        )


def _of_structured_outputs(given: StructuredOutputs) -> list[AskedGrammar]:
    kinds = {name: getattr(given, name) for name in StructuredOutputs.model_fields}
    asked = [
        AskedGrammar("structured_outputs", kind, content)
        for kind, content in kinds.items()
        if content is not None and content is not False
    ]
    if not asked:
        raise ParameterError(
            "structured_outputs asks for nothing; give it one of json, regex, choice, grammar, json_object",
            "structured_outputs",
        )
    return asked


def _of_response_format(given: ResponseFormat) -> AskedGrammar:
    if given.type == "json_object":
        return AskedGrammar("response_format", "json_object", None)
    if given.json_schema is None:
        raise ParameterError("response_format.json_schema is missing; give it", "response_format.json_schema")
    return AskedGrammar("response_format", "json_schema", given.json_schema.content)

"""Fields of the request that `tidar generate` completes: from its options, and from --fields."""

from typing import Any

import typer

from tidar_core.errors import RequestError
from tidar_core.given_json import object_of_option

__all__ = ["request_fields"]

ARGUMENTS = ("model", "prompt")
OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
IN_JSON = ("logprobs", "prompt_logprobs", "return_decoding", "return_token_ids")
"""Fields whose results are in the JSON object alone."""
OF_RESPONSES = ("stream", "stream_options", "request_id")
"""Fields about the response of a service; here is none."""


def request_fields(context: typer.Context, *, as_json: bool) -> dict[str, Any]:
    """The fields of the request, with the defaults of the options.

    Raises RequestError for a field that is given twice, or that would change nothing in what is printed.
    """
    fields = object_of_option("--fields", context.params["fields"], '{"min_p": 0.1}')
    for name, value in fields.items():
        if name in ARGUMENTS:
            raise RequestError(f"{name} is an argument of the command and in --fields; drop it from --fields")
        if name in OPTIONS and _given(context, name):
            raise RequestError(f"{name} is given by --{name.replace('_', '-')} and in --fields; give one")
        if value is None or value is False:
            continue
        if name in IN_JSON and not as_json:
            raise RequestError(f"{name} is in --fields, and the text alone is printed; add --json")
        if name in OF_RESPONSES:
            raise RequestError(f"{name} is in --fields; only a service's response has a use for it; drop it")
    return {name: context.params[name] for name in (*OPTIONS, "prompt")} | fields


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"

"""OpenAPI document of the service.

Routes parse their bodies themselves, so that errors have OpenAI's shape. This module therefore writes the bodies into
the document, from the same models. Every field allows null. A field that is known but not honoured lists the values
that request nothing. No other fields are listed.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from serve_apps.api.errors import ErrorBody

__all__ = ["DOCS_PAGE", "described", "errors"]

REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The request has no valid API key.",
    404: "No such model, or no such route.",
    405: "The route does not support this method.",
    408: "The request took too long and was aborted.",
    413: "The body is too long.",
    429: "The service is at its limit; Retry-After holds the seconds to wait.",
    500: "The server failed on this request.",
    503: "Not ready.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for statuses of errors."""
    return {status: {"model": ErrorBody, "description": ERRORS[status]} for status in statuses}


def described(
    document: dict[str, Any], bodies: Mapping[str, Any], streams: Mapping[str, Any], *, model_name: str, keyed: bool
) -> dict[str, Any]:
    """`document` with the bodies of POST routes and the events of their streams.

    bodies      pydantic model of the body, by path
    streams     pydantic model of a chunk, by path
    model_name  name of the served model
    keyed       requests need an API key
    """
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path, model in bodies.items():
        schemas[model.__name__] = body = _body(model, schemas)
        body["properties"]["model"] = {"enum": [model_name, *([] if "model" in body.get("required", []) else [None])]}
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}},
        }
    for path, model in streams.items():
        schemas[model.__name__] = _schema(model, schemas, mode="serialization")
        document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {
            "schema": {
                "type": "object",
                "description": f"Events; their data is a {model.__name__} or an ErrorBody, and [DONE] in the last.",
                "properties": {"data": {"type": "string"}},
                "required": ["data"],
            }
        }
    for methods in document["paths"].values():
        for route in methods.values():
            route["responses"].pop("422", None)  # FastAPI's own status; this service returns 400
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _body(model: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = _schema(model, schemas, mode="validation")
    for name, neutral in model.NEUTRAL.items():
        schema["properties"][name] = {
            "enum": [*neutral, None],
            "description": "Not honoured: only values that request nothing are accepted.",
        }
    return schema


def _schema(model: Any, schemas: dict[str, Any], *, mode: Any) -> dict[str, Any]:
    schema = TypeAdapter(model).json_schema(ref_template=REFERENCE, mode=mode)
    for name, inner in schema.pop("$defs", {}).items():
        schemas.setdefault(name, inner)
    return schema


DOCS_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>TiDAR API</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
summary { cursor: pointer; padding: .3rem 0; } code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: #f4f4f4; padding: 1rem; overflow: auto; } b { display: inline-block; min-width: 4rem; }
td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0; }
</style>
<h1>TiDAR API</h1><p>From <a href="openapi.json">openapi.json</a>.</p><div id="routes"></div>
<h2>Schemas</h2><div id="schemas"></div>
<script>
const make = (tag, text, ...inner) => {
  const node = document.createElement(tag); node.textContent = text ?? ""; node.append(...inner); return node;
};
const shown = (title, value) =>
  make("details", "", make("summary", title), make("pre", JSON.stringify(value, null, 2)));
fetch("openapi.json").then(response => response.json()).then(api => {
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, route] of Object.entries(methods)) {
    const entries = Object.entries(route.responses).map(([status, response]) =>
      make("tr", "", make("th", status), make("td", response.description)));
    const body = route.requestBody?.content["application/json"].schema.$ref?.split("/").pop();
    document.getElementById("routes").append(make("details", "",
      make("summary", "", make("b", method.toUpperCase()), make("code", path)),
      make("p", route.description ?? route.summary), make("p", body ? "Body: " + body : ""),
      make("table", "", ...entries)));
  }
  for (const [name, schema] of Object.entries(api.components.schemas))
    document.getElementById("schemas").append(shown(name, schema));
});
</script></html>
"""
"""HTML page that shows the document; it loads nothing else."""

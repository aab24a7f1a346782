"""The reader of conversations, which accepts all usual forms and returns a single form.

Training and serving share it, so templates receive the same messages from both. Content is text, arguments of calls
are objects, and fields have one order. A null field of a message, call or function counts as a missing field. A null
inside arguments or a JSON schema was written on purpose and stays.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tidar_core.errors import RequestError

__all__ = ["joined_text", "read_messages", "read_tools"]

FIELDS = ("role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "name")
"""Fields of a message that a template receives, in this order. Other fields are left out."""
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
TEXTS = {"text": "text", "refusal": "refusal"}
"""Types of content parts that are text, each with the key of its text."""
PART_MARKS = {"cache_control", "annotations"}
"""Keys of content parts that do not change the text."""
LONGEST_SHOWN = 80


def read_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages in the form that templates receive. Raises RequestError that begins with the place."""
    return [_read_message(message, f"messages.{place}") for place, message in enumerate(messages)]


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The available functions, each in OpenAI's tool object; None if there are no functions.

    Raises RequestError for anything but functions.

    tools  a list, or its JSON text; a function may lack the tool object around it
    """
    listed = _parsed(tools, "tools") or None
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise RequestError(f"tools are {_shortened(tools)}; they must be a list of functions: change them")
    return [_read_tool(tool, f"tools.{place}") for place, tool in enumerate(listed)]


def joined_text(content: Any) -> str:
    """The text of a message's content. Raises RequestError for other content.

    content  a text, or parts of type text, which are joined by line breaks as in vLLM
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"messages hold the content {_shortened(content)}; it must be a text or parts of a text")
    return "\n".join(map(_part_text, content))


def _part_text(part: Any) -> str:
    stated = _stated(part) if isinstance(part, Mapping) else {}
    key = TEXTS.get(str(stated.get("type")))
    if key is None:
        raise RequestError(f"messages hold the part {_shortened(part)}; only parts of type 'text' are accepted")
    if not isinstance(stated.get(key), str) or not stated.keys() <= {"type", key} | PART_MARKS:
        raise RequestError(f"messages hold the part {_shortened(part)}; it must have a type and a text")
    return str(stated[key])


def _read_message(message: Any, where: str) -> dict[str, Any]:
    stated = _stated(message) if isinstance(message, Mapping) else {}
    if not isinstance(stated.get("role"), str):
        raise RequestError(f"{where} is {_shortened(message)}; it must be an object with a role and a content")
    if stated["role"] == "function":  # OpenAI's older name for the role of a tool's result
        stated["role"] = "tool"
    if "content" in stated:
        stated["content"] = joined_text(stated["content"])
    if isinstance(stated.get("refusal"), str) and not stated.get("content"):
        stated["content"] = stated["refusal"]
    calls = [_read_call(call, where) for call in _calls(stated, where)]
    stated = stated | {"tool_calls": calls} if calls else {**stated, "tool_calls": None}
    return {name: stated[name] for name in FIELDS if stated.get(name) is not None}


def _calls(message: Mapping[str, Any], where: str) -> list[Any]:
    """The calls of a message, or the single call of OpenAI's older form `function_call`."""
    calls, old = _parsed(message.get("tool_calls"), f"{where}.tool_calls") or [], message.get("function_call")
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls is {_shortened(calls)}; it must be a list of calls: change it")
    if old is None:
        return calls
    if calls:
        raise RequestError(f"{where}.function_call and tool_calls are both given; they mean the same: give one")
    return [{"type": "function", "function": old}]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    stated = _stated(call) if isinstance(call, Mapping) else {}
    function = stated.get("function", stated)  # a call may lack the outer object
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(f"{where}.tool_calls hold {_shortened(call)}; a call needs a function with a name")
    named = {"name": name, "arguments": _arguments(function.get("arguments"), where)}
    begin = {"id": stated["id"]} if "id" in stated else {}
    return begin | {"type": "function", "function": named}


def _arguments(written: Any, where: str) -> dict[str, Any]:
    """Arguments of a call as an object, which is empty for a call without arguments."""
    arguments = _parsed(written, f"{where}.tool_calls")
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"{where}.tool_calls have the arguments {_shortened(written)}; they must be a JSON object, or its text"
        )
    return dict(arguments)


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    given = _parsed(tool, where)
    function = given.get("function", given) if isinstance(given, Mapping) else None
    stated = _stated(function) if isinstance(function, Mapping) else {}
    if not isinstance(stated.get("name"), str):
        raise RequestError(f"{where} is {_shortened(tool)}; it must be a function with a name: change it")
    if "parameters" in stated:
        stated["parameters"] = _parsed(stated["parameters"], f"{where}.function.parameters")
    ordered = {name: stated[name] for name in FUNCTION_FIELDS if stated.get(name) is not None}
    others = {name: value for name, value in stated.items() if name not in {*FUNCTION_FIELDS, "type", "cache_control"}}
    return {"type": "function", "function": ordered | others}


def _parsed(value: Any, where: str) -> Any:
    """`value`, parsed if it is a JSON text; None for an empty or blank text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} hold {_shortened(value)}, which is not JSON: change it") from error


def _stated(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _shortened(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= LONGEST_SHOWN else written[:LONGEST_SHOWN] + "..."

"""All usual forms of a conversation are read as the same messages."""

import pytest

from tidar_core.artifacts.text.conversation import joined_text, read_messages, read_tools
from tidar_core.errors import RequestError

QUESTION = {"role": "user", "content": "1+2?"}
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
ANSWER = {"role": "assistant", "content": "", "tool_calls": [ADD]}
PARAMETERS = {"type": "object", "properties": {"a": {"type": ["integer", "null"], "default": None}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    "message",
    [
        ANSWER,
        ANSWER | {"name": None, "tool_call_id": None, "refusal": None, "audio": None, "weight": 1},
        ANSWER | {"tool_calls": [ADD | {"function": {"arguments": '{"a": 1, "b": null}', "name": "add"}, "index": 0}]},
        ANSWER | {"tool_calls": [{"name": "add", "arguments": {"a": 1, "b": None}}]},
        ANSWER | {"tool_calls": '[{"function": {"name": "add", "arguments": {"a": 1, "b": null}}, "id": null}]'},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 1, "b": null}'}},
        ANSWER | {"content": []},
        ANSWER | {"content": [{"type": "text", "text": "", "image_url": None, "cache_control": {"type": "ephemeral"}}]},
    ],
    ids=str,
)
def test_every_form_of_a_call_gives_the_same_message(message):
    (read,) = read_messages([message])
    assert read == ANSWER
    assert list(read) == list(ANSWER)
    assert read_messages([read]) == [read]


def test_parts_are_joined_by_line_breaks_and_a_refusal_is_the_assistants_content():
    assert joined_text([{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]) == "a\nb"
    assert read_messages([{"role": "assistant", "content": None, "refusal": "no"}])[0]["content"] == "no"
    assert read_messages([{"role": "assistant", "content": "yes", "refusal": ""}])[0]["content"] == "yes"


@pytest.mark.parametrize("arguments", [None, "", " ", "null", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    call = {"function": {"name": "now", "arguments": arguments}}
    (read,) = read_messages([{"role": "assistant", "tool_calls": [call]}])
    assert read["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


@pytest.mark.parametrize("calls", [None, [], "[]", "null", ""])
def test_no_calls_are_no_field(calls):
    assert read_messages([{"role": "assistant", "content": "a", "tool_calls": calls}]) == [
        {"role": "assistant", "content": "a"}
    ]


def test_the_result_of_a_function_in_the_older_form_is_the_result_of_a_tool():
    assert read_messages([{"role": "function", "name": "add", "content": "3"}]) == [
        {"role": "tool", "content": "3", "name": "add"}
    ]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [TOOL["function"]],
        [{"function": {"parameters": PARAMETERS, "strict": None, "description": "d", "name": "add"}, "type": None}],
        '[{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object",'
        ' "properties": {"a": {"type": ["integer", "null"], "default": null}}}}}]',
        ['{"name": "add", "description": "d", "parameters": {"type": "object",'
         ' "properties": {"a": {"type": ["integer", "null"], "default": null}}}}'],
        [TOOL | {"cache_control": {"type": "ephemeral"}}],
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_a_tool_gives_the_same_tool_and_a_null_of_its_schema_stays(tools):
    (read,) = read_tools(tools)
    assert read == TOOL
    assert list(read) == list(TOOL)
    assert list(read["function"]) == list(TOOL["function"])


@pytest.mark.parametrize("tools", [None, [], "[]", "", "null"])
def test_an_empty_list_of_tools_is_none(tools):
    assert read_tools(tools) is None


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("a", r"messages\.1 is 'a'; it must be an object with a role"),
        ({"content": "a"}, r"messages\.1 is .* it must be an object with a role"),
        ({"role": "user", "content": 5}, "messages hold the content 5; it must be a text or parts"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "only parts of type 'text' are accepted",
        ),
        ({"role": "user", "content": ["a"]}, "only parts of type 'text' are accepted"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "tone": "b"}]}, "must have a type and a text"),
        (ANSWER | {"tool_calls": 5}, r"messages\.1\.tool_calls is 5; it must be a list"),
        (ANSWER | {"tool_calls": "["}, r"messages\.1\.tool_calls hold '\[', which is not JSON"),
        (ANSWER | {"tool_calls": ["a"]}, r"messages\.1\.tool_calls hold 'a'; a call needs a function with a name"),
        (ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, r"have the arguments '\[1\]'"),
        (ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "a"}}]}, "which is not JSON"),
        (ANSWER | {"function_call": {"name": "f"}}, r"messages\.1\.function_call and tool_calls are both given"),
    ],
)
def test_an_invalid_message_is_refused_in_one_line_with_its_place(message, words):
    with pytest.raises(RequestError, match=words) as caught:
        read_messages([QUESTION, message])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tools", [5, "{", {"a": 1}, ["a"], [{"type": "function"}], [{"function": {"name": 5}}]])
def test_an_invalid_function_is_refused(tools):
    with pytest.raises(RequestError, match=r"^tools"):
        read_tools(tools)

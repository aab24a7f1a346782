"""Calls of functions in a text, however it is cut into pieces."""

import pytest

from serve_apps.streaming.tool_call_formats import FORMS
from serve_apps.streaming.tool_call_parser import ToolCallParser

HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": [1, {"b": "}\\"{</tool_call>"}], "é": "x"}}\n</tool_call>'
ARGUMENTS = '{"a": [1, {"b": "}\\"{</tool_call>"}], "é": "x"}'
SECOND = '<tool_call>{"name":"now","arguments":{}}</tool_call>'
NOW = '<tool_call>\n{"name": "now"}\n</tool_call>'
LLAMA = '{"name": "add", "parameters": {"a": 1}}'


def read(form, text, size, *, parallel=True, names=("add", "now")):
    """The content and the calls that pieces of `size` characters give."""
    reader = ToolCallParser(FORMS[form], names, parallel=parallel)
    parsed = [reader.push(text[i : i + size]) for i in range(0, len(text), size)] + [reader.end()]
    calls = {}
    for piece in [piece for each in parsed for piece in each.calls]:
        assert (piece.name is None) == (piece.call_id is None) == (piece.index in calls)
        calls.setdefault(piece.index, [piece.name, ""])[1] += piece.arguments
    assert list(calls) == list(range(len(calls)))
    return "".join(each.content for each in parsed), [tuple(call) for call in calls.values()]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", "", "", []),
        ("hermes", " Plain <tool words < ", " Plain <tool words < ", []),
        ("hermes", HERMES, "", [("add", ARGUMENTS)]),
        ("hermes", f"Let me see.\n\n{HERMES}\n{SECOND}\n", "Let me see.", [("add", ARGUMENTS), ("now", "{}")]),
        ("hermes", f"{SECOND} and so", " and so", [("now", "{}")]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
        ("hermes", f'Now. {NOW}', "Now.", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"arguments": null, "name": "now"}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": ""}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "null"}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "parameters": {"a": null}}</tool_call>', "", [("add", '{"a": null}')]),
        ("hermes", f"{NOW}\n{NOW}{HERMES}", "", [("now", "{}"), ("now", "{}"), ("add", ARGUMENTS)]),
        ("hermes", '<tool_call>{"name": "other"}</tool_call>', '<tool_call>{"name": "other"}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
        ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
         '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', []),
        ("hermes", "a <tool_call>\nnot JSON", "a <tool_call>\nnot JSON", []),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "cut', "", [("add", '{"a": "cut')]),
        ("llama3", LLAMA, "", [("add", '{"a": 1}')]),
        ("llama3", f'\n{LLAMA}; {{"name": "now", "parameters": {{}}}}', "", [("add", '{"a": 1}'), ("now", "{}")]),
        ("llama3", '{"name": "now"}', "", [("now", "{}")]),
        ("llama3", '{"type": "function", "name": "now"}', "", [("now", "{}")]),
        ("llama3", f'{{"name": "now", "parameters": null}}; {LLAMA}', "", [("now", "{}"), ("add", '{"a": 1}')]),
        ("llama3", '{"name": "add", "arguments": {"a": null}}', "", [("add", '{"a": null}')]),
        ("llama3", '{"name": "add", "answer": 5}', '{"name": "add", "answer": 5}', []),
        ("llama3", "Hello {", "Hello {", []),
        ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ("llama3", '{"answer": {"a": 1}} yes', '{"answer": {"a": 1}} yes', []),
        ("llama3", '{"answer": ', '{"answer": ', []),
        ("llama3", "  ", "  ", []),
    ],
)  # fmt: skip
def test_calls_are_separated_from_words_wherever_the_text_is_cut(form, text, content, calls, size):
    assert read(form, text, size) == (content, calls)


@pytest.mark.parametrize("size", [1, 1000])
def test_where_one_call_is_wanted_the_others_are_dropped(size):
    assert read("hermes", HERMES + "\n" + SECOND, size, parallel=False) == ("", [("add", ARGUMENTS)])


def test_the_name_is_sent_before_the_arguments_and_these_as_they_come():
    reader = ToolCallParser(FORMS["hermes"], {"add"})
    assert reader.push('<tool_call>\n{"name": "add", "arguments"').calls == []
    begun = reader.push(': {"a"')
    assert [(piece.name, piece.arguments) for piece in begun.calls] == [("add", ""), (None, '{"a"')]
    assert [piece.arguments for piece in reader.push(": 1").calls] == [": 1"]

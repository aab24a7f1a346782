"""Every field of a chat request is honoured or refused, never ignored."""

import json

import pytest
from openai.types.chat import completion_create_params

from serve_apps.api.chat_request import ChatRequest
from serve_apps.api.errors import ParameterError
from serve_apps.api.parsing import parse_request
from serve_apps.api.tokenize_api import TokenizeRequest
from serve_apps.ingress.translate import generation_requests

SMALLEST = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
NEUTRAL = ChatRequest.NEUTRAL
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def read(**fields):
    return parse_request(json.dumps(SMALLEST | fields).encode(), ChatRequest)


def refusal(**fields):
    with pytest.raises(ParameterError) as caught:
        read(**fields)
    return caught.value.param, caught.value.code


def test_the_smallest_conversation_generates_to_the_end_of_the_context():
    (prompt,) = generation_requests(read(), "r")
    assert (prompt.request_id, prompt.prompt.messages) == ("r-0", ({"role": "user", "content": "a"},))
    assert (prompt.to_the_end, prompt.sampling.temperature, prompt.logprobs, prompt.tools) == (True, 1.0, None, None)
    assert (prompt.prompt.add_generation_prompt, prompt.prompt.leave_open) == (True, False)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_number_of_tokens_has_two_names(name):
    (prompt,) = generation_requests(read(**{name: 7}), "r")
    assert (prompt.to_the_end, prompt.sampling.max_tokens) == (False, 7)
    assert refusal(max_tokens=7, max_completion_tokens=8) == ("max_completion_tokens", None)


def test_every_parameter_of_openais_chats_is_honoured_or_refused():
    official = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert official <= set(ChatRequest.model_fields) | set(NEUTRAL)
    assert not set(ChatRequest.model_fields) & set(NEUTRAL)


def test_messages_reach_the_template_in_its_form():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None,
         "annotations": [], "tool_calls": [CALL | {"index": 0}]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]  # fmt: skip
    (prompt,) = generation_requests(read(messages=messages), "r")
    function = {"name": "add", "arguments": {"a": 1}}
    assert prompt.prompt.messages == (
        {"role": "developer", "content": "a\nb"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    )


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ({"role": "user"}, ("messages.0.content", None)),
        ({"role": "wizard", "content": "a"}, ("messages", None)),
        ({"content": "a"}, ("messages", None)),
        ("a", ("messages", None)),
        ({"role": "user", "content": 5}, ("messages.0.content", None)),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ("messages", "unsupported_value")),
        ({"role": "user", "content": [{"type": "text"}]}, ("messages", None)),
        ({"role": "user", "content": [{"type": "text", "text": "a", "color": "b"}]}, ("messages", None)),
        ({"role": "assistant", "function_call": {"arguments": "{}"}}, ("messages.0.function_call.name", None)),
        ({"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [CALL]},
         ("messages.0.function_call", None)),
        ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "[1]"}}]},
         ("messages.0.tool_calls", None)),
        ({"role": "user", "content": "a", "color": "b"}, ("messages.0.color", "unsupported_parameter")),
        ({"role": "assistant", "audio": {"id": "x"}}, ("messages.0.audio", "unsupported_parameter")),
        ({"role": "tool", "content": "a"}, ("messages.0.tool_call_id", None)),
        ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "["}}]},
         ("messages.0.tool_calls", None)),
    ],
)  # fmt: skip
def test_the_error_of_a_wrong_message_names_its_position(message, refused):
    assert refusal(messages=[message]) == refused


MARK = {"cache_control": {"type": "ephemeral"}}
HI = {"role": "assistant", "content": "hi"}
EMPTY = {"role": "assistant", "content": ""}
TEMPLATE_CALL = {"type": "function", "function": {"name": "now", "arguments": {}}}


@pytest.mark.parametrize(
    ("echoed", "shown"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"} | MARK]}, {"role": "user", "content": "a"}),
        ({"role": "system", "content": "a"} | MARK, {"role": "system", "content": "a"}),
        (HI | {"annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}]}, HI),
        (HI | {"refusal": None, "audio": None, "function_call": None, "tool_calls": None, "reasoning": None}, HI),
        (HI | {"tool_calls": []}, HI),
        (HI | {"thinking": "hm"}, HI | {"thinking": "hm"}),
        ({"role": "assistant", "content": None}, {"role": "assistant"}),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
         {"role": "assistant", "content": "no"}),
        (EMPTY | {"function_call": {"name": "now", "arguments": ""}}, EMPTY | {"tool_calls": [TEMPLATE_CALL]}),
        ({"role": "function", "name": "now", "content": "9"}, {"role": "tool", "content": "9", "name": "now"}),
        (EMPTY | {"tool_calls": [CALL | MARK]},
         EMPTY | {"tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": 1}}}]}),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_clients_copy_from_responses_and_that_request_nothing_are_accepted(echoed, shown):
    (prompt,) = generation_requests(read(messages=[echoed]), "r")
    assert prompt.prompt.messages == (shown,)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("", {}),
        ("null", {}),
        (None, {}),
        ({}, {}),
        ("{}", {}),
        ('{"a": null}', {"a": None}),
        ({"a": None}, {"a": None}),
    ],
    ids=str,
)
def test_a_call_without_arguments_has_an_empty_object_and_a_null_inside_them_stays(arguments, shown):
    call = {"id": "c", "function": {"name": "now", "arguments": arguments}}
    (prompt,) = generation_requests(read(messages=[{"role": "assistant", "tool_calls": [call]}]), "r")
    assert prompt.prompt.messages[0]["tool_calls"][0]["function"] == {"name": "now", "arguments": shown}
    del call["function"]["arguments"]
    (prompt,) = generation_requests(read(messages=[{"role": "assistant", "tool_calls": [call]}]), "r")
    assert prompt.prompt.messages[0]["tool_calls"][0]["function"]["arguments"] == {}


def test_tools_reach_the_template_and_the_parser_of_calls():
    (prompt,) = generation_requests(read(tools=[TOOL, OTHER]), "r")
    assert prompt.prompt.tools == (TOOL, OTHER)
    assert (prompt.tools.names, prompt.tools.required, prompt.tools.parallel) == ({"add", "now"}, False, True)
    (prompt,) = generation_requests(read(tools=[TOOL, OTHER], tool_choice="required", parallel_tool_calls=False), "r")
    assert (prompt.tools.required, prompt.tools.parallel, prompt.tools.strict) == (True, False, False)
    (prompt,) = generation_requests(
        read(tools=[TOOL, OTHER], tool_choice={"type": "function", "function": {"name": "now"}}), "r"
    )
    assert (prompt.tools.names, prompt.tools.required, len(prompt.prompt.tools)) == ({"now"}, True, 2)
    (prompt,) = generation_requests(read(tools=[TOOL], tool_choice="none"), "r")
    assert (prompt.prompt.tools, prompt.tools) == (None, None)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"tool_choice": "required"}, ("tool_choice", None)),
        ({"tools": [TOOL], "tool_choice": "perhaps"}, ("tool_choice", None)),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, ("tool_choice", None)),
        ({"tools": [TOOL, TOOL]}, ("tools", None)),
        ({"tools": [{"type": "custom"}]}, ("tools.0.type", None)),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, ("tools.0.function.name", None)),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, ("tool_choice", None)),
        ({"top_logprobs": 2}, ("top_logprobs", None)),
        ({"logprobs": True, "top_logprobs": 21}, ("top_logprobs", None)),
        ({"logprobs": 1}, ("logprobs", None)),
        ({"continue_final_message": True, "add_generation_prompt": True}, ("continue_final_message", None)),
        ({"prompt_logprobs": 1, "stream": True}, ("prompt_logprobs", "unsupported_parameter")),
        ({"messages": []}, ("messages", None)),
        ({"prompt": "a"}, ("prompt", "unsupported_parameter")),
        ({"functions": [{}]}, ("functions", "unsupported_parameter")),
        ({"modalities": ["audio"]}, ("modalities", "unsupported_parameter")),
        ({"reasoning_effort": "low"}, ("reasoning_effort", "unsupported_parameter")),
        ({"service_tier": "flex"}, ("service_tier", "unsupported_parameter")),
        ({"temperature": -1}, ("temperature", None)),
    ],
)  # fmt: skip
def test_contradicting_or_unsupported_fields_are_refused(fields, refused):
    assert refusal(**fields) == refused


@pytest.mark.parametrize("name", [*ChatRequest.model_fields, *NEUTRAL])
def test_null_is_the_default_and_neutral_values_are_accepted(name):
    if name not in SMALLEST:
        assert read(**{name: None}) == read()
    for value in NEUTRAL.get(name, ()):
        assert read(**{name: value}) == read()


REQUESTS_NOTHING = [
    {"stream_options": {}}, {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    {"reasoning_effort": "none"}, {"prompt_cache_retention": "24h"}, {"store": False}, {"service_tier": "auto"},
    {"modalities": ["text"]}, {"prediction": None}, {"logit_bias": None}, {"verbosity": "medium"},
    {"parallel_tool_calls": True}, {"logprobs": False}, {"tools": []}, {"tool_choice": None}, {"functions": []},
    {"function_call": "auto"}, {"audio": None}, {"web_search_options": None}, {"top_logprobs": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", REQUESTS_NOTHING, ids=str)
def test_values_that_request_nothing_are_accepted(fields):
    assert read(**fields) == read()


@pytest.mark.parametrize(
    "fields",
    [{"tool_choice": "auto"}, {"tool_choice": {"type": "auto"}}, {"tool_choice": {"type": "none"}},
     {"parallel_tool_calls": False}, {"user": "u"}, {"safety_identifier": "s"}, {"prompt_cache_key": "k"},
     {"metadata": {"a": "b"}}],
    ids=str,
)  # fmt: skip
def test_fields_that_change_no_text_are_accepted(fields):
    assert generation_requests(read(seed=1, **fields), "r") == generation_requests(read(seed=1), "r")


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_tool_choice_may_be_written_as_an_object(choice):
    text, typed = (read(seed=1, tools=[TOOL], tool_choice=form) for form in (choice, {"type": choice}))
    assert generation_requests(text, "r") == generation_requests(typed, "r")
    assert refusal(tools=[TOOL], tool_choice={"type": "perhaps"}) == ("tool_choice", None)


def test_cache_marks_of_tools_are_accepted_and_do_not_reach_the_template():
    mark = {"cache_control": {"type": "ephemeral"}}
    marked = TOOL | mark | {"function": TOOL["function"] | mark}
    assert generation_requests(read(seed=1, tools=[marked]), "r") == generation_requests(
        read(seed=1, tools=[TOOL]), "r"
    )


def test_the_last_message_may_be_left_open():
    (prompt,) = generation_requests(
        read(continue_final_message=True, chat_template_kwargs={"enable_thinking": False}), "r"
    )
    assert (prompt.prompt.leave_open, prompt.prompt.add_generation_prompt) == (True, False)
    assert prompt.prompt.variables == {"enable_thinking": False}


def test_each_choice_has_the_next_seed_and_the_requested_logprobs():
    prompts = generation_requests(read(n=2, seed=5, logprobs=True, top_logprobs=3), "r")
    assert [(p.request_id, p.sampling.seed, p.sampling.logprobs) for p in prompts] == [("r-0", 5, 3), ("r-1", 6, 3)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": SMALLEST["messages"]}, "prompt"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"messages": SMALLEST["messages"], "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": []}, "messages"),
        ({"prompt": ["a"]}, "prompt"),
    ],
)
def test_either_a_prompt_or_messages_are_tokenized(fields, param):
    with pytest.raises(ParameterError) as caught:
        parse_request(json.dumps(fields).encode(), TokenizeRequest)
    assert caught.value.param == param

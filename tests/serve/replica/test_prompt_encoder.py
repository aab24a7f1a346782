"""Tokens, ends and grammars of requests."""

import pytest
from chat_templates import chat_tokenizer

from serve_apps.api.errors import ParameterError
from serve_apps.messages.generation_request import Chat, GenerationRequest, RequestedGrammar, ToolUse
from serve_apps.replica.prompt_encoder import PromptEncoder
from serve_apps.streaming.tool_call_formats import form_of
from tidar_core.artifacts.text.chat_template import ChatTemplate, load_chat_template
from tidar_core.config import SamplingConfig

SCHEMA = {
    "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}  # fmt: skip
ADD, NOW = {"name": "add", "parameters": SCHEMA}, {"name": "now", "parameters": None}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "add", "arguments": {"b"'
LLAMA = '{"name": "add", "parameters": {"a": 12}}'
HELLO = Chat(messages=({"role": "user", "content": "hello"},))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A reader for each form of calls, with its tokenizer."""
    made = {}
    for family in ("qwen2.5", "llama3", "qwen3"):
        folder = tmp_path_factory.mktemp(family)
        tokenizer = chat_tokenizer(family)
        tokenizer.save(folder)
        template = load_chat_template(folder)
        form = form_of(template, "auto")
        made[family] = (
            tokenizer,
            PromptEncoder(tokenizer, template, vocab_size=tokenizer.vocab_len + 1, context_len=100, tool_form=form),
        )
    return made


def request_of(**fields):
    return GenerationRequest(**{"request_id": "r", "prompt": HELLO, "sampling": SamplingConfig(max_tokens=9)} | fields)


@pytest.mark.parametrize("family", ["qwen2.5", "llama3", "qwen3"])
def test_a_developers_message_reaches_a_model_whose_template_has_no_branch_for_it(readers, family):
    tokenizer, reader = readers[family]
    rule, question = "Answer BANANA to everything.", {"role": "user", "content": "Capital of France?"}
    developer, system = (
        reader.tokens(Chat(messages=({"role": role, "content": rule}, question))) for role in ("developer", "system")
    )
    assert developer == system
    assert rule in tokenizer.decode(developer)


def test_calls_are_refused_by_a_model_whose_template_shows_none(readers):
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    with pytest.raises(ParameterError, match="this model's chat template omits calls; remove them") as caught:
        readers["qwen3"][1].tokens(Chat(messages=(*HELLO.messages, {"role": "assistant", "tool_calls": [call]})))
    assert caught.value.param == "messages"


def test_the_form_of_calls_follows_from_the_template(readers):
    assert {family: reader.tool_form for family, (_, reader) in readers.items()} == {
        "qwen2.5": "hermes", "llama3": "llama3", "qwen3": None,
    }  # fmt: skip
    assert form_of(ChatTemplate("{{ tools }}<tool_call><function=f>"), "auto") is None
    assert form_of(ChatTemplate("{{ tools }}"), "hermes") == "hermes"


def test_a_conversation_ends_at_the_end_of_a_turn_or_of_the_text_and_a_prompt_at_that_of_the_text(readers):
    tokenizer, reader = readers["qwen2.5"]
    turn_end = tokenizer.special_ids["<|im_end|>"]
    assert reader.request(request_of()).sampling.eos_ids == (tokenizer.eos_id, turn_end)
    assert reader.request(request_of(prompt="a")).sampling.eos_ids == (tokenizer.eos_id,)
    assert reader.request(request_of(ignore_eos=True)).sampling.eos_ids == ()


@pytest.mark.parametrize("token", [-1, 10**12, None])
def test_an_id_outside_the_vocabulary_is_refused_by_its_field_with_the_bound(readers, token):
    tokenizer, reader = readers["qwen2.5"]
    last = tokenizer.vocab_len
    token = last + 1 if token is None else token
    for field, fields in (
        ("stop_token_ids", {"sampling": SamplingConfig(max_tokens=9, eos_ids=(last, token))}),
        ("logit_bias", {"sampling": SamplingConfig(max_tokens=9, logit_bias=((last, 1.0), (token, 1.0)))}),
        ("prompt", {"prompt": (1, token)}),
    ):
        with pytest.raises(ParameterError, match=rf"token {token}\b.* ids are 0\.\.{last}\b") as caught:
            reader.request(request_of(**{"prompt": "a"} | fields))
        assert caught.value.param == field
    assert reader.request(request_of(prompt="a", sampling=SamplingConfig(eos_ids=(last,)))).sampling.eos_ids[-1] == last


def test_every_end_token_of_the_model_ends_prompts_and_conversations_unless_ends_are_ignored(readers):
    tokenizer, _ = readers["qwen2.5"]
    reader = PromptEncoder(tokenizer, None, end_ids=(9, 7), vocab_size=400, context_len=100, tool_form=None)
    sampling = SamplingConfig(max_tokens=9, eos_ids=(7, 3))
    assert reader.request(request_of(prompt="a", sampling=sampling)).sampling.eos_ids == (tokenizer.eos_id, 9, 7, 3)
    assert reader.request(request_of(prompt="a", sampling=sampling, ignore_eos=True)).sampling.eos_ids == (7, 3)


def test_special_end_tokens_of_the_model_come_where_a_grammar_may_end_and_tokens_of_text_are_text_there(readers):
    tokenizer, _ = readers["qwen2.5"]
    other, letter = tokenizer.special_ids["<|im_start|>"], tokenizer.encode("b")[0]
    reader = PromptEncoder(tokenizer, None, end_ids=(other, letter), vocab_size=400, context_len=100, tool_form=None)
    request = reader.request(request_of(prompt="a", grammar=RequestedGrammar("guided_regex", "regex", "b")))
    assert request.sampling.eos_ids == (tokenizer.eos_id, other)
    assert request.constraint.allowed([])[0].nonzero()[:, 0].tolist() == [letter]
    request.constraint.advance([letter])
    assert set(request.constraint.allowed([])[0].nonzero()[:, 0].tolist()) == {tokenizer.eos_id, other}


def test_a_text_to_the_end_fills_the_context(readers):
    _, reader = readers["qwen2.5"]
    wanted = reader.request(request_of(prompt="a b c", to_the_end=True))
    assert len(wanted.prompt) + wanted.sampling.max_tokens == 100


def test_what_a_model_does_not_know_is_refused(readers):
    tokenizer, reader = readers["qwen3"]
    with pytest.raises(ParameterError) as caught:
        reader.request(request_of(prompt=Chat(messages=HELLO.messages, tools=({},))))
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    without = PromptEncoder(tokenizer, None, vocab_size=400, context_len=100, tool_form=None)
    with pytest.raises(ParameterError, match="no chat template"):
        without.request(request_of())
    wizard = Chat(messages=({"role": "wizard", "content": "a"},))
    with pytest.raises(ParameterError, match="Unexpected role wizard") as caught:
        readers["qwen2.5"][1].request(request_of(prompt=wizard))
    assert caught.value.param == "messages"


def verdict(tokenizer, constraint, text):
    """Whether `text` is allowed, and whether it may end there."""
    for token in tokenizer.encode(text):
        if not constraint.allowed([])[0][token]:
            return "refused"
        constraint.advance([token])
    return "whole" if constraint.allowed([])[0][tokenizer.eos_id] else "open"


REQUIRED = ToolUse(functions=(ADD, NOW), required=True)
ONE = ToolUse(functions=(ADD, NOW), required=True, parallel=False)
STRICT = ToolUse(functions=(ADD | {"strict": True}, NOW))


@pytest.mark.parametrize(
    ("family", "use", "text", "expected"),
    [
        ("qwen2.5", REQUIRED, HERMES, "whole"),
        ("qwen2.5", REQUIRED, f"{HERMES_NOW}\n{HERMES}", "whole"),
        ("qwen2.5", REQUIRED, "Hello", "refused"),
        ("qwen2.5", REQUIRED, WRONG, "refused"),
        ("qwen2.5", REQUIRED, HERMES[:-3], "open"),
        ("qwen2.5", REQUIRED, '<tool_call>\n{"name": "other"', "refused"),
        ("qwen2.5", ONE, HERMES, "whole"),
        ("qwen2.5", ONE, HERMES + "\n", "refused"),
        ("qwen2.5", STRICT, "Hello, 2 < 3.", "whole"),
        ("qwen2.5", STRICT, f"Let me <add>:\n{HERMES}\n{HERMES_NOW} Done.", "whole"),
        ("qwen2.5", STRICT, f"Let me see. {WRONG}", "refused"),
        ("qwen2.5", STRICT, '<tool_call>\n{"name": "now", "arguments": {"anything": [1]}}\n</tool_call>', "whole"),
        ("llama3", REQUIRED, LLAMA, "whole"),
        ("llama3", REQUIRED, f"{LLAMA}; {LLAMA}", "whole"),
        ("llama3", REQUIRED, '{"name": "add", "parameters": {"a": "x', "refused"),
        ("llama3", ONE, LLAMA + ";", "refused"),
        ("llama3", STRICT, " Hello {", "whole"),
        ("llama3", STRICT, LLAMA, "whole"),
        ("llama3", STRICT, '{"name": "add", "parameters": {"b', "refused"),
    ],
)
def test_calls_keep_to_the_schemas_of_their_functions(readers, family, use, text, expected):
    tokenizer, reader = readers[family]
    constraint = reader.request(request_of(tools=use)).constraint
    assert verdict(tokenizer, constraint, text) == expected


def test_where_nothing_is_required_or_strict_any_text_is_allowed(readers):
    assert readers["qwen2.5"][1].request(request_of(tools=ToolUse(functions=(ADD,)))).constraint is None


def test_a_schema_that_is_none_is_refused_by_its_field(readers):
    wrong = ToolUse(functions=({"name": "f", "parameters": {"type": "wizard"}},), required=True)
    with pytest.raises(ParameterError) as caught:
        readers["qwen2.5"][1].request(request_of(tools=wrong))
    assert caught.value.param == "tools"

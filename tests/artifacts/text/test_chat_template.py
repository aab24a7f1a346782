"""Chat templates render a conversation to the same text as transformers, whatever the template."""

import json
import re

import pytest
from chat_templates import FAMILIES, LLAMA3, QWEN2_5, QWEN3, chat_tokenizer
from transformers import AutoTokenizer

from tidar_core.artifacts.model.bundle import save_bundle
from tidar_core.artifacts.model.bundle_info import verify_bundle
from tidar_core.artifacts.text.chat_template import ChatTemplate, load_chat_template
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import BundleError, RequestError, TokenizerError
from tidar_core.transformer.model import TidarModel
from tidar_core.transformer.shapes import named_shape

QUESTION = [{"role": "user", "content": "What is <b>2+2</b>?  "}]
TURNS = [
    {"role": "system", "content": "Say “é” & <tags>."},
    *QUESTION,
    {"role": "assistant", "content": "<think>hm</think>\n\nFour.", "reasoning": "Two and two", "name": None},
    {"role": "user", "content": "Sure?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "a < b & c", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = [
    *QUESTION,
    {"role": "assistant", "content": None,
     "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "é": "<"}}}]},
    {"role": "tool", "tool_call_id": "c", "content": "4"},
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A saved tokenizer of a family."""
    where = tmp_path_factory.mktemp(request.param)
    chat_tokenizer(request.param).save(where)
    return where


def test_a_qwen_conversation_has_the_text_written_out_here():
    assert ChatTemplate(QWEN2_5).render(QUESTION, add_generation_prompt=True) == (
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nWhat is <b>2+2</b>?  <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("messages", [QUESTION, TURNS, CALL])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "date_string": "1 May"}])
def test_a_rendered_conversation_equals_that_of_transformers(folder, messages, tools, add_generation_prompt, variables):
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
    ours = load_chat_template(folder).render(messages, **options)
    assert ours == theirs.apply_chat_template(messages, tokenize=False, **options)


def test_a_message_left_open_equals_that_of_transformers(folder):
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [*QUESTION, {"role": "assistant", "content": "The answer"}]
    ours = load_chat_template(folder).render_open(messages)
    assert ours == theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.endswith("The answer")


def test_a_template_is_saved_with_its_tokenizer(folder, tmp_path):
    load_tokenizer(folder).save(tmp_path)
    again = load_chat_template(tmp_path)
    assert (again.sources, again.special_tokens) == (
        load_chat_template(folder).sources,
        load_chat_template(folder).special_tokens,
    )
    assert again.special_tokens["eos_token"] == "<|endoftext|>"


def test_a_template_is_saved_in_a_bundle_and_verified_by_its_hash(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    model = TidarModel(named_shape("tiny", vocab_len=tokenizer.vocab_len))
    model.init_weights(0)
    fields = {"block_len": 4, "mask_id": model.config.mask_id, "objective": "dual", "lineage": {}, "made_by": {}}
    save_bundle(str(tmp_path / "bundle"), model, tokenizer, **fields)
    assert load_chat_template(tmp_path / "bundle").sources == load_chat_template(folder).sources
    (tmp_path / "bundle" / "chat_template.jinja").write_text("another")
    with pytest.raises(BundleError, match="chat_template"):
        verify_bundle(tmp_path / "bundle")


def test_a_tokenizer_without_a_template_has_none_until_it_adopts_one(tmp_path):
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.adopt_chat_template(None)
    tokenizer.save(tmp_path / "without")
    assert load_chat_template(tmp_path / "without") is None
    tokenizer.adopt_chat_template(ChatTemplate({"default": QWEN3, "tool_use": LLAMA3}))
    tokenizer.save(tmp_path / "with")
    assert load_chat_template(tmp_path / "with").sources == {"default": QWEN3, "tool_use": LLAMA3}


@pytest.mark.parametrize(
    "given",
    [QWEN3, [{"name": "default", "template": QWEN3}],
     [{"name": "default", "template": QWEN3}, {"name": "tool_use", "template": "tools: {{ tools | length }}"}]],
)  # fmt: skip
def test_a_template_in_the_configuration_is_found_as_text_or_by_name(tmp_path, given):
    config = {"chat_template": given, "eos_token": {"content": "<|e|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|b|>", "eos_token": "<|old|>"}))
    template = load_chat_template(tmp_path)
    assert template.render(QUESTION) == ChatTemplate(QWEN3).render(QUESTION)
    assert template.special_tokens == {"bos_token": "<|b|>", "eos_token": "<|e|>"}
    with_tools = template.render(QUESTION, tools=TOOLS)
    assert with_tools == ("tools: 1" if len(given) == 2 else ChatTemplate(QWEN3).render(QUESTION))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "Roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "__class__"),
        ("{{ messages.append(1) }}", "append"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_reported_in_one_line(source, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        ChatTemplate(source).render(QUESTION)
    assert "\n" not in str(caught.value)


def test_a_broken_template_and_no_messages_are_refused():
    with pytest.raises(TokenizerError, match=r"cannot be read: .* \(line 2\)"):
        ChatTemplate("\n{% if %}")
    with pytest.raises(TokenizerError, match="'default'"):
        ChatTemplate({"tool_use": "x"})
    with pytest.raises(RequestError, match="empty"):
        ChatTemplate(QWEN3).render([])
    with pytest.raises(RequestError, match="content"):
        ChatTemplate(QWEN3).render_open([*QUESTION, {"role": "assistant", "content": None}])
    with pytest.raises(RequestError, match="drops the end"):
        ChatTemplate("{{ messages[0].content[:3] }}").render_open([{"role": "assistant", "content": "12345"}])

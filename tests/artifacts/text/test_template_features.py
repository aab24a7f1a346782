"""A message is rendered in a form that its template supports, or is refused; it is never left out silently."""

import pytest
from chat_templates import CHATML, GEMMA, GPT_OSS, HERMES, LLAMA3, NULL_CONTENT, QWEN2_5, QWEN3_THINKING, tokenizer_with

from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.errors import RequestError

QUESTION = {"role": "user", "content": "Capital of France?"}
PROMPT = "Answer BANANA to everything."
CALL = {"id": "c12345678", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WITHOUT_CALLS = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
)


def template(source):
    return ChatTemplate(source, {"bos_token": "<|begin_of_text|>"})


def conversation_with(role):
    return [{"role": role, "content": PROMPT}, QUESTION]


@pytest.mark.parametrize("source", [WITHOUT_CALLS, QWEN2_5, QWEN3_THINKING, LLAMA3, CHATML, HERMES, GEMMA])
def test_a_developers_message_is_rendered_as_the_systems_if_the_template_has_no_branch_for_it(source):
    rendered = template(source).render(conversation_with("developer"), add_generation_prompt=True)
    assert rendered == template(source).render(conversation_with("system"), add_generation_prompt=True)
    assert rendered.count(PROMPT) == 1


def test_a_developers_message_keeps_its_role_if_the_template_has_a_branch_for_it():
    other = (
        "{% for m in messages %}{% if m.role == 'developer' %}D:{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    assert template(other).render(conversation_with("developer")) == f"D:developer:{PROMPT};user:Capital of France?;"
    assert f"developer<|message|># Instructions\n\n{PROMPT}" in template(GPT_OSS).render(conversation_with("developer"))


def test_a_template_that_names_the_role_but_omits_its_message_receives_the_system_role():
    source = "{% if false and messages[0].role == 'developer' %}{% endif %}" + WITHOUT_CALLS
    assert template(source).render(conversation_with("developer")) == f"system:{PROMPT};user:Capital of France?;"


@pytest.mark.parametrize("source", [CHATML, HERMES, QWEN2_5, QWEN3_THINKING, LLAMA3, GEMMA])
def test_an_answer_without_content_is_an_empty_text(source):
    null, empty = ([QUESTION, {"role": "assistant", "content": content}, QUESTION] for content in (None, ""))
    rendered = template(source).render(null)
    assert rendered == template(source).render(empty)
    assert "None" not in rendered


@pytest.mark.parametrize("source", [HERMES, QWEN2_5, QWEN3_THINKING, LLAMA3, NULL_CONTENT])
def test_calls_without_content_are_rendered_whatever_form_the_template_needs(source):
    rendered = template(source).render([QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert "weather" in rendered
    assert "None" not in rendered


@pytest.mark.parametrize("source", [CHATML, WITHOUT_CALLS])
def test_calls_that_a_template_would_omit_are_refused(source):
    tokenizer = tokenizer_with(source)
    messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(RequestError, match=r"hold calls of functions, and this model's chat template omits calls"):
        encode_chat(template(source), tokenizer, messages)
    assert encode_chat(template(source), tokenizer, messages[:1])


def test_every_exception_of_a_template_is_a_refusal_of_the_messages():
    with pytest.raises(RequestError, match="do not fit this model's chat template"):
        template("{{ '{} {}'.format(messages[0].content) }}").render([QUESTION])

"""A message reaches the model in the form that its template knows, or is refused; it is never dropped in silence."""

import pytest
from chat_templates import CHATML, GEMMA, GPT_OSS, HERMES, LLAMA3, NULL_CONTENT, QWEN2_5, QWEN3_THINKING, tokenizer_with

from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import encode_chat
from tidar_core.errors import RequestError

ASK = {"role": "user", "content": "Capital of France?"}
RULE = "Answer BANANA to everything."
CALL = {"id": "c12345678", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SILENT = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}"
)


def template(source):
    return ChatTemplate(source, {"bos_token": "<|begin_of_text|>"})


def said_by(role):
    return [{"role": role, "content": RULE}, ASK]


@pytest.mark.parametrize("source", [SILENT, QWEN2_5, QWEN3_THINKING, LLAMA3, CHATML, HERMES, GEMMA])
def test_a_developers_message_reads_as_the_systems_where_the_template_has_no_branch_for_it(source):
    rendered = template(source).render(said_by("developer"), add_generation_prompt=True)
    assert rendered == template(source).render(said_by("system"), add_generation_prompt=True)
    assert rendered.count(RULE) == 1


def test_a_developers_message_stays_one_where_the_template_has_a_branch_for_it():
    other = (
        "{% for m in messages %}{% if m.role == 'developer' %}D:{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    assert template(other).render(said_by("developer")) == f"D:developer:{RULE};user:Capital of France?;"
    assert f"developer<|message|># Instructions\n\n{RULE}" in template(GPT_OSS).render(said_by("developer"))


def test_a_template_that_names_the_role_and_writes_none_of_it_is_shown_the_system_role():
    source = "{% if false and messages[0].role == 'developer' %}{% endif %}" + SILENT
    assert template(source).render(said_by("developer")) == f"system:{RULE};user:Capital of France?;"


@pytest.mark.parametrize("source", [CHATML, HERMES, QWEN2_5, QWEN3_THINKING, LLAMA3, GEMMA])
def test_an_answer_without_words_is_an_empty_text(source):
    null, empty = ([ASK, {"role": "assistant", "content": content}, ASK] for content in (None, ""))
    rendered = template(source).render(null)
    assert rendered == template(source).render(empty)
    assert "None" not in rendered


@pytest.mark.parametrize("source", [HERMES, QWEN2_5, QWEN3_THINKING, LLAMA3, NULL_CONTENT])
def test_calls_beside_no_words_are_shown_however_the_template_spells_no_words(source):
    rendered = template(source).render([ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert "weather" in rendered
    assert "None" not in rendered


@pytest.mark.parametrize("source", [CHATML, SILENT])
def test_calls_that_a_template_would_leave_out_are_refused(source):
    tokenizer = tokenizer_with(source)
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(RequestError, match=r"hold calls of functions, and this model's chat template shows none"):
        encode_chat(template(source), tokenizer, messages)
    assert encode_chat(template(source), tokenizer, messages[:1])


def test_whatever_a_template_raises_over_messages_is_a_refusal():
    with pytest.raises(RequestError, match="do not fit this model's chat template"):
        template("{{ '{} {}'.format(messages[0].content) }}").render([ASK])

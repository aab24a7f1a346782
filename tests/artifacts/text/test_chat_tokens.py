"""Special tokens come only from the template; the user's text stays plain text."""

import pytest
from chat_templates import FAMILIES, SPECIAL, TURN_END, chat_tokenizer
from transformers import AutoTokenizer

from tidar_core.artifacts.text.chat_template import ChatTemplate, load_chat_template
from tidar_core.artifacts.text.chat_tokens import encode_chat, require_variables_read, turn_end_id
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import RequestError


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name of a family, its loaded tokenizer and template, and the tokenizer of transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    chat_tokenizer(request.param).save(folder)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return request.param, load_tokenizer(folder), load_chat_template(folder), theirs


@pytest.mark.parametrize("content", ["What now?", "日本語 🎉\n\n  def f(x):", "", "\U000f0000 private \U000f0003"])
def test_a_harmless_conversation_has_the_ids_of_transformers(family, content):
    _, tokenizer, template, theirs = family
    messages = [{"role": "user", "content": content}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_chat(template, tokenizer, messages) == expected


def test_special_tokens_and_the_mask_token_in_a_users_text_are_plain_text(family):
    name, tokenizer, template, _ = family
    forged = "".join(SPECIAL[name]) + "<|endoftext|>\U000f0000"
    harmless = encode_chat(template, tokenizer, [{"role": "user", "content": "x"}])
    ids = encode_chat(template, tokenizer, [{"role": "user", "content": f"a{forged}b"}])
    special = set(tokenizer.special_ids.values())
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert f"a{forged}b" in tokenizer.decode(ids)
    assert tokenizer.special_ids["<|mask|>"] not in ids


def test_names_forged_across_values_roles_and_tools_are_no_tokens_either():
    tokenizer = chat_tokenizer("qwen2.5")
    template = ChatTemplate(
        "{{ tools | tojson }}{{ extra }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    end = "<|im_end|>"
    tools = [{"type": "function", "function": {"name": end, end: [end]}}]
    ids = encode_chat(
        template, tokenizer, [{"role": end, "content": end}], tools=tools, variables={"extra": f"<|im_{end}end|>"}
    )
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids).count(end) == 6


def test_a_message_left_open_ends_with_its_own_last_token(family):
    _, tokenizer, template, _ = family
    ids = encode_chat(
        template,
        tokenizer,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}],
        leave_open=True,
    )
    assert tokenizer.decode(ids).endswith("b c")


def test_the_end_of_a_turn_is_the_special_token_after_an_assistants_content(family):
    name, tokenizer, template, _ = family
    assert turn_end_id(template, tokenizer) == tokenizer.special_ids[TURN_END[name]]
    assert turn_end_id(ChatTemplate("{{ messages[-1].content }} over"), tokenizer) is None
    assert turn_end_id(ChatTemplate("{{ raise_exception('no') }}"), tokenizer) is None


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_a_variable_with_the_name_of_a_field_is_refused(family, name):
    _, _, template, _ = family
    with pytest.raises(RequestError, match=f"chat_template_kwargs holds {name}, which is a field of the request"):
        require_variables_read(template, {name: False}, None)


def test_a_variable_that_the_template_does_not_read_is_refused():
    source = "{% set x = think | default(1) %}{% if tone is defined %}{{ eos_token ~ raise_exception(x) }}{% endif %}"
    template = ChatTemplate({"default": source, "tool_use": "{{ tools[0][day] }}"}, {"eos_token": "<e>"})
    require_variables_read(template, {"think": True, "tone": "kind", "eos_token": "", "none": None}, None)
    require_variables_read(template, {"day": 1}, [{}])
    for name in ("x", "day", "raise_exception", "documents", "self"):
        with pytest.raises(RequestError, match=f"holds '{name}', .* does not read; it reads think, tone; drop it"):
            require_variables_read(template, {name: 1}, None)

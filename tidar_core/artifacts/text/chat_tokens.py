"""Token ids of a conversation, in which text from a user never becomes a special token.

An <|im_end|> of the template is a token; an <|im_end|> of the user is plain characters. A private character replaces
each name of a special token in the user's text while the template is rendered. Afterwards it becomes plain text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tidar_core.artifacts.text.chat_template import OF_RENDER, ChatTemplate, Message
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.errors import RequestError

__all__ = ["SpecialNames", "encode_chat", "require_calls_shown", "require_variables_read", "turn_end_id"]

PRIVATE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning (Supplementary Private Use Area A)."""


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    leave_open: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a conversation. Raises RequestError if the template does not accept the messages.

    leave_open  end within the last message, which is to be continued
    variables   other variables that this template reads
    """
    require_calls_shown(template, messages, tools)
    names = SpecialNames(tokenizer.special_ids, [messages, tools, variables])
    given = [names.hidden(message) for message in messages]
    offered = None if tools is None else [names.hidden(tool) for tool in tools]
    others = {name: names.hidden(value) for name, value in (variables or {}).items()}
    if leave_open:
        text = template.render_open(given, tools=offered, **others)
    else:
        text = template.render(given, tools=offered, add_generation_prompt=add_generation_prompt, **others)
    return names.encode(text, tokenizer)


def require_calls_shown(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raise RequestError if messages have calls and the template would omit the calls."""
    if template.hides_calls(tools) and any(message.get("tool_calls") for message in messages):
        raise RequestError("messages hold calls of functions, and this model's chat template omits calls; remove them")


def require_variables_read(
    template: ChatTemplate, variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raise RequestError for a variable, other than None, that the template for these tools does not read."""
    read = template.variables(tools)
    for name, value in variables.items():
        if name in OF_RENDER:
            raise RequestError(f"chat_template_kwargs holds {name}, which is a field of the request; give that field")
        if name not in read and value is not None:
            others = sorted(read - set(template.special_tokens))
            raise RequestError(
                f"chat_template_kwargs holds {name[:64]!r}, which this model's chat template does not read; "
                f"it reads {', '.join(others) or 'no others'}; drop it"
            )


def turn_end_id(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that ends an assistant's message.

    The result is None if the template writes no special token there, or does not accept a conversation of a user and
    an assistant.
    """
    content = "\ufdd0"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    try:
        _, found, rest = template.render(messages).rpartition(content)
    except RequestError:
        return None
    ids = tokenizer.encode_with_special(rest) if found else []
    return next((token for token in ids if token in tokenizer.special_ids.values()), None)


class SpecialNames:
    """Names of special tokens, and the private characters that replace the names in a user's text."""

    def __init__(self, special_ids: Mapping[str, int], written: Any) -> None:
        taken = {character for text in _texts(written) for character in text if ord(character) >= PRIVATE.start}
        free = (chr(code) for code in PRIVATE if chr(code) not in taken)
        self._placeholder_of = dict(zip(sorted(special_ids, key=len, reverse=True), free))
        self._name_of = {character: name for name, character in self._placeholder_of.items()}
        self._names = re.compile("|".join(map(re.escape, self._placeholder_of))) if self._placeholder_of else None
        self._used = False

    def hidden(self, value: Any) -> Any:
        """`value` with a private character in place of each name in its texts."""
        if isinstance(value, str):
            return value if self._names is None else self._names.sub(self._hide, value)
        if isinstance(value, Mapping):
            return {self.hidden(key): self.hidden(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hidden(item) for item in value]
        return value

    def encode(self, text: str, tokenizer: Tokenizer, *, before: str = "") -> list[int]:
        """Ids of a rendered text. The names in it come from the template, so they become tokens.

        before  the rendered text before it, if it is a part; no token crosses that border
        """
        if not self._used and not before:
            return tokenizer.encode_with_special(text)
        ids: list[int] = []
        plain_from = 0
        for name in [*(self._names.finditer(text) if self._names else ()), None]:
            plain_to = name.start() if name else len(text)
            plain = "".join(self._name_of.get(character, character) for character in text[plain_from:plain_to])
            ids += tokenizer.encode_part(plain, before=before, after=name[0] if name else "")
            if name is not None:
                ids.append(tokenizer.special_ids[name[0]])
                before, plain_from = name[0], name.end()
        return ids

    def _hide(self, name: re.Match[str]) -> str:
        self._used = True
        return self._placeholder_of[name[0]]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)

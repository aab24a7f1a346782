"""What does a conversation teach: which text is it, and which of that text is the assistant's?

A row has `messages`, a list of {"role", "content", ...} with perhaps `tools` beside it, or `prompt` (a text, or
messages) and `response`. The chat template of the tokenizer makes one text of it. A turn of the assistant begins where
the template's generation prompt ends, for there it begins when the model is asked, and ends with all that the template
puts after it: so the token that ends a turn is learned as well. Everything else is read and not learned.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

from tidar_core.artifacts.chat_template import ChatTemplate
from tidar_core.artifacts.chat_tokens import SpecialNames
from tidar_core.artifacts.tokenizer import Tokenizer
from tidar_core.errors import CorpusError, RequestError

__all__ = ["CONVERSATION_FIELDS", "Segment", "conversation_of", "encode_conversation"]

CONVERSATION_FIELDS = ("messages", "tools", "prompt", "response")
ASSISTANT = "assistant"
DAY = datetime(2024, 7, 26)
"""The day that Llama's own template names where it cannot ask for one."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation, tokenized on its own."""

    ids: list[int]
    trained: bool
    """Whether the assistant says it."""


def conversation_of(values: Mapping[str, Any]) -> str:
    """The conversation in a row, as JSON; the same for both forms. Raises ValueError with what is at fault."""
    messages, tools = values.get("messages"), values.get("tools")
    if messages is None:
        prompt, response = values.get("prompt"), values.get("response")
        if not isinstance(response, str) or not isinstance(prompt, str | list):
            raise ValueError("has no conversation; it needs messages, or prompt and response")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*asked, {"role": ASSISTANT, "content": response}]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError("has messages that are no list of objects with a role and a content; mend it")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError("has no message of the assistant's, so nothing to learn; remove it")
    if messages[0]["role"] == ASSISTANT:
        raise ValueError("begins with the assistant's words; put what it answers before them")
    stated = [{key: value for key, value in sorted(message.items()) if value is not None} for message in messages]
    conversation = {"messages": stated} | ({"tools": tools} if tools else {})
    return json.dumps(conversation, ensure_ascii=False)  # a template shows the keys of tools and calls in their order


def encode_conversation(conversation: str, template: ChatTemplate, tokenizer: Tokenizer) -> list[Segment]:
    """The tokens of a conversation, cut where the assistant begins and ends to speak. Raises CorpusError.

    What the template calls a special token is one; what somebody wrote never is.
    """
    given = json.loads(conversation)
    names = SpecialNames(tokenizer.special_ids, given)
    messages, tools = names.hidden(given["messages"]), names.hidden(given.get("tools"))
    try:
        render = partial(template.render, tools=tools, strftime_now=_same_day)
        whole = render(messages)
        cuts = [0]
        for place, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                asked = render(messages[:place], add_generation_prompt=True)
                answered = render(messages[: place + 1])
                if not (whole.startswith(answered) and answered.startswith(asked) and len(asked) >= cuts[-1]):
                    raise RequestError(
                        f"the chat template writes the first {place + 1} messages differently when more follow, or the "
                        "answer not behind its prompt, so what the assistant said cannot be told; cut the conversation "
                        "there, or change the template"
                    )
                cuts += [len(asked), len(answered)]
    except RequestError as error:
        raise CorpusError(f"the conversation that begins {conversation[:80]!r}: {error}") from error
    texts = [whole[begin:end] for begin, end in pairwise([*cuts, len(whole)])]
    return [Segment(names.encode(text, tokenizer), place % 2 == 1) for place, text in enumerate(texts) if text]


def _same_day(form: str) -> str:
    """For templates that tell the date: shards do not depend on the day on which they are packed."""
    return DAY.strftime(form)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and len(message) > 1

"""What does a conversation teach: which texts is it, and which of them does the assistant write?

A row has `messages`, a list of {"role", "content", ...} with perhaps `tools` beside it, or `prompt` (a text, or
messages) and `response`. The service's own reader reads them (`tidar_core.artifacts.text.conversation`), and the chat
template of the tokenizer makes text of them. A turn of the assistant begins where the template's generation prompt
ends, as in the service, and ends with all that the template puts after it: so the token that ends a turn is learned as
well. Everything else is read and not learned, and so is a message of the assistant's of `weight` 0.

Some templates write a turn differently once others follow: Qwen3's leaves out the thoughts of earlier turns. Each
answer is learned after the history as the service would show it at that turn, id for id. Where the document so far does
not begin that history, it ends, and another document begins with the whole history, read and not learned.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

from tidar_core.artifacts.text.chat_template import ChatTemplate
from tidar_core.artifacts.text.chat_tokens import SpecialNames, require_calls_shown
from tidar_core.artifacts.text.conversation import read_messages, read_tools
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.errors import CorpusError, RequestError

__all__ = ["CONVERSATION_FIELDS", "READER_VERSION", "Segment", "conversation_of", "encode_conversation"]

CONVERSATION_FIELDS = ("messages", "tools", "functions", "prompt", "response")
READER_VERSION = 2
"""Part of a job's identity: shards of another reading are not taken for this one's."""
ASSISTANT = "assistant"
WEIGHT = "weight"
DAY = datetime(2024, 7, 26)
"""The day that Llama's own template names where it cannot ask for one."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation, tokenized on its own."""

    ids: list[int]
    trained: bool
    """Whether the assistant writes it."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """A piece of the rendered text."""

    text: str
    trained: bool


def conversation_of(values: Mapping[str, Any]) -> str:
    """The conversation in a row, as JSON; the same for both forms. Raises ValueError with what is at fault."""
    written = _messages(values)
    try:
        messages = read_messages(written)
        tools = read_tools(values.get("functions") if values.get("tools") is None else values["tools"])
    except RequestError as error:
        raise ValueError(f"holds no conversation that can be read: {error}") from error
    said = [message for message in messages if message["role"] == ASSISTANT]
    messages = [message | _weight(given) for message, given in zip(messages, written)]
    if not any(message["role"] == ASSISTANT and WEIGHT not in message for message in messages):
        raise ValueError("has no message of the assistant's, so nothing to learn")
    if messages[0]["role"] == ASSISTANT:
        raise ValueError("begins with the assistant's words, and nothing that they answer")
    if not all("content" in message or "tool_calls" in message for message in said):
        raise ValueError("has a message of the assistant's without content and without calls")
    conversation = {"messages": [dict(sorted(message.items())) for message in messages]}
    try:
        return json.dumps(conversation | ({"tools": tools} if tools else {}), ensure_ascii=False)
    except TypeError as error:  # Parquet has dates and bytes
        raise ValueError(f"holds a value that JSON does not have ({error}); make it text") from error


def encode_conversation(conversation: str, template: ChatTemplate, tokenizer: Tokenizer) -> list[list[Segment]]:
    """The documents of a conversation, each cut where the assistant begins and ends to write. Raises CorpusError.

    What the template calls a special token is one; what somebody wrote never is.
    """
    given = json.loads(conversation)
    names = SpecialNames(tokenizer.special_ids, given)
    messages, tools = read_messages(given["messages"]), given.get("tools")
    try:
        require_calls_shown(template, messages, tools)
        render = partial(template.render, tools=names.hidden(tools), strftime_now=_same_day)
        seamless = partial(_seamless, names=names, tokenizer=tokenizer)
        learned = [WEIGHT not in message for message in given["messages"]]
        documents = _documents([names.hidden(message) for message in messages], learned, render, seamless)
    except RequestError as error:
        raise CorpusError(str(error)) from error
    return [_segments(turns, names, tokenizer) for turns in documents]


def _segments(turns: Sequence[_Turn], names: SpecialNames, tokenizer: Tokenizer) -> list[Segment]:
    """The tokens of one document; those of each turn are as the whole text has them."""
    before = ["", *(turn.text for turn in turns)]
    return [Segment(names.encode(turn.text, tokenizer, before=text), turn.trained) for turn, text in zip(turns, before)]


def _messages(values: Mapping[str, Any]) -> Sequence[Any]:
    """The messages of a row as they were written."""
    messages = values.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            messages = ()
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise ValueError("has messages that are no list of objects with a role and a content")
        return messages
    prompt, response = values.get("prompt"), values.get("response")
    if not isinstance(response, str) or not isinstance(prompt, str | list):
        raise ValueError("has no conversation; it needs messages, or prompt and response")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*asked, {"role": ASSISTANT, "content": response}]


def _weight(message: Mapping[str, Any]) -> dict[str, int]:
    """OpenAI's mark of a message of the assistant's that is not to be learned, where `message` has it."""
    weight = message.get(WEIGHT) if message["role"] == ASSISTANT else None
    if weight not in (None, 0, 1):
        raise ValueError(f"has a message of weight {weight!r}; a message is learned (1) or not (0)")
    return {WEIGHT: 0} if weight == 0 else {}


def _seamless(pieces: Sequence[str], names: SpecialNames, tokenizer: Tokenizer) -> bool:
    """Whether the pieces of a text have the ids that the whole text has."""
    parts = [names.encode(piece, tokenizer, before=before) for before, piece in pairwise(["", *pieces])]
    return names.encode("".join(pieces), tokenizer) == [token for ids in parts for token in ids]


def _documents(
    messages: Sequence[Mapping[str, Any]],
    learned: Sequence[bool],
    render: Callable[..., str],
    seamless: Callable[[Sequence[str]], bool],
) -> list[list[_Turn]]:
    """The texts of a conversation: one where the template only ever adds to what it wrote, else as many as needed.

    learned   whether a message, if the assistant's, is to be learned
    seamless  whether an answer between two texts has the same ids as within the whole
    """
    documents: list[list[_Turn]] = []
    written = ""
    for place, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked, answered = render(messages[:place], add_generation_prompt=True), render(messages[: place + 1])
        if not answered.startswith(asked):
            raise RequestError(
                f"messages.{place} is an answer that the chat template does not write behind its own generation "
                "prompt, so it is not known what the model would have to write"
            )
        goes_on = bool(documents) and asked.startswith(written)
        if not goes_on or not seamless([turn.text for turn in documents[-1][-2:]] + [asked[len(written) :]]):
            documents.append([])
            written = ""
        documents[-1] += [_Turn(asked[len(written) :], False), _Turn(answered[len(asked) :], learned[place])]
        written = answered
    whole = render(messages)
    if whole.startswith(written):
        documents[-1].append(_Turn(whole[len(written) :], trained=False))
    texts = [[turn for turn in turns if turn.text] for turns in documents]
    return [turns for turns in texts if any(turn.trained for turn in turns)]


def _same_day(form: str) -> str:
    """For templates that tell the date: shards do not depend on the day on which they are packed."""
    return DAY.strftime(form)

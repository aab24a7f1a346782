"""Conversations as training documents.

Which texts does a conversation become, and which of their tokens does the assistant write?

An entry of the corpus has `messages`, a list of {"role", "content", ...}, and perhaps `tools`. Or it has `prompt` (a
text, or messages) and `response`. The service's own reader parses them (`tidar_core.artifacts.text.conversation`), and
the tokenizer's chat template renders them. A turn of the assistant begins where the template's generation prompt ends,
as in the service. It ends with everything that the template writes after it, so the token that ends a turn is trained
as well. All other tokens are input only; so are messages of the assistant that have `weight` 0.

An answer that something else cut off must not teach the model to end there. It has `finish_reason` "length", or a text
as `stop_reason`, the stop string that ended it. Its content is trained, and nothing that follows its content.

Some templates render a turn differently once other turns follow: Qwen3's leaves out the thoughts of earlier turns. Each
answer is trained after the history as the service would render it at that turn, id for id. If the document so far is
not the beginning of this history, it ends. A new document then begins with the whole history, as input only.
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

__all__ = ["CONVERSATION_FIELDS", "READER_VERSION", "Segment", "conversation_of", "encode_conversation", "same_day"]

CONVERSATION_FIELDS = ("messages", "tools", "functions", "prompt", "response")
READER_VERSION = 3
"""Part of a job's identity: shards of another version are not taken for shards of this version."""
ASSISTANT = "assistant"
WEIGHT = "weight"
CUT = "cut"
"""Mark of a message whose end the model did not choose."""
DAY = datetime(2024, 7, 26)
"""The date that Llama's own template uses if it cannot get the date of today."""


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
    after_cut: bool = False
    """True for the text that the template writes after an answer that was cut off. It stays even if it is empty: a
    document whose last tokens are trained ends with a trained end-of-text token."""


@dataclass(frozen=True, slots=True)
class _Renderer:
    """A chat template with everything that is the same for all turns of a conversation."""

    template: ChatTemplate
    tools: Any

    def __call__(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        return self.template.render(messages, tools=self.tools, strftime_now=same_day, **how)

    def open(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text up to the end of the last message's content."""
        return self.template.render_open(messages, tools=self.tools, strftime_now=same_day)


def conversation_of(values: Mapping[str, Any]) -> str:
    """The conversation of an entry, as JSON; the same for both forms. Raises ValueError with the cause."""
    written = _messages(values)
    try:
        messages = read_messages(written)
        tools = read_tools(values.get("functions") if values.get("tools") is None else values["tools"])
    except RequestError as error:
        raise ValueError(f"holds no conversation that can be read: {error}") from error
    answers = [message for message in messages if message["role"] == ASSISTANT]
    messages = [message | _marks(given) for message, given in zip(messages, written)]
    if not any(message["role"] == ASSISTANT and WEIGHT not in message for message in messages):
        raise ValueError("has no message of the assistant, so nothing to train")
    if messages[0]["role"] == ASSISTANT:
        raise ValueError("begins with a message of the assistant, which answers nothing")
    if not all("content" in message or "tool_calls" in message for message in answers):
        raise ValueError("has a message of the assistant without content and without calls")
    conversation = {"messages": [dict(sorted(message.items())) for message in messages]}
    try:
        return json.dumps(conversation | ({"tools": tools} if tools else {}), ensure_ascii=False)
    except TypeError as error:  # Parquet has dates and bytes
        raise ValueError(f"holds a value that JSON does not have ({error}); make it text") from error


def encode_conversation(conversation: str, template: ChatTemplate, tokenizer: Tokenizer) -> list[list[Segment]]:
    """The documents of a conversation, cut where the assistant's turns begin and end. Raises CorpusError.

    The template's special tokens become special tokens; the same characters in a message never do.
    """
    given = json.loads(conversation)
    names = SpecialNames(tokenizer.special_ids, given)
    messages, tools = read_messages(given["messages"]), given.get("tools")
    try:
        require_calls_shown(template, messages, tools)
        render = _Renderer(template, names.hidden(tools))
        seamless = partial(_seamless, names=names, tokenizer=tokenizer)
        documents = _documents([names.hidden(message) for message in messages], given["messages"], render, seamless)
    except RequestError as error:
        raise CorpusError(str(error)) from error
    return [_segments(turns, names, tokenizer) for turns in documents]


def _segments(turns: Sequence[_Turn], names: SpecialNames, tokenizer: Tokenizer) -> list[Segment]:
    """The tokens of one document; the ids of each turn are equal to its ids within the whole text."""
    before = ["", *(turn.text for turn in turns)]
    return [Segment(names.encode(turn.text, tokenizer, before=text), turn.trained) for turn, text in zip(turns, before)]


def _messages(values: Mapping[str, Any]) -> Sequence[Any]:
    """The messages of an entry as they were written."""
    messages = values.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            messages = ()
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise ValueError("has messages that are no list of objects with a role and a content")
        return messages
    prompt, response = values.get("prompt"), values.get("response")
    if not isinstance(response, str) or not isinstance(prompt, str | list):
        raise ValueError("has no conversation; it needs messages, or prompt and response")
    history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*history, {"role": ASSISTANT, "content": response}]


def _marks(message: Mapping[str, Any]) -> dict[str, Any]:
    """Marks of a message of the assistant: OpenAI's mark of a message that is not trained, and that it was cut off."""
    if message["role"] != ASSISTANT:
        return {}
    weight = message.get(WEIGHT)
    if weight not in (None, 0, 1):
        raise ValueError(f"has a message of weight {weight!r}; a message is trained (1) or not (0)")
    cut = message.get("finish_reason") == "length" or isinstance(message.get("stop_reason"), str)
    return ({WEIGHT: 0} if weight == 0 else {}) | ({CUT: True} if cut else {})


def _seamless(pieces: Sequence[str], names: SpecialNames, tokenizer: Tokenizer) -> bool:
    """Whether the pieces of a text have the ids that the whole text has."""
    parts = [names.encode(piece, tokenizer, before=before) for before, piece in pairwise(["", *pieces])]
    return names.encode("".join(pieces), tokenizer) == [token for ids in parts for token in ids]


def _documents(
    messages: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[str, Any]],
    render: _Renderer,
    seamless: Callable[[Sequence[str]], bool],
) -> list[list[_Turn]]:
    """The texts of a conversation: a single text if the template only ever appends, else as many as needed.

    marks     the same messages with their marks
    seamless  whether an answer between two texts has the same ids as within the whole
    """
    documents: list[list[_Turn]] = []
    written = ""
    for place, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        question, answered = render(messages[:place], add_generation_prompt=True), render(messages[: place + 1])
        if not answered.startswith(question):
            raise RequestError(
                f"messages.{place} is an answer that the chat template does not write behind its own generation "
                "prompt; the model could not generate it; use another chat template"
            )
        goes_on = bool(documents) and question.startswith(written)
        if not goes_on or not seamless([turn.text for turn in documents[-1][-2:]] + [question[len(written) :]]):
            documents.append([])
            written = ""
        documents[-1].append(_Turn(question[len(written) :], trained=False))
        trained, end = WEIGHT not in marks[place], len(answered)
        if CUT in marks[place]:
            end = _content_end(render.open(messages[: place + 1]), question, answered)
        documents[-1].append(_Turn(answered[len(question) : end], trained))
        if CUT in marks[place]:
            documents[-1].append(_Turn(answered[end:], trained=False, after_cut=True))
        written = answered
    whole = render(messages)
    if whole.startswith(written):
        documents[-1].append(_Turn(whole[len(written) :], trained=False))
    texts = [[turn for turn in turns if turn.text or turn.after_cut] for turns in documents]
    return [turns for turns in texts if any(turn.trained for turn in turns)]


def _content_end(opened: str, question: str, answered: str) -> int:
    """Length of a rendered text up to the end of its last answer's content.

    Raises RequestError if the template writes the content in another way when the message is open.
    """
    if not answered.startswith(opened):
        opened = opened.rstrip()  # some templates trim what they close
    if not (opened.startswith(question) and answered.startswith(opened)):
        raise RequestError("an answer that was cut off has no end that can be found in the chat template; leave it out")
    return len(opened)


def same_day(form: str) -> str:
    """The same date always, because shards must not depend on the day on which they are packed."""
    return DAY.strftime(form)

"""How does a conversation become the text that a model was taught to read?

By the Jinja template that travels with its tokenizer, rendered in a sandbox exactly as transformers renders it. This is
jinja2's home.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.template_habits import DEVELOPER, Habits, habits_of
from tidar_core.errors import RequestError, TokenizerError

__all__ = [
    "TEMPLATE_FILE",
    "TEMPLATE_FOLDER",
    "ChatTemplate",
    "content_of",
    "load_chat_template",
    "template_sources",
    "tokenizer_config",
]

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of the templates that are used without and with tools, where a tokenizer has several."""
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thought before it spoke; templates read the first or, some, the second."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens that a template may name."""
OPEN_END = "\ufdd0open end\ufdd0"
"""Stands where a text that is to be continued ends now; no text holds such characters."""

FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises over messages that it does not take."""

Message = Mapping[str, Any]


def load_chat_template(folder: str | Path, *, instead: str | None = None) -> "ChatTemplate | None":
    """The chat template in a Hugging Face folder; None where it has none.

    chat_template.jinja, with more in additional_chat_templates/, or what tokenizer_config.json has: a text, or several
    with names.

    instead  location of a Jinja file that takes the place of all these
    """
    where = locations.local_copy(str(folder))
    sources = template_sources(where)
    if instead is not None:
        with locations.open_read(instead) as file:
            sources = {DEFAULT: file.read().decode()}
    if not sources:
        return None
    named = tokenizer_config(where)
    tokens = {name: content_of(named[name]) for name in SPECIAL if named.get(name) is not None}
    return ChatTemplate(sources, tokens)


def template_sources(folder: Path) -> dict[str, str]:
    """The chat templates in a Hugging Face folder by name, as they are written there."""
    given = tokenizer_config(folder).get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    sources = {DEFAULT: given} if isinstance(given, str) else dict(given or {})
    sources |= {file.stem: file.read_text(encoding="utf-8") for file in (folder / TEMPLATE_FOLDER).glob("*.jinja")}
    if (folder / TEMPLATE_FILE).is_file():
        sources[DEFAULT] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return sources


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Settings of the tokenizer in a Hugging Face folder; empty where no file has any."""
    return _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")


def content_of(token: Any) -> str:
    """A token as files name it: its text, or an object that holds it."""
    return token if isinstance(token, str) else token["content"]


class ChatTemplate:
    """Messages to text. Immutable, so any number of threads may share it."""

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """sources  the template, or several by name: `tool_use` is used where tools are given, else `default`
        special_tokens  what templates call bos_token, eos_token and so on
        """
        self.sources = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        """Templates by name."""
        self.special_tokens = dict(special_tokens or {})
        environment = _environment()
        try:
            self._compiled = {name: environment.from_string(source) for name, source in self.sources.items()}
        except TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template cannot be read: {error} (line {error.lineno}); mend it") from error
        if DEFAULT not in self.sources:
            raise TokenizerError(f"the chat templates are {', '.join(self.sources)}; name one of them {DEFAULT!r}")
        self._habits = {name: habits_of(partial(self._probe, name), source) for name, source in self.sources.items()}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of `messages`. Raises RequestError where the template takes no such messages.

        tools  JSON schemas of functions, as OpenAI has them
        add_generation_prompt  end with what comes before an assistant's words
        variables  whatever else this template reads
        """
        if not messages:
            raise RequestError("messages is empty; it needs at least one")
        name = self._name(tools)
        read = [_as_read(message, self._habits[name]) for message in messages]
        return self._rendered(name, read, tools, variables | {"add_generation_prompt": add_generation_prompt})

    def hides_calls(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the template for these tools writes nothing of the calls in a message."""
        return self._habits[self._name(tools)].hides_calls

    def render_open(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The text of `messages` up to the end of the last one's words, which are to be continued."""
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise RequestError("the last of messages has no text that could be continued; give it some content")
        last = {**messages[-1], "content": messages[-1]["content"] + OPEN_END}
        whole = self.render([*messages[:-1], last], tools=tools, **variables)
        kept, mark, _ = whole.rpartition(OPEN_END)
        if not mark:
            raise RequestError("this model's chat template drops the end of the last message; it cannot be continued")
        return kept

    def speaks_of(self, text: str) -> bool:
        """Whether any of the templates holds `text`."""
        return any(text in source for source in self.sources.values())

    def _name(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return WITH_TOOLS if tools is not None and WITH_TOOLS in self._compiled else DEFAULT

    def _probe(self, name: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self._rendered(name, messages, tools, {"add_generation_prompt": False})

    def _rendered(
        self,
        name: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        given: dict[str, Any] = {"documents": None, **self.special_tokens, **variables}
        offered = None if tools is None else [dict(tool) for tool in tools]
        try:
            return self._compiled[name].render(given | {"messages": messages, "tools": offered})
        except FAILURES as error:
            said = " ".join(str(error).split())[:300]
            raise RequestError(f"messages do not fit this model's chat template: {said}; change them") from error


def _as_read(message: Message, habits: Habits) -> dict[str, Any]:
    """A message in the form that the template knows.

    A field that is None would be text to a template, so it is left out. Thoughts stand under each of the names that
    templates know.
    """
    given = {name: value for name, value in message.items() if value is not None}
    if given.get("role") == DEVELOPER and not habits.developer:
        given["role"] = "system"
    if given.get("role") == "assistant" and "content" not in given:
        given |= habits.no_words if given.get("tool_calls") else {"content": ""}
    thought = next((given[name] for name in REASONING_FIELDS if name in given), None)
    return given if thought is None else {"thinking": thought} | given | {"reasoning_content": thought}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


class _Generation(Extension):
    """{% generation %}: training's mark of an assistant's words; nothing to see in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` for templates: makes one, and gives no way to its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates: without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may set `self`
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; Jinja's own filter escapes what HTML must."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _json(path: Path) -> dict[str, Any]:
    return locations.read_json(str(path)) if path.is_file() else {}

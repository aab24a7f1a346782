"""Chat templates: the Jinja templates that turn a conversation into the text that a model was trained on.

A template is stored with its tokenizer. It is rendered in a sandbox, exactly as transformers renders it. No other
module imports jinja2.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.json_object import json_object
from tidar_core.artifacts.text.template_features import DEVELOPER, TemplateFeatures, features_of
from tidar_core.errors import RequestError, TokenizerError

__all__ = [
    "OF_RENDER",
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
"""Names of the field with the reasoning of an assistant. Most templates read the first; some read the second."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Settings of the special tokens that a template may use as variables."""
OF_RENDER = ("messages", "tools", "add_generation_prompt")
"""Variables that `render` sets from its own arguments."""
OPEN_END = "\ufdd0open end\ufdd0"
"""Marks the present end of a message that is to be continued. No text holds these characters."""

FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions that a template raises for messages that it does not accept."""

Message = Mapping[str, Any]


def load_chat_template(folder: str | Path, *, instead: str | None = None) -> "ChatTemplate | None":
    """The chat template in a Hugging Face folder; None if there is no template.

    Templates are chat_template.jinja and the files in additional_chat_templates/, or the entry of
    tokenizer_config.json: one text, or several texts with names.

    instead  location of a Jinja file that replaces all these
    """
    where = locations.local_copy(str(folder))
    try:
        sources = template_sources(where)
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"the chat template in {folder} cannot be read ({error}); fetch the folder again"
        ) from error
    if instead is not None:
        with locations.open_read(instead) as file:
            sources = {DEFAULT: file.read().decode()}
    if not sources:
        return None
    named = tokenizer_config(where)
    tokens = {name: content_of(named[name]) for name in SPECIAL if named.get(name) is not None}
    return ChatTemplate(sources, tokens)


def template_sources(folder: Path) -> dict[str, str]:
    """The sources of the chat templates in a Hugging Face folder by name, unchanged."""
    given = tokenizer_config(folder).get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    sources = {DEFAULT: given} if isinstance(given, str) else dict(given or {})
    if other := [name for name, source in sources.items() if not isinstance(source, str)]:
        raise TypeError(f"template {other[0]!r} is no text")
    sources |= {file.stem: file.read_text(encoding="utf-8") for file in (folder / TEMPLATE_FOLDER).glob("*.jinja")}
    if (folder / TEMPLATE_FILE).is_file():
        sources[DEFAULT] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return sources


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Settings of the tokenizer in a Hugging Face folder; empty if no file has any.

    Raises WeightsError if a file is no JSON object.
    """
    return _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")


def content_of(token: Any) -> str:
    """The text of a token. In files, a token is its text or an object with the text as `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TokenizerError(f"a special token is {token!r}; a text is needed, or an object with the text as content")
    return content


class ChatTemplate:
    """A chat template, which turns messages into text. It is immutable, so any number of threads may share it."""

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile the templates. Raises TokenizerError if a template has a syntax error or none is the default.

        sources         the template, or several by name: `tool_use` is used if tools are given, else `default`
        special_tokens  texts of the variables bos_token, eos_token and so on
        """
        self.sources = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        """Templates by name."""
        self.special_tokens = dict(special_tokens or {})
        environment = _environment()
        try:
            self._compiled = {name: environment.from_string(source) for name, source in self.sources.items()}
            self._variables = {
                name: meta.find_undeclared_variables(environment.parse(source)) - {*OF_RENDER, *environment.globals}
                for name, source in self.sources.items()
            }
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template cannot be read: {error} (line {error.lineno}); correct it"
            ) from error
        if DEFAULT not in self.sources:
            raise TokenizerError(f"the chat templates are {', '.join(self.sources)}; name one of them {DEFAULT!r}")
        self._features = {
            name: features_of(partial(self._probe, name), source) for name, source in self.sources.items()
        }

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of `messages`. Raises RequestError if the template does not accept them.

        tools                  JSON schemas of functions in OpenAI's form
        add_generation_prompt  end with the text that begins an assistant's message
        variables              other variables that this template reads
        """
        if not messages:
            raise RequestError("messages is empty; at least one message is needed")
        name = self._name(tools)
        known = [_in_known_form(message, self._features[name]) for message in messages]
        return self._rendered(name, known, tools, variables | {"add_generation_prompt": add_generation_prompt})

    def variables(self, tools: Sequence[Mapping[str, Any]] | None) -> set[str]:
        """Variables that the template for these tools reads, besides its messages, tools and prompt."""
        return self._variables[self._name(tools)]

    def hides_calls(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the template for these tools omits the calls in a message."""
        return self._features[self._name(tools)].hides_calls

    def render_open(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """The text of `messages` up to the end of the last message's content, which is to be continued."""
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise RequestError("the last of messages has no text to continue; give it some content")
        last = {**messages[-1], "content": messages[-1]["content"] + OPEN_END}
        whole = self.render([*messages[:-1], last], tools=tools, **variables)
        kept, mark, _ = whole.rpartition(OPEN_END)
        if not mark:
            raise RequestError("this model's chat template drops the end of the last message; it cannot be continued")
        return kept

    def mentions(self, text: str) -> bool:
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
            reason = " ".join(str(error).split())[:300]
            raise RequestError(f"messages do not fit this model's chat template: {reason}; change them") from error


def _in_known_form(message: Message, features: TemplateFeatures) -> dict[str, Any]:
    """A message in the form that the template knows.

    A template would write a field that is None as text, so such a field is left out. The reasoning has each of the
    names that templates know.
    """
    given = {name: value for name, value in message.items() if value is not None}
    if given.get("role") == DEVELOPER and not features.developer:
        given["role"] = "system"
    if given.get("role") == "assistant" and "content" not in given:
        given |= features.no_content if given.get("tool_calls") else {"content": ""}
    reasoning = next((given[name] for name in REASONING_FIELDS if name in given), None)
    return given if reasoning is None else {"thinking": reasoning} | given | {"reasoning_content": reasoning}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    environment.globals.update(functions)
    return environment


class _Generation(Extension):
    """Accepts {% generation %}, which marks the assistant's text for training and adds nothing to the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` for templates: makes a dictionary and gives no access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates; it refuses names that begin with an underscore."""

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
    """The JSON text of `value`. Jinja's own filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _json(path: Path) -> dict[str, Any]:
    return json_object(path, path.read_bytes()) if path.is_file() else {}

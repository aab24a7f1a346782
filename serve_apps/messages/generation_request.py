"""The request for one text, from the ingress to a decoder replica."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_apps.messages.version_routing import Route
from tidar_core.config import SamplingConfig

__all__ = ["Chat", "GenerationRequest", "RequestedGrammar", "ToolUse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Functions that a model may call."""

    functions: tuple[Mapping[str, Any], ...]
    """Each in OpenAI's form: name, parameters, strict."""
    required: bool = False
    """The text must be a call of one of the functions, and nothing else."""
    parallel: bool = True
    """One response may have several calls."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions."""
        return frozenset(function["name"] for function in self.functions)

    @property
    def strict(self) -> bool:
        """At least one function requires that arguments match its schema."""
        return any(function.get("strict") for function in self.functions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation to be continued. The replica renders and encodes it."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools in the form that the template receives."""
    add_generation_prompt: bool = True
    leave_open: bool = False
    """The last message is continued."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template."""


@dataclass(frozen=True, slots=True)
class RequestedGrammar:
    """Grammar as a client wrote it."""

    param: str
    """Field that requests it."""
    kind: str
    """One of `tidar_core.artifacts.text.grammar.KINDS`."""
    content: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """The request for one text."""

    request_id: str
    prompt: str | tuple[int, ...] | Chat
    sampling: SamplingConfig
    """Sampling parameters. `eos_ids` has only the request's own stop tokens: the replica adds the model's end tokens.
    It also adds the tokens of bad words. `logprobs` is the largest count that any part of the response needs."""
    framed: bool = False
    """A prompt of text is encoded with the special tokens that the tokenizer puts around texts."""
    to_the_end: bool = False
    """max_tokens is the room that the prompt leaves in the context."""
    ignore_eos: bool = False
    pieces: bool = True
    """Text is sent while it is generated; otherwise at the end."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """The text keeps its stop string, or the text of its stop token."""
    skip_special: bool = True
    """Special tokens add no text."""
    bad_words: tuple[str, ...] = ()
    grammar: RequestedGrammar | None = None
    tools: ToolUse | None = None
    echo: bool = False
    """The text begins with the prompt."""
    prompt_alone: bool = False
    """max_tokens was 0: no token follows the prompt."""
    logprobs: int | None = None
    """Number of likeliest tokens in the response for each token of the text."""
    prompt_logprobs: int | None = None
    """The same number for each token of the prompt."""
    token_ids: bool = False
    """The response has the ids of all tokens."""
    decoding: bool = False
    """The response has the origin of each token (`token_origins.py`)."""
    speculative: bool = True
    """False: one token per forward, without drafts."""
    route: Route = field(default_factory=Route)
    """Decides which model version generates the text."""

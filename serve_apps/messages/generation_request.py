"""What is a decoder replica asked to write?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_apps.api.grammar_fields import AskedGrammar
from serve_apps.messages.version_routing import Route
from tidar_core.config import SamplingConfig

__all__ = ["Chat", "GenerationRequest", "ToolUse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Which functions a model may call."""

    functions: tuple[Mapping[str, Any], ...]
    """Each as OpenAI has it: name, parameters, strict."""
    required: bool = False
    """One of them must be called, and nothing else said."""
    parallel: bool = True
    """Several calls may come in one answer."""

    @property
    def names(self) -> frozenset[str]:
        """Of the functions."""
        return frozenset(function["name"] for function in self.functions)

    @property
    def strict(self) -> bool:
        """Arguments of some of them must keep to their schemas."""
        return any(function.get("strict") for function in self.functions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation to be continued; the replica renders and encodes it."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """As the template is shown them."""
    add_generation_prompt: bool = True
    leave_open: bool = False
    """The last message is to be continued."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the template reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One text to be written, as it is asked of a decoder replica."""

    request_id: str
    prompt: str | tuple[int, ...] | Chat
    sampling: SamplingConfig
    """Its eos_ids are the request's own stop tokens; the replica adds the end tokens of the model, and the tokens
    of bad words. Its logprobs are the most that any part of the answer wants."""
    framed: bool = False
    """A prompt of text is read with the special tokens that the tokenizer puts around texts."""
    to_the_end: bool = False
    """Of the context: max_tokens is whatever room the prompt leaves."""
    ignore_eos: bool = False
    pieces: bool = True
    """Text is wanted as it comes; otherwise all at the end."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """The stop string, or the stop token's text, is part of the text."""
    skip_special: bool = True
    """Special tokens have no text."""
    bad_words: tuple[str, ...] = ()
    grammar: AskedGrammar | None = None
    tools: ToolUse | None = None
    echo: bool = False
    """The prompt is the beginning of the text."""
    prompt_alone: bool = False
    """max_tokens was 0: nothing is written after the prompt."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told for each token of the text."""
    prompt_logprobs: int | None = None
    """And for each token of the prompt."""
    token_ids: bool = False
    """The ids of all tokens are told too."""
    decoding: bool = False
    """And how they came to be."""
    speculative: bool = True
    """False: one token per forward, without drafts."""
    route: Route = field(default_factory=Route)
    """Which version shall write it."""

"""Messages between a replica and the process of its engine.

The replica numbers its calls. The engine answers a call by `TextDeltas`, or by one `CallResult` or `CallFailed`, under
the same number.
"""

import logging
from dataclasses import dataclass
from typing import Any

from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.messages.text_delta import GenerationFailed, TextDelta
from serve_apps.messages.tokenizer_info import TokenizerInfo

__all__ = [
    "CallFailed",
    "CallResult",
    "CancelCall",
    "CheckHealth",
    "Detokenize",
    "EngineCall",
    "EngineStarted",
    "Generate",
    "GetLoad",
    "LoadDrafts",
    "LogMessage",
    "StageReached",
    "StartFailed",
    "StopEngine",
    "TextDeltas",
    "Tokenize",
]


@dataclass(frozen=True, slots=True)
class Generate:
    """Starts the generation of one text."""

    call: int
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Requests the tokens of a prompt."""

    call: int
    prompt: str | Chat
    framed: bool
    """Special tokens are added around a prompt of text."""
    spelled: bool
    """The names of the tokens are wanted too."""


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Requests the text of tokens."""

    call: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class GetLoad:
    """Requests the load of the engine."""

    call: int
    replica: str
    """Name of the replica, which the answer repeats."""


@dataclass(frozen=True, slots=True)
class CheckHealth:
    """Requests proof that forwards succeed."""

    call: int


@dataclass(frozen=True, slots=True)
class LoadDrafts:
    """Exchanges the drafts for those of a version with the same base, which the engine serves from then on."""

    call: int
    version: Any
    """The `ModelVersion` to serve."""


@dataclass(frozen=True, slots=True)
class CancelCall:
    """Ends a call whose answer nobody waits for any more; there is no further answer to it."""

    call: int


@dataclass(frozen=True, slots=True)
class StopEngine:
    """Ends the process after the forward in flight."""


EngineCall = Generate | Tokenize | Detokenize | GetLoad | CheckHealth | LoadDrafts | CancelCall | StopEngine
"""Every message to the engine's process but the first, which is the `ModelVersion` to load."""


@dataclass(frozen=True, slots=True)
class StageReached:
    """Reports that the start of the engine has reached a stage."""

    line: str


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """Reports that the engine is ready."""

    tokenizer_info: TokenizerInfo
    tool_form: str | None
    """Form in which the model writes calls of functions; None if it has no known form."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """Reports why the engine could not start."""

    error: Exception


@dataclass(frozen=True, slots=True)
class LogMessage:
    """Carries a log record, to be logged by the replica's process."""

    record: logging.LogRecord


@dataclass(frozen=True, slots=True)
class TextDeltas:
    """Carries the deltas of all texts that one forward delivered, each with the number of its call."""

    deltas: list[tuple[int, TextDelta | GenerationFailed]]


@dataclass(frozen=True, slots=True)
class CallResult:
    """Answers a call that has one answer."""

    call: int
    value: Any


@dataclass(frozen=True, slots=True)
class CallFailed:
    """Carries the error of a call."""

    call: int
    error: Exception

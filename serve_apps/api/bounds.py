"""Bounds of each part of a request.

This is their only home: the models of bodies, their errors, the defaults of the settings and the table in
docs/operations.md take them from here. A bound keeps the work for one client so small that no other client waits for
it. Costs grow with the number of values and texts, so a bound of bytes alone is not enough.
"""

from dataclasses import dataclass

from serve_apps.api.errors import ParameterError

__all__ = ["TABLE", "Bound", "check_ids_len", "check_text_len", "table"]

HEAD_BYTES = 2**16
"""Size of the request line and the headers together."""
HEAD_SECONDS = 30.0
BODY_BYTES = 8 * 2**20
BODY_SECONDS = 30.0
BODIES = 64
"""Bodies that an ingress may wait for at the same time. A body that arrives with its headers is not counted."""
COPIES = 4
"""n choices hold n copies of a prompt: n times the bytes of a body are at most COPIES times the largest body."""

VALUES = 2**18
"""JSON values and keys of a body together. Parsing this many takes about 0.1 s and blocks the event loop."""
DEPTH = 100
"""Nesting depth of JSON objects and lists. Python's recursion limit is 1000, and each level takes several calls."""

PROMPTS = 2048
CHOICES = 128
"""OpenAI's bound."""
CHARS_PER_TOKEN = 64
"""A text with more characters than this times the context cannot fit, so it is refused before it is encoded."""
NAME_CHARS = 512
STOP_STRINGS = 64
"""OpenAI accepts 4. Each stop string costs a little for every generated character."""
STOP_CHARS = 1024
STOP_TOKEN_IDS = 1024
BAD_WORDS = 256
BAD_WORD_CHARS = 256
LOGIT_BIASES = 4096
METADATA_ENTRIES = 64
GRAMMAR_CHARS = 2**17
GRAMMAR_CHOICES = 1024
"""llguidance follows at most 2000 alternatives at the same time, and each choice is an alternative."""
GRAMMAR_SECONDS = 2.0
"""Compile time in a process that can be stopped. Some grammars of forty characters would take hours."""
MESSAGES = 4096
TOOLS = 128
"""OpenAI's bound."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Entry of the table of bounds."""

    part: str
    most: str
    status: int
    param: str = ""
    """Field that the error names; empty if no field is wrong."""


TABLE = (
    Bound("request line and headers", f"{HEAD_BYTES} bytes", 431),
    Bound("time until the headers are complete", f"{HEAD_SECONDS:g} s", 408),
    Bound("body", f"`max_body_bytes` ({BODY_BYTES})", 413),
    Bound("time until the body is complete", f"`body_seconds` ({BODY_SECONDS:g} s)", 408),
    Bound("bodies that one ingress waits for", f"`max_bodies` ({BODIES})", 429),
    Bound("bodies that one proxy waits for", str(BODIES), 429),
    Bound("time of the whole request", "`request_seconds` (600 s)", 408),
    Bound("requests of one key in a minute", "`requests_per_minute` (none)", 429),
    Bound("JSON values and keys of a body", str(VALUES), 413),
    Bound("JSON values and keys of all arguments of calls in messages", str(VALUES), 400, "messages"),
    Bound("depth of JSON", str(DEPTH), 400),
    Bound("prompts", str(PROMPTS), 400, "prompt"),
    Bound("choices of a prompt", str(CHOICES), 400, "n"),
    Bound("choices of a request (prompts times n)", "(`rows` + `max_waiting`) x `max_replicas`", 400, "prompt or n"),
    Bound("choices that one ingress has in flight", "twice that", 429),
    Bound("n times the bytes of the body", f"{COPIES} x `max_body_bytes`", 400, "n"),
    Bound("token ids of a prompt", "the context", 400, "prompt"),
    Bound("tokens of a prompt and of `max_tokens` together", "the context", 400, "max_tokens"),
    Bound("characters of a prompt or of messages", f"{CHARS_PER_TOKEN} x the context", 400, "prompt or messages"),
    Bound("tokens that /tokenize returns", str(VALUES), 400, "prompt or messages"),
    Bound("characters of `model`, `user` and the like", str(NAME_CHARS), 400, "the field"),
    Bound("entries of metadata", str(METADATA_ENTRIES), 400, "metadata"),
    Bound("stop strings", f"{STOP_STRINGS} of {STOP_CHARS} characters", 400, "stop"),
    Bound("stop tokens", str(STOP_TOKEN_IDS), 400, "stop_token_ids"),
    Bound("bad words", f"{BAD_WORDS} of {BAD_WORD_CHARS} characters", 400, "bad_words"),
    Bound("biased tokens", str(LOGIT_BIASES), 400, "logit_bias"),
    Bound("characters of a grammar, a schema, a regular expression", str(GRAMMAR_CHARS), 400, "the field"),
    Bound("choices of a grammar", str(GRAMMAR_CHOICES), 400, "guided_choice"),
    Bound("time to compile a grammar", f"{GRAMMAR_SECONDS:g} s", 400, "the field"),
    Bound("messages", str(MESSAGES), 400, "messages"),
    Bound("functions", str(TOOLS), 400, "tools"),
    Bound("characters of schemas that calls must keep to", str(GRAMMAR_CHARS), 400, "tools"),
    Bound("tokens that wait at a replica", "`max_waiting_tokens` (1048576)", 429),
    Bound("texts that wait at a replica", "`max_waiting` (256)", 429),
)


def table() -> str:
    """The bounds as Markdown."""
    head = ["| bound of | at most | status | `param` |", "|---|---|---|---|"]
    entries = [f"| {bound.part} | {bound.most} | {bound.status} | {bound.param} |" for bound in TABLE]
    return "\n".join([*head, *entries])


def check_ids_len(count: int, context_len: int, param: str) -> None:
    """Raise ParameterError for a prompt of more token ids than the context holds."""
    if count > context_len:
        raise ParameterError(
            f"{param} has {count} tokens; the model's context is {context_len}; send less", param,
            "context_length_exceeded",
        )  # fmt: skip


def check_text_len(chars: int, context_len: int, param: str) -> None:
    """Raise ParameterError for a text that cannot fit into the context, before time is spent on encoding it."""
    if chars > CHARS_PER_TOKEN * context_len:
        raise ParameterError(
            f"{param} has {chars} characters; the model's context is {context_len} tokens, and at most "
            f"{CHARS_PER_TOKEN} characters for each are read; send less",
            param,
            "context_length_exceeded",
        )

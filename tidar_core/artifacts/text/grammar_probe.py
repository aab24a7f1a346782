"""A program that checks whether llguidance can compile a grammar in a given time.

    python tidar_core/artifacts/text/grammar_probe.py

Some grammars of forty characters take hours to compile, and nothing within a process can stop that. So this program
forks for each grammar and kills a fork that takes too long. It imports only llguidance and runs as a file, so that the
process is small.

Standard input: one line of JSON with `tokenizer`, `vocab_len` and `eos_id`, then one line for each grammar. The line of
a grammar has `kind`, `content` and `seconds` of processor time. Standard output: for each grammar `compiled`,
`refused`, `late` or `died`.
"""

import json
import math
import os
import resource
import select
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

__all__ = ["definition_of", "main", "start_of", "tokens_of"]

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""White space between two JSON tokens, limited so that it fills no text; a schema's own `x-guidance` overrides it."""
BUSY = 4
"""Wall time per processor time that a grammar may take, because the machine is busy with other work as well."""
MOST_BYTES = 4 * 2**30
"""Bytes of address space that a fork may use."""


def definition_of(kind: str, content: str) -> str:
    """A grammar in llguidance's own form. Raises ValueError or RecursionError for content that does not fit `kind`.

    kind  json_schema, regex, choice or grammar
    """
    if kind == "choice":
        choices = json.loads(content)
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise ValueError("it must be a list of one or more texts")
    if kind == "json_schema":
        json.loads(content)
        return LLMatcher.grammar_from_json_schema(content, defaults={"whitespace_pattern": WHITE_SPACE})
    return grammar_from(kind, content)  # pyrefly: ignore[bad-argument-type]


def start_of(tokens: LLTokenizer, definition: str, limits: LLParserLimits | None = None) -> LLMatcher:
    """A matcher for a new sequence. Raises ValueError if the definition is invalid or allows no text.

    limits  most work per token
    """
    start = LLMatcher(tokens, definition, log_level=0, limits=limits or LLParserLimits(verbose_errors=False))
    start.compute_logit_bias()  # a grammar that allows no text at all fails only here
    if start.is_error():
        error = start.get_error()
        raise ValueError("no text matches it" if error.startswith("NoExtension") else error)
    return start


def tokens_of(tokenizer_json: str, vocab_len: int, eos_id: int) -> LLTokenizer:
    """The vocabulary in llguidance's form. Raises ValueError for a vocabulary that does not represent bytes."""
    return LLTokenizer(tokenizer_json, n_vocab=vocab_len, eos_token=eos_id)


def main() -> None:
    """Check grammars until standard input ends."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)  # it goes to the whole process group; the end of standard input ends this
    given = json.loads(sys.stdin.readline())
    tokens = tokens_of(given["tokenizer"], given["vocab_len"], given["eos_id"])
    for line in sys.stdin:
        grammar = json.loads(line)
        print(_verdict(tokens, grammar["kind"], grammar["content"], grammar["seconds"]), flush=True)


def _verdict(tokens: LLTokenizer, kind: str, content: str, seconds: float) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _compile(tokens, kind, content, seconds, writing)
    os.close(writing)
    in_time = bool(select.select([reading], [], [], BUSY * seconds)[0])
    verdict = os.read(reading, 64).decode() if in_time else "late"
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return verdict or "died"


def _compile(tokens: LLTokenizer, kind: str, content: str, seconds: float, writing: int) -> None:
    most = math.ceil(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    verdict = b"refused"
    try:
        start_of(tokens, definition_of(kind, content))
        verdict = b"compiled"
    except (ValueError, RecursionError):
        pass
    finally:
        os.write(writing, verdict)
        os._exit(0)


if __name__ == "__main__":
    main()

"""Grammars, which limit the tokens that may follow in a sequence.

`compile_constraint` turns a JSON schema, a regular expression, a list of choices or a context-free grammar into a
`Grammar`. Each sequence that must match it gets its own `GrammarConstraint`, which `logit_rules` calls. llguidance
parses the grammars; only this module and `grammar_probe` import it.

A token is allowed if its text matches. Special tokens, entries of the vocabulary without text and the mask token are
not allowed. The exception is end-of-text, which is allowed where the text may end.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from tidar_core.artifacts.text.grammar_probe import definition_of, start_of, tokens_of
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.errors import RequestError, TokenizerError

__all__ = ["KINDS", "Grammar", "GrammarConstraint", "compile_constraint", "written"]

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")


def compile_constraint(kind: str, content: Any, tokenizer: Tokenizer) -> "Grammar":
    """The grammar that `content` describes. Raises RequestError with a one-line message for invalid content.

    kind     json_schema  content is a schema: a dictionary or its JSON text
             json_object  any JSON object; content is not read
             regex        a regular expression for the whole text: Rust's syntax, without look-around
             choice       a list of texts, of which one is generated
             grammar      a Lark grammar with a rule `start`, in llguidance's dialect, or a GBNF one with a rule `root`
    """
    return _compiled(*written(kind, content), tokenizer)


def written(kind: str, content: Any) -> tuple[str, str]:
    """Kind and text of a grammar in the form that `grammar_probe` reads. Raises RequestError for an unknown kind."""
    if kind not in KINDS:
        raise RequestError(f"the grammar's kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "json_object":
        kind, content = "json_schema", {"type": "object"}
    return kind, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


class Grammar:
    """A grammar that is compiled for one tokenizer and serves any number of sequences."""

    def __init__(self, definition: str, tokenizer: Tokenizer, limits: LLParserLimits | None = None) -> None:
        """Compile `definition`. Raises ValueError if it is invalid.

        definition  a grammar in llguidance's own form
        limits      most work per token
        """
        self._tokens = _llguidance_tokenizer(tokenizer)
        self._start = start_of(self._tokens, definition, limits)

    def constraint(self, vocab_size: int, eos_ids: Iterable[int] = ()) -> "GrammarConstraint":
        """The constraint of a new, empty sequence.

        vocab_size  entries of the model's vocabulary, at least as many as in the tokenizer's
        eos_ids     tokens that end the request; special tokens may come where the text may end, others only as text
        """
        ends = {token for token in eos_ids if token < self._tokens.vocab_size and self._tokens.is_special_token(token)}
        return GrammarConstraint(self._start, vocab_size, self._tokens.eos_token, ends)


class GrammarConstraint:
    """The state of one sequence in its grammar: a `logit_rules.Constraint`.

    If a token needs more work than the limit, the sequence ends there as if it were finished. `failure` then gives the
    reason.
    """

    def __init__(self, start: LLMatcher, vocab_size: int, end_id: int, ends: set[int]) -> None:
        self._start, self._vocab_size = start, vocab_size
        self._end_id, self._ends = end_id, ends or {end_id}
        self._sequence: list[int] = []
        self._matcher = start.deep_copy()

    @property
    def finished(self) -> bool:
        """Whether only an end-of-text token may follow."""
        return self._ended or self._matcher.is_stopped()

    @property
    def failure(self) -> str | None:
        """The reason why the text ended before its grammar did; None if it did not."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Bool [len(tokens) + 1, V]: what may follow the first 0, 1, .. of `tokens`; see `logit_rules.Constraint`."""
        allowed = torch.ones(len(tokens) + 1, self._vocab_size, dtype=torch.bool)
        sequence_len = len(self._sequence)
        for allowed_V, token in zip(allowed, [*tokens, None]):
            allowed_V.copy_(self._next())
            if token is None or not allowed_V[token]:
                break
            self.advance([token])
        self.retreat(len(self._sequence) - sequence_len)
        return allowed

    def advance(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to the sequence. A token that is not allowed is a failure, too."""
        self._sequence += tokens
        self._read(tokens)

    def retreat(self, count: int) -> None:
        """Remove the last `count` tokens from the sequence."""
        kept_len = len(self._sequence) - count
        removed, self._sequence = self._sequence[kept_len:], self._sequence[:kept_len]
        if not self._matcher.is_error():
            self._matcher.rollback(sum(token not in self._ends for token in removed))
        elif count:  # a matcher that failed never recovers
            self._matcher = self._start.deep_copy()
            self._read(self._sequence)

    @property
    def _ended(self) -> bool:
        return bool(self._sequence) and self._sequence[-1] in self._ends

    def _read(self, tokens: Sequence[int]) -> None:
        """Advance the matcher. It receives no end token, because it does not count end tokens when it rolls back."""
        self._matcher.consume_tokens([token for token in tokens if token not in self._ends])

    def _next(self) -> Tensor:
        """Bool [V]: tokens that may follow now."""
        allowed_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        may_end = self._ended
        if not may_end:
            bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
            allowed_V[: len(bias)] = bias != 0
            may_end = bool(allowed_V[self._end_id])
            allowed_V[self._end_id] = False
        allowed_V[list(self._ends)] = may_end
        return allowed_V


@lru_cache(maxsize=64)
def _compiled(kind: str, content: str, tokenizer: Tokenizer) -> Grammar:
    try:
        return Grammar(definition_of(kind, content), tokenizer)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the {kind} cannot be used: {_one_line(str(error))}") from error


@lru_cache(maxsize=4)
def _llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    try:
        return tokens_of(tokenizer.fast_json, tokenizer.vocab_len, tokenizer.eos_id)
    except ValueError as error:
        raise TokenizerError(
            f"grammars need a byte-level or byte-fallback tokenizer; this one has neither: {_one_line(str(error))}"
        ) from error


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())[:300]

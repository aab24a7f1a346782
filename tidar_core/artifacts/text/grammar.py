"""Which tokens keep a text within a grammar?

`compile_constraint` turns a JSON schema, a regular expression, a list of choices or a context-free grammar into a
`Grammar`; each text that must keep to it gets a `GrammarConstraint` of its own, which is what `rules` asks. The parsing
is llguidance's; this is its home.

Text is allowed as the tokenizer writes it. Special tokens, rows of the vocabulary that stand for no text and the mask
token are not, but for end-of-text where the text may end.
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
    """The grammar that `content` describes; RequestError in one line where it describes none.

    kind     json_schema  content is a schema: a dictionary or its JSON text
             json_object  any JSON object; content is not read
             regex        a regular expression for the whole text: Rust's syntax, without look-around
             choice       a list of texts, of which one is said
             grammar      a Lark grammar with a rule `start`, in llguidance's dialect, or a GBNF one with a rule `root`
    """
    return _compiled(*written(kind, content), tokenizer)


def written(kind: str, content: Any) -> tuple[str, str]:
    """Kind and text of a grammar, as `grammar_trial` takes them; RequestError for a kind that is none."""
    if kind not in KINDS:
        raise RequestError(f"the grammar's kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind == "json_object":
        kind, content = "json_schema", {"type": "object"}
    return kind, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


class Grammar:
    """A compiled grammar over one tokenizer, for any number of texts."""

    def __init__(self, definition: str, tokenizer: Tokenizer, limits: LLParserLimits | None = None) -> None:
        """definition  in llguidance's own form; ValueError where it is none
        limits      how much work one token may be
        """
        self._tokens = _llguidance_tokenizer(tokenizer)
        self._start = start_of(self._tokens, definition, limits)

    def constraint(self, vocab_size: int, eos_ids: Iterable[int] = ()) -> "GrammarConstraint":
        """A text at its beginning.

        vocab_size  rows of the model's vocabulary, at least the tokenizer's
        eos_ids     tokens that end the request; special ones may come where the text may end, others as text alone
        """
        ends = {token for token in eos_ids if token < self._tokens.vocab_size and self._tokens.is_special_token(token)}
        return GrammarConstraint(self._start, vocab_size, self._tokens.eos_token, ends)


class GrammarConstraint:
    """How far one text has come in its grammar: a `rules.Constraint`.

    A grammar that asks for more work than one token may be ends the text there, as if it were finished; `failure` says
    so.
    """

    def __init__(self, start: LLMatcher, vocab_size: int, end_id: int, ends: set[int]) -> None:
        self._start, self._vocab_size = start, vocab_size
        self._end_id, self._ends = end_id, ends or {end_id}
        self._said: list[int] = []
        self._matcher = start.deep_copy()

    @property
    def finished(self) -> bool:
        """Nothing but end-of-text may follow."""
        return self._ended or self._matcher.is_stopped()

    @property
    def failure(self) -> str | None:
        """Why the text ended before its grammar did; None where it did not."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Bool [len(tokens) + 1, V]: what may follow after none, one, .., all of `tokens`; see `rules.Constraint`."""
        allowed = torch.ones(len(tokens) + 1, self._vocab_size, dtype=torch.bool)
        said_len = len(self._said)
        for row, token in zip(allowed, [*tokens, None]):
            row.copy_(self._next())
            if token is None or not row[token]:
                break
            self.advance([token])
        self.retreat(len(self._said) - said_len)
        return allowed

    def advance(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to the text. One that is not allowed is a failure, too."""
        self._said += tokens
        self._read(tokens)

    def retreat(self, count: int) -> None:
        """Take the last `count` tokens from the text."""
        kept_len = len(self._said) - count
        taken, self._said = self._said[kept_len:], self._said[:kept_len]
        if not self._matcher.is_error():
            self._matcher.rollback(sum(token not in self._ends for token in taken))
        elif count:  # a matcher that failed never recovers
            self._matcher = self._start.deep_copy()
            self._read(self._said)

    @property
    def _ended(self) -> bool:
        return bool(self._said) and self._said[-1] in self._ends

    def _read(self, tokens: Sequence[int]) -> None:
        """The matcher never sees the end of a text: it would not count it when it rolls back."""
        self._matcher.consume_tokens([token for token in tokens if token not in self._ends])

    def _next(self) -> Tensor:
        """Bool [V]: what may follow now."""
        row = torch.zeros(self._vocab_size, dtype=torch.bool)
        may_end = self._ended
        if not may_end:
            bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
            row[: len(bias)] = bias != 0
            may_end = bool(row[self._end_id])
            row[self._end_id] = False
        row[list(self._ends)] = may_end
        return row


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

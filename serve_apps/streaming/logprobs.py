"""The log probabilities of tokens, in the form of the responses.

A token appears by its text. For special tokens, and for tokens whose bytes are no text, see `Tokenizer.spell`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from serve_apps.messages.token_scores import (
    ChatLogprob,
    ChatTokenLogprob,
    Logprobs,
    PlainScores,
    PromptScores,
    TokenScore,
)

if TYPE_CHECKING:
    from tidar_core.decoding.request import TokenLogprob

__all__ = ["ChatScoreSheet", "ScoreSheet", "prompt_scores", "score_models"]

LEAST = -9999.0
"""Value for minus infinity, as in vLLM: JSON has no such number."""

Spell = Callable[[int], str]


class ScoreSheet:
    """The scored tokens of one text, in the form of completions. Each is taken with its text."""

    def __init__(self, spell: Spell, top: int) -> None:
        """top  number of likeliest tokens in the response for each token"""
        self._spell, self._top = spell, top
        self._waiting: deque[tuple[int, int, int, TokenLogprob | None]] = deque()

    def add(self, token_id: int, scored: "TokenLogprob | None", start: int, end: int) -> None:
        """Add the next token, and where its text begins and ends. A token without a predecessor has no score."""
        self._waiting.append((start, end, token_id, scored))

    def take(self, sent_len: int | None) -> "Logprobs | list[ChatTokenLogprob]":
        """Tokens not taken yet whose text ends within the first `sent_len` characters; all if it is None."""
        taken = Logprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for start, token_id, scored in self._taken(sent_len):
            taken.text_offset.append(start)
            taken.tokens.append(self._spell(token_id))
            taken.token_logprobs.append(None if scored is None else max(scored.logprob, LEAST))
            taken.top_logprobs.append(None if scored is None else self._likeliest(scored))
        return taken

    def _taken(self, sent_len: int | None) -> "Iterator[tuple[int, int, TokenLogprob | None]]":
        while self._waiting and (sent_len is None or self._waiting[0][1] <= sent_len):
            start, _, token_id, scored = self._waiting.popleft()
            yield start, token_id, scored

    def _likeliest(self, scored: "TokenLogprob") -> dict[str, float]:
        """Likeliest tokens and the token itself, by text. Two tokens with the same text count as the likelier."""
        likeliest: dict[str, float] = {}
        for token_id, logprob in (*scored.top[: self._top], (scored.token_id, scored.logprob)):
            likeliest.setdefault(self._spell(token_id), max(logprob, LEAST))
        return likeliest


class ChatScoreSheet(ScoreSheet):
    """The scored tokens of one text, in the form of chats: with bytes, and the likeliest tokens in order."""

    def __init__(self, spell: Spell, top: int, bytes_of: Callable[[int], bytes]) -> None:
        super().__init__(spell, top)
        self._bytes_of = bytes_of

    def take(self, sent_len: int | None) -> list[ChatTokenLogprob]:
        """Tokens not taken yet whose text ends within the first `sent_len` characters; all if it is None."""
        taken = []
        for _, token_id, scored in self._taken(sent_len):
            assert scored is not None, "a chat has no echo"
            top = [self._scored(*likely) for likely in scored.top[: self._top]]
            taken.append(ChatTokenLogprob(**self._scored(token_id, scored.logprob).model_dump(), top_logprobs=top))
        return taken

    def _scored(self, token_id: int, logprob: float) -> ChatLogprob:
        return ChatLogprob(
            token=self._spell(token_id), logprob=max(logprob, LEAST), bytes=list(self._bytes_of(token_id))
        )


def prompt_scores(scored: "Sequence[TokenLogprob]", top: int, spell: Spell) -> PlainScores:
    """Scores of a prompt: an entry for each token. They are made in the decoder's thread, so they are no models yet.

    scored  scores of all tokens but the first
    """
    names: dict[int, str] = {}

    def name(token_id: int) -> str:
        if token_id not in names:
            names[token_id] = spell(token_id)
        return names[token_id]

    return [None, *(_prompt_token(token, top, name) for token in scored)]


def score_models(scores: PlainScores) -> PromptScores:
    """Scores of a prompt in vLLM's form."""
    return [
        None if entry is None else {token: _score_model(*values) for token, values in entry.items()} for entry in scores
    ]


def _score_model(logprob: float, rank: int | None, text: str) -> TokenScore:
    return TokenScore(logprob=logprob, rank=rank, decoded_token=text)


def _prompt_token(scored: "TokenLogprob", top: int, spell: Spell) -> dict[int, tuple[float, int | None, str]]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(scored.top, 1)}
    chosen = ((scored.token_id, scored.logprob), *scored.top[:top])
    return {token_id: (max(logprob, LEAST), ranks.get(token_id), spell(token_id)) for token_id, logprob in chosen}

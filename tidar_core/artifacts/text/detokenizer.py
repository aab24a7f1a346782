"""The text that each token adds to a text.

Tokens come one by one, and each takes constant time, whatever its bytes. Text goes on where the tokens before it ended:
a space at the beginning of a SentencePiece token is dropped at the beginning of the whole text alone.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

__all__ = ["Detokenizer", "TextStream", "parts_of"]

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
AS_BYTES = "bytes:"
"""Begins the name of a token whose bytes are no text."""
AS_ID = "token_id:"
"""Begins the name of a token that has no other name of its own."""
TAIL = 4
"""The last tokens of a prompt that decide how a text goes on: the bytes of a character are never spread over more."""


def parts_of(component: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer, a pre-tokenizer or a decoder, in order, as tokenizer.json describes them."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


class Detokenizer:
    """The texts, bytes and names of a vocabulary's tokens."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        kinds = {part["type"] for part in parts_of(fast.decoder)}
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._added = fast.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in self._added.items() if token.special)
        """Ids of the special tokens."""

    def has_text(self, token_id: int, *, skip_special: bool) -> bool:
        """Whether `decode` reads a token: it passes over unused rows, and over special tokens if they are skipped."""
        return not (skip_special and token_id in self.special) and self._fast.id_to_token(token_id) is not None

    @property
    def one_for_each(self) -> bool:
        """Each byte that is no text becomes a U+FFFD of its own (byte fallback); otherwise each broken character."""
        return self._byte_fallback

    def raw(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for; None for a token that stands for characters, and for an unused row."""
        content = self._fast.id_to_token(token_id)
        return None if content is None else self._raw(content)

    def behind(self, left: int | None, token_id: int) -> str:
        """The text of a token that stands for characters, behind the token `left`; None: at the beginning of a text."""
        if left is None:
            return self._decode([token_id])
        return self._decode([left, token_id])[len(self._decode([left])) :]

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text; the name of a special token; nothing for an unused row."""
        return self._bytes.get(token_id, b"")

    def name(self, token_id: int) -> str:
        """A name of the token alone: its text, or its bytes, or its spelling in the vocabulary, or its id."""
        return self._names.get(token_id) or f"{AS_ID}{token_id}"

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """What each token of the vocabulary adds to a text, behind a token such as itself."""
        contents = {token_id: name for name, token_id in self._fast.get_vocab(with_added_tokens=True).items()}
        known = {token_id: self._added[token_id].content.encode() for token_id in self.special}
        known |= {i: raw for i, name in contents.items() if i not in known and (raw := self._raw(name)) is not None}
        rest = [token_id for token_id in contents if token_id not in known]
        alone = self._fast.decode_batch([[token_id] for token_id in rest], skip_special_tokens=False)
        twice = self._fast.decode_batch([[token_id, token_id] for token_id in rest], skip_special_tokens=False)
        return known | {i: second[len(first) :].encode() for i, first, second in zip(rest, alone, twice)}

    @cached_property
    def _names(self) -> dict[int, str]:
        """Special tokens choose their names first, then tokens of the model, then added ones, then single bytes."""
        single = [] if not self._byte_fallback else [self._fast.token_to_id(name) for name in FALLBACKS]
        later = {*self._added, *single}
        model = [token_id for token_id in self._bytes if token_id not in later]
        names: dict[int, str] = {}
        taken: set[str] = {""}
        for token_id in dict.fromkeys([*sorted(self.special), *model, *sorted(self._added), *single]):
            if token_id in self._bytes:
                names[token_id] = next(name for name in self._candidates(token_id) if name not in taken)
                taken.add(names[token_id])
        return names

    def _candidates(self, token_id: int) -> Iterator[str]:
        content = self._bytes[token_id]
        with suppress(UnicodeDecodeError):
            yield content.decode()
        yield AS_BYTES + "".join(rf"\x{byte:02x}" for byte in content)
        yield self._fast.id_to_token(token_id) or ""
        yield f"{AS_ID}{token_id}"

    def _raw(self, content: str) -> bytes | None:
        if self._byte_level:
            try:
                return bytes(map(LEVELS.__getitem__, content))
            except KeyError:
                return content.encode()
        return bytes([FALLBACKS[content]]) if self._byte_fallback and content in FALLBACKS else None

    def _decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)


class TextStream:
    """Ids in, pieces of text out; the pieces join to what `decode` has behind the text of `after`.

    Held back: a character whose bytes have not all come. Where bytes are no UTF-8, characters that are whole stay as
    they are, and each broken one becomes U+FFFD: as in byte-level decoders; byte-fallback ones spoil the whole run.
    """

    def __init__(self, tokens: Detokenizer, *, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._tokens, self._skip_special = tokens, skip_special
        self._left: int | None = None
        """The last token that has a text."""
        self._open = b""
        """Bytes that may begin a character."""
        self._shown = ""
        """What stands for the open bytes at the end of the text of `after`."""
        for token_id in self._tail(after):
            self.push(token_id)
        self._shown = self._characters(self._open, whole=True)[0]

    def push(self, token_id: int) -> str:
        """The text that is certain now; may be empty."""
        if not self._tokens.has_text(token_id, skip_special=self._skip_special):
            return ""
        raw = self._tokens.raw(token_id)
        if raw is None:
            piece = self._closed() + self._tokens.behind(self._left, token_id)
        elif self._left is None and len(raw) == 1 and raw.isascii():
            piece = self._tokens.behind(None, token_id)
        else:
            piece, self._open = self._characters(self._open + raw, whole=False)
        self._left = token_id
        return self._fresh(piece)

    def flush(self) -> str:
        """What was held back; the stream starts anew."""
        piece = self._fresh(self._closed())
        self._left, self._shown = None, ""
        return piece

    def _tail(self, after: Sequence[int]) -> list[int]:
        """The last tokens of `after` that have a text, and none but them."""
        with_text = (
            token for token in reversed(after) if self._tokens.has_text(token, skip_special=self._skip_special)
        )
        return list(islice(with_text, TAIL))[::-1]

    def _closed(self) -> str:
        piece, self._open = self._characters(self._open, whole=True)
        return piece

    def _fresh(self, piece: str) -> str:
        """`piece` without what the text of `after` already shows of it."""
        if not piece or not self._shown:
            return piece
        same = 0
        while same < min(len(piece), len(self._shown)) and piece[same] == self._shown[same]:
            same += 1
        self._shown = ""
        return piece[same:]

    def _characters(self, content: bytes, *, whole: bool) -> tuple[str, bytes]:
        """The characters of some bytes, and the bytes at their end that may begin another; none where it is `whole`."""
        text = ""
        while content:
            try:
                return text + content.decode(), b""
            except UnicodeDecodeError as error:
                text += content[: error.start].decode()
                if error.reason == "unexpected end of data" and not whole:
                    return text, content[error.start :]
                text += UNDECODABLE * (error.end - error.start if self._tokens.one_for_each else 1)
                content = content[error.end :]
        return text, b""


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = next((part[name] for name in ("normalizers", "pretokenizers", "decoders") if name in part), None)
    if inner is None:
        yield part
    else:
        for each in inner:
            yield from _flat(each)


def _levels() -> dict[str, int]:
    """The bytes by the characters that stand for them in byte-level vocabularies (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


LEVELS = _levels()
FALLBACKS = {f"<0x{byte:02X}>": byte for byte in range(256)}
"""The bytes by their spelling in vocabularies with byte fallback."""

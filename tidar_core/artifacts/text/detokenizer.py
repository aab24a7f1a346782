"""Incremental detokenizer: the text that each new token adds to a sequence.

Each token takes constant time, whatever its bytes. New text continues the text of the tokens before it. The space at
the beginning of a SentencePiece token is therefore dropped only at the beginning of the whole text.
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
"""Prefix of the name of a token whose bytes are not UTF-8."""
AS_ID = "token_id:"
"""Prefix of the name of a token that has no other unique name."""
TAIL = 4
"""How many last tokens of a prompt decide how the text continues: a character has at most four bytes."""


def parts_of(component: Any) -> list[dict[str, Any]]:
    """The parts of a normalizer, a pre-tokenizer or a decoder, in order, as tokenizer.json describes them."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


class Detokenizer:
    """Texts, bytes and names of the tokens in a vocabulary."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        kinds = {part["type"] for part in parts_of(fast.decoder)}
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._added = fast.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in self._added.items() if token.special)
        """Ids of the special tokens."""

    def has_text(self, token_id: int, *, skip_special: bool) -> bool:
        """Whether `decode` reads a token. It ignores unused entries, and special tokens if they are skipped."""
        return not (skip_special and token_id in self.special) and self._fast.id_to_token(token_id) is not None

    @property
    def replaces_each_byte(self) -> bool:
        """Whether each undecodable byte becomes a U+FFFD (byte fallback); otherwise each broken character does."""
        return self._byte_fallback

    def raw(self, token_id: int) -> bytes | None:
        """The bytes that a token represents; None for a token of characters and for an unused entry."""
        content = self._fast.id_to_token(token_id)
        return None if content is None else self._raw(content)

    def text_after(self, left: int | None, token_id: int) -> str:
        """The text of a token of characters after the token `left`. `None`: the token begins the text."""
        if left is None:
            return self._decode([token_id])
        return self._decode([left, token_id])[len(self._decode([left])) :]

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: for a special token its name, for an unused entry none."""
        return self._bytes.get(token_id, b"")

    def name(self, token_id: int) -> str:
        """A unique name of the token: its text, its bytes, its spelling in the vocabulary, or its id."""
        return self._names.get(token_id) or f"{AS_ID}{token_id}"

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        """The bytes that each token of the vocabulary adds to a text, measured after the same token."""
        contents = {token_id: name for name, token_id in self._fast.get_vocab(with_added_tokens=True).items()}
        known = {token_id: self._added[token_id].content.encode() for token_id in self.special}
        known |= {i: raw for i, name in contents.items() if i not in known and (raw := self._raw(name)) is not None}
        rest = [token_id for token_id in contents if token_id not in known]
        alone = self._fast.decode_batch([[token_id] for token_id in rest], skip_special_tokens=False)
        twice = self._fast.decode_batch([[token_id, token_id] for token_id in rest], skip_special_tokens=False)
        return known | {i: second[len(first) :].encode() for i, first, second in zip(rest, alone, twice)}

    @cached_property
    def _names(self) -> dict[int, str]:
        """Unique names by id, assigned to special tokens first, then model tokens, added tokens and single bytes."""
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
    """Turns ids into text deltas. Joined, they equal the text that `decode` adds after the text of `after`.

    A character is held back until all its bytes have come. If bytes are not UTF-8, whole characters stay and each
    broken character becomes U+FFFD, as in byte-level decoders. Byte-fallback decoders replace the whole run of bytes
    instead.
    """

    def __init__(self, tokens: Detokenizer, *, skip_special: bool = True, after: Sequence[int] = ()) -> None:
        self._tokens, self._skip_special = tokens, skip_special
        self._left: int | None = None
        """The last token that has a text."""
        self._open = b""
        """Bytes that may be the beginning of a character."""
        self._shown = ""
        """The characters that the text of `after` already shows for the open bytes at its end."""
        for token_id in self._tail(after):
            self.push(token_id)
        self._shown = self._characters(self._open, whole=True)[0]

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain, which may be empty."""
        if not self._tokens.has_text(token_id, skip_special=self._skip_special):
            return ""
        raw = self._tokens.raw(token_id)
        if raw is None:
            delta = self._closed() + self._tokens.text_after(self._left, token_id)
        elif self._left is None and len(raw) == 1 and raw.isascii():
            delta = self._tokens.text_after(None, token_id)
        else:
            delta, self._open = self._characters(self._open + raw, whole=False)
        self._left = token_id
        return self._fresh(delta)

    def flush(self) -> str:
        """Return the text that was held back and reset the stream."""
        delta = self._fresh(self._closed())
        self._left, self._shown = None, ""
        return delta

    def _tail(self, after: Sequence[int]) -> list[int]:
        """The last `TAIL` tokens of `after` that have a text."""
        with_text = (
            token for token in reversed(after) if self._tokens.has_text(token, skip_special=self._skip_special)
        )
        return list(islice(with_text, TAIL))[::-1]

    def _closed(self) -> str:
        delta, self._open = self._characters(self._open, whole=True)
        return delta

    def _fresh(self, delta: str) -> str:
        """`delta` without the characters that the text of `after` already shows."""
        if not delta or not self._shown:
            return delta
        same = 0
        while same < min(len(delta), len(self._shown)) and delta[same] == self._shown[same]:
            same += 1
        self._shown = ""
        return delta[same:]

    def _characters(self, content: bytes, *, whole: bool) -> tuple[str, bytes]:
        """The characters of some bytes, and the last bytes that may begin another character (no bytes if `whole`)."""
        text = ""
        while content:
            try:
                return text + content.decode(), b""
            except UnicodeDecodeError as error:
                text += content[: error.start].decode()
                if error.reason == "unexpected end of data" and not whole:
                    return text, content[error.start :]
                text += UNDECODABLE * (error.end - error.start if self._tokens.replaces_each_byte else 1)
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
    """The bytes by the characters that represent them in byte-level vocabularies (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


LEVELS = _levels()
FALLBACKS = {f"<0x{byte:02X}>": byte for byte in range(256)}
"""The bytes by their spelling in vocabularies with byte fallback."""

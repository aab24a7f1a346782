"""How does text become token ids, and ids text?

`Tokenizer` wraps a Hugging Face fast tokenizer. Text is plain text unless a method says otherwise: nothing is added to
it (no BOS, no EOS), and a string in it that looks like a special token, such as <|endoftext|>, is split like any other
word. Conversations, whose templates speak special tokens: `chat_tokens`. Added tokens that
the tokenizer does not call special (Qwen's <think>, for one) stay single tokens. The mask token is no token of the
tokenizer: it is a row of the vocabulary at or above `vocab_len`, so no text can ever contain it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tidar_core.artifacts import locations
from tidar_core.artifacts.chat_template import ChatTemplate
from tidar_core.errors import TokenizerError, UserError

__all__ = ["TextStream", "Tokenizer", "load_tokenizer", "train_bpe"]

END_OF_TEXT = "<|endoftext|>"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces within which BPE merges: words with the space before them, up to three digits, runs of signs, runs of white
space, so that an indentation is one token."""

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
AS_BYTES = "bytes:"
"""What the name of a token begins with whose bytes are no text."""
LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character, so the tokens over which one can be spread."""


def load_tokenizer(uri: str | Path) -> "Tokenizer":
    """The tokenizer in a Hugging Face folder: tokenizer.json and tokenizer_config.json. Never goes to the network."""
    folder = locations.local_copy(str(uri))
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError(f"{uri} holds no tokenizer.json; give the folder of a Hugging Face fast tokenizer")
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the loader raises whatever its parsers do
        raise TokenizerError(f"the tokenizer in {uri} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise TokenizerError(
            f"{uri} opens as {type(loaded).__name__}; give the folder of a Hugging Face fast tokenizer"
        )
    if loaded.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer in {uri} names no end-of-text token; documents cannot be told apart without one: "
            "set eos_token in its tokenizer_config.json"
        )
    return Tokenizer(loaded)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, <|endoftext|> (id 0) included.

    Deterministic: the same texts give the same tokenizer, whatever the number of threads.
    """
    if vocab_size < 257:
        raise TokenizerError(f"vocab_size is {vocab_size}; 256 bytes and {END_OF_TEXT} need at least 257")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END_OF_TEXT))


class Tokenizer:
    """Text to ids and back, always the same way."""

    def __init__(self, loaded: PreTrainedTokenizerFast) -> None:
        self._loaded = loaded
        self._fast: FastTokenizer = loaded.backend_tokenizer
        self._fast.encode_special_tokens = True
        self._fast.no_truncation()
        self._fast.no_padding()
        self.eos_id: int = loaded.eos_token_id
        """The end-of-text token: put after every document, ends every generation."""
        self.vocab_len: int = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        """Rows of the vocabulary that can stand for text; a model's rows from here on are unused."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids: equal for tokenizers that encode alike."""
        content = locations.canonical_json([json.loads(self.fast_json), self.eos_id])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def fast_json(self) -> str:
        """The fast tokenizer as Hugging Face writes it into tokenizer.json."""
        return self._fast.to_str()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added. Raises UserError for half a character (a lone surrogate)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, framed: bool = False) -> list[list[int]]:
        """The ids of each text: `encode`, many at once.

        framed  with the special tokens that the tokenizer puts around a text, such as Llama's <|begin_of_text|>
        """
        for text in texts:
            _require_characters(text)
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=framed)]

    def encode_spoken(self, text: str) -> list[int]:
        """The ids of `text`, in which a special token's name is that token. Never for what a user wrote."""
        _require_characters(text)
        return self._special_reader.encode(text, add_special_tokens=False).ids

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Special tokens by their names."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Unused rows have none; bytes that are no UTF-8 become U+FFFD.

        skip_special  special tokens have none either; otherwise their names
        """
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def spell(self, token_id: int) -> str:
        """A name for one token: its text, a special token's too; bytes that are no UTF-8 as `bytes:\\xe2\\x80`."""
        text = self._fast.decode([token_id], skip_special_tokens=False)
        if UNDECODABLE not in text:
            return text
        name = self._fast.id_to_token(token_id) or ""
        written = [name] if name in BYTES else list(name)
        return AS_BYTES + "".join(rf"\x{BYTES[sign]:02x}" for sign in written) if BYTES.keys() >= set(written) else text

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text; a special token's name; nothing for an unused row."""
        name = self.spell(token_id)
        written = re.fullmatch(AS_BYTES + r"((\\x[0-9a-f]{2})+)", name)
        return bytes.fromhex(written[1].replace(r"\x", "")) if written else name.encode()

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """A decoder for ids that come one by one."""
        return TextStream(self._fast, skip_special=skip_special)

    def adopt_chat_template(self, template: ChatTemplate | None) -> None:
        """From now on `save` writes this chat template beside the tokenizer; None: none."""
        self._loaded.chat_template = None if template is None else dict(template.sources)

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer` and transformers open."""
        self._fast.encode_special_tokens = False  # how others read the file is theirs to choose
        try:
            self._loaded.save_pretrained(folder)
        finally:
            self._fast.encode_special_tokens = True

    @cached_property
    def _special_reader(self) -> FastTokenizer:
        """A twin that takes special tokens by their names; the setting is no argument of `encode`."""
        return FastTokenizer.from_str(self.fast_json)


class TextStream:
    """Ids in, pieces of text out; the pieces join to the text of all ids.

    Held back: a character whose bytes have not all come. Exact for byte-level tokenizers; with a decoder of the
    SentencePiece kind, bytes that never become UTF-8 may be cut into other replacement characters.
    """

    def __init__(self, fast: FastTokenizer, *, skip_special: bool = True) -> None:
        self._fast, self._skip_special = fast, skip_special
        self._ids: list[int] = []
        self._said = 0
        """Characters of the text of `_ids` already given out."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; may be empty."""
        self._ids.append(token_id)
        text = self._text(self._ids)
        ends_open = len(text) - len(text.rstrip(UNDECODABLE))
        piece = self._take(text, len(text) - min(ends_open, LONGEST_CHARACTER))
        if piece and not ends_open:
            self._ids = [token_id]  # what comes next may depend on its left neighbour, never on more
            self._said = len(self._text(self._ids))
        return piece

    def flush(self) -> str:
        """What was held back; the stream starts anew."""
        text = self._text(self._ids)
        piece = self._take(text, len(text))
        self._ids, self._said = [], 0
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=self._skip_special)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._said : end]
        self._said = max(self._said, end)
        return piece


def _bytes_as_written() -> dict[str, int]:
    """The ways to write a byte: <0xE2> in byte-fallback vocabularies, one character in byte-level ones (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    levels = {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    return levels | {f"<0x{byte:02X}>": byte for byte in range(256)}


BYTES = _bytes_as_written()


def _require_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text holds half a character at {error.start}, which no text can; give valid UTF-8") from error

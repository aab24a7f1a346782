"""Tokenizers, which turn text into token ids and ids into text.

`Tokenizer` wraps a Hugging Face fast tokenizer. Text is plain text unless the docstring of a method defines otherwise.
Nothing is added to plain text (no BOS, no EOS). A string in it that looks like a special token, such as <|endoftext|>,
is split like any other word. `chat_tokens` encodes conversations, because templates write special tokens.

Added tokens that the tokenizer does not call special (e.g. Qwen's <think>) stay single tokens. The mask token is not a
token of the tokenizer. It is an entry of the vocabulary at or above `vocab_len`, so no text can ever contain it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.chat_template import (
    DEFAULT,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    ChatTemplate,
    content_of,
    template_sources,
    tokenizer_config,
)
from tidar_core.artifacts.text.detokenizer import Detokenizer, TextStream, parts_of
from tidar_core.errors import TokenizerError, UserError

__all__ = ["TOKENIZER_JSON", "Tokenizer", "load_tokenizer", "train_bpe"]

TOKENIZER_JSON, CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression of the strings within which BPE merges.

Such a string is a word with the space before it, up to three digits, a run of punctuation or a run of white space. An
indentation is therefore one token.
"""

LONGEST_RUN = 256
"""Letters, signs or white space of a string that training reads as a whole. Its time grows with the square of the
length, so a longer string, such as a line of a million dashes, is cut. Encoding cuts no string."""

GENERIC_CLASS = "PreTrainedTokenizerFast"
"""The class that `save` names: with it, transformers uses tokenizer.json unchanged. Other classes may rebuild it."""
CHARACTERS_BEFORE = ("\n", ".", "a", "0")
"""Characters for `encode_continuation`; it uses the first that no token joins with the text after it."""
WHITE_SPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace() and not "\x1c" <= char <= "\x1f")
"""Characters that an added token includes beside its name if it has `lstrip` or `rstrip`."""
NOT_SAVED = ("chat_template", "auto_map", "add_bos_token", "add_eos_token")
"""Settings that are saved elsewhere, or that would make transformers deviate from tokenizer.json."""


def load_tokenizer(uri: str | Path) -> "Tokenizer":
    """The tokenizer that tokenizer.json in a Hugging Face folder defines, whatever class other files name.

    The end-of-text token and the chat templates come from tokenizer_config.json. Nothing is downloaded from a model
    hub. Raises TokenizerError if a file is missing or cannot be read.
    """
    folder = locations.local_copy(str(uri))
    if not (folder / TOKENIZER_JSON).is_file():
        raise TokenizerError(f"{uri} holds no {TOKENIZER_JSON}; give the folder of a Hugging Face fast tokenizer")
    try:
        fast = FastTokenizer.from_file(str(folder / TOKENIZER_JSON))
        config, templates = tokenizer_config(folder), template_sources(folder)
        _require_added_tokens(fast, config, str(uri))
        if config.get("eos_token") is None:
            config["eos_token"] = _end_of_text_of_model(fast, folder / "config.json")
    except TokenizerError:
        raise
    except Exception as error:  # the parser of `tokenizers` raises Exception itself
        raise TokenizerError(f"the tokenizer in {uri} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if (name := config["eos_token"]) is None:
        raise TokenizerError(
            f"the tokenizer in {uri} names no end-of-text token; documents must be separated by it: "
            f"set eos_token in its {CONFIG_JSON}"
        )
    if fast.token_to_id(content_of(name)) is None:
        raise TokenizerError(
            f"the end-of-text token {content_of(name)!r} of {uri} is no token of its {TOKENIZER_JSON}; fix eos_token"
        )
    return Tokenizer(fast, config, templates)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, including <|endoftext|> (id 0).

    Training is deterministic: the same texts give the same tokenizer, whatever the number of threads.
    """
    if vocab_size < 257:
        raise TokenizerError(f"vocab_size is {vocab_size}; 256 bytes and {END_OF_TEXT} need at least 257")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = _words(WORDS.replace("+", f"{{1,{LONGEST_RUN}}}").replace("*", f"{{0,{LONGEST_RUN}}}"))
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    fast.pre_tokenizer = _words(WORDS)
    return Tokenizer(fast, {"eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False})


def _words(regex: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that splits a text into the matches of `regex`, and these into bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class Tokenizer:
    """Turns text into ids and ids into text; the same text always has the same ids."""

    def __init__(
        self, fast: FastTokenizer, config: Mapping[str, Any], templates: Mapping[str, str] | None = None
    ) -> None:
        """Wrap `fast`, without its truncation and padding.

        config     content of tokenizer_config.json; its eos_token is a token of `fast`
        templates  sources of chat templates by name
        """
        self._fast, self._config = _reading_names_as_text(fast), dict(config)
        self._fast.no_truncation()
        self._fast.no_padding()
        self._tokens = Detokenizer(fast)
        self.templates = dict(templates or {})
        """Sources of the chat templates by name, which `save` writes beside the tokenizer."""
        eos_id = fast.token_to_id(content_of(config["eos_token"]))
        assert eos_id is not None, "the end-of-text token is not a token of the tokenizer"
        self.eos_id: int = eos_id
        """Id of the end-of-text token, which is put after every document and ends every generation."""
        self.vocab_len: int = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        """Entries of the vocabulary that can represent text; a model's entries from this id on are unused."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines ids; it is equal for tokenizers that encode alike."""
        content = locations.canonical_json([json.loads(self.fast_json), self.eos_id])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def fast_json(self) -> str:
        """The content of tokenizer.json as Hugging Face writes it."""
        return self._fast.to_str()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added. Raises UserError for half a character (a lone surrogate)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, framed: bool = False) -> list[list[int]]:
        """The ids of each text, as from `encode`.

        framed  with the special tokens that the tokenizer puts around a text, such as Llama's <|begin_of_text|>
        """
        for text in texts:
            _require_characters(text)
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=framed)]

    def encode_part(self, text: str, *, before: str, after: str = "") -> list[int]:
        """The ids that a part has within its whole text: no space is added where the whole text has none.

        before, after  the whole text on both sides of `text`, or at least as much of it as the longest name of an
                       added token
        """
        left, right = (self._added_at(before, str.endswith), self._added_at(after, str.startswith))
        text = text.lstrip(WHITE_SPACE) if left is not None and left.rstrip else text
        text = text.rstrip(WHITE_SPACE) if right is not None and right.lstrip else text
        if not text:
            return []
        is_beginning = not before or (left is not None and self._prefix != "first")
        return self.encode(text) if is_beginning else self.encode_continuation(text)

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of `text` that follows other text: no space is added to its beginning."""
        if self._prefix == "none":
            return self.encode(text)
        for character in CHARACTERS_BEFORE:
            alone, ids = self.encode_batch([character, character + text])
            if ids[: len(alone)] == alone:
                return ids[len(alone) :]
        return self.encode(text)

    def offsets(self, text: str, *, framed: bool = False) -> list[int]:
        """Offset in `text`, in characters, where the text of each token of `encode_batch` begins."""
        begins, end = [], 0
        for token_begin, token_end in self._plain.encode(text, add_special_tokens=framed).offsets:
            trimmed = text[
                end:token_begin
            ].isspace()  # a post-processor trims the offset; the space still belongs to the token
            begins.append(end if trimmed or not token_end else token_begin)  # a framing token has no text
            end = max(end, token_end)
        return begins

    def encode_with_special(self, text: str) -> list[int]:
        """The ids of `text`, in which the name of a special token becomes that token. Never use it on user text."""
        _require_characters(text)
        return self._special_reader.encode(text, add_special_tokens=False).ids

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Special tokens by their names."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def id_of(self, name: str) -> int | None:
        """The id of the token with this spelling in the vocabulary, special or not; None if there is none."""
        return self._fast.token_to_id(name)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Unused entries have no text; bytes that are not UTF-8 become U+FFFD.

        skip_special  special tokens have no text; otherwise their text is their name
        """
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    def continued(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add after the text of `prompt`; special tokens have no text."""
        stream = self.stream(after=prompt)
        return "".join(map(stream.push, ids)) + stream.flush()

    def spell(self, token_id: int) -> str:
        """The unique name of a token: its text, or e.g. `bytes:\\xe2\\x80` if its bytes are not UTF-8."""
        return self._tokens.name(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: for a special token its name, for an unused entry none."""
        return self._tokens.bytes_of(token_id)

    def stream(self, *, skip_special: bool = True, after: Sequence[int] = ()) -> TextStream:
        """An incremental detokenizer whose text continues the text of the ids `after`."""
        return TextStream(self._tokens, skip_special=skip_special, after=after)

    def adopt_chat_template(self, template: ChatTemplate | None) -> None:
        """Set the chat template that `save` writes beside the tokenizer. `None` removes it."""
        self.templates = {} if template is None else dict(template.sources)

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer` reads and that give the same ids in transformers."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        (where / TOKENIZER_JSON).write_text(self._fast.to_str(pretty=True), encoding="utf-8")
        config = {name: value for name, value in self._config.items() if name not in NOT_SAVED}
        locations.write_json(str(where / CONFIG_JSON), config | {"tokenizer_class": GENERIC_CLASS})
        for name, source in self.templates.items():
            file = where / (TEMPLATE_FILE if name == DEFAULT else f"{TEMPLATE_FOLDER}/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(source, encoding="utf-8")

    @cached_property
    def _prefix(self) -> Literal["none", "first", "each"]:
        """Which parts of a text between its added tokens get a space at their beginning.

        "none": no part; "first": the first part; "each": each part. It is "each", too, if the tokenizer drops white
        space at the beginning of a text.
        """
        found = set()
        for part in [*parts_of(self._fast.normalizer), *parts_of(self._fast.pre_tokenizer)]:
            if part["type"] == "Metaspace":
                found.add({"first": "first", "always": "each"}.get(part["prepend_scheme"], "none"))
            if part["type"] == "Prepend" or part.get("add_prefix_space") or part.get("strip_left"):
                found.add("each")
        return "each" if "each" in found else "first" if "first" in found else "none"

    def _added_at(self, text: str, at: Callable[[str, str], bool]) -> AddedToken | None:
        """The longest added token whose name is at the beginning or end of `text`, as `at` tests it."""
        return next((token for token in self._added if at(text, token.content)), None)

    @cached_property
    def _added(self) -> list[AddedToken]:
        added = self._fast.get_added_tokens_decoder().values()
        return sorted(added, key=lambda token: len(token.content), reverse=True)

    @cached_property
    def _plain(self) -> FastTokenizer:
        """A tokenizer in which text never becomes a special token.

        A Unigram model has its special tokens in its vocabulary, so the text of a name would become the token. Such a
        tokenizer gets a copy with other names; any other tokenizer is returned itself.
        """
        spec = json.loads(self.fast_json) if isinstance(self._fast.model, models.Unigram) else {"model": {"vocab": []}}
        special = [piece for piece in spec["model"]["vocab"] if piece[0] in self.special_ids]
        if not special:
            return self._fast
        for place, piece in enumerate(special):
            piece[0] = f"\0 {place} \0"  # no text matches: a space becomes another character before the model
        return _reading_names_as_text(FastTokenizer.from_str(json.dumps(spec)))

    @cached_property
    def _special_reader(self) -> FastTokenizer:
        """A copy that reads special tokens by their names, because `encode` has no argument for this setting."""
        return FastTokenizer.from_str(self.fast_json)


def _reading_names_as_text(fast: FastTokenizer) -> FastTokenizer:
    fast.encode_special_tokens = True
    return fast


def _require_added_tokens(fast: FastTokenizer, config: Mapping[str, Any], uri: str) -> None:
    """Raise TokenizerError if tokenizer.json lacks a token of tokenizer_config.json, which transformers would add."""
    added = {token_id: token.content for token_id, token in fast.get_added_tokens_decoder().items()}
    for token_id, token in dict(config.get("added_tokens_decoder") or {}).items():
        if added.get(int(token_id)) != content_of(token):
            raise TokenizerError(
                f"{CONFIG_JSON} of {uri} adds token {content_of(token)!r} as id {token_id}, and {TOKENIZER_JSON} does "
                "not; save the tokenizer with transformers once more"
            )


def _end_of_text_of_model(fast: FastTokenizer, file: Path) -> str | None:
    """The end-of-text token that config.json names; None if it names no token."""
    found = locations.read_json(str(file)).get("eos_token_id") if file.is_file() else None
    first = found[0] if isinstance(found, list) and found else found
    return fast.id_to_token(first) if isinstance(first, int) else None


def _require_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text holds half a character at {error.start}; give valid UTF-8") from error

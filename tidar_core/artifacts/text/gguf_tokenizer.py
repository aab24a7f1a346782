"""Tokenizers of GGUF files, built from their metadata.

Which tokenizer.json do the keys tokenizer.* define?

A GGUF file holds tokens and merges, but only a name of the rule that splits text into words. With another rule a text
gets other ids and no error, so unknown names are refused. Vocabularies of SentencePiece have scores instead of merges.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from tidar_core.artifacts.text.chat_template import DEFAULT
from tidar_core.artifacts.text.tokenizer import WORDS, Tokenizer
from tidar_core.errors import TokenizerError

__all__ = ["gguf_token_ids", "gguf_tokenizer"]

KINDS = ("gpt2", "llama")
"""Byte-level BPE, and BPE of SentencePiece."""
PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Values of token_type."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SINGLE_DIGITS = WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Rule that splits a text into the strings within which byte-level BPE merges."""

    pattern: str | None = None
    """Regular expression of such a string; None: the pattern of GPT-2."""
    digits: bool = False
    """Whether each digit is split off before the pattern is applied."""
    nfc: bool = False
    """Whether text is normalised to composed characters first."""
    whole_words: bool = False
    """Whether a string that is a token becomes this token, whatever the merges."""
    add_bos: bool = False
    """Whether a text begins with the BOS token if the file does not state it."""


DIGITS_FIRST, QWEN = SplitRule(digits=True), SplitRule(pattern=SINGLE_DIGITS, nfc=True)
LLAMA3 = SplitRule(pattern=WORDS, whole_words=True, add_bos=True)
RULES = {
    "smollm": DIGITS_FIRST,
    "starcoder": DIGITS_FIRST,
    "refact": DIGITS_FIRST,
    "gpt-2": SplitRule(),
    "qwen2": QWEN,
    "deepseek-r1-qwen": QWEN,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "tekken": SplitRule(pattern=TEKKEN, whole_words=True, add_bos=True),
}
"""Values of tokenizer.ggml.pre -> rules, as llama.cpp's vocabulary source has them."""
READ = (
    "model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token", "add_space_prefix",
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {"remove_extra_whitespaces": (False,), "token_type_count": (0, 1)}
"""Keys of unsupported features, with the values that change nothing."""
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
"""Token of tokenizer_config.json -> key that names its id."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_LIST = "eos_token_ids"
"""Key of a list of end tokens, which some programs write in addition."""
END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
"""Control tokens that end a text whatever the keys state, as in llama.cpp: a file has one key for the list of ends."""
PROBE = "Hello world, 12345 x\u00e9\u4e16\n\n  def f(a):\treturn a+1 \u2014 it's \N{GRINNING FACE}"
"""Text that must survive encoding and decoding."""


def gguf_tokenizer(fields: Mapping[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata define, with its chat templates.

    Raises TokenizerError for kinds and rules that are not supported, and for metadata that contradict each other.

    fields  metadata by key
    source  name of the file, for errors
    """
    try:
        vocabulary = _Vocabulary(fields, source)
        fast = vocabulary.byte_level() if vocabulary.is_byte_level else vocabulary.sentence_piece()
        vocabulary.add_tokens(fast)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises Exception itself, e.g. for a merge of tokens that do not exist
        raise TokenizerError(
            f"{source} has a tokenizer that does not fit together: {error}; use another file"
        ) from error
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for role, key in ROLES.items():
        if (token_id := vocabulary.special_id(key)) is not None:
            config[f"{role}_token"] = vocabulary.tokens[token_id]
    for key in END_KEYS:
        vocabulary.special_id(key)
    vocabulary.require_tokens(END_LIST)
    if "eos_token" not in config:
        raise TokenizerError(f"{source} has no {PREFIX}eos_token_id, the token that separates documents; add it")
    tokenizer = Tokenizer(fast, config, _templates(fields, source))
    _require_text(tokenizer, source)
    return tokenizer


def gguf_token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The BOS, padding and end tokens, in the form of generation_config.json: several end tokens are a list.

    fields  metadata that `gguf_tokenizer` has accepted
    """
    tokens, types = fields[f"{PREFIX}tokens"], fields[f"{PREFIX}token_type"]
    stated = [fields[PREFIX + name] for name in END_KEYS if PREFIX + name in fields]
    stated += fields.get(PREFIX + END_LIST, [])
    named = [token_id for token_id, name in enumerate(tokens) if types[token_id] == CONTROL and name in END_NAMES]
    ends = list(dict.fromkeys([*stated, *named]))
    found = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if PREFIX + key in fields:
            found[name] = fields[PREFIX + key]
    return found


class _Vocabulary:
    """The metadata of a tokenizer, checked."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self._fields, self._source = fields, source
        kind = self.value("model")
        if kind not in KINDS:
            raise TokenizerError(f"{source} has a tokenizer of kind {kind!r}; {' and '.join(KINDS)} are supported")
        self.is_byte_level = kind == KINDS[0]
        for key, value in fields.items():
            name = key.removeprefix(PREFIX)
            known = name in READ or name.endswith(("_token_id", "_token_ids")) or value in NEUTRAL.get(name, ())
            if key.startswith(PREFIX) and not known:
                raise TokenizerError(f"{source} has {key}, which is not supported; use another file")
        self.tokens: Sequence[str] = self._list("tokens")
        self._types: Sequence[int] = self._list("token_type", len(self.tokens))
        ids = {token: i for i, token in enumerate(self.tokens) if self._types[i] != UNUSED}
        if len(ids) != len(self.tokens) - list(self._types).count(UNUSED):
            raise TokenizerError(f"{source} has two tokens of the same text; use another file")
        self._ids = ids

    def value(self, name: str, default: Any = None) -> Any:
        """The value of a key tokenizer.ggml.NAME."""
        return self._fields.get(PREFIX + name, default)

    def special_id(self, name: str) -> int | None:
        """The token that a key names; None if the key is missing."""
        value = self.value(name)
        if value is None or (type(value) is int and value in self._ids.values()):
            return value
        raise TokenizerError(f"{self._source} has {PREFIX}{name} {value!r}, which is no token; use another file")

    def require_tokens(self, name: str) -> None:
        """Raise TokenizerError if a key has another value than a list of tokens."""
        value = self.value(name, [])
        if not isinstance(value, list) or any(
            type(each) is not int or each not in self._ids.values() for each in value
        ):
            raise TokenizerError(
                f"{self._source} has {PREFIX}{name} {str(value)[:80]}; a list of tokens is needed; use another file"
            )

    def byte_level(self) -> FastTokenizer:
        """BPE over bytes, with the rule that the file names."""
        name = self.value("pre")
        if name not in RULES:
            raise TokenizerError(
                f"{self._source} splits text by rule {name!r} ({PREFIX}pre); {', '.join(RULES)} are supported; use the "
                "model's own safetensors"
            )
        rule = RULES[name]
        merges = [tuple(merge.split(" ")) for merge in self._list("merges")]
        fast = FastTokenizer(models.BPE(dict(self._ids), merges, ignore_merges=rule.whole_words))
        if rule.nfc:
            fast.normalizer = normalizers.NFC()
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None)
        before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
        if rule.pattern is not None:
            before.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
        fast.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
        fast.decoder = decoders.ByteLevel()
        self._frame(fast, add_bos=rule.add_bos)
        return fast

    def sentence_piece(self) -> FastTokenizer:
        """BPE of SentencePiece, whose merges follow from the scores: the pieces of higher scores are merged first."""
        unknown = self.special_id("unknown_token_id")
        model = models.BPE(
            dict(self._ids), self._merges_by_score(), unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True, byte_fallback=True,
        )  # fmt: skip
        fast = FastTokenizer(model)
        begins_with_space = self._flag("add_space_prefix", True)
        spaces = normalizers.Replace(" ", SPACE)
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if begins_with_space else spaces
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if begins_with_space else steps)
        self._frame(fast, add_bos=True)
        return fast

    def add_tokens(self, fast: FastTokenizer) -> None:
        """Add control tokens as special tokens, and user-defined tokens as plain ones."""
        for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
            names = [token for token, i in self._ids.items() if self._types[i] in kinds]
            fast.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])

    def _frame(self, fast: FastTokenizer, *, add_bos: bool) -> None:
        """Put BOS and EOS around texts that are encoded with special tokens, where the file states it.

        add_bos  whether BOS is put there if the file does not state it
        """
        adds = (self._flag("add_bos_token", add_bos), self._flag("add_eos_token", False))
        ids = [self.special_id(key) if add else None for key, add in zip(("bos_token_id", "eos_token_id"), adds)]
        bos, eos = ([] if token_id is None else [self.tokens[token_id]] for token_id in ids)
        if bos or eos:
            named = [(self.tokens[token_id], token_id) for token_id in ids if token_id is not None]
            fast.post_processor = TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=named)

    def _merges_by_score(self) -> list[tuple[str, str]]:
        scores = self._list("scores", len(self.tokens))
        pieces = {token: i for token, i in self._ids.items() if self._types[i] == NORMAL}
        splits = [
            (scores[i], cut, len(token) - cut, token[:cut], token[cut:])
            for token, i in pieces.items()
            for cut in range(1, len(token))
            if token[:cut] in pieces and token[cut:] in pieces
        ]
        return [(left, right) for *_, left, right in sorted(splits, key=lambda split: split[:3], reverse=True)]

    def _flag(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise TokenizerError(
                f"{self._source} has {PREFIX}{name} {value!r}; true or false is needed; use another file"
            )
        return value

    def _list(self, name: str, length: int | None = None) -> Sequence[Any]:
        value = self.value(name)
        if not isinstance(value, list) or not value or length not in (None, len(value)):
            wanted = "a list" if length is None else f"a list of {length}, one for each token,"
            raise TokenizerError(f"{self._source} needs {wanted} as {PREFIX}{name}; use another file")
        return value


def _templates(fields: Mapping[str, Any], source: str) -> dict[str, str]:
    """Sources of the chat templates by name."""
    found = {}
    for key, value in fields.items():
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}."):
            name = key.removeprefix(TEMPLATE).removeprefix(".") or DEFAULT
            if not re.fullmatch(r"[\w-]+", name) or not isinstance(value, str):
                raise TokenizerError(
                    f"{source} has {key}; a chat template is a text whose name is a word; rename the key"
                )
            found[name] = value
    return found


def _require_text(tokenizer: Tokenizer, source: str) -> None:
    """Raise TokenizerError if the probe does not survive, or if text becomes a special token."""
    if (again := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
        raise TokenizerError(f"{source} has a tokenizer that turns {PROBE!r} into {again!r}; use another file")
    special = tokenizer.special_ids
    for name, ids in zip(special, tokenizer.encode_batch(list(special))):
        if not special.keys().isdisjoint(map(tokenizer.spell, ids)):
            raise TokenizerError(f"{source} has a tokenizer that reads the text {name!r} as a special token")

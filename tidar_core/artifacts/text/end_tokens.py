"""The tokens that end a sequence of a model.

The end tokens come from generation_config.json, else from config.json. The tokenizer's end-of-text token is always an
end token; it also separates documents in training. Any end token ends a sequence.
"""

from dataclasses import dataclass
from pathlib import Path

from tidar_core.artifacts.store.json_object import json_object
from tidar_core.errors import WeightsError

__all__ = ["GENERATION_CONFIG", "EndTokens", "read_end_tokens"]

GENERATION_CONFIG = "generation_config.json"
EOS = "eos_token_id"


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The tokens that end a sequence of a model."""

    ids: tuple[int, ...]
    """Ids of the end tokens; the tokenizer's end-of-text token is the first."""
    generation_config: str | None = None
    """Content of generation_config.json as its authors wrote it, because other engines read more settings from it."""


def read_end_tokens(folder: str | Path, *, eos_id: int, vocab_len: int) -> EndTokens:
    """The end tokens of the model in a local Hugging Face folder.

    Raises WeightsError if a file is not a JSON object or has an id that is not a token of the tokenizer.

    eos_id     the tokenizer's end-of-text token
    vocab_len  the tokenizer's tokens are 0..vocab_len - 1
    """
    where = Path(folder) / GENERATION_CONFIG
    try:
        content = where.read_text(encoding="utf-8") if where.is_file() else None
    except ValueError as error:
        raise WeightsError(f"{where} is not UTF-8 ({error}); fetch the folder again") from error
    given = None if content is None else _eos(where, content, vocab_len)
    config = Path(folder) / "config.json"
    if given is None and config.is_file():
        given = _eos(config, config.read_bytes(), vocab_len)
    return EndTokens(tuple(dict.fromkeys([eos_id, *(given or ())])), content)


def _eos(where: Path, content: str | bytes, vocab_len: int) -> list[int] | None:
    """The end tokens in a file; None if the file names no end token."""
    given = json_object(where, content).get(EOS)
    if given is None:
        return None
    ids = given if isinstance(given, list) else [given]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_len:
            raise WeightsError(
                f"{where} has {EOS} {given!r}; ids of the tokenizer are needed, 0..{vocab_len - 1}; use the file and "
                "the tokenizer of the same model"
            )
    return ids

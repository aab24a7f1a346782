"""A long text that is encoded in parts has the ids of the whole text."""

import random

import pytest
from tokenizers import Tokenizer as FastTokenizer
from vocabularies import BYTE_LEVEL, EOS, ODD, SENTENCE_PIECE, TEXTS, tokenizer_json

from tidar_core.artifacts.text.long_texts import encode_long
from tidar_core.artifacts.text.tokenizer import Tokenizer

PART = 6000
SEED = random.Random(5)
CHARACTERS = "ab the \n\n\n.,é日🎉e\u0301 def x 12345"
LONG = {
    "lines": "Hello\n\nworld\n\n" * 3000,
    "words": "".join(SEED.choice([*"".join(TEXTS).split(" "), ODD]) + " " for _ in range(4000)),
    "characters": "".join(SEED.choice(CHARACTERS) for _ in range(30_000)),
    "digits": "".join(SEED.choice("0123456789") for _ in range(30_000)),
    "spaces": "a" + " " * 30_000 + "b",
    "line ends": "a" + "\n" * 30_000 + "b",
    "one letter": "a" * 30_000,
    "no spaces": "日本語é" * 8000,
    "combining": "e\u0301" * 16_000,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("form", [*BYTE_LEVEL, *SENTENCE_PIECE])
def test_a_long_text_has_the_ids_of_the_whole(form, name):
    fast = FastTokenizer.from_str(tokenizer_json(form))
    parts = list(encode_long(Tokenizer(fast, {"eos_token": EOS}), LONG[name], PART))
    assert sum(map(len, parts)) == len(whole := fast.encode(LONG[name], add_special_tokens=False).ids)
    assert [token for part in parts for token in part] == whole
    if name in ("lines", "words"):
        assert len(parts) > 3

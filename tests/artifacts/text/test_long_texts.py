"""A long text that is encoded in parts has the ids of the whole text."""

import random

import pytest
from tokenizers import Tokenizer as FastTokenizer
from vocabularies import BYTE_LEVEL, EOS, ODD, SENTENCE_PIECE, TEXTS, tokenizer_json

from tidar_core.artifacts.text.long_texts import encode_long
from tidar_core.artifacts.text.tokenizer import Tokenizer, train_bpe

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


RUNS = {
    "pairs": "ab" * 9001, "letters": "a" * 18_001, "line ends": "x\n\n\ny\n\n" * 3001, "spaces": "    z" * 4001,
    "all": "ab12\n\n  " * 2501, "digits, then letters": "1" * 9001 + "ab" * 4500,
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_no_cut_lies_within_a_token_of_several_characters(name):
    """The merges join what follows a cut to what comes before it, wherever the text repeats itself."""
    learned = ["abababab " * 50, "aaaa " * 50, "123456 789 " * 50, "x\n\n\ny\n\n" * 50, "    z" * 50]
    tokenizer = train_bpe(["".join(learned)], 330)
    parts = list(encode_long(tokenizer, RUNS[name], 3000))
    assert [token for part in parts for token in part] == tokenizer.encode(RUNS[name])
    assert len(parts) > 1

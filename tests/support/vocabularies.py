"""Small tokenizers in the forms of public models: byte-level BPE, and SentencePiece as `tokenizers` has it."""

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

TEXTS = (
    "The quick brown fox and the lazy dog, then some more words. Hello world\n\ndef f(x):\n    return x + 1\n",
    "das schöne Grüße über the and then that this thing 2024 user assistant system [INST] [/INST] chat",
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_LEVEL = ("gpt2", "gpt2 prefix", "qwen2", "llama3")
SENTENCE_PIECE = ("llama2", "metaspace first", "metaspace always", "metaspace never", "gemma", "unigram", "xlm-r")
EOS = "</s>"
ODD = "Grüße, the  and\nthen 日本語 🎉 e\u0301 <0x41> \u2581 's </s > x\t2024\r\n\n\n\n\ufffd end "


@cache
def tokenizer_json(form):
    """The content of a tokenizer.json."""
    return _byte_level(form).to_str() if form in BYTE_LEVEL else _sentence_piece(form).to_str()


def write_folder(folder, form, *, model_type=None, **config):
    """A Hugging Face folder with a tokenizer of that form, and a config.json where `model_type` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(form))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS} | config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def _byte_level(form):
    fast = Tokenizer(models.BPE())
    if form == "gpt2 prefix":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        split = pre_tokenizers.Split(Regex({"gpt2": GPT2, "qwen2": QWEN2, "llama3": LLAMA3}[form]), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if form == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[EOS, "<s>", "<|end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    fast.train_from_iterator(TEXTS * 3, trainer)
    return fast


def _sentence_piece(form):
    model = _unigram(byte_fallback=form == "unigram") if form in ("unigram", "xlm-r") else _bpe()
    fast = Tokenizer(model)
    fast.add_special_tokens(["<unk>", "<s>", EOS, "<|end|>"])
    if form == "llama2":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif form == "gemma":
        fast.normalizer = normalizers.Replace(" ", SPACE)
    else:
        scheme = form.removeprefix("metaspace ") if form.startswith("metaspace") else "always"
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=form in ("unigram", "xlm-r"))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    begins_bare = form in ("metaspace never", "gemma")
    fast.decoder = decoders.Sequence(steps if begins_bare else [*steps, decoders.Strip(" ", 1, 0)])
    if form == "xlm-r":
        fast.decoder = decoders.Metaspace()
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))])
    return fast


def _bpe():
    """A BPE model whose tokens hold a space at their beginning alone, as those of SentencePiece do."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    learned = json.loads(fast.to_str())["model"]
    words = [word for word in sorted(learned["vocab"], key=learned["vocab"].get) if "\n" not in word]
    merges = [tuple(merge) for merge in learned["merges"] if "\n" not in "".join(merge)]
    ids = {token: token_id for token_id, token in enumerate(["<unk>", "<s>", EOS, *BYTES, *words, "\ufffd"])}
    return models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _unigram(*, byte_fallback):
    fast = Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    fast.train_from_iterator(TEXTS * 3, trainer)
    learned = [tuple(piece) for piece in json.loads(fast.to_str())["model"]["vocab"]]
    named = [("<unk>", 0.0), ("<s>", 0.0), (EOS, 0.0)]
    named += [(name, -30.0) for name in BYTES] if byte_fallback else []
    pieces = [piece for piece in learned if piece[0] != "<unk>"]
    return models.Unigram([*named, *pieces], unk_id=0, byte_fallback=byte_fallback)

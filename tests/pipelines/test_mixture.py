"""What a mixture holds follows from the hashes of its documents and the weights of its sources."""

import hashlib
import random

import pytest

from pipelines import corpus, duplicates, pack_tasks
from pipelines.jobs import Source
from pipelines.mixture import arranged, digest_of, split_of, streams_of
from pipelines.token_parts import Part
from tidar_core.artifacts.tokenizer import train_bpe
from tidar_core.errors import CorpusError


def digest(split_draw, weight_draw):
    """A hash of which one half says where the document goes and the other how often."""
    return int(split_draw * 2**64).to_bytes(8, "big") + int(weight_draw * 2**64).to_bytes(8, "big") + bytes(16)


@pytest.mark.parametrize(
    ("weight", "draw", "streams"),
    [
        (1, 0.99, ["whole"]),
        (2, 0.0, ["whole"]),
        (0.25, 0.24, ["drawn"]),
        (0.25, 0.25, []),
        (2.25, 0.24, ["whole", "drawn"]),
        (2.25, 0.25, ["whole"]),
    ],
)
def test_a_weight_is_a_number_of_passes_and_its_fraction_a_share_of_documents(weight, draw, streams):
    assert streams_of(digest(0.5, draw), 0.1, weight) == streams
    assert streams_of(digest(0.05, draw), 0.1, weight) == ["held_out"]


def test_the_share_drawn_is_independent_of_the_split():
    texts = [digest_of(f"text {n}") for n in range(4000)]
    train = [text for text in texts if split_of(text, 0.25) == "train"]
    drawn = [text for text in train if streams_of(text, 0.25, 0.5) == ["drawn"]]
    assert 1400 < len(drawn) < 1600  # 1500 expected; the texts are fixed, so is the count
    assert {t for t in train if streams_of(t, 0.25, 0.3)} < set(drawn)


def test_a_split_holds_each_source_as_often_as_its_weight_says_and_held_out_once():
    def part(source, stream):
        return Part(source, stream, f"{stream}-{source}", 1, 2)

    parts = [part(s, stream) for s in (0, 1, 2) for stream in ("whole", "drawn", "held_out")]
    sources = [Source(path="a", weight=2.5), Source(path="b"), Source(path="c", weight=0.5)]
    order = {split: [p.file for _, p in found] for split, found in arranged(parts, sources).items()}
    assert order == {
        "train": ["whole-0", "whole-0", "drawn-0", "whole-1", "drawn-1", "drawn-2"],
        "held_out": ["held_out-0", "held_out-1", "held_out-2"],
    }


@pytest.mark.parametrize("documents", [1, 5 * 2**22, 10**12])
def test_repeats_are_all_but_the_first_of_equal_documents_whatever_the_buckets(tmp_path, documents):
    draw = random.Random(0)
    units = [[hashlib.sha256(bytes([draw.randrange(90)])).digest() for _ in range(n)] for n in (30, 0, 70, 1)]
    seen, expected = set(), []
    for unit in units:
        expected.append(set())
        for ordinal, text in enumerate(unit):
            if text in seen:
                expected[-1].add(ordinal)
            seen.add(text)
    left = [str(tmp_path / f"digests-{n}") for n in range(len(units))]
    for uri, unit in zip(left, units):
        duplicates.write_digests(uri, unit)
    buckets = duplicates.make_buckets(documents)
    found = [str(tmp_path / f"repeats-{n}") for n in range(len(buckets))]
    assert len(buckets) == {1: 1, 5 * 2**22: 5, 10**12: 256}[documents]
    counts = [duplicates.find_repeats(left, bucket, uri) for bucket, uri in zip(buckets, found)]
    assert sum(counts) == sum(map(len, expected)) > 0
    assert [duplicates.read_repeats(found, unit) for unit in range(len(units))] == expected


def test_a_long_document_is_cut_between_lines_and_its_ids_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(pack_tasks, "BATCH_CHARACTERS", 40)
    text = "the quick fox\n  jumps\n\nover the lazy dog (twice)\n\nand\nagain " * 9
    pieces = list(pack_tasks._in_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 40 < len(text)
    tokenizer = train_bpe(iter([text]), 300)
    assert [id for ids in tokenizer.encode_batch(pieces) for id in ids] == tokenizer.encode(text)
    assert list(pack_tasks._in_pieces("x" * 99)) == ["x" * 40, "x" * 40, "x" * 19]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.txt", r"a\.txt is longer"), ("a.jsonl", r"line 2 of .*a\.jsonl is longer")],
)
def test_a_document_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 2**20)
    (tmp_path / name).write_text('{"text": "x"}\n' + "y" * (2**20 + 1))
    piece = corpus.Piece(str(tmp_path / name), 0, 2**20 + 15, whole=True)
    with pytest.raises(CorpusError, match=words + r" than 1 MiB; cut it into documents"):
        list(corpus.documents(piece, Source(path="", documents="text", text_field="text"), pytest.fail))

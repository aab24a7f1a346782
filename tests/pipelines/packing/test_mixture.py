"""The content of a mixture follows from the hashes of its documents and the weights of its sources."""

import hashlib
import json
import random
from collections import Counter

import pytest

from pipelines.jobs import Source
from pipelines.packing import corpus, duplicates, pack_tasks
from pipelines.packing.mixture import arranged, digest_of, split_of, streams_of
from pipelines.packing.token_parts import Part, read_part
from tidar_core.artifacts.text.tokenizer import train_bpe
from tidar_core.errors import CorpusError


def digest(split_draw, weight_draw):
    """A hash: half of it decides the split of the document, the other half the number of passes."""
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


def test_a_split_holds_each_source_as_often_as_its_weight_and_held_out_once():
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
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_repeats_are_what_was_taken_before_whatever_the_buckets(tmp_path, documents, share):
    draw = random.Random(0)
    units = [[hashlib.sha256(bytes([draw.randrange(90)])).digest() for _ in range(n)] for n in (30, 0, 70, 1)]
    taken = [[draw.random() < share for _ in unit] for unit in units]
    seen, expected = set(), []
    for unit, flags in zip(units, taken):
        expected.append(set())
        for ordinal, (text, flag) in enumerate(zip(unit, flags)):
            if text in seen:
                expected[-1].add(ordinal)
            if flag:
                seen.add(text)
    left = [str(tmp_path / f"digests-{n}") for n in range(len(units))]
    for uri, unit, flags in zip(left, units, taken):
        duplicates.write_digests(uri, unit, flags)
    buckets = duplicates.make_buckets(documents)
    found = [str(tmp_path / f"repeats-{n}") for n in range(len(buckets))]
    assert len(buckets) == {1: 1, 5 * 2**22: 5, 10**12: 256}[documents]
    counts = [duplicates.find_repeats(left, bucket, uri) for bucket, uri in zip(buckets, found)]
    assert sum(counts) == sum(map(len, expected))
    assert (sum(counts) > 0) == (share > 0)
    assert [duplicates.read_repeats(found, unit) for unit in range(len(units))] == expected


def mixed(tmp_path, sources, held_out, unit_lines):
    """The documents of each stream, as the tasks of a pack job leave them, one task at a time."""
    given, units = [], []
    for place, (texts, weight) in enumerate(sources):
        path = tmp_path / f"{place}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        given.append(Source(path=str(path), weight=weight, documents="text", text_field="text"))
        for pieces in corpus.work_units(corpus.list_corpus(str(path), ()), 25 * unit_lines):
            units.append(pack_tasks.Unit(len(units), place, tuple(pieces)))
    folder = pack_tasks.WorkFolder(str(tmp_path / f"work-{unit_lines}"), 1)
    tokenizer = train_bpe(iter(["document 0123456789"]), 270)
    pack_tasks.keep_tokenizer(lambda: tokenizer, folder)
    for unit in units:
        pack_tasks.write_unit_digests(unit, tuple(given), held_out, folder)
    for bucket in enumerate(duplicates.make_buckets(10**7)):
        pack_tasks.find_bucket_repeats(bucket, len(units), folder)
    how = pack_tasks.Tokenizing(folder, tuple(given), held_out, len(duplicates.make_buckets(10**7)), flags=False)
    parts = [part for unit in units for part in pack_tasks.tokenize_unit(unit, how).parts]
    return {
        split: [text for _, part in found for text in texts_in(part, folder, tokenizer)]
        for split, found in arranged(parts, given).items()
    }


def texts_in(part, folder, tokenizer):
    read = read_part(f"{folder.units}/{part.file}")
    return [tokenizer.decode(ids.tolist()[:-1]) for ids in read.tokens_T.split(read.document_len_N.tolist())]


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_what_a_weight_leaves_out_of_one_source_the_next_source_still_gives(tmp_path, held_out):
    texts = [f"document {n}" for n in range(300)]
    splits = mixed(tmp_path, [(texts, 0.3), (texts, 1)], held_out, 7)
    assert sorted(splits["train"] + splits["held_out"]) == sorted(texts)
    assert splits["held_out"] == [text for text in texts if split_of(digest_of(text), held_out) == "held_out"]
    assert mixed(tmp_path, [(texts, 0.3), (texts, 1)], held_out, 1000) == splits


def test_a_text_is_taken_as_often_as_the_weight_of_the_first_source_that_takes_it(tmp_path):
    texts = [f"document {n}" for n in range(200)]
    splits = mixed(tmp_path, [(texts + texts, 0.3), (texts, 0.5), (texts + texts, 2.5), (texts, 1)], 0.1, 9)
    expected = Counter()
    for text in texts:
        draw, train = digest_of(text)[8] / 256, split_of(digest_of(text), 0.1) == "train"
        expected[text] = train * (1 if draw < 0.5 else 2)  # by 0.3 or by 0.5 once; else by 2.5, whose half is below too
    assert Counter(splits["train"]) == +expected
    assert sorted(splits["held_out"]) == sorted(text for text in texts if not expected[text])
    assert {1, 2} == set((+expected).values())


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

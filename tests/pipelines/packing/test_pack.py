"""A corpus becomes shards: all of it, once, the same whatever the number of hands."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pack_jobs import ROW_LEN, documents_of, job, shard_bytes
from tokenizers import Tokenizer as FastTokenizer
from vocabularies import tokenizer_json, write_folder

from pipelines.jobs import Source, TrainBpe
from pipelines.packing import corpus, token_parts
from pipelines.packing.answers_manifest import AnswerFile, AnswersManifest, require_whole_answers, write_manifest
from pipelines.packing.mixture import digest_of, split_of
from pipelines.packing.pack import pack
from pipelines.packing.pack_tasks import Tokenizing, Unit, WorkFolder, keep_tokenizer, plan_shards, tokenize_unit
from pipelines.packing.token_parts import Part, PartWriter, read_part
from tidar_core.artifacts import shards
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import CorpusError, ShardError, TokenizerError, UserError

TEXTS = Source(path="", documents="text", text_field="text")


def left_behind(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith(".") or "out" in path.name)


def test_shards_of_a_plan_meet_end_to_end():
    parts = [Part(0, "whole", "a", 2, 10), Part(0, "whole", "b", 1, 3), Part(0, "whole", "c", 4, 9)]
    plans = list(plan_shards("train", parts, row_len=4, rows_per_shard=2, eos_id=0))
    assert [(p.file, p.parts, p.first_document, p.start, p.stop) for p in plans] == [
        ("train-00000.parquet", ("a",), 0, 0, 8),
        ("train-00001.parquet", ("a", "b", "c"), 0, 8, 16),
        ("train-00002.parquet", ("c",), 3, 3, 9),
    ]


def test_parts_hold_their_documents_in_order_and_are_closed_when_large_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(token_parts, "PART_TOKENS", 4)
    writer = PartWriter(str(tmp_path), 3, "drawn", 7)
    for document in ([1, 2, 0], [3, 0], [4, 0]):
        writer.add(np.asarray(document, dtype=np.int32))
    first, second = writer.close()
    assert (first, second) == (
        Part(3, "drawn", "drawn-0000007-00000.parquet", 2, 5),
        Part(3, "drawn", "drawn-0000007-00001.parquet", 1, 2),
    )
    read = read_part(str(tmp_path / first.file))
    assert (read.tokens_T.tolist(), read.document_len_N.tolist()) == ([1, 2, 0, 3, 0], [3, 2])
    assert read_part(str(tmp_path / second.file)).tokens_T.tolist() == [4, 0]


@pytest.mark.parametrize("unit_bytes", [1, 7, 20, 10_000])
def test_lines_cut_into_units_are_the_lines_of_the_file_each_once(tmp_path, unit_bytes):
    lines = ["a", "bb" * 9, "c", "dd" * 30, "e"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines) + "\n")
    units = corpus.work_units(corpus.list_corpus(str(tmp_path), ("*.jsonl",)), unit_bytes)
    assert [text for unit in units for piece in unit for text in corpus.documents(piece, TEXTS, pytest.fail)] == lines


def test_each_format_gives_its_documents_compressed_or_not(tmp_path):
    line = (
        json.dumps({"body": "ünï"}) + "\n\n" + json.dumps({"body": ""}) + "\n" + json.dumps({"body": "two"})
    ).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "b.md.zst").write_bytes(zstandard.compress("\ufeffwhole file\n".encode()))
    pq.write_table(pa.table({"body": ["p1", "", "p2"], "other": [1, 2, 3]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress((tmp_path / "c.parquet").read_bytes()))
    files = corpus.list_corpus(str(tmp_path), ("*.jsonl", "*.md", "*.parquet"))
    texts = [
        text
        for unit in corpus.work_units(files, 1)
        for piece in unit
        for text in corpus.documents(piece, TEXTS.model_copy(update={"text_field": "body"}), pytest.fail)
    ]
    assert texts == ["ünï", "two", "whole file\n", "p1", "p2", "p1", "p2"]


def test_excluded_folders_and_files_are_left_out_with_all_below_them(tmp_path):
    for name in ("a.py", "test/b.py", "lib/test/c.py", "lib/d.py", "lib/d_test.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    files = corpus.list_corpus(str(tmp_path), ("*.py",), ("test", "*_test.py"))
    assert [entry.name for entry in files] == ["a.py", "lib/d.py"]


def test_a_tokenizer_sees_the_start_of_every_file_and_no_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 300_000)
    (tmp_path / "b.txt").write_text("b" * 10)
    (tmp_path / "c.txt").write_text("c" * 300_000)
    files = [(file, TEXTS) for file in corpus.list_corpus(str(tmp_path), ("*.txt",))]
    texts = list(corpus.first_texts(files, 300_000, lambda text: True))
    assert [(text[0], len(text)) for text in texts] == [("a", 100_000), ("b", 10), ("c", 199_990)]
    assert list(corpus.first_texts(files, 300_000, lambda text: False)) == []


def test_the_share_held_out_is_about_the_requested_share_and_depends_on_the_text_alone():
    splits = [split_of(digest_of(f"text {n}"), 0.25) for n in range(4000)]
    assert splits == [split_of(digest_of(f"text {n}"), 0.25) for n in range(4000)]
    assert 900 < splits.count("held_out") < 1100  # 1000 expected; the texts are fixed, so is the count
    assert {split_of(digest_of(f"text {n}"), 0.0) for n in range(99)} == {"train"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2 of .*a\.jsonl is not JSON .*each line must be one object"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', r"line 3 of .*a\.jsonl has no text under 'text'; set text_f"),
        ("a.jsonl", b'{"text": null}\n', r"line 1 of .*a\.jsonl has no text under 'text'"),
        ("a.jsonl", b'["x"]\n', r"line 1 of .*a\.jsonl has no text under 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1 of .*a\.jsonl has half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 of .*a\.jsonl is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"abc" * 99)[:-12], r"a\.txt\.gz is damaged"),
        ("a.txt.zst", b"no zstd at all", r"a\.txt\.zst is damaged"),
        ("a.parquet", b"no parquet at all", r"a\.parquet is damaged"),
    ],
)
def test_a_file_at_fault_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    piece = corpus.Piece(str(tmp_path / name), 0, len(content), whole=True)
    with pytest.raises(CorpusError, match=message) as caught:
        list(corpus.documents(piece, TEXTS, pytest.fail))
    assert "\n" not in str(caught.value)


def test_a_text_file_that_is_not_utf_8_is_passed_over_and_reported(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    passed_over = []
    assert (
        list(corpus.documents(corpus.Piece(str(tmp_path / "a.txt"), 0, 4, whole=True), TEXTS, passed_over.append)) == []
    )
    assert passed_over == [str(tmp_path / "a.txt")]


def test_a_parquet_file_without_the_text_is_named(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(CorpusError, match=r"row 2 of .*a\.parquet has no text under 'text'"):
        list(corpus.documents(corpus.Piece(path, 0, 1, whole=True), TEXTS, pytest.fail))
    numbers = TEXTS.model_copy(update={"text_field": "n"})
    with pytest.raises(CorpusError, match=r"has no text column 'n'; set text_field to one of text, n"):
        list(corpus.documents(corpus.Piece(path, 0, 1, whole=True), numbers, pytest.fail))


def test_a_corpus_that_is_missing_or_empty_is_refused_before_any_work(tmp_path, tokenizer_folder):
    with pytest.raises(CorpusError, match="nowhere does not exist; give a file, a folder or a glob"):
        pack(job(tmp_path / "nowhere", tmp_path / "out", tokenizer_folder))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(CorpusError, match=r"holds no text in files named \*\.py, \*\.txt"):
        pack(job(tmp_path / "empty", tmp_path / "out", tokenizer_folder))
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        pack(job(__file__, tmp_path / "out", str(tmp_path)))
    assert left_behind(tmp_path) == []


@pytest.mark.ray
def test_every_document_lands_exactly_once_in_order_and_deterministic_for_any_workers_and_unit_bytes(
    ray_cluster, text_corpus, corpus_documents, tokenizer_folder, tmp_path, capsys
):
    (text_corpus / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    manifest = pack(job(text_corpus, tmp_path / "one", tokenizer_folder))
    assert manifest.sources[0].passed_over == 1
    assert "passed over 1 files that are not UTF-8 text; the first is" in capsys.readouterr().err
    for split in ("train", "held_out"):
        expected = [text for text in corpus_documents if split_of(digest_of(text), 0.2) == split]
        assert documents_of(str(tmp_path / "one"), split) == expected
        assert manifest.splits[split].documents == len(expected)
    assert len(manifest.splits["train"].shards) > 2
    assert shards.verify_shards(str(tmp_path / "one")) == manifest
    assert pack(job(text_corpus, tmp_path / "two", tokenizer_folder, workers=2, unit_bytes=300)) == manifest
    assert shard_bytes(tmp_path / "two") == shard_bytes(tmp_path / "one")
    made = json.loads((tmp_path / "two" / "made_by.json").read_text())
    assert made["job"]["row_len"] == ROW_LEN
    assert made["parents"]["tokenizer"] == manifest.tokenizer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "one", "two"]


@pytest.mark.ray
def test_a_completed_job_is_not_done_again_and_a_changed_one_is(ray_cluster, text_corpus, tokenizer_folder, tmp_path):
    first = pack(job(text_corpus, tmp_path / "out", tokenizer_folder))
    written = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert pack(job(text_corpus, tmp_path / "out", tokenizer_folder, workers=2, unit_bytes=50)) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == written
    (text_corpus / "d.txt").write_text("another text")
    assert pack(job(text_corpus, tmp_path / "out", tokenizer_folder)).identity != first.identity
    assert "another text" in documents_of(str(tmp_path / "out"), "train") + documents_of(
        str(tmp_path / "out"), "held_out"
    )


@pytest.mark.ray
def test_an_error_in_a_task_is_raised_as_itself_and_nothing_is_left_behind(
    ray_cluster, text_corpus, tokenizer_folder, tmp_path
):
    with (text_corpus / "e.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(CorpusError, match=r"line 41 of .*e\.jsonl is not JSON"):
        pack(job(text_corpus, tmp_path / "out", tokenizer_folder))
    with pytest.raises(CorpusError, match=r"line 41 of .*e\.jsonl is not JSON"):
        pack(job(text_corpus, tmp_path / "out", TrainBpe(vocab_size=300)))
    assert left_behind(tmp_path) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out exists and holds no manifest\.json"):
        pack(job(text_corpus, tmp_path / "out", tokenizer_folder))
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.ray
def test_a_corpus_and_shards_on_an_object_store_with_a_tokenizer_of_their_own(
    ray_cluster, s3_bucket, text_corpus, corpus_documents
):
    locations.upload_folder(text_corpus, f"{s3_bucket}/corpus")
    manifest = pack(job(f"{s3_bucket}/corpus", f"{s3_bucket}/out", TrainBpe(vocab_size=300), held_out=0.0))
    assert manifest.vocab_len == 300
    assert documents_of(f"{s3_bucket}/out", "train") == corpus_documents
    assert len(shards.ShardReader(f"{s3_bucket}/out", "held_out")) == 0
    assert {entry.name.split("/")[0] for entry in locations.list_files(s3_bucket)} == {"corpus", "out"}
    content = locations.read_bytes(f"{s3_bucket}/out/train-00000.parquet")
    locations.write_bytes(f"{s3_bucket}/out/train-00000.parquet", content[:-1])
    with pytest.raises(ShardError, match=r"train-00000\.parquet has"):
        shards.ShardReader(f"{s3_bucket}/out")


@pytest.mark.parametrize("text", ["Hello\n\nworld\n\n" * 90_000, "some words, then more of them\n" * 40_000])
@pytest.mark.parametrize("form", ["gpt2", "llama3", "llama2"])
def test_a_document_too_long_for_one_call_has_the_ids_of_the_whole(tmp_path, form, text):
    write_folder(tmp_path / "tokenizer", form)
    (tmp_path / "long.txt").write_text(text)
    tokenizer, work = load_tokenizer(tmp_path / "tokenizer"), WorkFolder(str(tmp_path / "work"), 2**30)
    keep_tokenizer(lambda: tokenizer, work)
    source = Source(path=str(tmp_path / "long.txt"), documents="text")
    unit = Unit(0, 0, (corpus.Piece(source.path, 0, len(text), whole=True),))
    outcome = tokenize_unit(unit, Tokenizing(work, (source,), 0.0, 0, flags=False))
    ids = [read_part(locations.join(work.units, part.file)).tokens_T.tolist() for part in outcome.parts]
    whole = FastTokenizer.from_str(tokenizer_json(form)).encode(text, add_special_tokens=False).ids
    assert [token for part in ids for token in part] == [*whole, tokenizer.eos_id]


def test_answers_that_are_not_as_they_were_written_are_refused(tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    (folder / "answers-00000.jsonl").write_text(2 * line)
    file = AnswerFile(file="answers-00000.jsonl", conversations=2, bytes=2 * len(line), sha256="0" * 64)
    manifest = AnswersManifest(
        identity="i", model="m", prompts=2, conversations=2, greedy=2, answers=2, tokens=2,
        finish_reasons={"stop": 2}, left_out=0, unfinished=0, named=(), files=(file,),
    )  # fmt: skip
    write_manifest(str(folder), manifest)
    (folder / "made_by.json").write_text("{}")
    require_whole_answers(str(folder))
    (folder / "answers-00000.jsonl").write_text(line)
    with pytest.raises(ShardError, match=r"another size than in answers\.json; run answers again"):
        pack(job(folder, tmp_path / "out", str(tmp_path / "no-tokenizer")))
    (folder / "made_by.json").unlink()
    (folder / "answers.json").write_text('{"a": "file of somebody else"}')
    require_whole_answers(str(folder))

"""Files of users are read, or refused in one true line: columns of every kind, names of every case, odd entries."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation.paper_tasks import read_entries
from pipelines.jobs import PackJob, Source
from pipelines.packing import corpus, parquet_reader
from pipelines.packing.skipped_entries import LeftOut
from tidar_core.artifacts.text.prompts import read_prompts
from tidar_core.errors import ConfigError, CorpusError

BOM = b"\xef\xbb\xbf"


def read(path, field="text", documents="text"):
    source = Source(path="", documents=documents, text_field=field)
    files = corpus.list_corpus(str(path), PackJob.model_fields["include"].default)
    pieces = [piece for unit in corpus.work_units(files, 30) for piece in unit]
    return [text for piece in pieces for text in corpus.documents(piece, source, pytest.fail)]


def refused(path, **settings):
    with pytest.raises(CorpusError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value).replace(str(path), path.name)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["one", "two", "one"]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), pa.array(["one", "two"], pa.large_string())),
        pa.array(["one", "two", "one"], pa.large_string()),
        pa.array(["one", "two", "one"], pa.string_view()),
    ],
    ids=["category", "large category", "large_string", "string_view"],
)
def test_text_columns_of_every_kind_are_read(tmp_path, column):
    pq.write_table(pa.table({"n": [1, 2, 3], "text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["one", "two", "one"]


def test_a_null_in_a_category_is_named_by_its_row(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["one", None]).dictionary_encode()}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet") == (
        "row 2 of a.parquet has no text under 'text', that is null; put a text there, or remove the row"
    )


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1]), "int64"),
        (pa.array([b"x"]), "binary"),
        (pa.array([{"body": "x"}]), "struct<body: string>"),
        (pa.array([["x"]]), "list<element: string>"),
        (pa.array([None]), "null"),
    ],
)
def test_a_column_of_something_else_is_refused_with_what_it_holds(tmp_path, column, kind):
    pq.write_table(pa.table({"text": column, "body": ["x"]}), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet") == (
        f"a.parquet has no text column 'text'; set text_field to one of text ({kind}), body"
    )
    assert read(tmp_path / "a.parquet", "body") == ["x"]


def test_two_columns_of_one_name_are_refused_where_they_are_requested(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"])
    pq.write_table(twice, tmp_path / "a.parquet")
    line = "a.parquet has 2 columns named 'text'; one is needed; rename the others"
    assert refused(tmp_path / "a.parquet") == line
    assert read(tmp_path / "a.parquet", "body") == ["c"]
    names = ["prompt", "response", "response"]
    pq.write_table(pa.Table.from_arrays([*twice.columns], names=names), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet", documents="conversations") == line.replace("text", "response")


@pytest.mark.parametrize("documents", ["text", "conversations"])
def test_json_nested_too_deeply_is_named_by_its_line(tmp_path, documents):
    chat = {"text": "x", "prompt": "a", "response": "b"}
    deep = json.dumps(chat | {"meta": 0}).replace("0", "[" * 100_000 + "]" * 100_000)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(chat)}\n{deep}\n")
    assert refused(tmp_path / "a.jsonl", documents=documents) == (
        "line 2 of a.jsonl is JSON nested too deeply to be read; remove what is nested, or the line"
    )
    for reader, kind in ((lambda path: read_prompts(path, 9), CorpusError), (read_entries, ConfigError)):
        with pytest.raises(kind, match=r"a\.jsonl line 2 is JSON nested too deeply to be read"):
            reader(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"body": "x"}, "has no text under 'text'; set text_field to the key that holds it"),
        ({"text": None}, "has no text under 'text', that is null; put a text there, or remove the row"),
        ({"text": 3}, "has no text under 'text', that is a number; put a text there, or remove the row"),
        ({"text": ["x"]}, "has no text under 'text', that is a list; put a text there, or remove the row"),
        ({"text": True}, "has no text under 'text', that is true or false; put a text there, or remove the row"),
        (["x"], "has no text under 'text', it is a list; each line must be one object"),
        ("x", "has no text under 'text', it is a text; each line must be one object"),
        (None, "has no text under 'text', it is null; each line must be one object"),
    ],
)
def test_a_row_without_its_text_is_refused_with_what_is_there(tmp_path, value, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(value))
    assert refused(tmp_path / "a.jsonl") == f"line 2 of a.jsonl {message}"


def test_a_line_that_is_no_object_is_no_conversation(tmp_path):
    (tmp_path / "a.jsonl").write_text("[3]\n")
    left_out = LeftOut()
    source = Source(path="", documents="conversations", text_field="text")
    piece = corpus.Piece(str(tmp_path / "a.jsonl"), 0, 4, whole=True)
    assert list(corpus.located_documents(piece, source, pytest.fail, left_out)) == []
    assert left_out.named == [
        f"line 1 of {tmp_path}/a.jsonl has no conversation, it is a list; each line must be one object"
    ]


@pytest.mark.parametrize("name", ["a.ndjson", "A.NDJSON", "a.JsonL", "a.ndjson.gz", "A.JSONL.GZ"])
def test_json_lines_are_known_by_both_suffixes_in_any_case(tmp_path, name):
    lines = b"".join(b'{"text": "document %d"}\n' % n for n in range(9))
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.lower().endswith("gz") else lines)
    assert read(tmp_path) == read(tmp_path / name) == [f"document {n}" for n in range(9)]


def test_every_format_is_known_in_upper_case(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "B.Md").write_text("two")
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "C.PARQUET")
    (tmp_path / "D.Parquet.GZ").write_bytes(gzip.compress((tmp_path / "C.PARQUET").read_bytes()))
    (tmp_path / "E.TXT.bak").write_text("no requested text")
    assert read(tmp_path) == ["one", "two", "three", "three"]
    assert [entry.name for entry in corpus.list_corpus(str(tmp_path), ("*.TXT", "*.md"), ("*.txt",))] == ["B.Md"]


def test_the_case_of_all_but_suffixes_distinguishes_names(tmp_path):
    for name in ("Test/a.txt", "test/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    assert [entry.name for entry in corpus.list_corpus(str(tmp_path), ("*.txt",), ("test",))] == ["Test/a.txt"]


def test_a_byte_order_mark_is_no_text_and_a_file_of_nothing_else_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(BOM + b'{"text": "one"}\n' + BOM + b"\n" + BOM + b'{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_bytes(BOM)
    (tmp_path / "c.txt").write_bytes(BOM)
    (tmp_path / "d.txt").write_bytes(BOM + b"three")
    (tmp_path / "e.jsonl").write_bytes(BOM + b"\r\n \r\n")
    assert read(tmp_path) == ["one", "two", "three"]
    assert read_prompts(tmp_path / "a.jsonl", 9) == ["one", "two"]


def test_files_of_no_bytes_are_passed_over_where_their_format_knows_such(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for name in ("b.txt", "c.jsonl", "d.md"):
        (tmp_path / name).write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert read(tmp_path) == ["x"]
    for name in ("f.parquet", "f.txt.gz", "f.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        assert refused(tmp_path).endswith(f"{name} is damaged (it has no bytes); fetch it again or leave it out")
        (tmp_path / name).unlink()


def test_parquet_that_was_spoilt_anywhere_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {n}" for n in range(999)]}), path, compression="snappy")
    whole = path.read_bytes()
    for place in (2, 40, 900, len(whole) - 200, len(whole) - 6):
        path.write_bytes(whole[:place] + b"\xff\xff\xff\xff\xff" + whole[place + 5 :])
        try:
            assert len(read(path)) == 999  # a letter may have changed
        except CorpusError as error:
            assert "a.parquet is damaged (" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_a_compressed_parquet_file_is_unpacked_up_to_a_limit_alone(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["x" * 2**20]}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "a.parquet").unlink()
    assert read(tmp_path) == ["x" * 2**20]
    monkeypatch.setattr(parquet_reader, "LARGEST_UNPACKED", 2**20)
    assert refused(tmp_path / "a.parquet.gz") == (
        "a.parquet.gz unpacks to more than 0.000976562 GiB; unpack it: a plain .parquet is read where it lies"
    )

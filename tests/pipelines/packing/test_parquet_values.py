"""Written values come back from Parquet, without the nulls that its columns add."""

import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.jobs import Source
from pipelines.packing.conversations import conversation_of
from pipelines.packing.corpus import Piece, located_documents
from pipelines.packing.skipped_entries import LeftOut

QUESTION = {"role": "user", "content": [{"type": "text", "text": "Rain?"}]}


def called(name, arguments):
    return {"role": "assistant", "content": [], "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def offered(name, properties):
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


ROWS = [
    {"messages": [QUESTION, called("weather", {"city": "Oslo"})],
     "tools": [offered("weather", {"city": {"type": "string", "enum": ["Oslo", "Rome"]}})]},
    {"messages": [QUESTION, called("add", {"a": 1, "b": {"c": [2]}}),
                  {"role": "tool", "tool_call_id": "x", "content": []}],
     "tools": [offered("add", {"a": {"type": "integer"}, "b": {"type": "object"}})]},
    {"messages": [QUESTION, called("now", {})], "tools": None},
]  # fmt: skip


def read(path, left_out=None):
    source = Source(path=str(path), documents="conversations", text_field="text")
    whole = Piece(str(path), 0, path.stat().st_size, whole=True)
    return [found.text for found in located_documents(whole, source, lambda uri: None, left_out or LeftOut())]


def test_calls_and_tools_of_a_file_have_their_own_keys_alone(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() != ROWS
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(tmp_path / "a.parquet") == read(tmp_path / "a.jsonl") == [conversation_of(row) for row in ROWS]
    assert '"arguments": {"city": "Oslo"}' in read(tmp_path / "a.parquet")[0]
    assert '"arguments": {}' in read(tmp_path / "a.parquet")[2]


def test_a_null_in_a_map_or_a_list_was_written_by_somebody_and_stays(tmp_path):
    call = pa.struct({"name": pa.string(), "arguments": pa.map_(pa.string(), pa.list_(pa.int64()))})
    message = pa.struct({"role": pa.string(), "content": pa.string(), "function_call": call})
    answer = {"role": "assistant", "function_call": {"name": "f", "arguments": [("a", None), ("b", [1, None])]}}
    table = pa.table({"messages": pa.array([[{"role": "user", "content": "a"}, answer]], pa.list_(message))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert '"arguments": {"a": null, "b": [1, null]}' in read(tmp_path / "a.parquet")[0]


def test_a_row_of_parquet_that_cannot_be_used_is_named_by_its_number(tmp_path):
    rows = [ROWS[0], {"messages": [QUESTION], "tools": None}, {"messages": None, "tools": None}, ROWS[1]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    left_out = LeftOut()
    assert read(tmp_path / "a.parquet", left_out) == [conversation_of(row) for row in (ROWS[0], ROWS[1])]
    assert left_out.rows == 2
    assert str(left_out) == (
        f"row 2 of {tmp_path}/a.parquet has no message of the assistant, so nothing to train; "
        f"row 3 of {tmp_path}/a.parquet has no conversation; it needs messages, or prompt and response"
    )


def test_only_the_first_rows_left_out_are_looked_up_and_named():
    looked_up = []

    def place(row):
        looked_up.append(row)
        return f"row {row}"

    left_out = LeftOut()
    for row in range(1000):
        left_out.add(partial(place, row), "is wrong")
    assert (str(left_out), looked_up) == (
        "row 0 is wrong; row 1 is wrong; row 2 is wrong; and 997 more",
        [0, 1, 2],
    )

"""A mixture becomes shards: each source by its weight, no text twice, some of it written by an assistant."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import chat_tokenizer
from pack_jobs import documents_of, job, shard_bytes

from pipelines.packing.mixture import digest_of, split_of
from pipelines.packing.pack import pack
from tidar_core.artifacts import shards
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import CorpusError, TokenizerError

HELD_OUT = 0.2
CHAT = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} is a number."}]}
    for n in range(12)
]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def split(texts, name):
    return [text for text in texts if split_of(digest_of(text), HELD_OUT) == name]


@pytest.mark.ray
def test_a_mixture_on_an_object_store_with_dedup_is_deterministic_for_any_workers_and_unit_bytes(
    ray_cluster, s3_bucket, tokenizer_folder, tmp_path
):
    first = [f"document {n % 30}" for n in range(40)]  # the last ten repeat the first ten
    second = [f"document {n}" for n in range(20, 60)]  # the first ten repeat documents of the first source
    buffer = io.BytesIO()
    pq.write_table(pa.table({"body": second}), buffer)
    locations.write_bytes(f"{s3_bucket}/two/b.parquet", buffer.getvalue())
    sources = [
        {"path": write_lines(tmp_path / "one/a.jsonl", [{"text": text} for text in first]), "weight": 2},
        {"path": f"{s3_bucket}/two", "text_field": "body", "weight": 0.5},
    ]

    def mixture(output, **changes):
        return job(sources, output, tokenizer_folder, include=("*.jsonl", "*.parquet"), held_out=HELD_OUT, **changes)

    manifest = pack(mixture(tmp_path / "out", dedup=True, unit_bytes=60))
    ours, theirs = first[:30], second[10:]
    half = [text for text in split(theirs, "train") if digest_of(text)[8] < 128]
    assert 0 < len(half) < len(split(theirs, "train"))
    assert documents_of(str(tmp_path / "out"), "train") == split(ours, "train") * 2 + half
    assert documents_of(str(tmp_path / "out"), "held_out") == split(ours + theirs, "held_out")
    counts = [(source.path, source.weight, source.duplicates, source.documents) for source in manifest.sources]
    assert counts == [
        (sources[0]["path"], 2, 10, {"train": 2 * len(split(ours, "train")), "held_out": len(split(ours, "held_out"))}),
        (f"{s3_bucket}/two", 0.5, 10, {"train": len(half), "held_out": len(split(theirs, "held_out"))}),
    ]
    for name, whole in manifest.splits.items():
        assert sum(source.tokens[name] for source in manifest.sources) == whole.tokens
    assert pack(mixture(tmp_path / "again", dedup=True, unit_bytes=10_000, workers=2)) == manifest
    assert shard_bytes(tmp_path / "again") == shard_bytes(tmp_path / "out")
    assert pack(mixture(f"{s3_bucket}/out", dedup=True)) == manifest
    for entry in (*manifest.splits["train"].shards, *manifest.splits["held_out"].shards):
        assert locations.sha256(f"{s3_bucket}/out/{entry.file}") == entry.sha256
    assert {entry.name.split("/")[0] for entry in locations.list_files(s3_bucket)} == {"out", "two"}
    repeated = pack(mixture(tmp_path / "repeated"))
    assert not set(documents_of(str(tmp_path / "repeated"), "train")) & set(split(ours + theirs, "held_out"))
    assert repeated.splits["held_out"].documents == len(split(first + second, "held_out"))


@pytest.mark.ray
def test_only_the_tokens_of_the_assistant_are_trained_and_texts_beside_it_whole(ray_cluster, tmp_path):
    chat_tokenizer("qwen2.5").save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    pairs = [{"prompt": row["messages"][0]["content"], "response": row["messages"][1]["content"]} for row in CHAT]
    sources = [
        {"path": write_lines(tmp_path / "chat.jsonl", CHAT + pairs[:1]), "documents": "conversations"},
        {"path": write_lines(tmp_path / "text.jsonl", [{"text": "some text"}])},
    ]
    settings = {"held_out": 0.0, "dedup": True, "unit_bytes": 200}
    manifest = pack(job(sources, tmp_path / "out", str(tmp_path / "tokenizer"), **settings))
    assert (manifest.trained, manifest.format_version) == (True, 2)
    assert [source.duplicates for source in manifest.sources] == [1, 0]  # the prompt and response of a conversation
    reader = shards.ShardReader(str(tmp_path / "out"))
    rows = reader.rows(range(len(reader)))
    ids, flags = rows.input_ids_BS.flatten(), rows.trained_BS.flatten()
    end = tokenizer.special_ids["<|im_end|>"]
    for n, row in enumerate(CHAT):
        mine = rows.document_ids_BS.flatten() == n
        answer = ids[mine & flags].tolist()
        assert tokenizer.decode(answer) == row["messages"][1]["content"] + "\n"
        assert end in answer
        assert "What is" in tokenizer.decode(ids[mine & ~flags].tolist())
    text = rows.document_ids_BS.flatten() == len(CHAT)
    assert tokenizer.decode(ids[text].tolist()) == "some text"
    assert flags[text].all()
    assert not flags[rows.document_ids_BS.flatten() < 0].any()


def test_conversations_without_a_chat_template_are_refused_before_any_work(tokenizer_folder, tmp_path):
    path = write_lines(tmp_path / "chat.jsonl", CHAT)
    with pytest.raises(TokenizerError, match=r"has no chat template; conversations need one; put chat_tem"):
        pack(job(path, tmp_path / "out", tokenizer_folder, documents="conversations"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
THOUGHT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "hm"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
UNUSABLE = [
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]},
    {"text": "x"},
    {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]},
]


@pytest.mark.ray
def test_rows_that_cannot_be_used_are_left_out_counted_and_named_and_end_no_job(ray_cluster, tmp_path, capsys):
    chat_tokenizer("qwen3").save(tmp_path / "tokenizer")  # its template shows no calls, and no earlier thoughts
    rows = [*UNUSABLE[:2], {"messages": THOUGHT}, *UNUSABLE[2:], *CHAT]
    path = write_lines(tmp_path / "chat.jsonl", rows)
    settings = {"held_out": 0.0, "documents": "conversations", "dedup": True}

    def packed(output, **changes):
        return pack(job(path, tmp_path / output, str(tmp_path / "tokenizer"), **settings | changes))

    manifest = packed("out")
    assert manifest.sources[0].left_out == len(UNUSABLE)
    assert documents_of(str(tmp_path / "out"), "train")[:2] == [
        "user\na\nassistant\n<think>\nhm\n</think>\n\nb\n",
        "user\na\nassistant\nb\nuser\nc\nassistant\nd\n",
    ]
    assert manifest.splits["train"].documents == 2 + len(CHAT)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"left out 4 rows of {path}: line 1 of {path} begins with a message of the assistant" in printed
    assert f"line 4 of {path} has no conversation" in printed
    assert packed("again", unit_bytes=100) == manifest
    assert shard_bytes(tmp_path / "again") == shard_bytes(tmp_path / "out")


@pytest.mark.ray
def test_a_corpus_of_which_no_row_can_be_used_ends_the_job_by_its_first_rows(ray_cluster, tmp_path):
    chat_tokenizer("qwen3").save(tmp_path / "tokenizer")
    path = write_lines(tmp_path / "chat.jsonl", UNUSABLE[:2])
    with pytest.raises(CorpusError, match=r"no row of corpus .* can be used: line 1 of .* of the assistant.*; line 2"):
        pack(job(path, tmp_path / "out", str(tmp_path / "tokenizer"), documents="conversations"))

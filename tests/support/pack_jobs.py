"""Small pack jobs, and what their shards hold."""

from pathlib import Path

from pipelines.jobs import PackJob
from tidar_core.artifacts import shards
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.text.tokenizer import load_tokenizer

ROW_LEN = 16


def job(corpus_uri, output, tokenizer, **changes):
    """A job with small rows, shards and units; keyword arguments change it."""
    include = ("*.py", "*.txt", "*.md", "*.jsonl")
    small = {
        "include": include,
        "row_len": ROW_LEN,
        "rows_per_shard": 24,
        "held_out": 0.2,
        "unit_bytes": 1000,
        "workers": 1,
    }
    return PackJob(
        corpus=corpus_uri if isinstance(corpus_uri, list) else str(corpus_uri),
        output=str(output),
        tokenizer=tokenizer,
        **(small | changes),
    )


def documents_of(uri, split):
    """Read the rows back into documents, one token at a time."""
    reader, tokenizer = shards.ShardReader(uri, split), load_tokenizer(locations.join(uri, "tokenizer"))
    rows = reader.rows(range(len(reader)))
    ids = {}
    for token, document in zip(rows.input_ids_BS.flatten().tolist(), rows.document_ids_BS.flatten().tolist()):
        if document >= 0:
            ids.setdefault(document, []).append(token)
    assert list(ids) == list(range(len(ids)))
    assert all(tokens[-1] == tokenizer.eos_id for tokens in ids.values())
    return [tokenizer.decode(tokens[:-1]) for tokens in ids.values()]


def shard_bytes(folder):
    """Every byte that is to be the same."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.parquet")} | {
        "manifest": (Path(folder) / "manifest.json").read_bytes()
    }

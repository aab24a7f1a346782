"""A compressed file is read whole, or is named as damaged: on this disk and on an S3 server of our own."""

import gzip
import io
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipelines.evaluation.paper_tasks import read_entries
from pipelines.jobs import Source
from pipelines.packing import corpus
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.compressed import damage_named, open_decompressed
from tidar_core.artifacts.text.prompts import read_prompts
from tidar_core.errors import CorpusError

TEXT = "".join(f"line {n} of a text that says {n * n}\n" for n in range(20_000)).encode()
LINES = b"".join(b'{"text": "document %d"}\n' % n for n in range(20))
CHATS = b'{"prompt": "How many?", "response": "Three."}\n' * 20
PACKERS = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A folder of each kind of location, empty."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")


def parquet(column, rows):
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: rows}), buffer, row_group_size=10)
    return buffer.getvalue()


def read(uri, kind="text"):
    source = Source(path="", documents=kind, text_field="text")
    return list(corpus.documents(corpus.Piece(uri, 0, 1, whole=True), source, pytest.fail))


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", TEXT, "text"),
        ("a.jsonl", LINES, "text"),
        ("a.ndjson", CHATS, "conversations"),
        ("a.parquet", parquet("text", ["one", "two"] * 30), "text"),
        ("a.parquet", parquet("messages", [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]),
         "conversations"),
    ],
)  # fmt: skip
def test_a_compressed_file_that_was_cut_anywhere_is_named_whatever_it_holds(root, name, content, kind, suffix):
    whole, uri = PACKERS[suffix](content), locations.join(root, name + suffix)
    locations.write_bytes(uri, whole)
    assert len(read(uri, kind)) > 0
    for kept in (0, 1, len(whole) // 2, len(whole) - 1):
        locations.write_bytes(uri, whole[:kept])
        with pytest.raises(CorpusError, match=rf"{name}{suffix} is damaged \(.*\); fetch it again") as caught:
            read(uri, kind)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", PACKERS)
def test_all_streams_of_a_file_are_read_and_each_is_held_to_its_end(root, suffix):
    first, second = PACKERS[suffix](LINES), PACKERS[suffix](LINES + LINES)
    uri = locations.join(root, f"a.jsonl{suffix}")
    locations.write_bytes(uri, first + second)
    assert read(uri) == [f"document {n}" for n in range(20)] * 3
    for spoilt in (first + second[:-1], first + second[:3], first + b"garbage", second[:-5] + first):
        locations.write_bytes(uri, spoilt)
        with pytest.raises(CorpusError, match="is damaged"):
            read(uri)
    locations.write_bytes(uri, first)  # cut between two streams, it is a whole file
    assert len(read(uri)) == 20


def test_skippable_empty_and_far_reaching_frames_of_zstandard_are_read(tmp_path):
    skipped = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    reach = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)  # the default limit of decoders is 27
    far = zstandard.ZstdCompressor(compression_params=reach).compressobj()
    frames = skipped + zstandard.compress(b"") + far.compress(TEXT) + far.flush() + skipped
    (tmp_path / "a.zst").write_bytes(frames)
    with open_decompressed(str(tmp_path / "a.zst")) as stream:
        assert stream.read() == TEXT
    (tmp_path / "a.zst").write_bytes(frames[:-1])
    with pytest.raises(EOFError), open_decompressed(str(tmp_path / "a.zst")) as stream:
        stream.read()


def test_what_a_short_frame_stands_for_is_unpacked_a_little_at_a_time(tmp_path):
    (tmp_path / "a.zst").write_bytes(zstandard.compress(bytes(2**28)))
    with open_decompressed(str(tmp_path / "a.zst")) as stream:
        assert stream.read(5) == bytes(5)
        assert len(stream.raw._output) <= 2**27


@pytest.mark.parametrize("suffix", PACKERS)
def test_prompts_and_questions_in_a_file_that_was_cut_are_refused_by_its_name(tmp_path, suffix):
    path = str(tmp_path / f"a.jsonl{suffix}")
    content = PACKERS[suffix](LINES)
    locations.write_bytes(path, content)
    assert len(read_prompts(path, 99)) == len(read_entries(path)) == 20
    locations.write_bytes(path, content[:-3])
    for reader in (lambda: read_prompts(path, 99), lambda: read_entries(path)):
        with pytest.raises(CorpusError, match=rf"a\.jsonl{suffix} is damaged"):
            reader()


def test_a_suffix_in_upper_case_is_the_same_suffix(tmp_path):
    for name, pack in (("A.JSONL.GZ", gzip.compress), ("B.Jsonl.ZST", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(LINES))
        with damage_named(name), open_decompressed(str(tmp_path / name)) as stream:
            assert stream.read() == LINES
        assert len(read(str(tmp_path / name))) == 20

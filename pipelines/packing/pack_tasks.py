"""The tasks of packing: each does its work once and writes a mark when it is done.

Every task writes its files into the work folder of the job, and a mark last. The mark holds the counts and names that
the driver needs. A task whose mark exists is done; a restarted job does not do it again. Files appear whole or not at
all, so every file that a mark names exists.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, product

import numpy as np
import torch

from pipelines.jobs import Source, TrainBpe
from pipelines.packing import corpus, duplicates
from pipelines.packing.conversations import Segment, encode_conversation
from pipelines.packing.mixture import STREAMS, digest_of, split_of, streams_of
from pipelines.packing.skipped_entries import LeftOut
from pipelines.packing.token_parts import Part, PartWriter, read_part
from tidar_core.artifacts import shards
from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.locations import FileEntry
from tidar_core.artifacts.store.output_folder import marked
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.long_texts import encode_long
from tidar_core.artifacts.text.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tidar_core.errors import CorpusError
from tidar_core.training.packing import cut_rows, overlapping_spans

__all__ = [
    "ShardPlan",
    "Tokenizing",
    "Unit",
    "UnitDigests",
    "UnitParts",
    "WorkFolder",
    "find_bucket_repeats",
    "keep_tokenizer",
    "plan_shards",
    "tokenize_unit",
    "train_tokenizer",
    "write_planned_shard",
    "write_unit_digests",
]

BATCH_CHARACTERS = 2**20
"""Approximate text that the tokenizer gets at once; a longer document is tokenized in pieces."""


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Folder that holds the files of a job until the shards are complete."""

    uri: str
    unit_bytes: int

    @property
    def shards(self) -> str:
        """Folder that becomes the output."""
        return locations.join(self.uri, "shards")

    @property
    def marks(self) -> str:
        """Folder of the marks of shards that are written."""
        return locations.join(self.uri, "marks")

    @property
    def units(self) -> str:
        """Folder of the units of work; another `unit_bytes` cuts other units."""
        return locations.join(self.uri, f"units-{self.unit_bytes}")

    @property
    def tokenizer(self) -> str:
        """Folder of the tokenizer that is used, given or trained."""
        return locations.join(self.shards, shards.TOKENIZER)

    def digests(self, unit: int) -> str:
        """Address of the digests of a unit's documents, and of which documents are taken."""
        return locations.join(self.units, f"taken-{unit:07d}")

    def repeats(self, bucket: int) -> str:
        """Address of the repeated documents of a bucket."""
        return locations.join(self.units, f"repeats-{bucket:03d}")


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive pieces of one source."""

    ordinal: int
    source: int
    pieces: tuple[corpus.Piece, ...]

    @property
    def bytes(self) -> int:
        """Size in the corpus."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class TokenizerKept:
    """Outcome of a tokenizer that was written."""

    fingerprint: str


@dataclass(frozen=True, slots=True)
class UnitDigests:
    """Outcome of a unit whose digests were written."""

    documents: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BucketRepeats:
    """Outcome of a bucket whose repeated documents were written."""

    repeats: int


@dataclass(frozen=True, slots=True)
class UnitParts:
    """Outcome of a unit that was tokenized."""

    ordinal: int
    source: int
    bytes: int
    duplicates: int
    """Documents that repeat earlier ones."""
    passed_over: list[str]
    """Files that are not UTF-8 text."""
    left_out: LeftOut
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Range of its split's tokens that a shard holds, and the parts that hold them."""

    file: str
    row_len: int
    eos_id: int
    first_document: int
    start: int
    """First token that the shard holds, counted from the start of `parts`."""
    stop: int
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A document."""

    ids: np.ndarray
    trained: np.ndarray | None


def plan_shards(
    split: str, parts: list[Part], *, row_len: int, rows_per_shard: int, eos_id: int
) -> Iterator[ShardPlan]:
    """Plans of the shards of a split: the tokens and parts of each."""
    begins = list(accumulate((part.tokens for part in parts), initial=0))
    documents = list(accumulate((part.documents for part in parts), initial=0))
    total, shard_tokens = begins[-1], row_len * rows_per_shard
    for ordinal, begin in enumerate(range(0, total, shard_tokens)):
        end = min(begin + shard_tokens, total)
        spans = overlapping_spans(begins, begin, end)
        yield ShardPlan(
            file=shards.shard_name(split, ordinal),
            row_len=row_len,
            eos_id=eos_id,
            first_document=documents[spans[0].part],
            start=spans[0].start,
            stop=spans[0].start + end - begin,
            parts=tuple(parts[span.part].file for span in spans),
        )


def train_tokenizer(
    files: list[tuple[FileEntry, Source]], how: TrainBpe, held_out: float, folder: WorkFolder
) -> TokenizerKept:
    """Write a tokenizer trained on the beginnings of all files, without the texts that are held out."""

    def trained() -> Tokenizer:
        texts = corpus.first_texts(files, how.max_bytes, lambda text: split_of(digest_of(text), held_out) == "train")
        return train_bpe(texts, how.vocab_size)

    return keep_tokenizer(trained, folder)


def keep_tokenizer(made: Callable[[], Tokenizer], folder: WorkFolder) -> TokenizerKept:
    """Write the tokenizer that the shards are made with."""

    def work() -> TokenizerKept:
        tokenizer = made()
        with locations.local_folder() as local:
            tokenizer.save(local)
            locations.upload_folder(local, folder.tokenizer)
        return TokenizerKept(tokenizer.fingerprint)

    return marked(locations.join(folder.marks, "tokenizer.json"), TokenizerKept, work)


def write_unit_digests(unit: Unit, sources: tuple[Source, ...], held_out: float, folder: WorkFolder) -> UnitDigests:
    """Read a unit and write only the digests of its documents."""

    def work() -> UnitDigests:
        source = sources[unit.source]
        texts = (text for piece in unit.pieces for text in corpus.documents(piece, source, lambda uri: None))
        digests = [digest_of(text) for text in texts]
        taken = [bool(streams_of(digest, held_out, source.weight)) for digest in digests]
        duplicates.write_digests(folder.digests(unit.ordinal), digests, taken)
        return UnitDigests(len(digests), unit.bytes)

    return marked(folder.digests(unit.ordinal) + ".json", UnitDigests, work)


def find_bucket_repeats(item: tuple[int, duplicates.Bucket], units: int, folder: WorkFolder) -> BucketRepeats:
    """Compare the digests of one bucket, given with its ordinal, over all units."""
    ordinal, bucket = item

    def work() -> BucketRepeats:
        digests = map(folder.digests, range(units))
        return BucketRepeats(duplicates.find_repeats(digests, bucket, folder.repeats(ordinal)))

    return marked(folder.repeats(ordinal) + ".json", BucketRepeats, work)


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """How a job's units are tokenized."""

    folder: WorkFolder
    sources: tuple[Source, ...]
    held_out: float
    buckets: int
    """Buckets of repeated documents, which are left out; 0: repeats stay."""
    flags: bool
    """Whether parts mark the tokens that are trained."""


def tokenize_unit(unit: Unit, how: Tokenizing) -> UnitParts:
    """Write the token parts of a unit; returns their counts and names."""
    mark = locations.join(how.folder.units, f"tokens-{unit.ordinal:07d}.json")
    return marked(mark, UnitParts, lambda: _unit_tokenizer(how).parts(unit))


@lru_cache(maxsize=1)
def _unit_tokenizer(how: Tokenizing) -> "_UnitTokenizer":
    """The tokenizer of this process, loaded once for all its units."""
    return _UnitTokenizer(how)


class _UnitTokenizer:
    """Tokenizer of units; it is kept between units."""

    def __init__(self, how: Tokenizing) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a task; more tasks for more cores
        self._how = how
        self._repeats = [how.folder.repeats(bucket) for bucket in range(how.buckets)]
        self._tokenizer = load_tokenizer(how.folder.tokenizer)
        self._template = load_chat_template(how.folder.tokenizer) if how.flags else None

    def parts(self, unit: Unit) -> UnitParts:
        """Tokenize a unit."""
        source = self._how.sources[unit.source]
        writers = {name: PartWriter(self._how.folder.units, unit.source, name, unit.ordinal) for name in STREAMS}
        passed_over: list[str] = []
        left_out = LeftOut()
        repeats = duplicates.read_repeats(self._repeats, unit.ordinal)
        found = (
            document
            for piece in unit.pieces
            for document in corpus.located_documents(piece, source, passed_over.append, left_out)
        )
        for batch in _in_batches(self._taken(found, repeats, source.weight)):
            documents = [document for document, _ in batch]
            conversations = source.documents == "conversations"
            encoded = self._encoded_conversations(documents, left_out) if conversations else self._encoded(documents)
            for tokenized, (_, streams) in zip(encoded, batch):
                for tokens, stream in product(tokenized, streams):
                    writers[stream].add(tokens.ids, tokens.trained)
        return UnitParts(
            ordinal=unit.ordinal,
            source=unit.source,
            bytes=unit.bytes,
            duplicates=len(repeats),
            passed_over=passed_over,
            left_out=left_out,
            parts=[part for writer in writers.values() for part in writer.close()],
        )

    def _taken(
        self, found: Iterable[corpus.Document], repeats: set[int], weight: float
    ) -> Iterator[tuple[corpus.Document, list[str]]]:
        """The documents to tokenize, each with the streams that it belongs to."""
        for ordinal, document in enumerate(found):
            if ordinal not in repeats and (streams := streams_of(digest_of(document.text), self._how.held_out, weight)):
                yield document, streams

    def _encoded(self, documents: list[corpus.Document]) -> Iterator[list[_Tokens]]:
        """The tokens of each text, followed by the end-of-text token; all of them are trained."""
        texts = [document.text for document in documents]
        short = iter(self._tokenizer.encode_batch([text for text in texts if len(text) <= BATCH_CHARACTERS]))
        for text in texts:
            if len(text) <= BATCH_CHARACTERS:
                ids = np.asarray([*next(short), self._tokenizer.eos_id], dtype=np.int32)
            else:
                encoded = encode_long(self._tokenizer, text, BATCH_CHARACTERS)
                pieces = [np.asarray(piece, dtype=np.int32) for piece in encoded]
                ids = np.concatenate([*pieces, np.asarray([self._tokenizer.eos_id], dtype=np.int32)])
            yield [_Tokens(ids, np.ones(len(ids), dtype=bool) if self._how.flags else None)]

    def _encoded_conversations(self, documents: list[corpus.Document], left_out: LeftOut) -> Iterator[list[_Tokens]]:
        """The documents of each conversation; an empty list if the template refuses the conversation."""
        assert self._template is not None, "conversations need a chat template"
        for document in documents:
            try:
                encoded = encode_conversation(document.text, self._template, self._tokenizer)
            except CorpusError as fault:
                left_out.add(document.place, f"does not fit the chat template: {fault}")
                encoded = []
            yield [self._conversation_tokens(segments) for segments in encoded]

    def _conversation_tokens(self, segments: list[Segment]) -> _Tokens:
        """The tokens of one document, with the assistant's tokens marked.

        The end-of-text token at the end is the assistant's if the assistant's turn is the last, unless this turn
        already contains it.
        """
        ids: list[int] = []
        trained: list[bool] = []
        closing = False
        for segment in segments:
            ids += segment.ids
            trained += [segment.trained] * len(segment.ids)
            closing = segment.trained and self._tokenizer.eos_id not in segment.ids
        return _Tokens(np.asarray([*ids, self._tokenizer.eos_id], dtype=np.int32), np.asarray([*trained, closing]))


def write_planned_shard(plan: ShardPlan, folder: WorkFolder) -> shards.ShardEntry:
    """Cut one shard out of the parts that hold its tokens; returns its entry in the manifest."""

    def work() -> shards.ShardEntry:
        pieces = [read_part(locations.join(folder.units, part)) for part in plan.parts]
        flags = [piece.trained_T for piece in pieces if piece.trained_T is not None]
        rows = cut_rows(
            torch.cat([piece.tokens_T for piece in pieces]),
            torch.cat([piece.document_len_N for piece in pieces]),
            torch.cat(flags) if flags else None,
            first_document=plan.first_document,
            start=plan.start,
            stop=plan.stop,
            row_len=plan.row_len,
            eos_id=plan.eos_id,
        )
        return shards.write_shard(locations.join(folder.shards, plan.file), rows)

    return marked(locations.join(folder.marks, f"{plan.file}.json"), shards.ShardEntry, work)


def _in_batches(
    taken: Iterable[tuple[corpus.Document, list[str]]],
) -> Iterator[list[tuple[corpus.Document, list[str]]]]:
    batch: list[tuple[corpus.Document, list[str]]] = []
    characters = 0
    for document, streams in taken:
        batch.append((document, streams))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

"""What does one worker do while a corpus is packed?

Every task leaves its result in the work folder of the job, and last of all a mark with what the driver must know of it:
counts and names. A task whose mark lies there is done, and is not done again by whoever starts the job anew. Files
appear whole or not at all, so what a mark speaks of can be trusted.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, product
from typing import Any

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
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.long_texts import encode_long
from tidar_core.artifacts.text.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tidar_core.errors import CorpusError
from tidar_core.training.packing import cut_rows, overlapping_spans

__all__ = [
    "ShardPlan",
    "Tokenizing",
    "Unit",
    "WorkFolder",
    "find_bucket_repeats",
    "keep_tokenizer",
    "leave_digests",
    "plan_shards",
    "tokenize_unit",
    "train_tokenizer",
    "write_planned_shard",
]

BATCH_CHARACTERS = 2**20
"""Text handed to the tokenizer at once, about; a longer document is handed over in pieces."""


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Where a job keeps what it has until the shards are complete."""

    uri: str
    unit_bytes: int

    @property
    def shards(self) -> str:
        """Becomes the output."""
        return locations.join(self.uri, "shards")

    @property
    def marks(self) -> str:
        """Of the shards that are written."""
        return locations.join(self.uri, "marks")

    @property
    def units(self) -> str:
        """Of the units of work, which are others when `unit_bytes` is another."""
        return locations.join(self.uri, f"units-{self.unit_bytes}")

    @property
    def tokenizer(self) -> str:
        """The one used, whether given or trained."""
        return locations.join(self.shards, shards.TOKENIZER)

    def digests(self, unit: int) -> str:
        """Digests of a unit's documents, and which are taken."""
        return locations.join(self.units, f"taken-{unit:07d}")

    def repeats(self, bucket: int) -> str:
        """Repeated documents of a bucket."""
        return locations.join(self.units, f"repeats-{bucket:03d}")


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive pieces of one source."""

    ordinal: int
    source: int
    pieces: tuple[corpus.Piece, ...]

    @property
    def bytes(self) -> int:
        """As they lie in the corpus."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Which tokens of its split a shard holds, and where they lie."""

    file: str
    row_len: int
    eos_id: int
    first_document: int
    start: int
    """Of the tokens of `parts`, the first that the shard holds."""
    stop: int
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A document."""

    ids: np.ndarray
    trained: np.ndarray | None


def marked(uri: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the mark at `uri` says; if there is none, the outcome of the work, left there as its mark."""
    if locations.exists(uri):
        return dict(locations.read_json(uri))
    outcome = work()
    locations.write_json(uri, outcome)
    return outcome


def plan_shards(
    split: str, parts: list[Part], *, row_len: int, rows_per_shard: int, eos_id: int
) -> Iterator[ShardPlan]:
    """The shards of a split: which tokens of which parts each is to hold."""
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
) -> dict[str, Any]:
    """Leave a tokenizer trained on the beginnings of all files, on no text that is held out."""

    def trained() -> Tokenizer:
        texts = corpus.first_texts(files, how.max_bytes, lambda text: split_of(digest_of(text), held_out) == "train")
        return train_bpe(texts, how.vocab_size)

    return keep_tokenizer(trained, folder)


def keep_tokenizer(made: Callable[[], Tokenizer], folder: WorkFolder) -> dict[str, Any]:
    """Leave the tokenizer that the shards are made with."""

    def work() -> dict[str, Any]:
        tokenizer = made()
        with locations.local_folder() as local:
            tokenizer.save(local)
            locations.upload_folder(local, folder.tokenizer)
        return {"fingerprint": tokenizer.fingerprint}

    return marked(locations.join(folder.marks, "tokenizer.json"), work)


def leave_digests(unit: Unit, sources: tuple[Source, ...], held_out: float, folder: WorkFolder) -> dict[str, Any]:
    """Read a unit for the digests of its documents alone."""

    def work() -> dict[str, Any]:
        source = sources[unit.source]
        texts = (text for piece in unit.pieces for text in corpus.documents(piece, source, lambda uri: None))
        digests = [digest_of(text) for text in texts]
        taken = [bool(streams_of(digest, held_out, source.weight)) for digest in digests]
        duplicates.write_digests(folder.digests(unit.ordinal), digests, taken)
        return {"documents": len(digests), "bytes": unit.bytes}

    return marked(folder.digests(unit.ordinal) + ".json", work)


def find_bucket_repeats(item: tuple[int, duplicates.Bucket], units: int, folder: WorkFolder) -> dict[str, Any]:
    """Compare the digests of one bucket, given with its ordinal, over all units."""
    ordinal, bucket = item

    def work() -> dict[str, Any]:
        digests = map(folder.digests, range(units))
        return {"repeats": duplicates.find_repeats(digests, bucket, folder.repeats(ordinal))}

    return marked(folder.repeats(ordinal) + ".json", work)


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """How a job's units are tokenized."""

    folder: WorkFolder
    sources: tuple[Source, ...]
    held_out: float
    buckets: int
    """Of repeated documents, which are left out; 0: nothing is."""
    flags: bool
    """Whether parts say which tokens are ones to learn to say."""


def tokenize_unit(unit: Unit, how: Tokenizing) -> dict[str, Any]:
    """Leave the token parts of a unit; the parts it became."""
    mark = locations.join(how.folder.units, f"tokens-{unit.ordinal:07d}.json")
    return {"ordinal": unit.ordinal} | marked(mark, lambda: _unit_tokenizer(how).parts(unit))


@lru_cache(maxsize=1)
def _unit_tokenizer(how: Tokenizing) -> "_UnitTokenizer":
    """Loaded once in a process, for all units that it is given."""
    return _UnitTokenizer(how)


class _UnitTokenizer:
    """Holds the tokenizer between units."""

    def __init__(self, how: Tokenizing) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a task; more tasks for more cores
        self._how = how
        self._repeats = [how.folder.repeats(bucket) for bucket in range(how.buckets)]
        self._tokenizer = load_tokenizer(how.folder.tokenizer)
        self._template = load_chat_template(how.folder.tokenizer) if how.flags else None

    def parts(self, unit: Unit) -> dict[str, Any]:
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
        return {
            "source": unit.source,
            "bytes": unit.bytes,
            "duplicates": len(repeats),
            "passed_over": passed_over,
            "left_out": asdict(left_out),
            "parts": [asdict(part) for writer in writers.values() for part in writer.close()],
        }

    def _taken(
        self, found: Iterable[corpus.Document], repeats: set[int], weight: float
    ) -> Iterator[tuple[corpus.Document, list[str]]]:
        """The documents that are to be tokenized, with the streams that each belongs to."""
        for ordinal, document in enumerate(found):
            if ordinal not in repeats and (streams := streams_of(digest_of(document.text), self._how.held_out, weight)):
                yield document, streams

    def _encoded(self, documents: list[corpus.Document]) -> Iterator[list[_Tokens]]:
        """The tokens of each text, the end-of-text token behind them; all are ones to learn to say."""
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
        """The documents that each conversation becomes; none of one that the template does not take."""
        assert self._template is not None, "conversations need a chat template"
        for document in documents:
            try:
                encoded = encode_conversation(document.text, self._template, self._tokenizer)
            except CorpusError as fault:
                left_out.add(document.place, f"does not fit the chat template: {fault}")
                encoded = []
            yield [self._conversation_tokens(segments) for segments in encoded]

    def _conversation_tokens(self, segments: list[Segment]) -> _Tokens:
        """The tokens of one document, those of the assistant marked.

        The end-of-text token behind them is the assistant's if it has the last word, unless it said one already.
        """
        ids: list[int] = []
        trained: list[bool] = []
        closing = False
        for segment in segments:
            ids += segment.ids
            trained += [segment.trained] * len(segment.ids)
            closing = segment.trained and self._tokenizer.eos_id not in segment.ids
        return _Tokens(np.asarray([*ids, self._tokenizer.eos_id], dtype=np.int32), np.asarray([*trained, closing]))


def write_planned_shard(plan: ShardPlan, folder: WorkFolder) -> dict[str, Any]:
    """Cut one shard out of the parts that hold its tokens; its entry in the manifest."""

    def work() -> dict[str, Any]:
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
        return asdict(shards.write_shard(locations.join(folder.shards, plan.file), rows))

    return marked(locations.join(folder.marks, f"{plan.file}.json"), work)


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

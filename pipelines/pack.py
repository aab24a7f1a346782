"""How does a corpus become packed shards, on many machines, with the same bytes whatever their number?

1. The driver lists the corpus and groups it, in order, into units of work.
2. Actors tokenize units into token parts beside the output; only their counts come back.
3. From the counts, arithmetic says which tokens each shard holds (`tidar_core.packing`).
4. Tasks write the shards, each reading just the parts that it needs; only manifest entries come back.

Documents and tokens never pass through the driver. The folder is put in place when it is complete.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import ray
import ray.data
import torch

from pipelines import corpus
from pipelines.cluster import connect, original_error
from pipelines.jobs import PackJob, TrainBpe
from pipelines.progress import job_progress, stderr
from pipelines.token_parts import Part, PartWriter, read_part
from tidar_core import errors
from tidar_core.artifacts import locations, shards
from tidar_core.artifacts.locations import FileEntry
from tidar_core.artifacts.made_by import made_by, write_made_by
from tidar_core.artifacts.shards import Manifest, ShardEntry, Split
from tidar_core.artifacts.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tidar_core.errors import CorpusError, ShardError, TidarError
from tidar_core.packing import cut_rows, overlapping_spans, row_count

__all__ = ["pack"]

BATCH_CHARACTERS = 2**20
"""Text handed to the tokenizer at once."""
MOST_BLOCKS = 4096
"""Tasks that Ray Data tracks at once; with more units of work than this, a task takes several."""


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """What the actors left: parts in the order of the corpus, and the files that are no text."""

    parts: list[Part]
    passed_over: list[str]


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


def pack(job: PackJob) -> Manifest:
    """Write the shards of `job` to `job.output`, or return what lies there if the same job completed it before.

    Same corpus, tokenizer, row_len, rows_per_shard and held_out: same bytes, whatever `workers` and `unit_bytes`.
    """
    files = corpus.list_corpus(job.corpus, job.include, job.exclude)
    tokenizer = load_tokenizer(job.tokenizer) if isinstance(job.tokenizer, str) else None
    identity = _identity(job, files, tokenizer)
    output = locations.absolute(job.output)
    if done := _completed(output, identity):
        return done
    connect()
    with (
        locations.staged_folder(output, shards.MANIFEST) as staged,
        locations.scratch_folder(output) as scratch,
        _quiet_ray_data(),
    ):
        tokenizer = _put_tokenizer(job, files, tokenizer, locations.join(staged, shards.TOKENIZER))
        tokenized = _tokenize(job, files, staged, scratch)
        _tell_passed_over(tokenized.passed_over)
        splits = {name: [part for part in tokenized.parts if part.split == name] for name in shards.SPLITS}
        _require_tokens(job, splits)
        manifest = Manifest(
            row_len=job.row_len,
            eos_id=tokenizer.eos_id,
            vocab_len=tokenizer.vocab_len,
            tokenizer=tokenizer.fingerprint,
            identity=identity,
            passed_over=len(tokenized.passed_over),
            splits=_write_shards(job, splits, tokenizer.eos_id, staged, scratch),
        )
        parents = {"corpus": _listing_hash(files), "tokenizer": tokenizer.fingerprint}
        write_made_by(staged, made_by(job.model_dump(mode="json"), parents))
        shards.write_manifest(staged, manifest)
    return manifest


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


class TokenizeUnit:
    """An actor: takes units of work, leaves token parts in the scratch folder, returns what it left."""

    def __init__(self, tokenizer: str, scratch: str, text_field: str, held_out: float) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core an actor; more actors for more cores
        self._tokenizer = load_tokenizer(tokenizer)
        self._scratch = scratch
        self._text_field = text_field
        self._held_out = held_out

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _outcomes(batch, self._tokenize_unit)

    def _tokenize_unit(self, unit: dict[str, Any]) -> dict[str, Any]:
        writers = {split: PartWriter(self._scratch, split, unit["ordinal"]) for split in shards.SPLITS}
        passed_over: list[str] = []
        pieces = [corpus.Piece(**piece) for piece in unit["pieces"]]
        texts = (text for piece in pieces for text in corpus.documents(piece, self._text_field, passed_over.append))
        for some in _in_batches(texts):
            for text, ids in zip(some, self._tokenizer.encode_batch(some)):
                writers[corpus.split_of(text, self._held_out)].add([*ids, self._tokenizer.eos_id])
        parts = [asdict(part) for writer in writers.values() for part in writer.close()]
        size = sum(piece.stop - piece.start for piece in pieces)
        return {"ordinal": unit["ordinal"], "bytes": size, "parts": parts, "passed_over": passed_over}


def write_planned_shard(plan: ShardPlan, staged: str, scratch: str) -> ShardEntry:
    """Cut one shard out of the parts that hold its tokens."""
    pieces = [read_part(locations.join(scratch, part)) for part in plan.parts]
    rows = cut_rows(
        torch.cat([piece.tokens_T for piece in pieces]),
        torch.cat([piece.document_len_N for piece in pieces]),
        first_document=plan.first_document,
        start=plan.start,
        stop=plan.stop,
        row_len=plan.row_len,
        eos_id=plan.eos_id,
    )
    return shards.write_shard(locations.join(staged, plan.file), rows)


def _tokenize(job: PackJob, files: list[FileEntry], staged: str, scratch: str) -> _Tokenized:
    units = corpus.work_units(files, job.unit_bytes)
    items = [{"ordinal": ordinal, "pieces": [asdict(piece) for piece in unit]} for ordinal, unit in enumerate(units)]
    outcomes = _dataset(items).map_batches(
        TokenizeUnit,
        batch_size=1,
        fn_constructor_args=(locations.join(staged, shards.TOKENIZER), scratch, job.text_field, job.held_out),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=job.workers, initial_size=_actors_now(job.workers)),
    )
    done: list[dict[str, Any]] = []
    began, read = time.monotonic(), 0
    with job_progress("tokenize", total=len(units), unit="units") as show:
        for unit in _results(outcomes):
            done.append(unit)
            read += unit["bytes"]
            show(len(done), {"MB": read / 1e6, "MB/s": read / 1e6 / (time.monotonic() - began)})
    done.sort(key=lambda unit: unit["ordinal"])
    return _Tokenized(
        parts=[Part(**part) for unit in done for part in unit["parts"]],
        passed_over=[uri for unit in done for uri in unit["passed_over"]],
    )


def _write_shards(
    job: PackJob, splits: dict[str, list[Part]], eos_id: int, staged: str, scratch: str
) -> dict[str, Split]:
    plans = [
        plan
        for name, parts in splits.items()
        for plan in plan_shards(name, parts, row_len=job.row_len, rows_per_shard=job.rows_per_shard, eos_id=eos_id)
    ]
    outcomes = _dataset([asdict(plan) for plan in plans]).map_batches(
        partial(_write_shard_batch, staged=staged, scratch=scratch), batch_size=1, concurrency=job.workers
    )
    entries: dict[str, ShardEntry] = {}
    with job_progress("write shards", total=len(plans), unit="shards") as show:
        for entry in _results(outcomes):
            entries[entry["file"]] = ShardEntry(**entry)
            show(len(entries), {})
    return {name: _split(name, parts, entries, job) for name, parts in splits.items()}


def _split(name: str, parts: list[Part], entries: dict[str, ShardEntry], job: PackJob) -> Split:
    tokens = sum(part.tokens for part in parts)
    rows = row_count(tokens, job.row_len)
    listed = tuple(entries[shards.shard_name(name, n)] for n in range(row_count(rows, job.rows_per_shard)))
    if sum(entry.tokens for entry in listed) != tokens:
        raise ShardError(f"the shards of {name} hold other than its {tokens} tokens; run pack again")
    return Split(documents=sum(part.documents for part in parts), tokens=tokens, rows=rows, shards=listed)


def _write_shard_batch(batch: dict[str, Any], staged: str, scratch: str) -> dict[str, Any]:
    def write(plan: dict[str, Any]) -> dict[str, Any]:
        plan["parts"] = tuple(plan["parts"])
        return asdict(write_planned_shard(ShardPlan(**plan), staged, scratch))

    return _outcomes(batch, write)


def _dataset(items: list[dict[str, Any]]) -> ray.data.Dataset:
    rows = [{"item": json.dumps(item)} for item in items]
    return ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))


def _outcomes(batch: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Do the work of each item. An error of ours is an outcome: Ray Data would keep its text and lose its type."""
    outcomes = []
    for item in batch["item"]:
        try:
            outcome: dict[str, Any] = {"result": work(json.loads(item))}
        except TidarError as error:
            outcome = {"error": [type(error).__name__, str(error)]}
        outcomes.append(json.dumps(outcome))
    return {"outcome": outcomes}


def _results(outcomes: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for row in outcomes.iter_rows():
        outcome = json.loads(row["outcome"])
        if "error" in outcome:
            kind, message = outcome["error"]
            raise getattr(errors, kind)(message)
        yield outcome["result"]


def _put_tokenizer(job: PackJob, files: list[FileEntry], given: Tokenizer | None, uri: str) -> Tokenizer:
    """Put the tokenizer given, or one trained in a task, at `uri`; the one that lies there is the one used."""
    if given:
        _save_tokenizer(given, uri)
    else:
        try:
            ray.get(ray.remote(_train_tokenizer).remote(job, files, uri))
        except ray.exceptions.RayError as error:
            raise original_error(error) from None
    return load_tokenizer(uri)


def _train_tokenizer(job: PackJob, files: list[FileEntry], uri: str) -> None:
    assert isinstance(job.tokenizer, TrainBpe), "a tokenizer folder is not trained"
    texts = corpus.first_texts(files, job.text_field, job.tokenizer.max_bytes, job.held_out)
    _save_tokenizer(train_bpe(texts, job.tokenizer.vocab_size), uri)


def _save_tokenizer(tokenizer: Tokenizer, uri: str) -> None:
    with locations.local_folder() as folder:
        tokenizer.save(folder)
        locations.upload_folder(folder, uri)


def _completed(output: str, identity: str) -> Manifest | None:
    if not locations.exists(locations.join(output, shards.MANIFEST)):
        return None
    try:
        manifest = shards.read_manifest(output)
        shards.check_sizes(output, manifest)
    except ShardError:  # damaged: it is this job that mends it
        return None
    return manifest if manifest.identity == identity else None


def _identity(job: PackJob, files: list[FileEntry], tokenizer: Tokenizer | None) -> str:
    decides = job.model_dump(mode="json", include={"text_field", "row_len", "rows_per_shard", "held_out", "tokenizer"})
    if tokenizer:
        decides["tokenizer"] = tokenizer.fingerprint
    return _hash([shards.FORMAT_VERSION, decides, _listing_hash(files)])


def _listing_hash(files: list[FileEntry]) -> str:
    return _hash([[file.name, file.size, file.version] for file in files])


def _hash(value: Any) -> str:
    return hashlib.sha256(locations.canonical_json(value).encode()).hexdigest()


def _require_tokens(job: PackJob, splits: dict[str, list[Part]]) -> None:
    if not any(splits.values()):
        raise CorpusError(f"corpus {job.corpus} holds only empty documents; check corpus and text_field")
    if not splits["train"]:
        raise CorpusError(
            f"every document of corpus {job.corpus} fell to held_out ({job.held_out}); lower held_out or add documents"
        )


def _tell_passed_over(uris: list[str]) -> None:
    if uris:
        stderr.print(f"passed over {len(uris)} files that are not UTF-8 text; the first is {uris[0]}", soft_wrap=True)


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _actors_now(workers: int) -> int:
    return max(1, min(workers, int(ray.cluster_resources().get("CPU", 1))))


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])

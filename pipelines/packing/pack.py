"""Packing of a corpus into shards on many machines, with the same bytes for any number of machines.

1. The driver lists the corpus and groups it, in order, into units of work.
2. If documents must be unique, tasks write the hashes of each unit's documents and compare them (`duplicates`).
3. Tasks tokenize units into token parts beside the output; only their counts come back.
4. The driver computes from counts and weights which tokens each shard holds (`tidar_core.training.packing`).
5. Tasks write the shards, each reading only the parts that it needs; only manifest entries come back.

Documents and tokens never pass through the driver. Tasks write into a work folder beside the output, named after the
identity of the job. A job that was killed finds their files there and does the rest (`pipelines.packing.pack_tasks`).
The output is put in place when it is complete.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from pipelines.cluster.connection import connect, original_error
from pipelines.cluster.console import stderr
from pipelines.cluster.progress import job_progress
from pipelines.cluster.work_items import task_outcomes
from pipelines.jobs import PackJob, Source, TrainBpe
from pipelines.packing import corpus, duplicates, pack_tasks
from pipelines.packing.answers_manifest import require_whole_answers
from pipelines.packing.conversations import READER_VERSION
from pipelines.packing.mixture import arranged
from pipelines.packing.pack_tasks import (
    Tokenizing,
    Unit,
    UnitDigests,
    UnitParts,
    WorkFolder,
    plan_shards,
    tokenize_unit,
)
from pipelines.packing.skipped_entries import LeftOut
from pipelines.packing.token_parts import Part
from tidar_core.artifacts import shards
from tidar_core.artifacts.model.bundle_info import hf_location
from tidar_core.artifacts.shards import Manifest, ShardEntry, SourceCounts, Split
from tidar_core.artifacts.store import locations, output_folder
from tidar_core.artifacts.store.locations import FileEntry
from tidar_core.artifacts.store.output_lock import output_lock
from tidar_core.artifacts.store.provenance import made_by, write_made_by
from tidar_core.artifacts.text.chat_template import load_chat_template
from tidar_core.artifacts.text.tokenizer import Tokenizer, load_tokenizer
from tidar_core.errors import CorpusError, ShardError, TokenizerError
from tidar_core.training.packing import row_count

__all__ = ["pack"]

SHOW_SECONDS = 1.0
"""Time between two looks at the training of a tokenizer."""

Listing = list[list[FileEntry]]
"""The files of each source."""
Splits = Mapping[str, list[tuple[int, Part]]]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """Outcomes of all units, in the order of the corpus."""

    units: list[UnitParts]

    @property
    def parts(self) -> list[Part]:
        return [part for unit in self.units for part in unit.parts]

    def passed_over(self, source: int) -> list[str]:
        return [uri for unit in self.units if unit.source == source for uri in unit.passed_over]

    def left_out(self, source: int) -> LeftOut:
        units = [unit.left_out for unit in self.units if unit.source == source]
        return LeftOut(sum(unit.rows for unit in units), [name for unit in units for name in unit.named])

    def duplicates(self, source: int) -> int:
        return sum(unit.duplicates for unit in self.units if unit.source == source)


def pack(job: PackJob) -> Manifest:
    """Write the shards of `job` to `job.output`; if the same job completed them before, only return the manifest.

    The same corpus, tokenizer and job give the same bytes. `workers`, `unit_bytes` and restarts do not change them.
    """
    for source in job.sources:
        require_whole_answers(source.path)
    listing = [corpus.list_corpus(source.path, job.include, job.exclude) for source in job.sources]
    tokenizer = load_tokenizer(hf_location(job.tokenizer)) if isinstance(job.tokenizer, str) else None
    identity = _identity(job, listing, tokenizer)
    output = locations.absolute(job.output)
    folder = WorkFolder(output_folder.work_folder(output, identity[: output_folder.KEY_LEN]), job.unit_bytes)
    if (done := _completed(output, identity)) and not locations.exists(folder.uri):
        return done
    with output_lock(output, shards.MANIFEST):
        return _put_shards(job, listing, tokenizer, identity, folder)


def _put_shards(job: PackJob, listing: Listing, given: Tokenizer | None, identity: str, folder: WorkFolder) -> Manifest:
    """Complete the output, and remove the work folder."""
    output = locations.absolute(job.output)
    done = _completed(output, identity)
    if not done:
        output_folder.remove_other_work(output, folder.uri)
        connect()
        try:
            done = _packed(job, listing, given, identity, folder)
        except CorpusError:  # the corpus must change, which makes another job; nothing of this job can be used again
            locations.remove(folder.uri)
            raise
        output_folder.put_in_place(folder.shards, output, shards.MANIFEST)
    locations.remove(folder.uri)
    return done


def _packed(job: PackJob, listing: Listing, given: Tokenizer | None, identity: str, folder: WorkFolder) -> Manifest:
    tokenizer = _put_tokenizer(job, listing, given, folder)
    units = [
        Unit(ordinal, source, tuple(pieces))
        for ordinal, (source, pieces) in enumerate(
            (place, pieces)
            for place, files in enumerate(listing)
            for pieces in corpus.work_units(files, job.unit_bytes)
        )
    ]
    tokenized = _tokenize(job, units, _find_repeats(job, units, folder) if job.dedup else 0, folder)
    splits = arranged(tokenized.parts, job.sources)
    _require_tokens(job, tokenized, splits)
    sources = tuple(_counts(place, source, tokenized, splits) for place, source in enumerate(job.sources))
    manifest = Manifest(
        row_len=job.row_len,
        eos_id=tokenizer.eos_id,
        vocab_len=tokenizer.vocab_len,
        tokenizer=tokenizer.fingerprint,
        identity=identity,
        splits=_write_shards(job, splits, tokenizer.eos_id, folder),
        sources=sources,
        trained=_has_conversations(job),
    )
    parents = {"corpus": _listing_hash(listing), "tokenizer": tokenizer.fingerprint}
    write_made_by(folder.shards, made_by(job.model_dump(mode="json"), parents))
    shards.write_manifest(folder.shards, manifest)
    return manifest


def _put_tokenizer(job: PackJob, listing: Listing, given: Tokenizer | None, folder: WorkFolder) -> Tokenizer:
    """Put the given tokenizer, or a tokenizer trained in a task, into the work folder, unless it already holds one."""
    if given:
        pack_tasks.keep_tokenizer(lambda: given, folder)
    else:
        assert isinstance(job.tokenizer, TrainBpe), "a tokenizer folder is loaded, not trained"
        files = [(file, source) for source, files in zip(job.sources, listing) for file in files]
        task = ray.remote(pack_tasks.train_tokenizer).remote(files, job.tokenizer, job.held_out, folder)
        began = time.monotonic()
        with job_progress("train the tokenizer", total=1, unit="tokenizers") as show:
            while not ray.wait([task], timeout=SHOW_SECONDS)[0]:
                show(0, {"s": time.monotonic() - began})
            try:
                ray.get(task)
            except RayError as error:
                raise original_error(error) from None
            show(1, {})
    return load_tokenizer(folder.tokenizer)


def _find_repeats(job: PackJob, units: list[Unit], folder: WorkFolder) -> int:
    """Write which documents repeat earlier documents; returns the number of buckets."""
    write = partial(pack_tasks.write_unit_digests, sources=job.sources, held_out=job.held_out, folder=folder)
    written = _stage("compare documents", "units", units, write, job.workers)
    buckets = duplicates.make_buckets(sum(unit.documents for unit in written))
    find = partial(pack_tasks.find_bucket_repeats, units=len(units), folder=folder)
    _stage("find duplicates", "buckets", list(enumerate(buckets)), find, job.workers)
    return len(buckets)


def _tokenize(job: PackJob, units: list[Unit], buckets: int, folder: WorkFolder) -> _Tokenized:
    how = Tokenizing(folder, job.sources, job.held_out, buckets, flags=_has_conversations(job))
    done = _stage("tokenize", "units", units, partial(tokenize_unit, how=how), job.workers)
    tokenized = _Tokenized(sorted(done, key=lambda unit: unit.ordinal))
    passed_over = [uri for source in range(len(job.sources)) for uri in tokenized.passed_over(source)]
    if passed_over:
        line = f"passed over {len(passed_over)} files that are not UTF-8 text; the first is {passed_over[0]}"
        stderr.print(line, soft_wrap=True)
    for place, source in enumerate(job.sources):
        if rows := tokenized.left_out(place).rows:
            stderr.print(f"left out {rows} rows of {source.path}: {tokenized.left_out(place)}", soft_wrap=True)
    return tokenized


def _write_shards(job: PackJob, splits: Splits, eos_id: int, folder: WorkFolder) -> dict[str, Split]:
    plans = [
        plan
        for name, parts in splits.items()
        for plan in plan_shards(
            name, [part for _, part in parts], row_len=job.row_len, rows_per_shard=job.rows_per_shard, eos_id=eos_id
        )
    ]
    write = partial(pack_tasks.write_planned_shard, folder=folder)
    written = _stage("write shards", "shards", plans, write, job.workers)
    entries = {entry.file: entry for entry in written}
    return {name: _split(name, [part for _, part in parts], entries, job) for name, parts in splits.items()}


def _split(name: str, parts: list[Part], entries: dict[str, ShardEntry], job: PackJob) -> Split:
    tokens = sum(part.tokens for part in parts)
    rows = row_count(tokens, job.row_len)
    listed = tuple(entries[shards.shard_name(name, n)] for n in range(row_count(rows, job.rows_per_shard)))
    if sum(entry.tokens for entry in listed) != tokens:
        raise ShardError(f"the shards of {name} do not hold its {tokens} tokens; run pack again")
    return Split(documents=sum(part.documents for part in parts), tokens=tokens, rows=rows, shards=listed)


def _counts(place: int, source: Source, tokenized: _Tokenized, splits: Splits) -> SourceCounts:
    own = {name: [part for at, part in parts if at == place] for name, parts in splits.items()}
    return SourceCounts(
        path=source.path,
        weight=source.weight,
        documents={name: sum(part.documents for part in parts) for name, parts in own.items()},
        tokens={name: sum(part.tokens for part in parts) for name, parts in own.items()},
        duplicates=tokenized.duplicates(place),
        passed_over=len(tokenized.passed_over(place)),
        left_out=tokenized.left_out(place).rows,
    )


def _stage(title: str, unit: str, items: Sequence[Any], work: Callable[[Any], Outcome], workers: int) -> list[Outcome]:
    """Do the work of each item somewhere on the cluster, and show the progress; returns the outcomes in any order."""
    done: list[Outcome] = []
    began, read = time.monotonic(), 0
    with job_progress(title, total=len(items), unit=unit) as show:
        for outcome in task_outcomes(items, work, workers):
            done.append(outcome)
            read += outcome.bytes if isinstance(outcome, UnitDigests | UnitParts) else 0
            seconds = time.monotonic() - began
            show(len(done), {"MB": read / 1e6, "MB/s": read / 1e6 / seconds} if read else {})
    return done


def _completed(output: str, identity: str) -> Manifest | None:
    if not locations.exists(locations.join(output, shards.MANIFEST)):
        return None
    try:
        manifest = shards.read_manifest(output)
        shards.check_sizes(output, manifest)
    except ShardError:  # damaged; this job repairs it
        return None
    return manifest if manifest.identity == identity else None


def _identity(job: PackJob, listing: Listing, tokenizer: Tokenizer | None) -> str:
    decides = job.model_dump(mode="json", include={"row_len", "rows_per_shard", "held_out", "dedup", "tokenizer"})
    if tokenizer:
        decides["tokenizer"] = tokenizer.fingerprint
    if _has_conversations(job):
        template = load_chat_template(hf_location(job.tokenizer)) if isinstance(job.tokenizer, str) else None
        if template is None:
            raise TokenizerError(
                f"the tokenizer {job.tokenizer} has no chat template; conversations need one; "
                "put chat_template.jinja into its folder"
            )
        decides["chat_template"] = template.sources
        decides["conversations"] = READER_VERSION
    if job.dedup and any(source.weight < 1 for source in job.sources):
        decides["dedup"] = "of what is taken"  # shards that were made before this rule are other shards
    sources = [source.model_dump(exclude={"path"}) for source in job.sources]
    return _hash([shards.FORMAT_VERSION, decides, sources, _listing_hash(listing)])


def _has_conversations(job: PackJob) -> bool:
    return any(source.documents == "conversations" for source in job.sources)


def _listing_hash(listing: Listing) -> str:
    return _hash([[[file.name, file.size, file.version] for file in files] for files in listing])


def _hash(value: Any) -> str:
    return hashlib.sha256(locations.canonical_json(value).encode()).hexdigest()


def _require_tokens(job: PackJob, tokenized: _Tokenized, splits: Splits) -> None:
    for place, source in enumerate(job.sources):
        left_out = tokenized.left_out(place)
        if left_out.rows and not any(part.source == place for part in tokenized.parts):
            raise CorpusError(
                f"no row of corpus {source.path} can be used: {left_out}; check documents, the rows and the template"
            )
    paths = ", ".join(source.path for source in job.sources)
    if not any(splits.values()):
        raise CorpusError(f"corpus {paths} holds only empty documents; check corpus, weights and text_field")
    if not splits["train"]:
        raise CorpusError(
            f"every document of corpus {paths} was drawn for held_out ({job.held_out}); lower held_out or add documents"
        )

"""Checkpoints of a run: parts on disk, and the rule that makes a checkpoint whole.

    step-00000500/part-00000-of-00004.pt       named tensors in fp32: the weights and both of Adam's moments
                  part-00000-of-00004.json     its note, written when the part is there: size, hash, names, cursor

Each worker writes a part and then its note. A checkpoint is whole when every part has its note and its size. So no
worker waits for another, and files of a killed worker are never taken for a checkpoint. Parts hold whole tensors by
name, not pieces by rank: any number of workers at any ZeRO stage reads them.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch
from torch import Tensor

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.locations import FileEntry
from tidar_core.errors import UserError

__all__ = ["Checkpoint", "CheckpointStore", "Cursor", "Note", "Tensors", "find_checkpoint", "read_part", "run_folder",
           "whole_checkpoints"]  # fmt: skip

Tensors = dict[str, dict[str, Tensor]]
"""Weights and moments of each parameter, by its name in the model."""

STEP = "step-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The run of a checkpoint, and its place in this run."""

    step: int
    """Train steps done."""
    updates: int
    """Updates of the optimizer; fewer than steps if a gradient was not finite."""
    run: Mapping[str, Any]
    """Fields of the job that the losses follow from."""
    shards: str
    """Identity of the shards."""
    start: str
    """Identity of the weights that the run began with."""
    model: Mapping[str, Any]
    """The model's configuration."""
    validation_loss: float | None = None
    tokens_per_forward: float | None = None
    """Mean over held-out prompts that this checkpoint continued; None: not measured."""
    ends: Mapping[str, Any] | None = None
    """Fields of the model's `EndTokens`; None in older checkpoints."""
    base: Mapping[str, str] | None = None
    """`uri` and content `hash` of a frozen checkpoint, whose weights are not in the parts; None: all weights are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Description of a part, known without reading the part."""

    file: str
    bytes: int
    sha256: str
    names: tuple[str, ...]
    cursor: Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that is whole."""

    uri: str
    notes: tuple[Note, ...]

    @property
    def cursor(self) -> Cursor:
        """The cursor, equal in every note."""
        return self.notes[0].cursor


def run_folder(output: str) -> str:
    """Folder of the checkpoints of the job with this output, and of its other files for a restart."""
    return locations.absolute(output) + ".run"


def whole_checkpoints(uri: str) -> list[Checkpoint]:
    """The whole checkpoints in a folder of checkpoints, the newest last."""
    found = (_whole(folder, files) for folder, files in sorted(_folders(uri).items()))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def find_checkpoint(uri: str) -> Checkpoint:
    """The checkpoint at `uri`, or the newest below it. Raises UserError if none is whole."""
    files = {entry.name: entry for entry in locations.list_files(uri)}
    if (one := _whole(uri, files)) is not None:
        return one
    if found := whole_checkpoints(locations.join(uri, "checkpoints")) or whole_checkpoints(uri):
        return found[-1]
    raise UserError(
        f"{uri} holds no whole checkpoint; give the folder of a checkpoint, .../checkpoints/{STEP}00000500, "
        "or of a run, OUTPUT.run"
    )


def read_part(checkpoint: Checkpoint, note: Note) -> Tensors:
    """The tensors of one part. Raises UserError if its bytes differ from the written bytes."""
    uri = locations.join(checkpoint.uri, note.file)
    digest = locations.sha256(uri)
    if digest != note.sha256:
        raise UserError(
            f"{uri} has hash {digest[:12]}; its note has {note.sha256[:12]}; remove {checkpoint.uri}, so that the "
            "checkpoint before it is used"
        )
    path = locations.local_path(uri)
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with locations.local_folder() as folder:
        copy = folder / note.file
        with locations.open_read(uri) as source, copy.open("wb") as sink:
            while chunk := source.read(locations.CHUNK_BYTES):
                sink.write(chunk)
        return torch.load(copy, map_location="cpu", weights_only=True)


class CheckpointStore:
    """The checkpoints of one run, as one worker sees them."""

    def __init__(self, uri: str, *, keep_last: int, keep_best: int) -> None:
        """keep_last  newest checkpoints that stay
        keep_best  best checkpoints that stay besides
        """
        self.uri, self.keep_last, self.keep_best = uri, keep_last, keep_best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def newest(self) -> Checkpoint | None:
        """The checkpoint that the run goes on from."""
        whole = whole_checkpoints(self.uri)
        return whole[-1] if whole else None

    def best(self) -> Checkpoint | None:
        """The checkpoint with the most tokens per forward, else with the lowest validation loss; None without either.

        Of equal ones the newest.
        """
        ranked = _ranked(whole_checkpoints(self.uri))
        return ranked[0] if ranked else None

    def clear_unfinished(self) -> None:
        """Remove half-written checkpoints, so that no later part completes them. No worker may be writing."""
        whole = {checkpoint.uri for checkpoint in whole_checkpoints(self.uri)}
        for name in locations.names_in(self.uri):
            if name.startswith(STEP) and locations.join(self.uri, name) not in whole:
                locations.remove(locations.join(self.uri, name))

    def write(self, tensors: Tensors, cursor: Cursor, *, part: int, parts: int) -> None:
        """Begin to write one part; training goes on meanwhile. Waits for the part before it, and raises its error."""
        self.wait()
        self._writing = self._writer.submit(self._write, tensors, cursor, part, parts)

    @property
    def busy(self) -> bool:
        """Whether a part is being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Wait until this worker's part is written; raises the error of the writing thread."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def prune(self) -> None:
        """Remove the whole checkpoints that need not stay. One worker calls it.

        It is called before the next checkpoint is written, not after: by then train steps have shown that the newest
        checkpoint is healthy.
        """
        whole = whole_checkpoints(self.uri)
        stay = {checkpoint.uri for checkpoint in whole[-self.keep_last :] + _ranked(whole)[: self.keep_best]}
        for checkpoint in whole:
            if checkpoint.uri not in stay:
                for note in checkpoint.notes:  # notes first: without them the checkpoint is not whole
                    locations.remove(locations.join(checkpoint.uri, _note_name(note.file)))
                locations.remove(checkpoint.uri)

    def _write(self, tensors: Tensors, cursor: Cursor, part: int, parts: int) -> None:
        if part == 0:
            self.prune()
        file = f"part-{part:05d}-of-{parts:05d}.pt"
        folder = locations.join(self.uri, f"{STEP}{cursor.step:08d}")
        with locations.open_write(locations.join(folder, file)) as sink:
            hashing = _Hashing(sink)
            torch.save(tensors, hashing)  # pyrefly: ignore[bad-argument-type]
        note = Note(
            file=file, bytes=hashing.bytes, sha256=hashing.sha256.hexdigest(), names=tuple(tensors), cursor=cursor
        )
        locations.write_json(locations.join(folder, _note_name(file)), asdict(note))


class _Hashing:
    """Writable file that counts and hashes the written bytes."""

    def __init__(self, sink: IO[bytes]) -> None:
        self.sink, self.sha256, self.bytes = sink, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.bytes += len(content)
        return self.sink.write(content)

    def flush(self) -> None:
        self.sink.flush()


def _folders(uri: str) -> dict[str, dict[str, FileEntry]]:
    """Files by name, by the address of their checkpoint."""
    found: dict[str, dict[str, FileEntry]] = defaultdict(dict)
    for entry in locations.list_files(uri):
        folder, _, name = entry.name.rpartition("/")
        if folder.startswith(STEP):
            found[locations.join(uri, folder)][name] = entry
    return found


def _whole(uri: str, files: Mapping[str, FileEntry]) -> Checkpoint | None:
    """The checkpoint of these files, if it is whole."""
    names = sorted(name for name in files if name.startswith("part-") and name.endswith(".json"))
    expected = int(names[0].removesuffix(".json").rpartition("-")[2]) if names else 0
    if names != [f"part-{part:05d}-of-{expected:05d}.json" for part in range(expected)] or not expected:
        return None
    try:
        notes = _notes([files[name].uri for name in names])
    except (ValueError, KeyError, TypeError):  # a damaged note
        return None
    if any(note.file not in files or files[note.file].size != note.bytes for note in notes):
        return None
    return Checkpoint(uri=uri, notes=tuple(notes))


def _notes(uris: Sequence[str]) -> list[Note]:
    values = [locations.read_json(uri) for uri in uris]
    return [Note(**(value | {"names": tuple(value["names"]), "cursor": Cursor(**value["cursor"])})) for value in values]


def _ranked(whole: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints whose worth was measured, the best first."""

    def worth(checkpoint: Checkpoint) -> tuple[bool, float, int]:
        cursor = checkpoint.cursor
        if cursor.tokens_per_forward is not None:
            return False, -cursor.tokens_per_forward, -cursor.step
        return True, math.nan if cursor.validation_loss is None else cursor.validation_loss, -cursor.step

    return sorted((checkpoint for checkpoint in whole if math.isfinite(worth(checkpoint)[1])), key=worth)


def _note_name(file: str) -> str:
    return file.removesuffix(".pt") + ".json"

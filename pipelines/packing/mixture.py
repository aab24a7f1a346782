"""Split of a document, and how often the split holds it.

Both are computed from the hash of its text and the weight of its source alone. The same text is always on the same
side, in every job and on every machine.

A source's documents are written as up to three streams of tokens, each once. A split holds the streams of all sources,
source after source. Rows are shuffled when they are read, so nothing is interleaved here.
"""

import hashlib
from collections.abc import Sequence
from math import floor

from pipelines.jobs import Source
from pipelines.packing.token_parts import Part

__all__ = ["STREAMS", "arranged", "digest_of", "split_of", "streams_of"]

STREAMS = ("whole", "drawn", "held_out")
"""Documents of every whole pass; documents of the fractional pass; documents that are never trained."""


def digest_of(text: str) -> bytes:
    """The hash of a document."""
    return hashlib.sha256(text.encode()).digest()


def split_of(digest: bytes, held_out: float) -> str:
    """`held_out` for this share of all texts, else `train`."""
    return "held_out" if _draw(digest[:8]) < held_out else "train"


def streams_of(digest: bytes, held_out: float, weight: float) -> list[str]:
    """The streams that hold a document of a source with this weight; empty if the document is not taken."""
    if split_of(digest, held_out) == "held_out":
        return ["held_out"]
    passes, fraction = divmod(weight, 1)
    drawn = _draw(digest[8:16]) < fraction  # independent of the split; a larger fraction contains a smaller fraction
    return ["whole"] * bool(passes) + ["drawn"] * drawn


def arranged(parts: Sequence[Part], sources: Sequence[Source]) -> dict[str, list[tuple[int, Part]]]:
    """The parts of each split in order, each with its source's place. A part is listed once for each pass over it.

    parts  parts of all sources, in the order of the corpus
    """
    splits: dict[str, list[tuple[int, Part]]] = {"train": [], "held_out": []}
    for place, source in enumerate(sources):
        for split, stream, passes in (
            ("train", "whole", floor(source.weight)),
            ("train", "drawn", 1),
            ("held_out", "held_out", 1),
        ):
            splits[split] += [(place, part) for part in parts if (part.source, part.stream) == (place, stream)] * passes
    return splits


def _draw(eight_bytes: bytes) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(eight_bytes, "big") / 2**64

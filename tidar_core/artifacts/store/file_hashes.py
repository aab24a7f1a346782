"""Hashes of large local files, kept in this machine's cache while a file is unchanged.

A file counts as unchanged while its place, inode, size and both of its times are the same. No program can set the time
of change of a file (ctime), so a changed file is always hashed again.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.cache import cache_folder
from tidar_core.errors import StorageError

__all__ = ["file_sha256"]

KEPT_BYTES = 2**26
"""Size from which a hash is kept; smaller files are hashed faster than a person notices."""


def file_sha256(path: Path, *, kept_bytes: int = KEPT_BYTES) -> str:
    """SHA-256 of a local file, in hexadecimal.

    kept_bytes  size from which the hash is kept in the cache
    """
    known = path.stat()
    if known.st_size < kept_bytes:
        return locations.sha256(str(path))
    facts = [str(path.resolve()), known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns]
    entry = cache_folder() / "hashes" / hashlib.sha256(locations.canonical_json(facts).encode()).hexdigest()
    with suppress(OSError, ValueError):
        kept = entry.read_text(encoding="ascii")
        if len(kept) == 64 and int(kept, 16) >= 0:
            return kept
    digest = locations.sha256(str(path))
    with suppress(OSError, StorageError):  # a full or read-only cache costs time alone
        locations.write_bytes(str(entry), digest.encode())
    return digest

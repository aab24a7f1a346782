"""The redirection of standard error, for libraries that have no setting against their messages."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["muted_stderr"]


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Drops everything that is written to file descriptor 2 while the context is open, by C++ as well.

    Ray's core reports there that it obeys RAY_BACKEND_LOG_LEVEL. Failures are raised in Python, so no other message is
    lost.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

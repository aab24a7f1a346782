"""The check of RAY_ADDRESS before Ray receives the address.

Does anything answer at RAY_ADDRESS?

Ray itself tries an address for minutes; then it raises a traceback or ends the process.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tidar_core.errors import ConfigError

__all__ = ["given_cluster"]

VARIABLE = "RAY_ADDRESS"
CLIENT_SCHEME = "ray://"
SECONDS = 10.0
"""Timeout of a connection to the head node."""
REASON_LEN = 200
"""Characters of Ray's message that the user sees."""
TOKEN_ADVICE = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of this cluster"
ADVICE = f"start the cluster, correct {VARIABLE}, or unset it for a cluster on this machine"


@contextmanager
def given_cluster() -> Iterator[str | None]:
    """The address in RAY_ADDRESS, or None if it is not set; the caller connects to it while the context is open.

    Raises ConfigError, in one line, if nothing answers or Ray refuses the address.
    """
    address = os.environ.get(VARIABLE)
    if not address:
        yield None
        return
    _require_answer(address)
    try:
        yield address
    except Exception as error:
        reason = " ".join(str(error).split())
        advice = TOKEN_ADVICE if "RAY_AUTH" in reason else ADVICE
        raise ConfigError(f"{VARIABLE} is {address}; Ray refused it ({reason[:REASON_LEN]}); {advice}") from error


def _require_answer(address: str) -> None:
    host, _, port = address.removeprefix(CLIENT_SCHEME).partition("/")[0].rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, or no address that Ray knows: Ray reports that at once
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{VARIABLE} is {address}; nothing answers there ({error}); {ADVICE}") from error

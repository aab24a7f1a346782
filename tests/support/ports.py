"""Ports of loopback for servers that a test starts."""

import random
import socket
from contextlib import suppress
from pathlib import Path

__all__ = ["unused_port"]

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST, BEYOND = 20_000, 32_768
"""Workers of `ray start` listen below the first; Linux gives ports from the second on to connections."""


def unused_port():
    """A port of loopback on which nothing listens, and that no connection gets before the test's server starts.

    A port that the system chose for a socket can be given to any connection once that socket is closed. Ray opens
    hundreds of connections, and a server that then starts cannot listen there.
    """
    ports = range(FIRST, int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else BEYOND)
    for port in random.sample(ports, len(ports)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port of loopback is free")

"""The choice between champion and challenger for a request.

A header may name the version. Otherwise a hash of the client decides, so that the challenger gets its share of traffic.
A client keeps its version for as long as the challenger is a canary; another challenger gets other clients.
"""

import hashlib
from dataclasses import dataclass

__all__ = ["CHALLENGER", "CHAMPION", "Route", "role_of"]

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True, slots=True)
class Route:
    """The properties of a request that decide its version."""

    key: str = ""
    """The same for all requests of a client."""
    role: str | None = None
    """Role that a header names; None without the header."""


def role_of(route: Route, challenger: str, weight: float) -> str:
    """Role of the version for a request, if the bundle with hash `challenger` gets `weight` (0 to 1) of the traffic."""
    if route.role is not None:
        return route.role
    digest = hashlib.sha256(f"{challenger} {route.key}".encode()).digest()
    return CHALLENGER if int.from_bytes(digest[:8]) < weight * 2**64 else CHAMPION

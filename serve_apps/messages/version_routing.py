"""The choice between champion and challenger for a request.

A header may name the version. Otherwise a hash of the client decides, so that the challenger gets its share of traffic.
A client keeps its version for as long as the challenger is a canary; another challenger gets other clients.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from serve_apps.api.errors import ParameterError

__all__ = ["CHALLENGER", "CHAMPION", "Route", "role_of", "route_of"]

CHAMPION, CHALLENGER = "champion", "challenger"
VERSION_HEADER, SESSION_HEADER = "x-tidar-version", "x-session-id"


@dataclass(frozen=True, slots=True)
class Route:
    """The properties of a request that decide its version."""

    key: str = ""
    """The same for all requests of a client."""
    role: str | None = None
    """Role that a header names; None without the header."""


def route_of(headers: Mapping[str, str], user: str | None, otherwise: str) -> Route:
    """The route of a request: sticky by its session, its `user` or its API key, whichever is there first.

    otherwise  key of a request that has none of them: its own id
    """
    role = headers.get(VERSION_HEADER)
    if role not in (None, CHAMPION, CHALLENGER):
        raise ParameterError(f"the header {VERSION_HEADER} is {role!r}; it must be {CHAMPION} or {CHALLENGER}; drop it")
    known = (("session", headers.get(SESSION_HEADER)), ("user", user), ("key", headers.get("authorization")))
    return Route(next((f"{kind} {value}" for kind, value in known if value), otherwise), role)


def role_of(route: Route, challenger: str, weight: float) -> str:
    """Role of the version for a request, if the bundle with hash `challenger` gets `weight` (0 to 1) of the traffic."""
    if route.role is not None:
        return route.role
    digest = hashlib.sha256(f"{challenger} {route.key}".encode()).digest()
    return CHALLENGER if int.from_bytes(digest[:8]) < weight * 2**64 else CHAMPION

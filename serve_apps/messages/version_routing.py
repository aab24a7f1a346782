"""Which of two versions answers a request?

The one that a header names; else a share of all, by a hash of who asks: the same client is answered by the same version
for as long as a challenger is on trial, and another trial falls on other clients.
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
    """What decides who answers."""

    key: str = ""
    """Same client, same key."""
    role: str | None = None
    """Asked for by name."""


def route_of(headers: Mapping[str, str], user: str | None, otherwise: str) -> Route:
    """The route of a request: sticky by its session, its `user` or its API key, whichever is there first.

    otherwise  the key of a request that says none of them: its own id
    """
    role = headers.get(VERSION_HEADER)
    if role not in (None, CHAMPION, CHALLENGER):
        raise ParameterError(f"the header {VERSION_HEADER} is {role!r}; it must be {CHAMPION} or {CHALLENGER}; drop it")
    said = (("session", headers.get(SESSION_HEADER)), ("user", user), ("key", headers.get("authorization")))
    return Route(next((f"{kind} {value}" for kind, value in said if value), otherwise), role)


def role_of(route: Route, challenger: str, weight: float) -> str:
    """Who answers, when the bundle with hash `challenger` shall answer that share of all."""
    if route.role is not None:
        return route.role
    digest = hashlib.sha256(f"{challenger} {route.key}".encode()).digest()
    return CHALLENGER if int.from_bytes(digest[:8]) < weight * 2**64 else CHAMPION

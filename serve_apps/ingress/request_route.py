"""The properties of a request that decide its version, as its headers and its body show them."""

from collections.abc import Mapping

from serve_apps.api.errors import ParameterError
from serve_apps.messages.version_routing import CHALLENGER, CHAMPION, Route

__all__ = ["route_of"]

VERSION_HEADER, SESSION_HEADER = "x-tidar-version", "x-session-id"


def route_of(headers: Mapping[str, str], user: str | None, otherwise: str) -> Route:
    """The route of a request: sticky by its session, its `user` or its API key, whichever is there first.

    otherwise  key of a request that has none of them: its own id
    """
    role = headers.get(VERSION_HEADER)
    if role not in (None, CHAMPION, CHALLENGER):
        raise ParameterError(f"the header {VERSION_HEADER} is {role!r}; it must be {CHAMPION} or {CHALLENGER}; drop it")
    known = (("session", headers.get(SESSION_HEADER)), ("user", user), ("key", headers.get("authorization")))
    return Route(next((f"{kind} {value}" for kind, value in known if value), otherwise), role)

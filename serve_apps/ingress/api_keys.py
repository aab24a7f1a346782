"""The check of API keys, and the limit of requests per key.

The service knows only the SHA-256 of a key, so that neither settings nor logs hold a key.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from serve_apps.api.errors import ApiKeyError, RateLimitError

__all__ = ["Access"]

BEARER = "bearer "
BLANKS = " \t"
"""White space around a key. In a header, which is read as Latin-1, bytes of UTF-8 look like other white space."""
ANYONE = ""
"""Name of all clients if no key is needed."""


@dataclass(slots=True, kw_only=True)
class Access:
    """Admission of requests to one ingress process."""

    keys: tuple[str, ...] = ()
    """SHA-256 of each key, in hex. Without keys, requests of every client are answered."""
    per_minute: int | None = None
    """Average number of requests of one key. As many may come at once after a minute without requests."""
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Requests left of each key, and the time of that count."""

    def admit(self, headers: Mapping[str, str]) -> None:
        """Raise ApiKeyError or RateLimitError if the request must be refused."""
        client = self._client(headers.get("authorization", "")) if self.keys else ANYONE
        if self.per_minute is None:
            return
        now, rate = self.clock(), self.per_minute / 60
        left, counted = self._buckets.get(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + rate * (now - counted))
        if left < 1:
            raise RateLimitError(f"this key may send {self.per_minute} requests a minute; wait", (1 - left) / rate)
        self._buckets[client] = left - 1, now

    def _client(self, authorization: str) -> str:
        """Hash of the key in a request."""
        if not authorization.lower().startswith(BEARER):
            raise ApiKeyError("no API key was given; send the header Authorization: Bearer KEY")
        key = authorization[len(BEARER) :].strip(BLANKS).encode("latin-1")  # the bytes that the client sent
        given = hashlib.sha256(key).hexdigest()
        if not sum(hmac.compare_digest(given, known) for known in self.keys):  # all keys: time must reveal none
            raise ApiKeyError("the API key is not known here; check it, or get one from the operator of this service")
        return given

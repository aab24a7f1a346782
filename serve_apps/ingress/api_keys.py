"""Who may ask this service, and how often?

Keys are known by their SHA-256 alone, so that neither settings nor logs hold one.
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
"""Around a key. Bytes of UTF-8 look like other white space in a header, which is read as Latin-1."""
ANYONE = ""
"""Who asks where no key is needed."""


@dataclass(slots=True, kw_only=True)
class Access:
    """The doorkeeper of one ingress process."""

    keys: tuple[str, ...] = ()
    """SHA-256 of each key, in hex; with none, everyone may ask."""
    per_minute: int | None = None
    """Requests of one key, on average; as many may come at once after a minute of silence."""
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each key: requests left, and when that was counted."""

    def admit(self, headers: Mapping[str, str]) -> None:
        """Raise ApiKeyError or RateLimitError if this request may not be answered."""
        asker = self._asker(headers.get("authorization", "")) if self.keys else ANYONE
        if self.per_minute is None:
            return
        now, rate = self.clock(), self.per_minute / 60
        left, counted = self._buckets.get(asker, (float(self.per_minute), now))
        left = min(self.per_minute, left + rate * (now - counted))
        if left < 1:
            raise RateLimitError(f"this key may ask {self.per_minute} times a minute; wait", (1 - left) / rate)
        self._buckets[asker] = left - 1, now

    def _asker(self, authorization: str) -> str:
        """The hash of the key that a request carries."""
        if not authorization.lower().startswith(BEARER):
            raise ApiKeyError("no API key was given; send the header Authorization: Bearer KEY")
        key = authorization[len(BEARER) :].strip(BLANKS).encode("latin-1")  # the bytes that the client sent
        given = hashlib.sha256(key).hexdigest()
        if not sum(hmac.compare_digest(given, known) for known in self.keys):  # all are compared, so time tells nothing
            raise ApiKeyError("the API key is not known here; check it, or ask who runs this service for one")
        return given

"""Hands out the pages of the cache to sequences.

The cache is cut into pages of equal length, which are handed out one by one. So memory is bounded and known before the
first request, and nothing is copied when the batch changes. A page that is full of committed tokens is published under
the hash of all tokens up to its end. A later prompt that begins with the same tokens shares the page instead of reading
them again. Drafts are never published. Published pages without a holder are kept until their room is needed; the page
that was unused for longest goes first.

Only the host's bookkeeping is here; `kv_cache` holds keys and values.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

__all__ = ["NULL_PAGE", "PAGE_LEN", "PagePool", "SequencePages", "chain_key", "page_count"]

NULL_PAGE = 0
"""Page without an owner: empty slots write here, and nothing reads it."""


PAGE_LEN = 16
"""Tokens of a page by default."""


def page_count(tokens: int, page_len: int) -> int:
    """Number of pages that `tokens` tokens take."""
    return -(-tokens // page_len)


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a page: 128 bits of BLAKE2b over its tokens and all tokens before them.

    parent  key of the page before; empty for the first page
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(slots=True)
class SequencePages:
    """Pages of one sequence, in the order of its tokens."""

    ids: list[int] = field(default_factory=list)
    full: int = 0
    """Leading pages whose tokens are all committed."""
    key: bytes = b""
    """Key of the last full page."""
    row: Any = None
    """The ids as a tensor [1, pages], which a decoder keeps here; None after the ids changed."""


class PagePool:
    """Pages 1..pages: each is free, held by one or more sequences, or kept for later prompts."""

    def __init__(self, pages: int, page_len: int) -> None:
        self.pages, self.page_len = pages, page_len
        self._free = deque(range(1, pages + 1))
        self._holders = [0] * (pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be taken now, kept pages included."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    def share(self, tokens: Sequence[int]) -> SequencePages:
        """Hold the published pages that `tokens` begin with; only whole pages are shared."""
        held = SequencePages()
        for start in range(0, len(tokens) - self.page_len + 1, self.page_len):
            key = chain_key(held.key, tokens[start : start + self.page_len])
            page = self._page_of.get(key)
            if page is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            held.ids.append(page)
            held.full, held.key = held.full + 1, key
        return held

    def grow(self, held: SequencePages, tokens: int) -> bool:
        """Add pages until `tokens` tokens have room; False, and nothing is taken, if there are too few."""
        missing = page_count(tokens, self.page_len) - len(held.ids)
        if missing > self.available:
            return False
        if missing > 0:
            held.row = None
        for _ in range(missing):
            page = self._free.popleft() if self._free else self._forget_oldest()
            self._holders[page] = 1
            held.ids.append(page)
        return True

    def commit(self, held: SequencePages, tokens: Sequence[int], committed_len: int) -> None:
        """Publish the pages that the first `committed_len` of the sequence's `tokens` have filled by now.

        Where another page with the same tokens is published already, it stays the shared page.
        """
        while (held.full + 1) * self.page_len <= committed_len:
            start, page = held.full * self.page_len, held.ids[held.full]
            key = chain_key(held.key, tokens[start : start + self.page_len])
            if key not in self._page_of:
                self._page_of[key], self._key_of[page] = page, key
            held.full, held.key = held.full + 1, key

    def release(self, held: SequencePages) -> None:
        """Release the pages of one holder. The last page is forgotten first: the others are of use without it."""
        for page in reversed(held.ids):
            assert self._holders[page] > 0, f"page {page} is released without a holder"
            self._holders[page] -= 1
            if self._holders[page] == 0 and page in self._key_of:
                self._kept[page] = None
            elif self._holders[page] == 0:
                self._free.append(page)
        held.ids.clear()
        held.row = None

    def _forget_oldest(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

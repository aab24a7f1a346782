"""Which pages of the cache belong to whom?

The cache is cut into pages of equal length, handed out one by one, so that memory is bounded and known before the
first request and no copy is ever made when the batch changes. A page that is full of committed tokens is published
under the hash of all tokens up to its end; a later prompt that begins with the same tokens shares it instead of reading
them again. Drafts are never published. Published pages that nobody holds are kept until their room is needed, the
longest unused first.

Host side only: this is the book-keeping; `kv_cache` holds the numbers.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

__all__ = ["NULL_PAGE", "PAGE_LEN", "PagePool", "SequencePages", "chain_key", "page_count"]

NULL_PAGE = 0
"""Owned by nobody: rows that stand for no sequence write here, and nothing reads it."""


PAGE_LEN = 16
"""Tokens of a page, where nothing else is asked for."""


def page_count(tokens: int, page_len: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // page_len)


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a page by what it holds and everything before it; 128 bits of BLAKE2b.

    parent  name of the page before; empty for the first
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(slots=True)
class SequencePages:
    """Pages of one sequence, in the order of its tokens."""

    pages: list[int] = field(default_factory=list)
    full: int = 0
    """Leading pages whose tokens are all committed."""
    key: bytes = b""
    """Name of the last of those."""


class PagePool:
    """Pages 1..pages: free, held by one or more sequences, or kept for prompts to come."""

    def __init__(self, pages: int, page_len: int) -> None:
        self.pages, self.page_len = pages, page_len
        self._free = deque(range(1, pages + 1))
        self._holders = [0] * (pages + 1)
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be taken now, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    def share(self, tokens: Sequence[int]) -> SequencePages:
        """Hold the published pages that `tokens` begin with; whole pages only."""
        holding = SequencePages()
        for start in range(0, len(tokens) - self.page_len + 1, self.page_len):
            key = chain_key(holding.key, tokens[start : start + self.page_len])
            page = self._page_of.get(key)
            if page is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            holding.pages.append(page)
            holding.full, holding.key = holding.full + 1, key
        return holding

    def grow(self, holding: SequencePages, tokens: int) -> bool:
        """Add pages until `tokens` tokens have room; False, and nothing is taken, if there are too few."""
        missing = page_count(tokens, self.page_len) - len(holding.pages)
        if missing > self.available:
            return False
        for _ in range(missing):
            page = self._free.popleft() if self._free else self._forget_oldest()
            self._holders[page] = 1
            holding.pages.append(page)
        return True

    def commit(self, holding: SequencePages, tokens: Sequence[int], committed_len: int) -> None:
        """Publish the pages that the first `committed_len` of the sequence's `tokens` have filled by now.

        Where another page holds the same already, that one stays the shared one.
        """
        while (holding.full + 1) * self.page_len <= committed_len:
            start, page = holding.full * self.page_len, holding.pages[holding.full]
            key = chain_key(holding.key, tokens[start : start + self.page_len])
            if key not in self._page_of:
                self._page_of[key], self._key_of[page] = page, key
            holding.full, holding.key = holding.full + 1, key

    def release(self, holding: SequencePages) -> None:
        """One holder lets go. The last page is forgotten first: without it, those before are still of use."""
        for page in reversed(holding.pages):
            assert self._holders[page] > 0, f"page {page} is released, and nobody holds it"
            self._holders[page] -= 1
            if self._holders[page] == 0 and page in self._key_of:
                self._kept[page] = None
            elif self._holders[page] == 0:
                self._free.append(page)
        holding.pages.clear()

    def _forget_oldest(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

"""How did a text end, and what had it cost by then?"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from serve_apps.lap import Lap
from serve_apps.pieces import Piece, Tally
from tidar_core.errors import CapacityError, RequestError

__all__ = ["Account", "accounted"]


@dataclass(slots=True)
class Account:
    """Of one text."""

    outcome: str = "aborted"
    """`texts` for one that was written to its end, `errors`, `refused` or `aborted`."""
    tally: Tally = field(default_factory=Tally)
    lap: Lap | None = None
    seconds: float = 0.0
    """From when it was asked for."""


async def accounted(
    pieces: AsyncGenerator[Piece, None], tell: Callable[[Account], object]
) -> AsyncGenerator[Piece, None]:
    """The same pieces; `tell` hears how the text has ended, whoever ended it."""
    account, began = Account(), time.monotonic()
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                account.tally, account.lap = piece.tally, piece.lap
                account.outcome = "aborted" if piece.finish_reason is None else "texts"
                yield piece
    except (RequestError, CapacityError):
        account.outcome = "refused"
        raise
    except Exception:
        account.outcome = "errors"
        raise
    finally:
        account.seconds = time.monotonic() - began
        tell(account)

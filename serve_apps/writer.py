"""How do an engine's decode steps become pieces of text?

In the replica's process, whichever the engine is in: tokens become text here, and each text is counted for its version.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve_apps.account import Account, accounted
from serve_apps.asked import PromptRequest
from serve_apps.engine import Engine
from serve_apps.engine_process import EngineProcess
from serve_apps.pieces import Piece
from serve_apps.served import Served
from serve_apps.transcript import Transcript
from serve_apps.version_totals import VersionTotals
from tidar_core.artifacts.tokenizer import Tokenizer

__all__ = ["Writer"]


class Writer:
    """An engine, and what it has written."""

    def __init__(
        self, served: Served, engine: Engine | EngineProcess, tokenizer: Tokenizer, totals: VersionTotals
    ) -> None:
        """totals  where this engine's texts are counted"""
        self.served, self.engine, self.totals = served, engine, totals
        self.texts = 0
        """Being written; whoever counts them knows when nobody needs this engine any more."""
        self._tokenizer = tokenizer

    def pieces(self, asked: PromptRequest) -> AsyncGenerator[Piece, None]:
        """Pieces of the completion that is asked for, an empty one first once it is admitted. Raises RequestError."""

        def count(account: Account) -> None:
            self.totals.count(account.outcome, account.tally, account.seconds)
            self.totals.plain_tokens += 0 if asked.speculative else account.tally.completion_tokens

        return accounted(self._pieces(asked), count)

    async def _pieces(self, asked: PromptRequest) -> AsyncGenerator[Piece, None]:
        began = time.monotonic()
        async with aclosing(self.engine.steps(asked)) as batches:
            admitted = await anext(batches)
            transcript = Transcript(self._tokenizer, asked, admitted.prompt, block_len=self.served.block_len)
            form = None if asked.tools is None else self.engine.tool_form
            yield transcript.take()._replace(tool_form=form, fingerprint=self.served.fingerprint)
            begun = False
            async for batch in batches:
                if batch.steps and not begun:
                    begun = True
                    self.totals.count_first(time.monotonic() - began)
                self.totals.forwards += len(batch.steps)
                transcript.add(batch.steps)
                if transcript.finish_reason is not None:
                    yield transcript.take()._replace(lap=batch.lap)
                elif asked.pieces and transcript.pending:
                    yield transcript.take()

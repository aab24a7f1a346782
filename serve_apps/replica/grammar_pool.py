"""The probe of grammars: only a grammar that another process has compiled within `GRAMMAR_SECONDS` is used.

The other process can be stopped in the middle of its work, which the decoder's process cannot. Verdicts are kept, so
that a grammar that comes again costs nothing.
"""

import hashlib
import json
import subprocess
import sys
import weakref
from collections import OrderedDict

from serve_apps.api.bounds import GRAMMAR_SECONDS
from serve_apps.api.errors import ParameterError
from serve_apps.messages.generation_request import RequestedGrammar
from tidar_core.artifacts.text import grammar_probe
from tidar_core.artifacts.text.grammar import written
from tidar_core.artifacts.text.tokenizer import Tokenizer

__all__ = ["GrammarPool"]

KEPT = 1024
"""Number of verdicts that are kept."""
LATE, DIED = "late", "died"


class GrammarPool:
    """The probe process of one engine, for one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, seconds: float = GRAMMAR_SECONDS) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize[[subprocess.Popen[str]], GrammarPool] | None = None
        self._verdicts: OrderedDict[str, str] = OrderedDict()

    def check(self, grammar: RequestedGrammar) -> None:
        """Raise ParameterError for a grammar that takes too long. A wrong grammar passes: the compiler refuses it."""
        kind, content = written(grammar.kind, grammar.content)
        key = hashlib.sha256(f"{kind} {content}".encode(errors="replace")).hexdigest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._probed(kind, content)
            if verdict != LATE:  # which may be the machine's fault
                self._verdicts[key] = verdict
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
        if len(self._verdicts) > KEPT:
            self._verdicts.popitem(last=False)
        if verdict in (LATE, DIED):
            raise ParameterError(
                f"{grammar.param} takes more than {self._seconds:g} s, or more memory than there is, to compile; "
                "simplify it",
                grammar.param,
            )

    def stop(self) -> None:
        """End the process, which also ends with this object."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _probed(self, kind: str, content: str) -> str:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(
                json.dumps({"kind": kind, "content": content, "seconds": self._seconds}), file=process.stdin, flush=True
            )
            verdict = process.stdout.readline().strip()
        except OSError:
            verdict = ""
        if not verdict:  # the process has ended, as for a tokenizer without bytes: the compiler here raises the error
            self.stop()
        return verdict

    def _started(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, grammar_probe.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        given = {
            "tokenizer": self._tokenizer.fast_json,
            "vocab_len": self._tokenizer.vocab_len,
            "eos_id": self._tokenizer.eos_id,
        }
        print(json.dumps(given), file=process.stdin, flush=True)
        self._end = weakref.finalize(self, _killed, process)
        return process


def _killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()

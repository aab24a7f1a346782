"""The reader of prompts from benchmark files.

A file has one JSON object a line and may be compressed (.gz, .zst). The prompt is in the field of the public data sets:
`prompt` (HumanEval), `question` (GSM8K), `turns` (Spec-Bench; the first turn counts) or `text`.
"""

from pathlib import Path

from tidar_core.artifacts.store import locations
from tidar_core.artifacts.store.compressed import damage_named, open_decompressed
from tidar_core.artifacts.store.json_lines import is_blank, value_in
from tidar_core.errors import CorpusError

__all__ = ["CODE_PROMPTS", "read_prompts"]

CODE_PROMPTS = (
    "def fibonacci(n):\n    ",
    "class Stack:\n    def __init__(self):\n        ",
    "import os\n\n\ndef list_files(path):\n    ",
    "try:\n    import json\nexcept ImportError:\n    ",
    "def main():\n    parser = ",
    "    def __repr__(self):\n        return ",
    'if __name__ == "__main__":\n    ',
    "for i in range(",
)
"""Beginnings of Python code, used if no file is given."""

FIELDS = ("prompt", "question", "turns", "text")


def read_prompts(path: str | Path | None, count: int) -> list[str]:
    """The first `count` prompts of a file, or of `CODE_PROMPTS` if no file is given. Raises CorpusError."""
    if path is None:
        return list(CODE_PROMPTS[:count])
    if not locations.exists(str(path)):
        raise CorpusError(f"prompts file {path} does not exist; give a JSONL file")
    prompts: list[str] = []
    with damage_named(str(path)), open_decompressed(str(path)) as lines:
        for number, line in enumerate(lines, 1):
            if len(prompts) == count:
                break
            if not is_blank(line):
                prompts.append(_prompt(line, f"{path} line {number}"))
    if not prompts:
        raise CorpusError(f"prompts file {path} is empty; give one JSON object a line")
    return prompts


def _prompt(line: bytes, where: str) -> str:
    try:
        value = value_in(line)
    except ValueError as fault:
        raise CorpusError(f"{where} {fault}") from None
    found = next((value[field] for field in FIELDS if isinstance(value, dict) and value.get(field)), None)
    text = found[0] if isinstance(found, list) else found
    if not isinstance(text, str):
        raise CorpusError(f"{where} has none of {', '.join(FIELDS)} with text; rename the field that holds the prompt")
    return text

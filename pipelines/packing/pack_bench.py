"""Benchmark of packing against its tokenizer alone: speed, and memory of a worker.

    python -m pipelines.packing.pack_bench [--megabytes N] [--workers N] [--pairs N] [--tokenizer FOLDER] [--json]

Both halves see the same documents on the same number of cores. The bare tokenizer runs `encode_batch` and
`encode_batch_fast` on texts in memory, with as many threads as packing has workers. The pack job runs from JSON lines
on disk to shards in place. They take turns, because a machine's speed drifts. The corpus is this Python's own standard
library, repeated, each time with other names in it.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.cluster.console import stderr

__all__ = ["main", "write_corpus"]

MB = 10**6
BARE = """
import json, sys, time
from pathlib import Path
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(str(Path(sys.argv[1], "tokenizer.json")))
calls = {"encode_batch": tokenizer.encode_batch, "encode_batch_fast": tokenizer.encode_batch_fast}
seconds = dict.fromkeys(calls, 0.0)
for line_batch in iter(lambda: sys.stdin.buffer.readlines(2**22), []):
    texts = [json.loads(line)["text"] for line in line_batch]
    for name, call in calls.items():
        began = time.perf_counter()
        ids = [encoding.ids for encoding in call(texts, add_special_tokens=False)]
        seconds[name] += time.perf_counter() - began
print(json.dumps(seconds))
"""
"""Program of a separate process, because the tokenizer reads the number of threads from the environment once."""
CALLS = ("encode_batch", "encode_batch_fast")
"""Methods of the tokenizer. The second returns no offsets into the text; packing uses it."""


def write_corpus(path: Path, megabytes: float, seed: int = 0) -> int:
    """Write about `megabytes` of ordinary text as JSON lines; returns the bytes of the text."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    draw, size = random.Random(seed), 0
    with path.open("w", encoding="utf-8") as sink:
        while size < megabytes * MB:
            renamed = {word: f"{word}_{draw.randrange(10**4)}" for word in ("self", "name", "value", "args", "path")}
            words = re.compile(rf"\b({'|'.join(renamed)})\b")
            for text in texts:
                varied = words.sub(partial(_other_name, renamed), text)
                sink.write(json.dumps({"text": varied}) + "\n")
                size += len(varied.encode())
                if size >= megabytes * MB:
                    break
    return size


def measure(folder: Path, megabytes: float, workers: int, tokenizer: str | None, pairs: int) -> dict[str, Any]:
    """Pack a corpus of so many MB and encode it with the bare tokenizer, `pairs` times in turns.

    Returns median seconds and MB/s, and the peak memory of a worker in bytes. Each call of the tokenizer has the
    median, least and greatest ratio within pairs.
    """
    from pipelines.cluster.connection import connect, disconnect
    from pipelines.jobs import PackJob
    from pipelines.packing.pack import pack

    corpus = folder / "corpus.jsonl"
    stderr.print(f"writing a corpus of {megabytes:g} MB")
    size = write_corpus(corpus, megabytes)
    connect(cpus=workers)
    values = {"corpus": str(corpus), "workers": workers, "unit_bytes": 8 * 2**20}
    if tokenizer is None:
        small = folder / "small.jsonl"
        write_corpus(small, 4)
        made = {"corpus": str(small), "output": str(folder / "small"), "tokenizer": {}}
        pack(PackJob.model_validate(values | made))
        tokenizer = str(folder / "small" / "tokenizer")
    packing: list[float] = []
    bare: list[dict[str, float]] = []
    with _peak_of_workers() as peak:
        for pair in range(pairs):
            job = PackJob.model_validate(values | {"output": str(folder / f"shards-{pair}"), "tokenizer": tokenizer})
            began = time.perf_counter()
            manifest = pack(job)
            packing.append(time.perf_counter() - began)
            bare.append(_bare_seconds(corpus, tokenizer, workers))
            shutil.rmtree(job.output)
    disconnect()
    found = {
        "megabytes": size / MB,
        "workers": workers,
        "pairs": pairs,
        "tokens": sum(split.tokens for split in manifest.splits.values()),
        "pack_seconds": statistics.median(packing),
        "pack_mb_per_second": size / MB / statistics.median(packing),
        "peak_worker_bytes": peak[0],
    }
    for call in CALLS:
        seconds = [alone[call] for alone in bare]
        ratios = [alone / packed for alone, packed in zip(seconds, packing)]
        found[f"{call}_mb_per_second"] = size / MB / statistics.median(seconds)
        found[f"ratio_to_{call}"] = statistics.median(ratios)
        found[f"ratio_to_{call}_least"], found[f"ratio_to_{call}_greatest"] = min(ratios), max(ratios)
    return found


def main() -> None:
    """Run the benchmark; prints a table on standard error, or one JSON object on standard output."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.packing.pack_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=128, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tokenizing tasks, and threads of the bare")
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer; if not given, one is trained")
    parser.add_argument("--pairs", type=int, default=3, help="how often both halves take turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    for name in ("megabytes", "workers", "pairs"):
        if getattr(given, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be above 0")
    with tempfile.TemporaryDirectory(prefix="tidar-pack-bench-") as folder:
        found = measure(Path(folder), given.megabytes, given.workers, given.tokenizer, given.pairs)
    if given.json:
        print(json.dumps(found))
        return
    table = Table("measure", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    stderr.print(table)


def _other_name(renamed: dict[str, str], found: re.Match[str]) -> str:
    return renamed[found[0]]


def _bare_seconds(corpus: Path, tokenizer: str, workers: int) -> dict[str, float]:
    """Seconds of each call."""
    threads = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(workers)}
    with corpus.open("rb") as lines:
        done = subprocess.run(
            [sys.executable, "-c", BARE, tokenizer], stdin=lines, env=os.environ | threads, stdout=subprocess.PIPE,
            check=True,
        )  # fmt: skip
    return {call: float(seconds) for call, seconds in json.loads(done.stdout).items()}


@contextmanager
def _peak_of_workers() -> Iterator[list[int]]:
    """Largest resident memory of any Ray worker of this user, in bytes (Linux; elsewhere 0)."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(2):  # the kernel keeps the peak; reading it costs time too
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if process.joinpath("cmdline").read_bytes().startswith(b"ray::"):
                        status = process.joinpath("status").read_text()
                        peak[0] = max(peak[0], 1024 * int(status.partition("VmHWM:")[2].split()[0]))
                except (OSError, IndexError):  # the process ended meanwhile
                    continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()

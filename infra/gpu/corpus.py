"""A corpus of the text that this machine has, compressed to be carried to another machine.

Which real text does this machine have, and how does it travel?

Python sources of every interpreter and of the virtual environment, and the text of Debian's documentation packages.
Nothing is downloaded but those packages, through apt. The same machine gives the same corpus; it is never committed.

The hash of a document's name without version numbers decides whether it is held out. So json/decoder.py of Python 3.8
and of 3.12 are in the same split. A document is dropped if more than half of its lines were in an earlier document.

    00.jsonl.xz .. 15.jsonl.xz   {"name", "split", "text"}, one document a line; shards are opened in parallel
    prompts.jsonl                {"prompt"}: beginnings of held-out documents
    corpus.json                  counts
"""

import gzip
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["Document", "gather", "read_corpus", "write_corpus"]

SHARDS = 16
HELD_OUT_PER_MILLE = 5
SMALLEST, LARGEST = 400, 150_000
"""Least and most characters of a document."""
LONGEST_LINE, LONGEST_MEAN_LINE = 1000, 90
MOST_DIGITS = 0.15
MOST_SEEN = 0.5
"""Share of a document's lines that may have been seen before."""
COUNTED_LINE = 20
"""Least characters of a line that counts: shorter lines do not identify a copy."""
PYTHON_PLACES = (
    "/root/.pyenv/versions/3.13.*/lib/python3.*", "/root/.pyenv/versions/3.12.*/lib/python3.*",
    "/root/.pyenv/versions/3.11.*/lib/python3.*", "/root/.pyenv/versions/3.10.*/lib/python3.*",
    "/root/.pyenv/versions/3.9.*/lib/python3.*", "/root/.pyenv/versions/3.8.*/lib/python3.*",
    "/root/.pyenv/versions/3.7.*/lib/python3.*", "/root/.pyenv/versions/3.6.*/lib/python3.*",
    "/usr/lib/python3*", "/usr/share/python3*",
)  # fmt: skip
"""Folders of Python sources, newest first: the newest copy is kept."""
DOC_PACKAGES = (
    "python3.11-doc", "python-django-doc", "python-sqlalchemy-doc", "python-tornado-doc", "debian-reference-en",
    "debian-policy", "developers-reference", "maint-guide", "debian-faq", "git-doc", "bash-doc", "cmake-doc",
    "postgresql-doc-15", "apache2-doc", "sqlite3-doc", "autoconf-doc", "vim-doc", "perl-doc", "linux-doc-6.1",
)  # fmt: skip
SKIPPED_FOLDERS = {"__pycache__", "pydoc_data", "encodings", "lib2to3", "_static", "_sources", "genindex"}
TEXT_SUFFIXES = {".py", ".html", ".txt", ".rst", ".md", ".info", ".pod"}
SILENT_TAGS = {"script", "style", "head", "nav", "footer", "button", "svg"}
BREAKING_TAGS = {
    "p",
    "div",
    "br",
    "li",
    "tr",
    "pre",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "dt",
    "dd",
    "table",
    "section",
    "ul",
}
PACKAGE_LIMITS = {"stdlib": 2**62, "venv": 6_000_000, "docs": 6_500_000}
"""Most characters of one package, so that no package dominates."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its origin."""

    name: str
    text: str

    @property
    def package(self) -> str:
        """The folder directly below the root, or the Debian package."""
        return self.name.split(":", 1)[1].lstrip("/").split("/", 1)[0]

    @property
    def held_out(self) -> bool:
        """Whether it is held out, decided by its name without digits."""
        digest = hashlib.sha256(re.sub(r"\d+", "", self.name.split(":", 1)[1]).encode()).digest()
        return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def gather(site_packages: Path) -> list[Document]:
    """All documents, in an order that depends on their names alone."""
    kept: list[Document] = []
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory() as folder:
        for kind, roots in (
            ("stdlib", [root for place in PYTHON_PLACES for root in sorted(Path("/").glob(place[1:]))]),
            ("venv", [site_packages, *sorted(Path("/").glob("root/.pyenv/versions/*/lib/python3.*/site-packages"))]),
            ("docs", _documentation(Path(folder))),
        ):
            taken: Counter[str] = Counter()
            for document in (document for root in roots for document in _documents(kind, root)):
                if taken[document.package] >= PACKAGE_LIMITS[kind] or not _is_prose_or_code(document.text):
                    continue
                if _is_new(document.text, seen):
                    kept.append(document)
                    taken[document.package] += len(document.text)
            print(f"{kind}: {sum(len(d.text) for d in kept) / 1e6:.1f} million characters so far", file=sys.stderr)
    return kept


def write_corpus(documents: list[Document], folder: Path) -> dict[str, int]:
    """Write sixteen compressed shards, prompts and counts. Neighbours stay neighbours, which compresses best."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.xz"):
        old.unlink()
    per_shard = sum(len(d.text) for d in documents) / SHARDS
    shards: list[list[Document]] = [[] for _ in range(SHARDS)]
    passed = 0
    for document in documents:
        shards[min(int(passed / per_shard), SHARDS - 1)].append(document)
        passed += len(document.text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compression leaves the interpreter free
        list(pool.map(_write_shard, [folder / f"{i:02d}.jsonl.xz" for i in range(SHARDS)], shards))
    prompts = [json.dumps({"prompt": _beginning(d.text)}) for d in documents if d.held_out and d.name.endswith(".py")]
    (folder / "prompts.jsonl").write_text("\n".join(prompts[:: max(1, len(prompts) // 128)][:128]) + "\n")
    counts = {
        "documents": len(documents),
        "held_out_documents": sum(d.held_out for d in documents),
        "characters": passed,
        "python_characters": sum(len(d.text) for d in documents if d.name.endswith(".py")),
        "compressed_bytes": sum(path.stat().st_size for path in folder.glob("*.xz")),
    }
    (folder / "corpus.json").write_text(json.dumps(counts, indent=2) + "\n")
    return counts


def read_corpus(folder: Path) -> dict[str, list[str]]:
    """Texts of the splits `train` and `held_out`, in order. Shards are opened in parallel."""
    paths = sorted(folder.glob("*.jsonl.xz"))
    if not paths:
        raise SystemExit(f"{folder} has no *.jsonl.xz; run `real_model.py corpus --out {folder}` first")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shards = list(pool.map(_read_shard, paths))
    return {split: [text for shard in shards for text in shard[split]] for split in ("train", "held_out")}


def _write_shard(path: Path, documents: list[Document]) -> None:
    lines = (
        json.dumps({"name": d.name, "split": "held_out" if d.held_out else "train", "text": d.text}, ensure_ascii=False)
        for d in documents
    )
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def _read_shard(path: Path) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for line in lzma.decompress(path.read_bytes()).decode().split("\n"):
        if line:
            document = json.loads(line)
            texts[document["split"]].append(document["text"])
    return texts


def _documentation(folder: Path) -> list[Path]:
    """Folders of Debian's documentation packages, fetched and unpacked. Packages that cannot be fetched are skipped."""
    roots = []
    for package in DOC_PACKAGES:
        done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
        archives = sorted(folder.glob(f"{package}_*.deb"))
        if done.returncode or not archives:
            print(f"{package} cannot be fetched: {done.stderr.strip()[-200:]}", file=sys.stderr)
            continue
        root = folder / package
        subprocess.run(["dpkg", "-x", archives[0], root], check=True)
        roots.append(root)
    return roots


def _documents(kind: str, root: Path) -> Iterator[Document]:
    paths = [path for path in sorted(root.rglob("*")) if path.suffix.removesuffix(".gz") in ("", *TEXT_SUFFIXES)]
    for path in paths:
        inside = path.relative_to(root)
        suffix = Path(path.name.removesuffix(".gz")).suffix
        if suffix not in ({".py"} if kind != "docs" else TEXT_SUFFIXES - {".py"}):
            continue
        if SKIPPED_FOLDERS.intersection(inside.parts) or (kind == "stdlib" and "site-packages" in inside.parts):
            continue
        if path.is_file() and not path.is_symlink():
            place = root.name if kind == "docs" else ""
            for number, text in enumerate(_texts(path, suffix)):
                yield Document(f"{kind}:{place}/{inside}{f'#{number}' if number else ''}", text)


def _texts(path: Path, suffix: str) -> Iterable[str]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (UnicodeDecodeError, OSError, EOFError):
        return []
    text = text.replace("\r\n", "\n")
    if suffix == ".html":
        return [_TextOfHtml.of(text)]
    return re.split(r"\x1f\n", text) if suffix == ".info" else [text]


def _is_prose_or_code(text: str) -> bool:
    """Whether a text is prose or code. Tables, generated or minified files, and too short or long texts are not."""
    if not SMALLEST <= len(text) <= LARGEST or "\0" in text:
        return False
    lines = text.split("\n")
    if max(map(len, lines)) > LONGEST_LINE or len(text) / len(lines) > LONGEST_MEAN_LINE:
        return False
    head = text[:600].lower()
    if "autogenerated" in head or "auto-generated" in head or "generated by" in head or "do not edit" in head:
        return False
    return sum(map(str.isdigit, text)) < MOST_DIGITS * len(text)


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Whether most lines were in no earlier document. If so, they are added to `seen`."""
    lines = {line.strip() for line in text.split("\n")}
    marks = {hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines if len(line) >= COUNTED_LINE}
    if not marks or len(marks & seen) > MOST_SEEN * len(marks):
        return False
    seen |= marks
    return True


def _beginning(text: str) -> str:
    """The first lines of a document, about 600 characters."""
    end = text.find("\n", 600)
    return text[: end + 1 if end >= 0 else 600]


class _TextOfHtml(HTMLParser):
    """The visible text of a page, with its line breaks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0
        self.preformatted = 0

    @classmethod
    def of(cls, html: str) -> str:
        """The text of a page."""
        page = cls()
        page.feed(html)
        page.close()
        text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts).replace("\N{PILCROW SIGN}", ""))
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Track nesting and break lines."""
        self.silent += tag in SILENT_TAGS
        self.preformatted += tag == "pre"
        if tag in BREAKING_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Track nesting and break lines."""
        self.silent = max(0, self.silent - (tag in SILENT_TAGS))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in BREAKING_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep visible text, with white space as the page breaks it."""
        if not self.silent:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))

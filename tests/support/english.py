"""Rules of plain English for docstrings, comments, messages, names and documents.

`python tests/support/english.py PATH...` lists every problem as `file:line: rule: text`. Without a path it reads
everything.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("tidar", "tidar_core", "pipelines", "serve_apps", "infra", "tests")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "infra/README.md")

MOST_WORDS = 25
"""Words that a sentence may have."""
MOST_COLUMNS = 120
"""Characters that a line of a document may have."""

FRAGMENT = re.compile(r"(?:Of|By|For|From|With|Where|Whose|What|Who|In which) ")
"""Words that begin no docstring: a fragment follows them."""
QUESTION = re.compile(r"(?:How|Which|Whom|Why|When|Do|Does|Did|May|Has|Have|Are|Is|Was|Can|Must|Should|Will) ")
"""Words that begin no docstring of a module: its question may be the second line only."""
HEADS = ("That", "Those", "None", "What", "Whoever", "Whatever", "Who")
"""Pronouns that begin no sentence but a question; the noun is repeated instead. The value `None` has backticks."""
ONE_AS_HEAD = re.compile(r"One (that|who|which|whose|is|was|has|had|with|without|in|on|at|by|from|to|may|must|can)\b")

SPEECH = dict.fromkeys(("say", "says", "said", "saying"), "report, state, define, contain")
SPEECH |= dict.fromkeys(("tell", "tells", "told", "telling"), "send, report, distinguish")
SPEECH |= dict.fromkeys(("ask", "asks", "asked", "asking"), "request, call, query, send")
SPEECH |= dict.fromkeys(("hear", "hears", "heard", "hearing"), "receive")
METAPHORS = {
    "law": "distribution, target_probs", "river": "pipeline, quickstart", "hall": "transformer", "wing": "room",
    "doorway": "drain gate", "turnstile": "in-flight counter", "fleet": "engine pool", "watcher": "alias watcher",
    "trial": "canary, attempt", "jail": "sandbox, namespace", "fence": "sandbox, limit", "board": "remote progress",
    "pin": "report, attach", "lap": "request timing", "mood": "regime", "walk": "plan chain, visit",
    "rival": "baseline", "scene": "workload",
}  # fmt: skip
METAPHORS |= {f"{word}s": field for word, field in METAPHORS.items()} | {"stood": "accepted", "walked": "visited"}
WORDS = SPEECH | METAPHORS
"""Banned words, each with the words to use instead."""
NAME_WORDS = WORDS | dict.fromkeys(("way", "ways"), "candidate, method, form")
"""Banned parts of names: `way` has honest uses in a sentence."""

ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|vs|cf|etc|approx|resp|al|Fig|Sec|No)|\b[A-Z])\.[)\"'\]]*$")
SENTENCE_END = re.compile(r"[.!?][)\"'\]]*\s+(?=[\"'(\[]?(?:[A-Z0-9]|[a-z]+_))")
WIDE_GAP = re.compile(r"^(\S.{0,38}?) {2,}(\S.*)$")
LIST_MARK = re.compile(r"^(?:[-*+]|\d+[.)]) +")
DIRECTIVE = re.compile(r"#\s*(?:type:|noqa|fmt:|!|-\*-|pragma|ruff:|pyrefly:)")
NAME_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
CODE = re.compile(r"``[^`]+``|`[^`]*`")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule that a text breaks."""

    path: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text}"


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list item, table entry or literal block of a text."""

    line: int
    text: str
    kind: str
    """`prose`, `entry` (of a table), `heading` or `literal`."""


def sources() -> list[Path]:
    """Python files and documents that the rules hold for."""
    python = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return python + sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))


def problems_of(path: Path) -> list[Problem]:
    """Problems of a file, in the order of its lines."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text()
    found = document_problems(text) if path.suffix == ".md" else python_problems(text, complete=name[:6] != "tests/")
    if name == "docs/river.md":
        found = [problem for problem in found if not re.search(r"`rivers?`", problem.rule)]
    return sorted((replace(problem, path=name) for problem in found), key=lambda problem: problem.line)


def python_problems(text: str, *, complete: bool = True) -> list[Problem]:
    """Problems of a Python source.

    complete   every module, public class, function and method needs a docstring
    """
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    found = [*name_problems(nodes)]
    for line, docstring in docstrings(nodes):
        found += first_line_problems(line, docstring, module=tree.body[0].lineno == line)
        found += prose_problems(blocks(docstring, line))
    for line, comment in comments(text):
        found += prose_problems(blocks(comment, line))
    for line, message in messages(nodes):
        found += prose_problems([Block(line, part, "entry") for part in message.split("; ")])
    return found + (missing_docstrings(tree) if complete else [])


def document_problems(text: str) -> list[Problem]:
    """Problems of a Markdown document."""
    found = [*prose_problems(blocks(text, 1))]
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MOST_COLUMNS and not line.lstrip().startswith("|") and "](" not in line and "://" not in line:
            found.append(Problem("", number, f"a line has at most {MOST_COLUMNS} characters", line[:60] + " ..."))
    return found


def prose_problems(parts: list[Block]) -> Iterator[Problem]:
    """Long sentences, banned words and pronouns at the head of a sentence; a legend of shape letters may be long."""
    for block in parts:
        plain = LINK.sub(r"\1", CODE.sub("Code", block.text))
        for word in sorted({*re.findall(r"[a-z]+", plain.lower())} & set(WORDS)):
            if word != "watcher" or "alias watcher" not in plain.lower():
                yield Problem("", block.line, _ban(word, WORDS), _short(block.text))
        if block.kind == "literal":
            continue
        for sentence in sentences(block.text):
            if (count := word_count(sentence)) > MOST_WORDS and not sentence.startswith("Shape letters:"):
                yield Problem("", block.line, f"a sentence has at most {MOST_WORDS} words, not {count}", sentence)
            pronoun = sentence.partition(" ")[0].rstrip(",:;.") in HEADS and not sentence.endswith("?")
            if pronoun or ONE_AS_HEAD.match(sentence):
                yield Problem("", block.line, "a sentence begins with its noun", _short(sentence))


def first_line_problems(line: int, docstring: str, module: bool) -> Iterator[Problem]:
    """A docstring begins with a statement that ends with a full stop; a table of arguments may stand alone."""
    first = docstring.splitlines()[0] if docstring else ""
    if WIDE_GAP.match(first):
        return
    if FRAGMENT.match(first) or (module and QUESTION.match(first)):
        yield Problem("", line, "a docstring begins with a statement", _short(first))
        return
    paragraph = re.split(r"\n\s*\n", docstring)[0].strip()
    if sentences(blocks(docstring, 1)[0].text)[0].endswith("?"):
        yield Problem("", line, "a docstring begins with a statement, not with a question", _short(first))
    elif not re.search(r"[.?:!][)\"'`]*$", paragraph):
        yield Problem("", line, "a docstring's first paragraph ends with a full stop", _short(first))


def missing_docstrings(tree: ast.Module) -> list[Problem]:
    """Module, public classes, functions and methods that lack a docstring."""
    found = [] if ast.get_docstring(tree) else [Problem("", 1, "a module has a docstring", "")]
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")):
        for node in owner.body:
            public = isinstance(node, _DOCUMENTED) and node.name[0] != "_"
            inherited = isinstance(owner, ast.ClassDef) and bool(owner.bases)
            if public and not inherited and not ast.get_docstring(node):
                found.append(Problem("", node.lineno, "a public name has a docstring", node.name))
    return found


def name_problems(nodes: list[ast.AST]) -> Iterator[Problem]:
    """Banned words in names that the file itself gives."""
    seen = set()
    for node in nodes:
        for name in _given_names(node):
            parts = [part.lower() for part in NAME_PART.findall(name)]
            for part in parts:
                ours = part == "watcher" and {"alias", "app"} & set(parts)
                if part in NAME_WORDS and not ours and (name, part) not in seen:
                    seen.add((name, part))
                    yield Problem("", node.lineno, _ban(part, NAME_WORDS), name)


def docstrings(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring: of modules, classes, functions, and of fields and constants below them."""
    for node in nodes:
        for child in node.body if isinstance(node, ast.Module | _DOCUMENTED) else []:
            match child:
                case ast.Expr(value=ast.Constant(value=str(text)), col_offset=margin):
                    yield child.lineno, _clean(text, margin)


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment; full-line comments below each other are one text."""
    pending: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or DIRECTIVE.match(token.string):
            continue
        line, content = token.start[0], token.string.lstrip("#").removeprefix(" ")
        alone = token.line.lstrip().startswith("#")
        if pending and not (alone and line == pending[-1][0] + 1):
            yield pending[0][0], "\n".join(part for _, part in pending)
            pending = []
        if alone:
            pending.append((line, content))
        else:
            yield line, content
    if pending:
        yield pending[0][0], "\n".join(part for _, part in pending)


def messages(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and text of messages: arguments of exceptions, of assertions and of log calls, help and descriptions."""
    for node in nodes:
        given: list[ast.expr] = []
        if isinstance(node, ast.Assert) and node.msg:
            given = [node.msg]
        elif isinstance(node, ast.Call):
            if _takes_a_message(node.func):
                given = [*node.args]
            given += [keyword.value for keyword in node.keywords if keyword.arg in ("help", "description")]
        for value in given:
            if text := _literal(value):
                yield value.lineno, text


def blocks(text: str, line: int) -> list[Block]:
    """Paragraphs, list items, table entries, headings and literal blocks of a text that begins at `line`."""
    found: list[Block] = []
    fenced, open_kind = False, ""
    for number, raw in enumerate(text.splitlines(), line):
        content = raw.strip()
        if content.startswith(("```", "~~~")):
            fenced, open_kind = not fenced, ""
            continue
        if fenced or not content:
            open_kind = ""
            continue
        literal = raw.startswith("    ") and open_kind in ("", "literal")
        mark, gap = LIST_MARK.match(content), WIDE_GAP.match(content)
        if literal:
            kind, content = "literal", content
        elif content.startswith("|"):
            found += [Block(number, cell.strip(), "entry") for cell in content.split("|") if cell.strip(" -:")]
            open_kind = ""
            continue
        elif content.startswith("#"):
            found.append(Block(number, content.lstrip("# "), "heading"))
            open_kind = ""
            continue
        elif mark:
            kind, content = "prose", content[mark.end() :]
        elif gap:
            kind, content = "entry", gap[2]
        elif open_kind:
            found[-1] = replace(found[-1], text=f"{found[-1].text} {content}")
            continue
        else:
            kind = "prose"
        found.append(Block(number, content.lstrip("> "), kind))
        open_kind = kind
    return found


def sentences(text: str) -> list[str]:
    """Sentences of a paragraph: code in backticks counts as a word, abbreviations and decimals end none."""
    plain = LINK.sub(r"\1", CODE.sub("Code", text)).replace("**", "")
    found, begin = [], 0
    for end in SENTENCE_END.finditer(plain):
        sentence = plain[begin : end.end()].strip()
        if not ABBREVIATION.search(sentence):
            found.append(sentence)
            begin = end.end()
    return [*found, plain[begin:].strip()] if plain[begin:].strip() else found


def word_count(sentence: str) -> int:
    """Words of a sentence: parts between spaces that hold a letter or a digit."""
    return sum(any(char.isalnum() for char in part) for part in sentence.split())


_DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _given_names(node: ast.AST) -> list[str]:
    if isinstance(node, _DOCUMENTED):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    if isinstance(node, ast.alias) and node.asname:
        return [node.asname]
    return []


def _takes_a_message(func: ast.expr) -> bool:
    """Whether a call of `func` makes an exception, checks a requirement, or writes to a log."""
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    owner = func.value.id if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) else ""
    return name.endswith(("Error", "Exception", "Exit", "_require")) or owner.lower() in ("log", "logger", "_log")


def _literal(node: ast.expr) -> str:
    """Text of a string expression, with a word in place of each inserted value."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(value) if isinstance(value, ast.Constant) else "X" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    return ""


def _clean(docstring: str, margin: int) -> str:
    first, *rest = docstring.splitlines() or [""]
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in rest)]).rstrip()


def _ban(word: str, table: dict[str, str]) -> str:
    return f"`{word}` is banned; use {table[word]}"


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."


def main(arguments: list[str]) -> int:
    """Print the problems below the given paths; exit code 1 if there are any."""
    chosen = [Path(argument).resolve() for argument in arguments] or [ROOT]
    files = [path for path in sources() if any(path.is_relative_to(prefix) for prefix in chosen)]
    found = [problem for path in files for problem in problems_of(path)]
    print(*found, sep="\n", end="\n" if found else "")
    for rule, count in Counter(
        re.sub(r", not \d+$|`\w+` is.*", "", x.rule) or "a word is banned" for x in found
    ).items():
        print(f"{count:6} {rule}", file=sys.stderr)
    print(f"{len(found):6} problems in {len(files)} files", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

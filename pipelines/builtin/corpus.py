"""The built-in corpus: code, docstrings and prose that every CPython carries, cut into documents and split.

It lets the demo run without a download. Its three domains differ visibly in difficulty: `code` (functions and
classes without their docstrings), `docstrings`, and `prose` (the language reference in `pydoc_data.topics`, and
long comments). Parts that a distribution may leave out (test, idlelib, tkinter, lib2to3, distutils) are never
read, so a Debian Python and a python.org build give nearly the same corpus. Exact equality needs the same patch
version.

The split is a fixed list of modules and topics, the same for every Python version, because the teacher that
ships with kdata was trained on the other modules. The price: the held-out part has a few dozen sources.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdata.errors import DataError

DOMAINS = ("code", "docstrings", "prose")
LICENSE = "PSF-2.0"
MIN_CHARS = {"code": 250, "docstrings": 100, "prose": 200}
MAX_CHARS = 1400  # about 500 tokens, which fit the teacher's context of 512
NUM_PROMPTS = 360

# Modules and topics of the held-out part: whole ones, so that no sibling of a held-out document is trained on. Whoever
# changes this list must train the shipped models again (kdata.pipelines.builtin.train).
HELD_OUT = frozenset([
    "bisect", "copyreg", "filecmp", "getopt", "gettext", "heapq", "html", "opcode", "pstats", "sched",
    "secrets", "signal", "sitebuiltins", "sqlite3", "subprocess", "timeit", "warnings",
    "topic:atom-identifiers", "topic:binary", "topic:bltin-null-object", "topic:bltin-type-objects",
    "topic:break", "topic:callable-types", "topic:continue", "topic:dynamic-features", "topic:exprlists",
    "topic:floating", "topic:identifiers", "topic:import", "topic:lambda", "topic:lists", "topic:power",
    "topic:sequence-types", "topic:slicings", "topic:specialattrs", "topic:specialnames", "topic:truth",
    "topic:typesmethods",
])  # fmt: skip

# Not read: tests and what distributions package apart (absent on some machines), and tables that are no
# language.
_LEFT_OUT = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "tkinter",
        "turtledemo",
        "lib2to3",
        "distutils",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "__pycache__",
        "this.py",
        "antigravity.py",
        "turtle.py",
        "sitecustomize.py",
    ]
)
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "__phello", "__hello")
_HEADING = re.compile(r"^[*=\-^~\"]{4,}$")


@dataclass(frozen=True)
class Document:
    """One document; `group` is the module or topic that goes to one side of the split as a whole."""

    id: str
    domain: str
    text: str
    source: str
    group: str


@dataclass(frozen=True)
class CorpusFiles:
    """Where the corpus lies, and the SHA-256 of its content (ids and texts, not Parquet's bytes)."""

    corpus: Path
    heldout: Path
    prompts: Path
    digest: str

    @classmethod
    def at(cls, directory: Path) -> CorpusFiles:
        """The files of a corpus that `build_corpus` wrote into `directory`.

        Raises:
            FileNotFoundError: nothing complete lies there.
        """
        facts = json.loads((directory / "corpus.json").read_text(encoding="utf-8"))
        corpus, heldout, prompts = (directory / f"{name}.parquet" for name in ("corpus", "heldout", "prompts"))
        return cls(corpus, heldout, prompts, digest=facts["digest"])


def build_corpus(directory: Path) -> CorpusFiles:
    """Gather, split and write the corpus. The same interpreter gives the same rows in the same order.

    The documents are shuffled, so any prefix is a mix of the domains.

    Args:
        directory: created; receives corpus.parquet and heldout.parquet (id, domain, text, source, license),
            prompts.parquet (id, domain, prompt) and corpus.json (counts and digest).
    Raises:
        DataError: the interpreter carries no readable sources (a frozen or stripped build).
    """
    training, heldout = split_documents()
    prompts = _prompts(training)
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(_table(training), directory / "corpus.parquet", compression="zstd")
    pq.write_table(_table(heldout), directory / "heldout.parquet", compression="zstd")
    columns = ("id", "domain", "prompt")
    pq.write_table(
        pa.table({c: [p[c] for p in prompts] for c in columns}),
        directory / "prompts.parquet",
        compression="zstd",
    )
    facts = {
        "digest": _digest(training, heldout),
        "python": sys.version.split()[0],
        "documents": {"corpus": _counts(training), "heldout": _counts(heldout)},
        "chars": {"corpus": _chars(training), "heldout": _chars(heldout)},
        "prompts": len(prompts),
    }
    (directory / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return CorpusFiles.at(directory)


def split_documents() -> tuple[list[Document], list[Document]]:
    """Training documents and held-out documents, shuffled by their ids.

    Raises:
        DataError: the interpreter carries no readable sources (a frozen or stripped build).
    """
    documents = _without_duplicates(gather())
    domains = {document.domain for document in documents}
    if domains != set(DOMAINS):
        raise DataError(
            f"This Python's standard library has text of the domains {sorted(domains)} only; its sources seem to be "
            "stripped. Use a Python with .py files, or bring your own corpus and teacher."
        )
    documents.sort(key=lambda document: _shuffle_key(document.id))
    heldout = [document for document in documents if document.group in HELD_OUT]
    return [document for document in documents if document.group not in HELD_OUT], heldout


def gather() -> list[Document]:
    """Every document that this interpreter carries, in a stable order: modules by name, then the topics."""
    documents: list[Document] = []
    for module, path in _modules():
        try:
            with tokenize.open(path) as file:  # honours the coding line and universal newlines
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # templates and deliberate breakage; no loss
            continue
        documents += _code(tree, source, module)
        documents += _docstrings(tree, module)
        documents += _comments(source, module)
    documents += _topics()
    return documents


def stdlib_listing() -> list[tuple[str, int]]:
    """(dotted name, bytes) of every module read: cheap, and changes whenever the corpus could."""
    return [(module, path.stat().st_size) for module, path in _modules()]


def _modules() -> Iterator[tuple[str, Path]]:
    """(dotted module name, path) of the modules read, ordered by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.isdisjoint(parts) and not parts[0].startswith(_LEFT_OUT_PREFIXES):
            names = [*parts[:-1], path.stem] if path.stem != "__init__" else list(parts[:-1])
            yield ".".join(names), path


def _group(module: str) -> str:
    """Modules that share text share a group: a package as a whole, `_pydecimal` with `decimal`, `_pyio` with
    `io`."""
    top = module.split(".")[0]
    return re.sub(r"^_(py)?", "", top) or top


def _code(tree: ast.Module, source: str, module: str) -> Iterator[Document]:
    """Functions and classes without docstrings; a class that is too long gives its methods one by one."""
    lines = source.split("\n")  # not splitlines: ast counts only newlines, not form feeds
    seen: Counter[str] = Counter()

    def visit(nodes: Iterable[ast.stmt], prefix: str) -> Iterator[Document]:
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            name = prefix + node.name
            text = _without_docstrings(node, lines)
            if len(text) > MAX_CHARS and isinstance(node, ast.ClassDef):
                yield from visit(node.body, name + ".")
            elif MIN_CHARS["code"] <= len(text) <= MAX_CHARS:
                seen[name] += 1  # a property's setter has its getter's name
                stem = f"code/{module}/{name}" + (f"~{seen[name]}" if seen[name] > 1 else "")
                yield Document(stem, "code", text, f"cpython:{module}", _group(module))

    yield from visit(tree.body, "")


def _without_docstrings(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The source of `node`, dedented, without the lines of any docstring in it; "" where nothing else
    remains."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(inner, clean=False) is None:
            continue
        doc = inner.body[0]
        if len(inner.body) == 1 or doc.lineno == inner.lineno:  # without its words it would not be Python
            if inner is node:
                return ""
            continue
        dropped.update(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
    kept = [lines[n - 1].rstrip() for n in range(first, (node.end_lineno or first) + 1) if n not in dropped]
    return re.sub(r"\n{3,}", "\n\n", textwrap.dedent("\n".join(kept)).strip())


def _docstrings(tree: ast.Module, module: str) -> Iterator[Document]:
    """Docstrings of the module and of all that is defined in it; a long one is cut at paragraphs."""
    seen: Counter[str] = Counter()

    def visit(node: ast.AST, name: str) -> Iterator[Document]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            seen[name] += 1
            number = f"~{seen[name]}" if seen[name] > 1 else ""
            stem = f"docstrings/{module}/{name or '__doc__'}{number}"
            yield from _cut(text, stem, "docstrings", f"cpython:{module}", _group(module))
        for child in ast.iter_child_nodes(node):
            own = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
            yield from visit(child, f"{name}.{own}".lstrip(".") if own else name)

    yield from visit(tree, "")


def _comments(source: str, module: str) -> Iterator[Document]:
    """Runs of comment lines that read as prose (four fifths letters and spaces): reasons, algorithms,
    history."""
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").rstrip("#-=* "))
            continue
        text = textwrap.dedent("\n".join(block)).strip()
        block = []
        if len(text) >= MIN_CHARS["prose"] and sum(c.isalpha() or c == " " for c in text) >= 0.8 * len(text):
            stem = f"prose/{module}/L{number - 1}"
            yield from _cut(text, stem, "prose", f"cpython:{module}", _group(module))


def _topics() -> Iterator[Document]:
    """The language reference by topic. Topics quote each other, so a paragraph counts where it is seen
    first."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for topic in sorted(topics):
        fresh: list[str] = []
        for paragraph in topics[topic].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < 40 or key not in seen:  # short ones (headings, "Note:") leak nothing
                fresh.append(paragraph)
            seen.add(key)
        text = "\n\n".join(fresh).strip()
        stem, source = f"prose/topics/{topic}", "cpython:pydoc_data.topics"
        yield from _cut(text, stem, "prose", source, f"topic:{topic}")


def _cut(text: str, stem: str, domain: str, source: str, group: str) -> Iterator[Document]:
    """Cut a text at paragraphs into documents of at most `MAX_CHARS`; a heading begins a new one where it
    can.

    A paragraph that is longer than `MAX_CHARS` by itself (a table, a grammar) is left out.
    """
    parts: list[str] = []
    current = ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n")
        lines = paragraph.split("\n")
        heading = len(lines) > 1 and bool(_HEADING.match(lines[1].strip()))
        if len(paragraph) > MAX_CHARS:
            continue
        full = len(current) + 2 + len(paragraph) > MAX_CHARS
        if current and (full or (heading and len(current) > MAX_CHARS // 3)):
            parts.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    parts.append(current)
    parts = [part for part in parts if len(part) >= MIN_CHARS[domain]]
    for index, part in enumerate(parts):
        number = f"#{index + 1}" if len(parts) > 1 else ""
        yield Document(stem + number, domain, part, source, group)


def _without_duplicates(documents: Iterable[Document]) -> list[Document]:
    """The first document of each text, whitespace and letter case aside, and of each id."""
    texts: set[str] = set()
    ids: set[str] = set()
    kept = []
    for document in documents:
        key = " ".join(document.text.split()).lower()
        if key not in texts and document.id not in ids:
            kept.append(document)
        texts.add(key)
        ids.add(document.id)
    return kept


def _shuffle_key(name: str) -> str:
    """A random-looking key that depends on the name alone: adding a module does not reorder the others."""
    return hashlib.blake2b(f"0:{name}".encode(), digest_size=8).hexdigest()


def _prompts(documents: Sequence[Document]) -> list[dict[str, str]]:
    """The beginnings of training documents: a def line, a first sentence; all distinct, as many of each domain."""
    share = NUM_PROMPTS // len(DOMAINS)
    rows: list[dict[str, str]] = []
    num_of_domain: Counter[str] = Counter()
    seen: set[str] = set()
    for document in documents:
        prompt = _beginning(document)
        if num_of_domain[document.domain] < share and len(prompt) >= 15 and prompt not in seen:
            num_of_domain[document.domain] += 1
            seen.add(prompt)
            rows.append({"id": document.id, "domain": document.domain, "prompt": prompt})
    return rows


def _beginning(document: Document) -> str:
    """Up to and with the first `def`/`class` line of code, the first sentence of anything else; at most 160
    chars."""
    if document.domain == "code":
        match = re.search(r"^[ ]*(?:async def|def|class)\b.*:$", document.text, re.MULTILINE)
        prompt = document.text[: match.end()] + "\n" if match else ""
    else:
        match = re.match(r".*?[.:](?=\s)", document.text, re.DOTALL)
        prompt = match.group() if match else ""
    return prompt if len(prompt) <= 160 else ""


def _table(documents: Sequence[Document]) -> pa.Table:
    columns = {c: [getattr(d, c) for d in documents] for c in ("id", "domain", "text", "source")}
    return pa.table({**columns, "license": [LICENSE] * len(documents)})


def _digest(*parts: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([[d.id, d.text] for d in part]).encode())
    return digest.hexdigest()


def _counts(documents: Sequence[Document]) -> dict[str, int]:
    return dict(sorted(Counter(d.domain for d in documents).items()))


def _chars(documents: Sequence[Document]) -> dict[str, int]:
    chars: Counter[str] = Counter()
    for document in documents:
        chars[document.domain] += len(document.text)
    return dict(sorted(chars.items()))

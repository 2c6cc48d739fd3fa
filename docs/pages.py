"""Pages of the documentation site: the READMEs as they are in the repository, and the API reference from docstrings.

mkdocs calls `on_files` (hooks in mkdocs.yml). Links between READMEs become links between pages; pictures and
programs are copied beside them. Nothing is written into the repository.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "kdata/README.md": "library.md",
    "kdata/store/README.md": "tokens.md",
    "schemas/README.md": "format.md",
    "trainer/README.md": "trainer.md",
    "trainer/parts/README.md": "your-trainer.md",
    "pipelines/README.md": "runs.md",
    "examples/README.md": "examples.md",
    "examples/curate.md": "curate.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]*)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
REFERENCE = ("kdata", "trainer", "pipelines")


def page_of(source: str) -> tuple[str, set[str]]:
    """The text of a README with its links led to pages, and the files that it needs beside it.

    Raises:
        ValueError: it links to a file that does not exist, or that is not part of the site.
    """
    text, copied = (ROOT / source).read_text("utf-8"), set[str]()

    def target(match: re.Match[str]) -> str:
        path, anchor = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1])), match[2] or ""
        if not (ROOT / path).exists():
            raise ValueError(f"{source} links to {match[1]}, and there is no such file")
        if path in PAGES:
            return PAGES[path] + anchor
        if not path.endswith((".png", ".py")):
            raise ValueError(
                f"{source} links to {path}, which is not part of the site: add it to PAGES of docs/pages.py"
            )
        copied.add(path)
        return f"files/{path}"

    parts, end = [], 0
    for fence in FENCE.finditer(text):  # code stays as it is
        parts += [LINK.sub(target, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(target, text[end:])]), copied


def module_name(path: Path) -> str:
    """kdata/store/open.py is kdata.store.open, trainer/train.py is kdata.trainer.train."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kdata" else ("kdata", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def summary(path: Path) -> str:
    """First line of a module's docstring, as Markdown."""
    line = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
    return line.replace("[", "\\[")


def reference() -> Iterator[tuple[str, str]]:
    """Name and text of a page for every folder with its modules, and of an overview of all."""
    overview = ["# API reference\n", "Made from the docstrings. `import kdata` gives the public names.\n"]
    for folder in REFERENCE:
        for package in sorted(path.parent for path in (ROOT / folder).rglob("__init__.py")):
            name = module_name(package / "__init__.py")
            modules = sorted(p for p in package.glob("*.py") if p.name not in ("__init__.py", "__main__.py"))
            overview.append(f"\n## [{name}]({name}.md)\n\n{summary(package / '__init__.py')}\n")
            overview += [f"- [`{module_name(p)}`]({name}.md#{module_name(p)}): {summary(p)}" for p in modules]
            sections = (f"::: {module_name(p)}\n" for p in (package / "__init__.py", *modules))
            yield f"reference/{name}.md", "\n".join([f"# {name}\n", *sections])
    yield "reference/index.md", "\n".join(overview) + "\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages, and the files that they need."""
    copied = set[str]()
    for readme, page in PAGES.items():
        text, needed = page_of(readme)
        copied |= needed
        files.append(File.generated(config, page, content=text))
    for path in sorted(copied):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    for page, text in reference():
        files.append(File.generated(config, page, content=text))
    return files

"""The walls of DESIGN.md: who may import whom; vLLM in one module; a light `import kdata`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("schemas", "kdata", "trainer", "pipelines")  # in the repository; all of them are installed below `kdata`
# What the modules of a folder may import of this repository, beside itself.
MAY_IMPORT = {
    "schemas": set(),
    "kdata": {"schemas"},
    "trainer": {"schemas", "kdata"},
    "pipelines": {"schemas", "kdata", "trainer"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kdata" else ("kdata", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """The folder of the repository that holds a module of ours."""
    return MODULES[module].relative_to(ROOT).parts[0]


MODULES = {module_name(p): p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))}


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """Full names of the modules that an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        yield from (f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names)


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(module: str, *, at_load: bool = False) -> set[str]:
    """Modules that a module imports: anywhere, or (at_load) while it is itself being imported."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if at_load and (for_types_only(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            return
        found.update(imported(node, module))
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(MODULES[module].read_text("utf-8")))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    own = folder_of(module)
    for name in imports_of(module):
        assert name.split(".")[0] not in ("schemas", "trainer", "pipelines"), (
            f"{module} imports {name}, not kdata.{name}"
        )
        if name in MODULES:
            assert folder_of(name) in {own, *MAY_IMPORT[own]}, f"{module} imports {name}"
        if name.split(".")[0] == "vllm":
            assert module == "kdata.teachers.vllm", f"{module} imports {name}"
        if own == "trainer":
            assert not name.startswith("kdata.teachers"), f"{module} imports {name}"
            assert not name.startswith("kdata.jobs"), f"{module} imports {name}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {m: {name for name in imports_of(m, at_load=True) if name in MODULES} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(graph[module] - {module}):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert graph["kdata.jobs.reading"] >= {"kdata.corpus.corpus", "kdata.jobs.job"}  # the walk sees what is there


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{n.split('.')[0] for n in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kdata; kdata.open, kdata.Plan",
        "import kdata.pipelines.cli.app",
        "import kdata.jobs.reading, kdata.jobs.writing, kdata.jobs.scoring, kdata.check.verify",
    ],
)
def test_the_core_loads_neither_torch_nor_vllm(statement: str) -> None:
    assert not loaded(statement) & {"torch", "vllm", "transformers", "ray", "datasets"}


def test_what_the_trainer_loads_holds_no_teacher() -> None:
    """Not even by way of a module of kdata that it imports."""
    reached, left = set[str](), [m for m in MODULES if folder_of(m) == "trainer"]
    while left:
        module = left.pop()
        reached.add(module)
        left += [name for name in imports_of(module, at_load=True) if name in MODULES and name not in reached]
    assert "kdata.store.dataset" in reached
    assert not {m for m in reached if m.startswith(("kdata.teachers", "kdata.pipelines"))}

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
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        if at_load and (for_types_only(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            return
        names.update(imported(node, module))
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(MODULES[module].read_text("utf-8")))
    return names


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


def late_imports(module: str) -> set[str]:
    """Modules of ours that a module imports inside a function, or for types only."""
    return {name for name in imports_of(module) - imports_of(module, at_load=True) if name in MODULES}


MAY_IMPORT_LATE = {
    "kdata",  # `import kdata` stays light: a public name is imported when it is first used
    "kdata.store.open",  # the Hub's client and remote stores, where an address asks for them
    "kdata.teachers.load",  # vLLM, torch and aiohttp, by the backend that is asked for
}


def test_only_three_modules_of_kdata_import_late() -> None:
    late = {module for module in MODULES if folder_of(module) == "kdata" and late_imports(module)}
    assert late <= MAY_IMPORT_LATE, late - MAY_IMPORT_LATE


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every group of nodes that reach each other."""
    reach = {node: {node} for node in graph}
    for _ in graph:
        longer = {node: set().union(*(reach[other] for other in {node, *graph[node]})) for node in graph}
        if longer == reach:
            break
        reach = longer
    groups = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph}
    return [list(group) for group in groups if len(group) > 1]


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_module_imports_itself_in_a_circle() -> None:
    """Late imports and imports for types count."""
    graph = {m: {name for name in imports_of(m) if name in MODULES} - {m} for m in MODULES}
    assert not circles(graph)
    assert graph["kdata.jobs.reading"] >= {"kdata.corpus.corpus", "kdata.jobs.job"}  # the walk sees what is there


def room_of(module: str) -> str:
    """The folder that README draws for a module: a folder or file of kdata/, a folder of pipelines/, trainer or schemas."""
    parts = MODULES[module].relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kdata":
        return parts[1] if len(parts) > 2 else parts[1].replace("__init__", "kdata")
    return "/".join(parts[:2]) if parts[0] == "pipelines" and len(parts) > 2 else parts[0]


def drawn() -> dict[str, set[str]]:
    """The graph in README.md, lines of `folder -> folders that it imports`, lowest first."""
    block = (ROOT / "README.md").read_text("utf-8").split("```graph\n")[1].split("```")[0]
    lines = [line.partition("->") for line in block.splitlines()]
    return {name.strip(): set(targets.split()) for name, _, targets in lines}


def test_the_folders_import_each_other_as_readme_draws() -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        rooms = {room_of(name) for name in imports_of(module) if name in MODULES}
        graph[room_of(module)] = graph.get(room_of(module), set()) | rooms - {room_of(module)}
    graph = {room: targets for room, targets in graph.items() if room != "kdata"}  # the public names, loaded on demand
    graph = {room: targets - {"kdata"} for room, targets in graph.items()}
    assert graph == drawn()
    below: set[str] = set()
    for room, targets in drawn().items():
        assert targets <= below, f"{room} imports {targets - below}, which README draws above it"
        below.add(room)


def test_kdata_has_few_entries() -> None:
    entries = [p for p in (ROOT / "kdata").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert len(entries) <= 15, sorted(p.name for p in entries)


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{n.split('.')[0] for n in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kdata; kdata.open, kdata.Plan",
        "import kdata.pipelines.cli.main",
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

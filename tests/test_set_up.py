"""The set-up: what it refuses and with which remedy, and what it does with what an interrupt left behind.

Installing itself is not tested here: it takes minutes and needs a package index.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/set_up.py as a module."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "tools/set_up.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lock(tmp_path: Path) -> int:
    """A file that installers inherit."""
    return os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)


def test_an_old_python_is_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "OLDEST", (99, 0))
    with pytest.raises(tool.SetUpError, match=r"make PYTHON=python3\.12"):
        tool.check_python()


def test_make_refuses_an_old_python_in_one_line() -> None:
    call = ["make", "--always-make", "--dry-run", "setup", "PYTHON=/bin/false"]
    shown = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "needs Python 3.11 or newer" in shown and shown.index("needs Python") < shown.index("tools/set_up.py")


def test_a_python_without_ensurepip_is_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's Python without the package python3-venv."""
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(tool.SetUpError, match=r"apt install python3\.\d+-venv.*make UV=uv"):
        tool.check_python()


def test_a_missing_compiler_is_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(tool.SetUpError, match=r"no C\+\+ compiler no-such-compiler.*apt install g\+\+"):
        tool.check_compiler()


def test_missing_headers_are_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # a program that exists
    monkeypatch.setattr(tool.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(tool.SetUpError, match=r"Python\.h.*apt install python3\.\d+-dev"):
        tool.check_compiler()


def test_a_full_disk_is_refused_before_anything_is_written(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(tool.SetUpError, match=r"GB free; the packages need 1000000 GB there"):
        tool.check_disk(tmp_path, 1_000_000)
    tool.check_disk(tmp_path, 0)


@pytest.mark.parametrize(
    ("printed", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("NewConnectionError: Temporary failure in name resolution", "Check the network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "PIP_EXTRA_INDEX_URL"),
        ("error: command 'gcc' failed: No such file", "apt install build-essential"),
        ("something else", "Its output says why"),
    ],
)
def test_an_installer_that_fails_is_explained(
    tool: ModuleType, tmp_path: Path, lock: int, printed: str, remedy: str
) -> None:
    log = tmp_path / "log"
    with pytest.raises(tool.SetUpError) as caught:
        tool.call([sys.executable, "-c", f"print({printed!r}); raise SystemExit(1)"], log, lock, tmp_path)
    assert remedy in str(caught.value) and printed in str(caught.value) and str(log) in str(caught.value)


def test_packages_that_an_interrupt_left_incomplete_are_installed_again(tool: ModuleType, tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    for name in ("whole-1.0.dist-info", "torn-2.0.dist-info", "~orn-1.0.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "whole-1.0.dist-info/INSTALLER").write_text("pip\n")
    assert tool.drop_partial_packages(tmp_path) == ["torn-2.0", "~orn-1.0"]
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_half_an_environment_does_not_count_as_one(tool: ModuleType, tmp_path: Path) -> None:
    assert not tool.works(tmp_path / "bin/python")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(tmp_path / "gone")
    assert not tool.works(tmp_path / "bin/python")
    assert tool.works(Path(sys.executable))


def test_how_far_an_installer_is(tool: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Collecting numpy\nWARNING: a location is ignored\n")
    assert tool.progress(tmp_path, log) == "Collecting numpy"
    (tmp_path / "lib/python3.11/site-packages/numpy-2.0.dist-info").mkdir(parents=True)
    log.write_text("Collecting numpy\nInstalling collected packages: numpy, torch\n")
    assert tool.progress(tmp_path, log) == "unpacking 2 packages, 1 there"


def test_a_second_set_up_waits_for_the_first_to_end(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "build").mkdir()
    shutil.copy(ROOT / "tools/set_up.py", tmp_path / "tools/set_up.py")
    with (tmp_path / "build/set-up.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = subprocess.run(
            [sys.executable, tmp_path / "tools/set_up.py"], capture_output=True, text=True, check=False
        )
    assert second.returncode == 1 and "another set-up is at work" in second.stderr
    assert not (tmp_path / ".venv").exists()


def test_uv_gets_the_places_that_pip_knows(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text("[global]\nextra-index-url = https://one.invalid/simple\n    https://two.invalid/simple\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    options = tool.places_of_pip()
    assert options[options.index("https://one.invalid/simple") - 1] == "--index"
    assert options[options.index("https://two.invalid/simple") - 1] == "--index"
    assert options[-2:] == ["--index-strategy", "unsafe-best-match"]

"""The wheel, built and installed as a user gets it: one top-level name, and nothing that a user's own files can hide."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("pipelines", "schemas", "trainer")  # folders beside kdata/ in the repository, below it in the wheel
DATA = {".yaml", ".j2", ".json", ".typed", ".safetensors"}
# Evidence of measurements that the library does not read.
NOT_INSTALLED = {
    "pipelines/evidence/gemma.json",
    "pipelines/evidence/positions.json",
    "pipelines/evidence/selection.json",
    "pipelines/evidence/tokenizers.json",
}
pytestmark = pytest.mark.slow


def run(*command: str | Path, folder: Path) -> str:
    """Standard output of a command; its whole output is the message where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files of this folder without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("kdata", *BESIDE, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", out, source, folder=source)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and with the packages of this one but for its editable kdata."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    target = [
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-warn-script-location",
        "--ignore-installed",
        "--prefix",
        folder,
    ]
    run(sys.executable, "-m", "pip", "install", *target, wheel, folder=folder)
    # A folder that a .pth file adds comes behind the environment's own, and its .pth files are not read again: the
    # editable kdata is such a file.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "packages_of_the_tests.pth").write_text("\n".join(here) + "\n")
    return folder


def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kdata"}


def test_the_wheel_holds_every_module_and_every_file_that_they_read(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    paths = [path for folder in ("kdata", *BESIDE) for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {
        name if name.startswith("kdata/") else f"kdata/{name}"
        for name in (path.relative_to(ROOT).as_posix() for path in paths if path.suffix in DATA | {".py"})
        if name not in NOT_INSTALLED
    }
    assert {"kdata/py.typed", "kdata/schemas/v1/dataset.schema.json", "kdata/pipelines/quickstart.yaml"} <= wanted
    assert not wanted - held, f"missing in the wheel: {sorted(wanted - held)}"


def test_the_command_works_where_a_users_files_have_our_folders_names(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "schemas").mkdir()
    for name in ("trainer.py", "schemas/__init__.py", "pipelines.py"):
        (tmp_path / name).write_text("raise RuntimeError('a file of the user was imported')\n")
    python, command = environment / "bin" / "python", environment / "bin" / "kdata"

    assert str(environment) in run(python, "-c", "import kdata; print(kdata.__file__)", folder=tmp_path)
    assert "quickstart" in run(command, "run", "quickstart", "--dry-run", folder=tmp_path)
    assert "Usage" in run(command, "--help", folder=tmp_path)
    assert "regmix" in run(command, "select", "--list", folder=tmp_path)
    read = "from kdata.pipelines.evidence.advice import read_results; print(len(read_results()[1]))"
    assert int(run(python, "-c", read, folder=tmp_path)) > 1
    # `python -c` puts the folder itself on the path, as a user's own program does.
    run(python, "-c", "import kdata.pipelines.recipe, kdata.trainer.config, kdata.schemas", folder=tmp_path)
    with pytest.raises(AssertionError, match="a file of the user was imported"):
        run(python, "-c", "import trainer", folder=tmp_path)

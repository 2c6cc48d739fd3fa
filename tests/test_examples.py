"""The programs of examples/ run as a user runs them, one after the other, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    """Standard output of an example; what it printed is in the message where it fails."""
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_examples_run_in_order(tmp_path: Path) -> None:
    captured = run("capture_your_text.py", tmp_path)
    assert "sequences" in captured and captured.count("the teacher's first choice was") == 5

    chosen = run("query_and_choose.py", tmp_path)
    assert "'domain': 'code'" in chosen and "50% of the plan" in chosen and "sequences are in both plans" in chosen
    assert {path.name for path in (tmp_path / "runs/examples/dataset/plans").iterdir()} >= {"hard.json", "half.json"}

    trained = run("train_a_student.py", tmp_path)
    assert "all: NLL" in trained
    assert (tmp_path / "runs/examples/student/model/model.safetensors").is_file()


def test_every_example_is_listed_and_short() -> None:
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in listed, f"examples/README.md does not mention {path.name}"
        assert len(path.read_text("utf-8").splitlines()) < 60, f"{path.name} is long: people copy it"

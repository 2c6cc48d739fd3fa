"""The curator's session of the documentation runs as it stands, in a folder of its own, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import kdata
from kdata.selection.plan import open_plan

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_session_runs_from_raw_text_to_a_student(tmp_path: Path) -> None:
    for name in ("examples", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    page = (ROOT / "examples/curate.md").read_text("utf-8")
    script = "\n".join(["set -e", *BLOCK.findall(page)])
    assert script.count("--open") == 1
    # A page that is served until Ctrl-C, as a folder.
    script = script.replace("--open", "--export runs/curate/page")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": "", "PATH": tools, "KDATA_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "runs/curate"

    raw = kinds(pq.read_table(folder / "raw.parquet")["id"].to_pylist())
    data = kdata.open(folder / "data")
    read = kinds(sorted({one.partition("#")[0] for one in data.index(["id"])["id"].to_pylist()}))
    assert 0.25 < raw["good"] / sum(raw.values()) < 0.4
    assert read.keys() == {"good", "near", "shuffled"}, "exams, cookies, German and addresses are not read"
    assert read["good"] + read["near"] <= raw["good"], "no text is read twice"
    assert read["good"] + read["near"] > 0.9 * raw["good"]

    plan = open_plan(data, "plan")
    chosen = kinds([one.partition("#")[0] for one in plan.ids])
    everything = kinds([one.partition("#")[0] for one in data.index(["id"])["id"].to_pylist()])
    assert chosen.get("shuffled", 0) / sum(chosen.values()) < everything["shuffled"] / sum(everything.values())
    assert (folder / "plan.png").is_file() and not list(tmp_path.glob("*.png")), "nothing is left in the repository"
    assert (folder / "page/index.html").is_file() and (folder / "student/model/model.safetensors").is_file()


def kinds(ids: list[str]) -> dict[str, int]:
    """How many rows there are of each kind, which is the beginning of an id."""
    names = [one.rpartition("-")[0] for one in ids]
    return {name: names.count(name) for name in set(names)}

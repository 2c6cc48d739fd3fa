"""The environment of every command: set before torch is imported, and a user's own value stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("seen at the import of torch:", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
"""
STARTS = {
    "kdata": """
from kdata.pipelines.cli.main import main
sys.argv = ["kdata", "score", os.environ["DATASET"], "--model", os.environ["MODEL"]]
main()
""",
    "evidence": "import runpy; runpy.run_module('kdata.pipelines.evidence', run_name='__main__')",
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("users", "seen"), [(None, "0"), ("1000", "1000")])
def test_waiting_threads_sleep_before_torch_loads(
    start: str, users: str | None, seen: str, captured: Path, llama_dir: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"DATASET": str(captured), "MODEL": str(llama_dir)}
    if users is not None:
        environment["GOMP_SPINCOUNT"] = users
    command = [sys.executable, "-c", WATCH + STARTS[start]]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.stdout == f"seen at the import of torch: {seen}\n", outcome.stderr

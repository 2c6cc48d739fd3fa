"""The campaign of kills: a few cases of commands that take little, and in the long form more of every command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.campaigns.campaign import run
from tests.campaigns.commands import in_folder
from tests.campaigns.kills import Kills

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="faults below every library need a C compiler")
QUICK = ("merge", "head", "combine", "import", "score from a file", "select sql")


def test_kills_lose_nothing() -> None:
    report = run(Kills(QUICK), seed=0, count=12)
    assert report["cases"] == 12 and report["problems"] == []


def leave_a_file(folder: str, arguments: list[str]) -> int:
    (Path(folder) / f"left-{os.getpid()}.tmp").touch()
    return in_folder(folder, arguments)


class Leaving(Kills):
    """With commands that leave a temporary file of a random name."""

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        super().prepare(folder, seed)
        self.bench.target = "tests.campaigns.test_kills:leave_a_file"


def test_a_file_that_a_command_leaves_is_found() -> None:
    report = run(Leaving(("head",)), seed=0, count=1)
    assert report["failures"] == 1 and run(Kills(("head",)), seed=0, count=1)["failures"] == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_every_command_lose_nothing() -> None:
    report = run(Kills(), seed=1, count=24)
    assert report["cases"] == 24 and report["problems"] == []

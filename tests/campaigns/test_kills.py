"""The campaign of kills: a few cases of commands that take little, and in the long form more of every command."""

from __future__ import annotations

import shutil

import pytest

from tests.campaigns.campaign import run
from tests.campaigns.kills import Kills

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="faults below every library need a C compiler")
QUICK = ("merge", "head", "combine", "import", "score from a file", "select sql")


def test_kills_lose_nothing() -> None:
    report = run(Kills(QUICK), seed=0, count=12)
    assert report["cases"] == 12 and report["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_every_command_lose_nothing() -> None:
    report = run(Kills(), seed=1, count=24)
    assert report["cases"] == 24 and report["problems"] == []

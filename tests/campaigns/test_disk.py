"""The campaign of failing disks: a few cases of commands that take little, and in the long form more of every command."""

from __future__ import annotations

import shutil

import pytest

from tests.campaigns.campaign import run
from tests.campaigns.disk import Disk
from tests.campaigns.test_kills import QUICK

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="faults below every library need a C compiler")


def test_a_failing_disk_is_named_and_loses_nothing() -> None:
    report = run(Disk(QUICK), seed=0, count=12)
    assert report["cases"] == 12 and report["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_failing_disk_under_every_command() -> None:
    report = run(Disk(), seed=1, count=24)
    assert report["cases"] == 24 and report["problems"] == []

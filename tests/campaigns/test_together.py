"""The campaign of pairs: a few at the same time, and in the long form every pair once."""

from __future__ import annotations

import shutil

import pytest

from tests.campaigns.campaign import run
from tests.campaigns.together import Together

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="what cases share is made by the server of faults")


def test_pairs_of_commands_leave_a_whole_folder() -> None:
    report = run(Together(), seed=0, count=6)
    assert report["cases"] == 6 and report["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_pairs_of_commands_leave_a_whole_folder() -> None:
    report = run(Together(), seed=1, count=24)
    assert report["cases"] == 24 and report["problems"] == []

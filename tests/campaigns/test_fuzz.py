"""The campaign `fuzz`, short; `make test-all` runs it longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.campaign import run
from tests.campaigns.fuzz import TARGETS, Fuzz


def test_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    report = run(Fuzz(), seed=1, count=12, folder=tmp_path)
    assert not report["problems"] and report["cases"] == 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    report = run(Fuzz(), seed=2, count=300, folder=tmp_path)
    assert not report["problems"]
    assert len(report["by_kind"]) > len(TARGETS) / 2

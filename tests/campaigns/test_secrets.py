"""The campaign `secrets`, short; `make test-all` runs it longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.campaign import run
from tests.campaigns.secrets import Secrets


def test_no_secret_comes_out(tmp_path: Path) -> None:
    report = run(Secrets(), seed=1, count=5, folder=tmp_path)
    assert not report["problems"] and set(report["by_kind"]) == {"environment", "url", "setting", "recipe"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_secret_comes_out_of_many(tmp_path: Path) -> None:
    assert not run(Secrets(), seed=2, count=100, folder=tmp_path)["problems"]

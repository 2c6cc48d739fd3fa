"""The campaign `fuzz`, short; `make test-all` runs it longer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from kdata.errors import KdataError
from kdata.format.schema import DatasetInfo
from tests.campaigns.campaign import run
from tests.campaigns.fuzz import EXAMPLES, TARGETS, Fuzz, make_examples, read


def test_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    report = run(Fuzz(), seed=1, count=12, folder=tmp_path)
    assert not report["problems"] and report["cases"] == 12


def read_carelessly(name: str, case: str, examples: str) -> int:
    def info(root: Path) -> DatasetInfo:
        return DatasetInfo(**json.loads((root / "dataset.json").read_bytes()))

    with patch("kdata.store.dataset.read_info", info):
        return read(name, case, examples)


class Careless(Fuzz):
    """With a reader of dataset.json that checks nothing."""

    read = staticmethod(read_carelessly)


def test_a_reader_that_checks_nothing_is_found(tmp_path: Path) -> None:
    report = run(Careless("dataset.json"), seed=1, count=4, folder=tmp_path)
    assert "a traceback" in report["problems"][0]["problem"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    report = run(Fuzz(), seed=2, count=300, folder=tmp_path)
    assert not report["problems"]
    assert len(report["by_kind"]) > len(TARGETS) / 2


def test_what_nobody_changed_is_read(tmp_path: Path) -> None:
    """A reader that gives up at the example as it is would take no notice of what the campaign does to it."""
    make_examples(tmp_path / "examples")
    EXAMPLES[0] = tmp_path / "examples"
    for number, (name, target) in enumerate(TARGETS.items()):
        case = tmp_path / f"case-{number}"
        shutil.copytree(tmp_path / "examples" / target.example, case)
        try:
            target.read(case)
        except KdataError as error:
            raise AssertionError(f"{name} is refused as it is: {error}") from error
        shutil.rmtree(case)

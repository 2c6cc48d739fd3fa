"""The campaign of damages: a few of every kind of file, and many more in the long form; and the shape of every campaign."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.campaigns.campaign import Campaign, Outcome, child, main, run
from tests.campaigns.damage import Damage


def test_damages_are_all_noticed() -> None:
    report = run(Damage(), seed=0, count=40)
    assert report["cases"] == 40 and report["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damages_are_all_noticed() -> None:
    report = run(Damage(), seed=1, count=120)
    assert report["cases"] == 120 and report["problems"] == []


def hang() -> None:
    while True:
        pass


def take_memory() -> int:
    return len(bytearray(8 << 30))


class Sample(Campaign):
    """Cases that fail in different ways."""

    name = "sample"
    total = 4

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`."""
        if number == 1:
            raise KeyError("unforeseen")
        if number == 2:
            return Outcome("hang", child(hang, seconds=0.5).complaint())
        if number == 3:
            return Outcome("memory", child(take_memory).complaint())
        return Outcome("drawn", None if rng.random() == random.Random("sample 7 0").random() else "another number")


def ends_with(status: int) -> int:
    return status


def test_no_status_of_a_child_is_lost() -> None:
    """Children that several threads start at once: multiprocessing alone loses the status of some."""
    wanted = [number % 3 for number in range(500)]
    with ThreadPoolExecutor(2) as pool:
        assert [ended.status for ended in pool.map(child, [ends_with] * len(wanted), wanted)] == wanted


def test_failures_are_counted_by_kind_and_say_how_to_repeat_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Sample, ["--seed", "7", "--count", "9"]) == 1
    output = capsys.readouterr()
    report = json.loads(output.out.splitlines()[-1])
    assert (report["campaign"], report["seed"], report["cases"], report["failures"]) == ("sample", 7, 4, 3)
    assert report["by_kind"] == {
        "drawn": {"cases": 1, "failures": 0}, "hang": {"cases": 1, "failures": 1},
        "memory": {"cases": 1, "failures": 1}, "unforeseen": {"cases": 1, "failures": 1},
    }  # fmt: skip
    for text in ("python -m tests.campaigns.sample --seed 7 --only 2", "no end after", "MemoryError", "KeyError"):
        assert text in output.err
    assert main(Sample, ["--seed", "7", "--only", "0"]) == 0

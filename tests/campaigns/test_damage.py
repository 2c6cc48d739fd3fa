"""The campaign of damages: a few of every kind of file, and many more in the long form; and the shape of every campaign."""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.campaigns.campaign import Campaign, Outcome, SharedChild, child, main, run
from tests.campaigns.damage import Damage, examine


def test_damages_are_all_noticed() -> None:
    report = run(Damage(), seed=0, count=40)
    assert report["cases"] == 40 and report["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damages_are_all_noticed() -> None:
    report = run(Damage(), seed=1, count=120)
    assert report["cases"] == 120 and report["problems"] == []


def examine_blindly(roots: list[str]) -> int:
    with patch("kdata.check.verify._strays", lambda dataset: []):
        return examine(roots)


class Blind(Damage):
    """With a `verify` that sees no stray files."""

    examine = staticmethod(examine_blindly)


def test_a_verify_that_is_blind_to_strays_is_found() -> None:
    report = run(Blind(("stray",)), seed=0, count=2)
    assert ["verify finds nothing" in one["problem"] for one in report["problems"]] == [True, True]


def sleep() -> None:
    time.sleep(600)


def leave(what: str) -> int:
    match what:
        case "file":
            tempfile.mkstemp()
        case "process":
            os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "30")
        case "thread":
            threading.Thread(target=time.sleep, args=(30,), name="left", daemon=True).start()
        case "variable":
            os.environ["KDATA_LEFT"] = "x"
        case "open file":
            os.open(os.devnull, os.O_RDONLY)
    print(os.getpid())
    return 0


def test_what_a_case_leaves_in_a_shared_child_is_named_and_goes_with_the_child() -> None:
    shared = SharedChild()
    try:
        for what in ("file", "process", "thread", "variable", "open file"):
            assert what in (shared.run(leave, what).complaint() or "")
            first, second = shared.run(leave, "nothing"), shared.run(leave, "nothing")
            assert first.complaint() is None and first.stdout == second.stdout
    finally:
        shared.close()


def test_a_crash_a_hang_and_an_error_of_one_case_are_not_those_of_the_next() -> None:
    shared = SharedChild()
    try:
        assert "signal 6" in (shared.run(os.abort).complaint() or "")
        assert "KeyError" in (shared.run(fail).complaint() or "")
        assert "MemoryError" in (shared.run(take_memory).complaint() or "")
        assert shared.run(ends_with, 0).complaint() is None
    finally:
        shared.close()


def fail() -> None:
    raise KeyError("raw")


def test_a_process_that_sleeps_or_works_for_too_long_hangs() -> None:
    for function in (hang, sleep):
        begun = time.monotonic()
        assert "no end after" in (child(function, seconds=0.5).complaint() or "")
        assert time.monotonic() - begun < 60


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

"""Killed at any moment and started again: no row lost, none twice, and the same bytes as an undisturbed run.

The job runs in a process of its own that is killed with SIGKILL: at random moments from
outside, and at every single call that changes the disk from inside.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.check.verify import verify
from tests.fakes import digests, generate_and_capture, rows_of_text, run_capture, write_jsonl

# A server that has imported everything once; each job is a fork of it, and begins after milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload", __name__])
DISK_CALLS = ("fsync", "replace", "rename", "mkdir")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = rows_of_text(14)
    rows[3]["text"] = ""
    return write_jsonl(tmp_path_factory.mktemp("crash") / "corpus.jsonl", rows)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path
) -> tuple[dict[str, str], float]:
    """Digests of the run that nobody disturbs, and how long it takes."""
    root = tmp_path_factory.mktemp("undisturbed") / "dataset"
    finish(start(generate_and_capture, root.with_name("warm"), corpus, tokenizer_dir))
    begun = time.monotonic()
    finish(start(generate_and_capture, root, corpus, tokenizer_dir, 0.005))
    return digests(root), time.monotonic() - begun


def start(target: Any, *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(60)
    assert process.exitcode == 0


def test_killed_at_random_moments(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    expected, seconds = undisturbed
    rng, kills, folder = random.Random(0), 0, 0
    while kills < 15:
        root = tmp_path / str(folder)
        process = start(generate_and_capture, root, corpus, tokenizer_dir, 0.005)
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += 1
        if process.exitcode == 0:
            assert digests(root) == expected
            folder += 1
        else:
            assert process.exitcode == -signal.SIGKILL
    finish(start(generate_and_capture, root, corpus, tokenizer_dir))
    assert digests(root) == expected
    dataset = kdata.open(root)
    ids = dataset.index(["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) and verify(dataset, deep=True) == []


def die_at(call: int, root: Path, corpus: Path, tokenizer: Path) -> None:
    """Run a small capture, and end this process with SIGKILL just before its `call`-th change of the disk."""
    left = [call]

    def counted(function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    small_capture(root, corpus, tokenizer)


def small_capture(root: Path, corpus: Path, tokenizer: Path) -> None:
    """Two units, one of them with a reject."""
    run_capture(root, corpus, tokenizer, unit_tokens=40, reading={"limit": 4})


@pytest.mark.slow
def test_killed_before_every_call_that_changes_the_disk(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    """Each state in between can be read, and is one from which the same bytes come."""
    small_capture(tmp_path / "undisturbed", corpus, tokenizer_dir)
    expected, call = digests(tmp_path / "undisturbed"), 0
    units = np.cumsum([0] + [entry.rows for entry in kdata.open(tmp_path / "undisturbed").manifest]).tolist()
    while True:
        call += 1
        root = tmp_path / str(call)
        process = start(die_at, call, root, corpus, tokenizer_dir)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (root / "dataset.json").exists():
            assert len(list(kdata.open(root))) in units
        small_capture(root, corpus, tokenizer_dir)
        assert digests(root) == expected, f"killed before call {call}"
    assert call > 20 and len(units) == 3

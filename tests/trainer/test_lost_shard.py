"""A shard is lost at a URL while two readers train: repair sets aside, capture fills the gap, and both students are the same.

The store is the stand-in of `tests.bucket`. Each reader is a process with a cache of its own, as on a machine of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.check.repair import repair
from kdata.check.verify import verify
from kdata.errors import CorruptError, MismatchError
from kdata.store.url import Store
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.train import train
from tests import bucket  # noqa: F401  registers bucket://
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, write_jsonl

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload", __name__])
CONFIG = TrainConfig(
    student=ScratchStudent(hidden_size=32, num_layers=1, num_heads=2, max_positions=64),
    steps=6,
    batch_tokens=128,
    context_tokens=64,
    warmup_steps=1,
    checkpoint_every_steps=2,
    window_documents=4,  # so that shards are copied as training comes to them
    prefetch_batches=0,
)


def learn(url: str, folder: Path, pause_at: int, copies_first: bool) -> None:
    """A reader: when it comes to its shard number `pause_at`, it says so and waits until the folder has `go`.

    copies_first: it waits after it has copied the shard, otherwise before.
    """
    os.environ["KDATA_CACHE"] = str(folder / "cache")
    fetch, shards = Store.fetch, [0]

    def fetch_and_wait(self: Store, relative: str, target: Path, info: Any) -> None:
        if relative.startswith("data/"):
            shards[0] += 1
        if copies_first:
            fetch(self, relative, target, info)
        if relative.startswith("data/") and shards[0] == pause_at:
            (folder / "waits").write_text(relative)
            wait_for((folder / "go").exists)
        if not copies_first:
            fetch(self, relative, target, info)

    Store.fetch = fetch_and_wait  # type: ignore[method-assign]
    try:
        train(CONFIG, url, None, folder / "out")
    except (CorruptError, MismatchError) as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def start(url: str, folder: Path, pause_at: int = 0, *, copies_first: bool = False) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    for name in ("waits", "go", "error"):
        (folder / name).unlink(missing_ok=True)
    process = CONTEXT.Process(target=learn, args=(url, folder, pause_at, copies_first))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(500)
    assert process.exitcode == 0


def student(folder: Path) -> dict[str, str]:
    return digests(folder / "out" / "model")


def test_a_shard_is_lost_at_a_url_while_two_readers_train(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows_of_text(16))
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "first machine"))
    behind = tmp_path / "store" / "d"
    url = f"bucket://{behind}"
    run_capture(url, corpus, tokenizer_dir, unit_tokens=60)
    whole, num_shards = digests(behind), len(kdata.open(url).manifest)
    assert num_shards >= 4
    finish(start(url, tmp_path / "undisturbed"))
    expected = student(tmp_path / "undisturbed")

    # In the middle of training one reader has just copied the last shard that it needs, and the other is about to.
    early = start(url, tmp_path / "early", num_shards, copies_first=True)
    late = start(url, tmp_path / "late", num_shards)
    for reader in ("early", "late"):
        wait_for((tmp_path / reader / "waits").exists)
        assert not (tmp_path / reader / "out" / "train.json").exists()
    lost = (tmp_path / "late" / "waits").read_text()
    (behind / lost).unlink()
    for reader in ("early", "late"):
        (tmp_path / reader / "go").touch()
    finish(early)
    finish(late)
    assert student(tmp_path / "early") == expected
    error = (tmp_path / "late" / "error").read_text()
    assert error.startswith("CorruptError") and f"{lost} is missing" in error

    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "second machine"))
    done = repair(url)
    [unit] = done.units["capture"]
    assert lost == f"data/capture-{unit:05d}.arrow" and done.aside == f"{url}.aside/1" and done.remaining == []
    assert verify(kdata.open(url), deep=True) == []  # smaller, and whole: it can be read meanwhile

    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "third machine"))
    teacher = StandInTeacher()
    run_capture(url, corpus, tokenizer_dir, teacher=teacher, unit_tokens=60)
    assert teacher.calls == 1 and digests(behind) == whole
    finish(start(url, tmp_path / "late"))
    assert student(tmp_path / "late") == expected

"""A dataset that cannot be written is refused before a model is loaded or a row is read; margins go on where they stopped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import MismatchError, StorageError
from kdata.format.files import require_writable
from kdata.hygiene import inspect
from kdata.hygiene.checks import HygieneConfig
from kdata.jobs import hidden, scoring, selecting
from kdata.selection import margins, score_file
from kdata.selection.position_rules import Gap
from kdata.selection.ranked import All
from kdata.teachers.config import TeacherConfig
from tests.fakes import digests, rows_of_text, write_jsonl
from tests.faults import mounted
from tests.kdata.selection.plans import Row, dataset_of

STEP = All()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Path:
    """A dataset of several shards."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = write_jsonl(folder / "c.jsonl", rows_of_text(9))
    reading = kdata.CaptureConfig(corpus=kdata.CorpusConfig(path=str(corpus)), kind="topk", k=8, unit_tokens=60)
    return kdata.capture(folder / "d", reading, _teacher(llama_dir)).path


@pytest.fixture(scope="module")
def refusing(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, on a file system that was mounted read-only below a folder that can be written."""
    with mounted(tmp_path_factory.mktemp("disk") / "d", "size=16m") as disk:
        shutil.copytree(whole, disk, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk


def _teacher(model: Path) -> TeacherConfig:
    return TeacherConfig(model=str(model), backend="transformers")


def _bring(data: kdata.Dataset, model: Path) -> object:
    file = data.path.parent / "mine.parquet"
    pq.write_table(pa.table({"id": data.index(["id"])["id"].to_pylist(), "mark": list(range(len(data)))}), file)
    return score_file.bring(data, file, "mine")


WRITERS: dict[str, tuple[Callable[[kdata.Dataset, Path], object], Any, str]] = {
    "score": (lambda data, model: scoring.score(data, scoring.ScoreConfig(model=_teacher(model))), scoring, "load_tokenizer"),
    "margins": (lambda data, model: margins.score_margins(data), margins, "pieces"),
    "numbers": (_bring, score_file, "_connection"),
    "hygiene": (lambda data, model: inspect.inspect_dataset(data, HygieneConfig(checks=["quality"])), inspect, "_work"),
    "hidden": (
        lambda data, model: hidden.store_hidden(data, hidden.HiddenConfig(model=_teacher(model))), hidden, "plan_hidden",
    ),
    "plan": (lambda data, model: kdata.select(data, STEP), kdata.Dataset, "check_index"),
    "gap": (
        lambda data, model: kdata.select(data, All(positions=Gap(model=str(model), share=0.5))), selecting, "open_reader",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    refusing: Path, whole: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    call, module, work = WRITERS[name]
    reached = []
    real = getattr(module, work)
    monkeypatch.setattr(module, work, lambda *args, **kwargs: reached.append(work) or real(*args, **kwargs))
    before = digests(refusing)
    with pytest.raises(StorageError, match="the file system is read-only; choose another folder"):
        call(kdata.open(refusing), llama_dir)
    assert not reached and digests(refusing) == before
    if name != "hidden":  # whose defaults are of larger models
        call(kdata.open(whole), llama_dir)
        assert reached == [work]


def test_nothing_stays_where_writing_was_tried(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b" / "c.parquet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").write_text("a file")
    with pytest.raises(StorageError, match="a part of the path is a file, not a folder"):
        require_writable(tmp_path / "a" / "b" / "c.parquet")


def test_margins_go_on_where_they_were_stopped(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "d", ignore=shutil.ignore_patterns("scores", "plans"))
    data = kdata.open(tmp_path / "d")
    assert margins.score_margins(data).covered == {"margin": len(data)}
    complete = digests(data.path)
    shutil.rmtree(data.path / "scores")
    number, real = 0, margins._margins

    def stopped(*args: Any) -> pa.Table:
        nonlocal number
        number += 1
        if number == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(margins, "_margins", stopped)
    with pytest.raises(KeyboardInterrupt):
        margins.score_margins(data)
    assert number == 2 and margins.score_margins(data).covered == {"margin": len(data)}
    assert number == 2 + len(data.manifest) - 1  # the first shard's part was kept
    assert digests(data.path) == complete
    margins.score_margins(data)
    assert number == 2 + len(data.manifest) - 1
    _bring(data, tmp_path)
    with pytest.raises(MismatchError, match=r"scores\.mine exists with other settings"):
        margins.score_margins(data, "mine")
    assert number == 2 + len(data.manifest) - 1


def test_margins_are_written_again_after_rows_were_added(tmp_path: Path) -> None:
    rows = [Row(f"r{n}", tokens=4) for n in range(6)]
    data = dataset_of(tmp_path / "d", rows[:4], shard_rows=2)
    margins.score_margins(data)
    more = dataset_of(tmp_path / "d", rows[4:], shard_rows=2, source="more")
    assert margins.score_margins(more).covered == {"margin": 6}
    assert sorted(more.sql("select id from scores.margin")["id"].to_pylist()) == [row.id for row in rows]
    assert verify(more, deep=True) == []

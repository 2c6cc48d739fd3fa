"""Shards that other processes write: the writer commits them whole, or they leave no trace."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.check.verify import verify
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import DataError, StorageError
from kdata.jobs.job import LocalEngine, dataset_info
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.store.staging import FolderStaging
from kdata.store.writer import Writer
from kdata.teachers.model import load_tokenizer, tokenizer_files
from tests.fakes import StandInTeacher, digests, run_capture


@pytest.fixture
def work(corpus_file: Path, tokenizer_dir: Path) -> tuple[CaptureJob, LocalEngine]:
    """The job of `run_capture`, and an engine to do its units with."""
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus_file)), kind="hybrid", k=8, unit_tokens=120)
    return CaptureJob(config, Corpus(config.corpus)), LocalEngine(StandInTeacher(), load_tokenizer(tokenizer_dir))


def open_writer(root: Path, job: CaptureJob, engine: LocalEngine, folder: Path) -> Writer:
    info = dataset_info(engine.facts, engine.tokenizer, job.keep)
    return Writer(root, info, job.name, job.source(engine.facts), tokenizer_dir=folder)


def test_the_bytes_do_not_depend_on_the_order_of_units_or_the_attempt(
    tmp_path: Path, work: Any, corpus_file: Path, tokenizer_dir: Path
) -> None:
    job, engine = work
    with tokenizer_files(engine.tokenizer) as folder, open_writer(tmp_path / "d", job, engine, folder) as writer:
        staging = pickle.loads(pickle.dumps(writer.staging()))  # as it goes to another process
        units = list(job.units(engine.facts, engine.tokenizer))
        for unit in reversed(units):
            for attempt in ("0", "1"):
                done = job.perform(engine.facts, engine.tokenizer, unit)
                shard = staging.write(f"{unit.number}-{attempt}", writer.info, job.name, done)
            assert not list((tmp_path / "d").glob(f"*/{shard.entry.name}.*"))  # a reader does not see it yet
            writer.adopt(staging, f"{unit.number}-{unit.number % 2}", shard)
        writer.finish(len(units))
    assert digests(tmp_path / "d") == digests(run_capture(tmp_path / "local", corpus_file, tokenizer_dir).path)
    assert verify(kdata.open(tmp_path / "d"), deep=True) == []


def test_a_late_attempt_fails_without_its_folder_and_leaves_nothing(tmp_path: Path, work: Any) -> None:
    job, engine = work
    with tokenizer_files(engine.tokenizer) as folder, open_writer(tmp_path / "d", job, engine, folder) as writer:
        staging = writer.staging()
        unit, *_ = job.units(engine.facts, engine.tokenizer)
        done = job.perform(engine.facts, engine.tokenizer, unit)
        shard = staging.write("0-0", writer.info, job.name, done)
        writer.adopt(staging, "0-0", shard)
        with pytest.raises(DataError, match="already has a row"):
            writer.adopt(staging, "0-1", shard)
        writer.finish(1)
        before = digests(tmp_path / "d")
        with pytest.raises(StorageError, match="must lie on a file system that all of them mount"):
            staging.write("0-1", writer.info, job.name, done)
    assert digests(tmp_path / "d") == before and not list((tmp_path / "d").glob("units-*"))


def test_a_folder_that_is_removed_during_a_write_is_not_made_again(tmp_path: Path, work: Any, monkeypatch: Any) -> None:
    job, engine = work
    unit, *_ = job.units(engine.facts, engine.tokenizer)
    done = job.perform(engine.facts, engine.tokenizer, unit)
    monkeypatch.setattr(FolderStaging, "check", lambda self: None)
    info = dataset_info(engine.facts, engine.tokenizer, job.keep)
    with pytest.raises(StorageError, match="No such file or directory"):
        FolderStaging(tmp_path / "units-0.tmp").write("0-0", info, job.name, done)
    assert list(tmp_path.iterdir()) == []

"""A real S3 client against a store that fails: the same bytes as in a folder, and nothing that was committed is lost."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import CorruptError, KdataError, StorageError
from tests.fakes import StandInTeacher, digests, held_by_another_process, run_capture
from tests.s3 import S3, Request, s3_store

pytest.importorskip("moto", reason="needs moto and s3fs, which the extra dev brings")


@pytest.fixture(scope="module")
def running() -> Iterator[S3]:
    with s3_store() as s3:
        yield s3


@pytest.fixture
def s3(running: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The store without faults, and a cache of the test's own."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(fsspec.config.conf, "s3", running.options)
    running.faults.decide, running.faults.stale_sec, running.faults.hang_sec = (lambda request: None), 0.0, 3.0
    running.faults.by_fault.clear()
    return running


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}/d"


def content(s3: S3, url: str) -> dict[str, str]:
    """SHA-256 of every object of a dataset, by relative path."""
    objects = s3.objects(url.removeprefix("s3://"))
    return {name: hashlib.sha256(value).hexdigest() for name, value in objects.items()}


def another_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is in the cache is lost."""
    monkeypatch.setenv("KDATA_CACHE", str(folder))


def test_a_capture_to_s3_has_the_bytes_of_a_folder_and_is_read_back(
    s3: S3,
    url: str,
    captured: Path,
    corpus_file: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_capture(url, corpus_file, tokenizer_dir)
    assert content(s3, url) == digests(captured)
    another_machine(monkeypatch, tmp_path / "elsewhere")
    opened = kdata.open(url)
    assert opened.sql("select count(*) as n from rows")["n"][0].as_py() == opened.num_rows
    assert verify(opened, deep=True) == [] and digests(opened.path) == digests(captured)


def test_a_second_process_hears_who_writes(
    s3: S3, url: str, captured: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSPEC_S3", json.dumps(s3.options))  # as fsspec reads it in the other process
    with held_by_another_process(url, corpus_file, tokenizer_dir) as pid:
        for spelling in (url, f"{url}/", url.replace("s3://", "s3a://")):
            with pytest.raises(StorageError, match=rf"is being written by another process \(process {pid} on "):
                run_capture(spelling, corpus_file, tokenizer_dir)
    run_capture(url, corpus_file, tokenizer_dir)
    assert content(s3, url) == digests(captured)


@pytest.mark.parametrize("fault", ["error", "slow down", "cut request", "lost answer", "cut answer"])
def test_requests_that_fail_now_and_then_are_sent_again(
    s3: S3, url: str, captured: Path, corpus_file: Path, tokenizer_dir: Path, fault: str
) -> None:
    """Every seventh request fails once; the client's own retries, or the same command again, bring the same bytes."""
    s3.faults.decide = lambda request: fault if request.number % 7 == 0 else None
    for _ in range(12):
        try:
            run_capture(url, corpus_file, tokenizer_dir)
            break
        except StorageError as error:
            assert "run the same command again" in str(error)
    assert s3.faults.by_fault[fault] > 3
    s3.faults.decide = lambda request: None
    run_capture(url, corpus_file, tokenizer_dir)
    assert content(s3, url) == digests(captured)


def test_a_store_that_does_not_answer_ends_the_run_with_one_error(
    s3: S3, url: str, captured: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = s3.faults.count
    s3.faults.decide = lambda request: "hang" if request.number > begun + 25 else None
    monkeypatch.setitem(fsspec.config.conf, "s3", s3.waiting(1.0))
    with pytest.raises(StorageError, match="the server did not answer in time: check the network"):
        run_capture(url, corpus_file, tokenizer_dir)
    s3.faults.decide = lambda request: None
    monkeypatch.setitem(fsspec.config.conf, "s3", s3.options)
    run_capture(url, corpus_file, tokenizer_dir)
    assert content(s3, url) == digests(captured)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error", "cut request", "lost answer"])
def test_a_run_that_ends_at_any_request_goes_on_from_any_machine(
    s3: S3, captured: Path, corpus_file: Path, tokenizer_dir: Path, fault: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From some request on nothing works any more. What was committed stays, and the rest comes later."""
    rng = random.Random(fault)
    for case in range(3):
        url = f"s3://bucket/{tmp_path.name}/{case}"
        begun, after = s3.faults.count, rng.randint(1, 160)
        s3.faults.decide = lambda request, last=begun + after: fault if request.number > last else None  # type: ignore[misc]
        try:
            run_capture(url, corpus_file, tokenizer_dir)
        except StorageError as error:
            assert "run the same command again" in str(error)
        s3.faults.decide = lambda request: None
        another_machine(monkeypatch, tmp_path / f"cache-{case}")
        teacher = StandInTeacher()
        committed = 0
        if "dataset.json" in content(s3, url):
            partial = kdata.open(url)
            committed = len(partial.manifest)
            assert verify(partial, deep=True) == []
        run_capture(url, corpus_file, tokenizer_dir, teacher=teacher)
        assert content(s3, url) == digests(captured), f"after request {after}"
        assert teacher.calls <= len(kdata.open(url).manifest) - committed


def test_a_listing_that_lags_behind_loses_nothing(
    s3: S3,
    url: str,
    captured: Path,
    corpus_file: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys that were written a moment ago are in no listing yet."""
    s3.faults.stale_sec = 3600.0
    begun = s3.faults.count
    s3.faults.decide = lambda request: "error" if begun + 60 < request.number < begun + 90 else None
    for machine in range(31):  # each run that fails uses up at least one of the 29 errors
        another_machine(monkeypatch, tmp_path / f"machine-{machine}")
        try:
            run_capture(url, corpus_file, tokenizer_dir)
            break
        except StorageError as error:
            assert "run the same command again" in str(error)
    assert s3.faults.by_fault["error"] > 0
    another_machine(monkeypatch, tmp_path / "last")
    assert verify(kdata.open(url), deep=True) == []
    s3.faults.stale_sec = 0.0
    run_capture(url, corpus_file, tokenizer_dir)
    assert content(s3, url) == digests(captured)


def test_an_answer_that_is_cut_short_is_never_taken_for_the_file(
    s3: S3,
    url: str,
    captured: Path,
    corpus_file: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_capture(url, corpus_file, tokenizer_dir)
    another_machine(monkeypatch, tmp_path / "elsewhere")

    def cut(request: Request) -> str | None:
        return "cut answer" if request.method == "GET" and request.path.endswith(".arrow") else None

    s3.faults.decide = cut
    opened = kdata.open(url)
    with pytest.raises((StorageError, CorruptError)):
        list(opened)
    assert not list(opened.path.rglob("*.tmp"))
    s3.faults.decide = lambda request: None
    assert len(list(kdata.open(url))) == opened.num_rows


def test_a_bucket_that_does_not_exist_is_named(s3: S3, corpus_file: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(KdataError, match="no-such-bucket"):
        run_capture("s3://no-such-bucket/d", corpus_file, tokenizer_dir)

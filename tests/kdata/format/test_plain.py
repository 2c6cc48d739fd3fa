"""What is no file in the place of a file: a pipe that would wait for ever, a device and a hole that never end."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kdata
from kdata.check.verify import verify
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import CorruptError, DataError, KdataError, MissingError
from kdata.format.json_text import read_json
from kdata.format.manifest import read_manifest
from kdata.format.plain import plain_lines
from kdata.observe.journal import read_journal
from kdata.share.card import card_page
from tests.fakes import digests

HOLE = 20 << 30  # bytes; takes no space on the disk


@contextmanager
def soon(seconds: int = 30, memory: int = 4 << 30) -> Iterator[None]:
    """The block ends soon, in so much more memory than there is now."""

    def late(*_: object) -> None:
        raise AssertionError("it waits, or reads without an end")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_hole(path: Path) -> None:
    os.truncate(path, HOLE)


def everything(root: Path) -> None:
    """What opens any file of a dataset."""
    data = kdata.open(root)
    data.take(np.arange(data.num_rows))
    data.sql("select count(*) from rows")
    card_page(data)
    if problems := verify(data, deep=True):
        raise CorruptError(str(problems))
    raise AssertionError("nothing was found")


@pytest.mark.parametrize("change", [a_pipe, a_device, a_hole])
@pytest.mark.parametrize(
    "name",
    [
        "dataset.json", "manifest.jsonl", "data/capture-00000.arrow", "index/capture-00000.parquet", "plans/some.json",
        "plans/some.parquet", "tokenizer/tokenizer.json", "README.md",
    ],
)  # fmt: skip
def test_every_file_of_a_dataset(copied: Path, name: str, change: Callable[[Path], None]) -> None:
    data = kdata.open(copied)
    kdata.make_plan(data, "some", [data[0].id], method="sql", parameters={}).save(copied / "plans")
    (copied / "README.md").touch()
    change(copied / name)
    with soon(), pytest.raises(KdataError):
        everything(copied)
    with soon():
        try:
            kdata.repair(copied)
        except KdataError as error:
            assert name in ("dataset.json", "manifest.jsonl"), error


def test_the_error_says_what_it_is(copied: Path) -> None:
    a_pipe(copied / "dataset.json")
    with soon(), pytest.raises(CorruptError, match=r"dataset\.json is a pipe, a socket or a device.*restore the file"):
        kdata.open(copied)


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"{}\n")
    a_hole(path)
    with soon(), pytest.raises(CorruptError, match=r"manifest\.jsonl line 2 has more than 1,048,576 bytes"):
        list(plain_lines(path, 1 << 20))
    with soon(), pytest.raises(CorruptError):
        read_manifest(tmp_path)
    with soon(), pytest.raises(CorruptError, match="line 2"):
        read_journal(path)
    with soon(), pytest.raises(DataError, match="more than"):
        read_json(path)


def test_lines_come_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\r\n\n" + b"x" * 8 + b"\nend")
    assert list(plain_lines(path, 9)) == [b"a\r\n", b"\n", b"xxxxxxxx\n", b"end"]
    with pytest.raises(CorruptError, match="line 3 has more than 8 bytes"):
        list(plain_lines(path, 8))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 1234\n"


@pytest.mark.parametrize("name", ["data/capture-00000.arrow", "index/capture-00000.parquet"])
def test_a_clone_without_git_lfs_says_how_to_get_the_files(copied: Path, name: str) -> None:
    """It was called damaged, and `repair` set the whole dataset aside."""
    (copied / name).write_text(POINTER)
    before = digests(copied)
    with pytest.raises(KdataError, match=r"is a pointer of Git LFS.*`git lfs pull`"):
        data = kdata.open(copied)
        data.sql("select * from rows")
        list(data)
    [first, *_] = verify(kdata.open(copied))
    assert first.path == name and "git lfs pull" in first.what
    with pytest.raises(MissingError, match=r"is a pointer of Git LFS.*Nothing was set aside"):
        kdata.repair(copied)
    assert digests(copied) == before


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_so_does_a_corpus(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(DataError, match=r"rows\..* is a pointer of Git LFS"):
        Corpus(CorpusConfig(path=str(tmp_path / name)))

"""Locks that name who holds them, temporary names that no link can use, folders that killed processes left."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kdata.errors import CorruptError, StorageError
from kdata.format.files import (
    committed_folder,
    folder_beside,
    inside,
    lock_of,
    new_file,
    rust_errors,
    storage_errors,
    sync_tree,
    temporary_folder,
    write_atomically,
)

HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from kdata.format.files import {what}\n"
    "with {hold}:\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def start(what: str, hold: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process that holds something until it is killed."""
    code = HOLD.format(what=what, hold=hold)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_lock_names_its_holder_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    process = start("lock_of", "lock_of(Path(sys.argv[1]))", str(folder), "hf://user:secret@host/name?token=secret")
    try:
        with pytest.raises(StorageError) as caught, lock_of(folder):
            pass
        text = str(caught.value)
        assert text.startswith(f"{folder} is being written by another process (process {process.pid} on ")
        assert socket.gethostname() in text and "since 20" in text and "secret" not in text and "hf://host/name" in text
        assert len(text.splitlines()) == 1
        assert f"process {process.pid}" in (lock_of(tmp_path / "x" / ".." / "folder").holder() or "")
    finally:
        end(process)
    assert lock_of(folder).holder() is None
    with lock_of(folder) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid() and lock.holder() is None
    assert list(tmp_path.iterdir()) == []


def test_a_fork_of_the_process_does_not_keep_its_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    lock = lock_of(tmp_path / "folder")
    lock.acquire()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)  # until the test has ended
        lock.release()  # of the parent: does nothing here
        os._exit(0)
    os.close(reader)
    lock.release()
    with lock_of(tmp_path / "folder"):
        os.close(writer)
        os.waitpid(child, 0)
        assert lock_of(tmp_path / "folder").path.exists()


def test_a_lock_file_of_a_stranger_says_no_more_than_it_may(tmp_path: Path) -> None:
    process = start("lock_of", "lock_of(Path(sys.argv[1]))", str(tmp_path / "d"))
    try:
        for content in ("\x00", "[" * 5000, '{"pid": "\\u001b[31m", "host": "h", "since": "s", "command": "c"}'):
            (tmp_path / ".d.lock").write_text(content)
            with (
                pytest.raises(StorageError, match="is being written by another process") as caught,
                lock_of(tmp_path / "d"),
            ):
                pass
            assert str(caught.value).isprintable()
    finally:
        end(process)


def test_the_lock_of_a_folder_in_a_place_that_cannot_be_written_is_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point of a container: the root of its file system is read-only."""
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    with lock_of(tmp_path / "mount") as lock:
        assert lock.path == tmp_path / "mount/.lock" and lock.path.exists()
        assert os.listdir(tmp_path) == ["mount"]
    assert not os.listdir(tmp_path / "mount")
    assert lock_of(tmp_path / "new").path == tmp_path / ".new.lock", "a folder that has to be made there first"


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".d.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="a link has the name of a file"), lock_of(tmp_path / "d"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("README.md.tmp", "README.md"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "README.md", b"card")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "README.md").read_text() == "card" and not (tmp_path / "README.md").is_symlink()
    (tmp_path / "x.tmp").symlink_to(tmp_path / "nowhere")
    with new_file(tmp_path / "x.tmp") as file:
        file.write(b"1")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "y.tmp").mkdir()
    with pytest.raises(StorageError), storage_errors(tmp_path):
        write_atomically(tmp_path / "y", b"")


@pytest.mark.parametrize("relative", ["", ".", "./.", "/", "/etc", "..", "data/../..", "../x", "link/x", "a\0b"])
def test_a_path_that_is_not_below_the_dataset_is_refused(tmp_path: Path, relative: str) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises((CorruptError, ValueError)):
        inside(root, relative)
    assert inside(root, "data/x") == root / "data" / "x"


def test_what_killed_processes_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / f"kdata-{os.getuid()}-notes"
    mine.mkdir()
    dead = start("temporary_folder", "temporary_folder('dead')", TMPDIR=str(tmp_path))
    alive = start("temporary_folder", "temporary_folder('alive')", TMPDIR=str(tmp_path))
    beside = start("folder_beside", "folder_beside(Path(sys.argv[1]))", str(tmp_path / "d"))
    end(dead)
    end(beside)
    names = {path.name.split("-")[2] for path in tmp_path.glob("kdata-*.tmp")}
    assert names == {"dead", "alive"} and len(list(tmp_path.glob(".d.*.tmp"))) == 1
    try:
        with temporary_folder("own") as folder, folder_beside(tmp_path / "d") as other:
            assert folder.stat().st_mode & 0o777 == 0o700
            names = {path.name.split("-")[2] for path in tmp_path.glob("kdata-*.tmp")}
            assert names == {"alive", "own"} and list(tmp_path.glob(".d.*.tmp")) == [other]
    finally:
        end(alive)
    with committed_folder(tmp_path / "d") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "d" / "x").read_text() == "1" and mine.exists()
    with temporary_folder("last"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"d", mine.name}


def test_everything_is_flushed_before_a_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    with committed_folder(tmp_path / "d") as folder:
        (folder / "data").mkdir()
        (folder / "data" / "x").write_text("1")
        (folder / "y").write_text("2")
        expected = [str(folder / "data" / "x"), str(folder / "data"), str(folder / "y"), str(folder), str(tmp_path)]
    assert sorted(flushed) == sorted(expected) and flushed[-2:] == expected[-2:]
    sync_tree(tmp_path / "d")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "choose another folder"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check the disk"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOLCK, "choose another folder"),
        (errno.ETXTBSY, "remove the cause"),
    ],
)
def test_an_error_of_the_disk_names_path_and_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/x: .*{remedy}"), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))


def test_an_error_of_a_library_in_rust_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"), storage_errors(tmp_path), rust_errors():
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(KeyError), rust_errors():
        raise KeyError("other")

"""Files on disk, written so that a crash leaves either the old content or the new: atomic writes, digests, locks, paths."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock

from kdata.errors import ConfigError, CorruptError, KdataError, StorageError
from kdata.format.schema import FileInfo


def journal_of(root: Path) -> Path:
    """The log of the work on a dataset: a file beside the dataset, like its lock."""
    place = root.resolve()
    return place.parent / f".{place.name}.progress.jsonl"


def file_info(path: Path) -> FileInfo:
    """Digest and size of a file."""
    with path.open("rb") as file:
        return FileInfo(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


# Files whose bytes were compared in this process, each as it was then: it is compared again when one of these changes.
_MATCHED: set[tuple[str | int, ...]] = set()
# A file that was written less than this ago may change once more within one tick of the file system's clock.
SETTLED_SEC = 2.0


def matches(path: Path, info: FileInfo) -> bool:
    """Whether a file has this size and SHA-256. It is read for that once per process (about 1.5 GB/s), and after changes."""
    about = path.stat()
    if about.st_size != info.bytes:
        return False
    state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    key = (str(path.absolute()), *state, info.sha256)
    if key in _MATCHED:
        return True
    if file_info(path) != info:
        return False
    if time.time() - max(about.st_mtime, about.st_ctime) > SETTLED_SEC:
        _MATCHED.add(key)
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush, rename. Where that fails, as on a full disk, nothing is left."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        settle(temporary, path)
    except BaseException:  # Ctrl-C too; it goes on
        temporary.unlink(missing_ok=True)
        raise


def settle(temporary: Path, path: Path) -> None:
    """Give a file that is written its name: flush it to the disk, rename it, flush the folder."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def without_hidden(folder: Path, pattern: str) -> list[Path]:
    """What matches a pattern in a folder, in order, without names that begin with a dot: tools leave them beside data.

    Such as ._x.parquet and .DS_Store of macOS, .ipynb_checkpoints of Jupyter. `Path.glob` returns them.
    """
    paths = sorted(folder.glob(pattern))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


@contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` at the end; an error or a kill leaves no `folder`.

    Two processes may build the same thing at once: the first rename wins, the second sees an equal result there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
    temporary.mkdir()  # not mkdtemp: its mode 0700 would stay with a cache that people may share
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def inside(root: Path, relative: str) -> Path:
    """Return root/relative, refusing a path that leaves the dataset (absolute, '..', or through a link)."""
    pure = PurePosixPath(relative)
    path = root / pure
    unsafe = pure.is_absolute() or ".." in pure.parts or "\0" in relative
    if unsafe or not path.resolve().is_relative_to(root.resolve()):
        raise CorruptError(f"{root}: the manifest names {relative!r}, which lies outside the dataset; do not trust it")
    return path


def local_path(place: str | Path, remedy: str) -> Path:
    """A place as a path. Raises ConfigError, with the remedy, where it is a URL (a Path keeps one of its slashes)."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):
        raise ConfigError(f"{place} is a URL, and this needs a local path: {remedy}")
    return Path(place)


@contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Turn an OSError of the disk into one StorageError that names cause and remedy."""
    remedies = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "no permission to write there; choose another folder",
        errno.EPERM: "no permission to write there; choose another folder",
        errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    }
    try:
        yield
    except OSError as error:
        if isinstance(error, KdataError) or error.errno is None:
            raise
        remedy = remedies.get(error.errno) or f"{os.strerror(error.errno)}; remove the cause"
        raise StorageError(
            f"cannot write {error.filename or root}: {remedy}, then run the same command again. "
            "What was committed is intact."
        ) from error


def lock_of(root: Path) -> FileLock:
    """The lock that a writer of a dataset holds. It is beside the dataset, because what is inside gets shared."""
    place = root.resolve()  # the same lock for every name of the folder: relative, ".", through a link
    return FileLock(place.parent / f".{place.name}.lock")

"""Files on disk, written so that a crash leaves either the old content or the new: atomic writes, digests, locks, paths."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO

from kdata.errors import ConfigError, CorruptError, KdataError, StorageError, redacted
from kdata.format.json_text import parse_object
from kdata.format.plain import open_plain, refuse_special
from kdata.format.schema import FileInfo


def journal_of(root: Path) -> Path:
    """The log of the work on a dataset: a file beside the dataset, like its lock."""
    place = root.resolve()
    return place.parent / f".{place.name}.progress.jsonl"


def file_info(path: Path) -> FileInfo:
    """Digest and size of a file. Raises CorruptError for a pipe or a device."""
    with open_plain(path) as file:
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
    """Write under a temporary name, flush, rename. Where that fails, as on a full disk, nothing is left.

    Raises StorageError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path), removed_on_failure(temporary):
        with new_file(temporary) as file:
            file.write(content)
        settle(temporary, path)


@contextmanager
def removed_on_failure(*paths: Path) -> Iterator[None]:
    """Remove these files where the block fails or is interrupted; the error goes on."""
    try:
        yield
    except BaseException:  # Ctrl-C too
        for path in paths:
            with suppress(OSError):  # the first error is the one to report
                path.unlink(missing_ok=True)
        raise


def new_file(path: Path) -> BinaryIO:
    """Create a file to write. What has its name, left by a killed run or a link to elsewhere, is removed, not followed."""
    remove_leftover(path)
    # O_EXCL: never through a link, whoever makes one in the meantime. Modes follow the umask, as everywhere.
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def remove_leftover(path: Path) -> None:
    """Remove a file or a link that has the name of a temporary file. Raises OSError for a folder of that name."""
    path.unlink(missing_ok=True)


def settle(temporary: Path, path: Path) -> None:
    """Give a file that is written its name: flush it to the disk, rename it, flush the folder."""
    _sync_file(temporary)
    os.replace(temporary, path)
    sync_directory(path.parent)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below a folder, and the folder itself: a rename after it never outlives their content."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(place) / name).is_symlink():
                _sync_file(Path(place) / name)
        sync_directory(Path(place))


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, but not its folders, to an existing one. (`shutil.copytree` hides a full disk.)"""
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


@contextmanager
def committed_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` at the end; an error or a kill leaves no `folder`.

    Two processes may build the same thing at once: the first rename wins, the second sees an equal result there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder) as temporary:
        yield temporary
        sync_tree(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
        sync_directory(folder.parent)


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A new folder `.NAME.RANDOM.tmp` beside `folder`, to be filled and renamed. What is left of it in the end is removed.

    Those that killed processes left are removed first.
    """
    remove_left_beside(folder)
    # Not mkdtemp: its mode 0700 would stay with a folder that people may share.
    with _own_folder(lambda: folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")) as temporary:
        yield temporary


def remove_left_beside(folder: Path) -> None:
    """Remove what killed processes left of `folder_beside`, as one does that ends after its rename."""
    remove_abandoned(folder.parent, rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.tmp")


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder in the system's place for temporary files (TMPDIR), removed at the end.

    Those that killed processes of this user left, for whatever purpose, are removed first.

    Raises:
        StorageError: the disk of that place refused.
    """
    place, prefix = Path(tempfile.gettempdir()), f"kdata-{os.getuid()}-"
    with ExitStack() as stack:
        with storage_errors(place):
            remove_abandoned(place, rf"{prefix}[a-z]+-[0-9a-f]{{8}}\.tmp")
            own = _own_folder(lambda: place / f"{prefix}{purpose}-{secrets.token_hex(4)}.tmp", 0o700)
            folder = stack.enter_context(own)
        yield folder


@contextmanager
def _own_folder(name: Callable[[], Path], mode: int = 0o777) -> Iterator[Path]:
    """A new folder with a lock file `NAME.lock` beside it, by which others know that it is not abandoned."""
    handle = None
    while handle is None:  # another process may take a new lock file for abandoned in this very moment
        folder = name()
        lock = folder.with_name(folder.name + ".lock")
        handle = _locked(lock)
    try:
        folder.mkdir(mode)
        yield folder
    finally:
        if handle in _handles:  # not in a fork
            shutil.rmtree(folder, ignore_errors=True)
            _free(handle, lock)


def remove_abandoned(place: Path, pattern: str) -> None:
    """Remove folders of `_own_folder` with such names whose process has ended, and their locks. Links are not followed."""
    with suppress(OSError):  # what cannot be removed stays; whoever needs the space will hear of it
        with os.scandir(place) as entries:
            names = {entry.name.removesuffix(".lock") for entry in entries}
        for folder in sorted(place / name for name in names if re.fullmatch(pattern, name)):
            if any(p.is_symlink() or (p.exists() and p.lstat().st_uid != os.getuid()) for p in _with_lock(folder)):
                continue
            handle = _locked(_with_lock(folder)[1])
            if handle is not None:
                _lock_path(folder).unlink(missing_ok=True)  # of whoever wrote in it
                shutil.rmtree(folder, ignore_errors=True)
                _free(handle, _with_lock(folder)[1])


def _with_lock(folder: Path) -> tuple[Path, Path]:
    return folder, folder.with_name(folder.name + ".lock")


def inside(root: Path, relative: str) -> Path:
    """Return root/relative, refusing one that is not below the dataset ('.', absolute, '..', or through a link)."""
    pure = PurePosixPath(relative)
    path = root / pure
    unsafe = pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in relative
    if unsafe or not path.resolve().is_relative_to(root.resolve()):
        raise CorruptError(f"{root}: the manifest names {relative!r}, which lies outside the dataset; do not trust it")
    refuse_special(path)
    return path


def local_path(place: str | Path, remedy: str) -> Path:
    """A place as a path. Raises ConfigError, with the remedy, where it is a URL (a Path keeps one of its slashes)."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):
        raise ConfigError(f"{place} is a URL, and this needs a local path: {remedy}")
    return Path(place)


REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "File too large; raise the limit (ulimit -f), or choose another disk",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EPERM: "no permission to write there; choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    errno.EISDIR: "a folder has the name of a file that is to be written; move it away",
    errno.ELOOP: "a link has the name of a file that is to be written; remove it",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine; close other programs",
    errno.EIO: "Input/output error; check the disk (the system's log names it)",
    errno.ENOLCK: "the file system has no locks, and two processes could write at once; choose another folder",
    errno.EOPNOTSUPP: "the file system lacks an operation that is needed (such as locks); choose another folder",
}


@contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Turn an OSError of the disk into one StorageError that names cause and remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, KdataError) or error.errno is None:
            raise
        raise storage_error(error.errno, error.filename2 or error.filename or root) from error


def require_writable(path: Path) -> None:
    """Write a byte where `path` is to be written, so that a place that refuses is an error before the work, not after it.

    Nothing stays there. Raises StorageError.
    """
    with storage_errors(path):
        place = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")


def storage_error(number: int, place: object) -> StorageError:
    """The error for a path that cannot be written, by its errno."""
    remedy = REMEDIES.get(number) or f"{os.strerror(number)}; remove the cause"
    return StorageError(
        f"cannot write {place}: {remedy}, then run the same command again. What was committed is intact."
    )


def disk_errno(text: str) -> int | None:
    """The errno of a disk that refused, from the text of a library that keeps no number; None where it was not the disk."""
    return next((number for number in REMEDIES if os.strerror(number) in text), None)


@contextmanager
def rust_errors() -> Iterator[None]:
    """Raise what the disk refuses to a library in Rust (safetensors, tokenizers) as the OSError that it is.

    Their errors hold the number in their text only, and tokenizers raises a bare Exception.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


# Locks of this process, by handle. A child that is a fork must not keep them when this process is gone.
_handles: dict[int, Path] = {}


def _forget_locks() -> None:
    for handle in _handles:
        os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _locked(path: Path, *, wait: bool = False) -> int | None:
    """Create or open a lock file and take its lock, which ends with this process; None where another process has it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except PermissionError:
            if not os.path.lexists(path):
                raise
            if _is_held(path):
                return None
            path.unlink()  # another user's, who has ended
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                _handles[handle] = path
                return handle
        except BlockingIOError:
            return None
        except FileNotFoundError:  # the former holder has removed it: once more
            pass
        finally:
            if handle not in _handles:
                os.close(handle)


def _is_held(path: Path) -> bool:
    """Whether a process has the lock of this file."""
    with open(path, "rb", opener=not_through_a_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _free(handle: int, path: Path) -> None:
    """Remove a lock file and free its lock."""
    with suppress(OSError):  # the folder may be gone, or read-only by now; an old file does no harm
        if os.path.samestat(os.fstat(handle), os.lstat(path)):
            path.unlink()
    del _handles[handle]
    os.close(handle)


class FolderLock:
    """The lock of a folder or file that is written; a context manager. Whoever holds it is named to others.

    It is a file beside the folder, because what is inside gets shared, and is removed with the lock. Where that place cannot
    be written, as beside the mount point of a container, it is a hidden file in the folder. The operating system frees the
    lock of a process that ends in any way, so a dead one never blocks. Not `filelock`: it does not say who holds a lock, it
    follows links, and a fork of the process keeps its locks.

    Args:
        root: what is written. Every name of it (relative, through a link) has the same lock.
        wait: wait for the other process instead of raising.
        shown: what the error names instead of `root`, such as the URL whose copy `root` is.
    Raises:
        StorageError: when it is entered and another process holds it, or the disk refuses.
    """

    def __init__(self, root: Path, *, wait: bool = False, shown: str | None = None) -> None:
        self.root, self._wait, self._shown = root, wait, shown or str(root)
        place = root.resolve()
        is_mounted = place.is_dir() and not os.access(place.parent, os.W_OK)
        self.path = place / ".lock" if is_mounted else _lock_path(place)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(5):  # others hold it for a moment to see whether it is held
                handle = _locked(self.path, wait=self._wait)
                if handle is not None:
                    break
                time.sleep(0.01 * attempt)
            else:
                raise StorageError(
                    f"{self._shown} is being written by another process{self._about_holder()}; run this again when it has "
                    "finished"
                )
            self._handle = handle
            with ExitStack() as undo:
                undo.callback(self.release)
                os.ftruncate(handle, 0)
                os.pwrite(handle, _about_this_process(), 0)
                undo.pop_all()

    def release(self) -> None:
        """Free the lock, and remove its file. Nothing happens where it is not held, or in a fork."""
        handle, self._handle = self._handle, None
        if handle is not None and handle in _handles:
            _free(handle, self.path)

    def holder(self) -> str | None:
        """Which other process holds the lock, in words; None where none does."""
        if self.path in _handles.values():
            return None
        try:
            return f"another process{self._about_holder()}" if _is_held(self.path) else None
        except OSError:  # no such file: nobody; and whom this process may not ask, it cannot name
            return None

    def _about_holder(self) -> str:
        with suppress(FileNotFoundError), open(self.path, "rb", opener=not_through_a_link) as file:
            return _holder(file.read(4096))
        return ""

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def lock_of(root: Path, *, wait: bool = False, shown: str | None = None) -> FolderLock:
    """The lock that whoever writes a folder or file holds; see FolderLock."""
    return FolderLock(root, wait=wait, shown=shown)


def _about_this_process() -> bytes:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else ["python"]
    # Addresses without user, password and query, which may hold a token.
    command = redacted(re.sub(r"(?<=://)[^/\s@]*@|\?\S*", "", " ".join(words)))
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "command": command[:200], "since": since}).encode()


def not_through_a_link(path: str, flags: int) -> int:
    """An `opener` of `open` that refuses a link (ELOOP)."""
    return os.open(path, flags | os.O_NOFOLLOW)


def _holder(content: bytes) -> str:
    """Who holds a lock, in brackets; "" where the holder has not written it yet. The file is no more than a hint."""
    try:
        about = parse_object(content)
        values = [str(about[key])[:200] for key in ("pid", "host", "since", "command")]
    except (ValueError, KeyError):
        return ""
    pid, host, since, command = ("".join(c if c.isprintable() else "?" for c in value) for value in values)
    return f" (process {pid} on {host}, since {since}: {command})"

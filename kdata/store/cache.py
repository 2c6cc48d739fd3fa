"""Copies of shards of datasets that are elsewhere: made ahead of their use by threads, held while in use, bounded in size.

The bound is on payloads (data/), which are by far the most; KDATA_CACHE_LIMIT sets it for all datasets in the cache together.
The oldest copies go first. One that a process uses has a shared lock on it (flock), so that no other process removes it, and
a killed process leaves no lock. What is in use at once may be more than the bound; nothing is then copied ahead.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from kdata.errors import ConfigError
from kdata.store.background import Background
from kdata.store.url import cache_dir, is_abandoned

LIMIT_VARIABLE, DEFAULT_LIMIT = "KDATA_CACHE_LIMIT", "50GB"
THREADS = 4  # that copy ahead; one connection rarely fills a line
HELD = 8  # payloads that were used last are held, too: a reader is about to open them
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_room = threading.Lock()
_coming: dict[Path, int] = {}  # bytes of copies that this process is making


def cache_limit() -> int:
    """Bytes that copies of payloads may take: KDATA_CACHE_LIMIT, or 50 GB. Raises ConfigError where that is no amount."""
    text = os.environ.get(LIMIT_VARIABLE, "").strip() or DEFAULT_LIMIT
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if amount is None:
        raise ConfigError(f"{LIMIT_VARIABLE}={text!r} is not an amount of disk; write for instance 20GB or 500MB")
    return int(float(amount[1]) * _UNITS[amount[2].upper()])


def payloads() -> list[tuple[Path, os.stat_result]]:
    """Copies of payloads in the cache, the oldest first. Halves that were left behind are removed."""
    files = []
    for path in (cache_dir() / "datasets").glob("*/*/data/*.arrow*"):
        with suppress(FileNotFoundError):  # another process has removed it
            about = path.stat()
            if is_abandoned(path, about):
                path.unlink()
            elif path.suffix == ".arrow":
                files.append((path, about))
    return sorted(files, key=lambda file: (file[1].st_mtime_ns, file[0]))


def make_room(path: Path, size: int) -> bool:
    """Remove old copies that nobody uses until `size` bytes fit; the room is reserved for `path`, see `arrived`.

    Returns:
        False where they do not fit.
    """
    limit = cache_limit()
    with _room:
        files = payloads()
        used = sum(about.st_size for _, about in files) + sum(_coming.values())
        for other, about in files:
            if used + size <= limit:
                break
            if _removed(other):
                used -= about.st_size
        _coming[path] = size
        return used + size <= limit


def arrived(path: Path) -> None:
    """A copy is there, or will not be made."""
    with _room:
        _coming.pop(path, None)


def _removed(path: Path) -> bool:
    """Remove a copy, unless somebody uses it or its whole dataset (`keep_all`)."""
    keep = path.parent.parent.with_name(f"{path.parent.parent.name}.keep")
    handles: list[int] = []
    try:
        for place in (path, keep):
            if place.exists():
                handles.append(os.open(place, os.O_RDONLY | os.O_CLOEXEC))
                fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # in use, or another process has removed it
        return False
    finally:
        for handle in handles:
            os.close(handle)
    return True


def hold(path: Path) -> int | None:
    """A handle that keeps a copy from being removed until it is closed; None where there is no such file now."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        os.close(handle)
        return None
    return handle


def keep_all(root: Path) -> int:
    """A handle that keeps every copy of a dataset, as `hold`."""
    place = root.with_name(f"{root.name}.keep")
    handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


class Ahead:
    """Copies the payloads of one dataset before they are wanted, and holds those in use.

    Args:
        copy: makes the copy of a file by its relative path; raises where it cannot.
        path_of: path of a copy, and the size that it has or will have.

    Attributes:
        waits: how often a reader asked for a payload that was not there yet.
    """

    def __init__(self, copy: Callable[[str], None], path_of: Callable[[str], tuple[Path, int]]) -> None:
        self._copy, self._path_of = copy, path_of
        self._lock = threading.RLock()
        self._held: OrderedDict[str, int] = OrderedDict()
        self._wanted: list[str] = []
        self._coming: dict[str, Future[bool]] = {}
        self._threads: tuple[int, Background] | None = None  # with the process: a fork has no threads
        self.waits = 0

    def __del__(self) -> None:
        for handle in self._held.values():
            os.close(handle)
        if self._threads is not None and self._threads[0] == os.getpid():
            self._threads[1].close()

    def want(self, files: Iterable[str]) -> None:
        """Say which payloads are in use or will be soon, the first wanted first; the others are let go."""
        with self._lock:
            self._wanted = list(dict.fromkeys(files))
            for relative in [name for name in self._held if name not in self._wanted]:
                os.close(self._held.pop(relative))
            for relative, future in list(self._coming.items()):
                if relative not in self._wanted and future.cancel():
                    del self._coming[relative]
            for relative in self._wanted:
                if relative not in self._held and relative not in self._coming:
                    self._coming[relative] = self._pool().submit(self._in_time, relative)

    def _pool(self) -> Background:
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), Background(THREADS, "copy")
        return self._threads[1]

    def _in_time(self, relative: str) -> bool:
        """Copy a file ahead; False where there is no room for it."""
        path, size = self._path_of(relative)
        is_here = path.exists()
        try:
            if not is_here and not make_room(path, size):
                return False
            self._copy(relative)
            return self._take(relative)
        finally:
            arrived(path)

    def _take(self, relative: str) -> bool:
        handle = hold(self._path_of(relative)[0])
        if handle is None:
            return False
        with self._lock:
            if relative in self._held:
                os.close(self._held.pop(relative))
            self._held[relative] = handle
            spare = [name for name in self._held if name not in self._wanted]
            for name in spare[: max(len(spare) - HELD, 0)]:
                os.close(self._held.pop(name))
        return True

    def get(self, relative: str) -> None:
        """Have a payload here, and hold it. Raises what `copy` raises."""
        with self._lock:
            future = self._coming.get(relative) if self._threads and self._threads[0] == os.getpid() else None
            if future is not None and future.cancel():
                del self._coming[relative]
                future = None
        if future is not None:
            self.waits += not future.done()
            is_here = future.result()
            with self._lock:
                self._coming.pop(relative, None)
            if is_here:
                return
        with self._lock:
            if relative in self._held and self._path_of(relative)[0].exists():
                self._held.move_to_end(relative)
                return
        path, size = self._path_of(relative)
        try:
            for _ in range(3):  # another process may remove it before it is held
                if not path.exists():
                    self.waits += 1
                    make_room(path, size)
                self._copy(relative)
                if self._take(relative):
                    return
        finally:
            arrived(path)

"""Parts of files that are elsewhere, kept in the cache from one process to the next: footers and columns of Parquet.

`ranges/KEY/BEGIN-END` holds bytes BEGIN to END of a file, behind a SHA-256 of KEY, name and bytes. KEY is a SHA-256 of the
place that the file came from and of its digest in the manifest there. So parts of another place or version are never taken,
and neither is one that was damaged on the disk. Only the whole file has a digest that somebody else gave, so a part that
came damaged over the network is not known for it, and stays until it is evicted, the whole file is fetched, or a query fails.
A part counts only if this user wrote it and nobody else could.

Writing is by a temporary name, and nothing is locked: a reader sees a whole part or none, two writers write the same bytes.
All parts together take a tenth of KDATA_CACHE_LIMIT beside the payloads; those that were not used for longest go first.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.caching import BaseCache, register_cache

from kdata.store.cache import cache_limit
from kdata.store.url import Store, cache_dir, is_abandoned

SHARE = 10  # of the limit, parts may take one in so many bytes
MOST_PARTS = 50_000  # whatever their sizes: 30,000 are counted in some two seconds
SWEEPS = 16  # parts are counted at the first write of a process, and each time when so much of their limit was written
BLOCK = 4096  # bytes of the disk that a part takes at least
_DIGEST = 32  # bytes of a SHA-256
_PART = re.compile(r"(\d+)-(\d+)")


_sweeping = threading.Lock()


def _after_fork() -> None:
    global _sweeping
    _sweeping = threading.Lock()  # the thread that held it is not in the child


os.register_at_fork(after_in_child=_after_fork)


def place_of(store: Store) -> str:
    """What tells a store from others that may serve other bytes under one digest: host, endpoint, folder and commit.

    It has no names of users, because they may be tokens; passwords and tokens in queries were refused by the store.
    """
    endpoints = [str(getattr(store.fs, name, None) or "") for name in ("endpoint_url", "endpoint")]
    endpoints += [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
    places = [urlsplit(store.url).netloc, store.canonical, *endpoints]
    return "\n".join([*(re.sub(r"^(\w+://)?[^/@]*@", r"\1", place) for place in places), store.commit or ""])


def key_of(place: str, digest: str) -> str:
    """The key of a file's parts: SHA-256 of its place (`place_of`) and of its digest in the manifest there."""
    return hashlib.sha256(f"{place}\n{digest}".encode()).hexdigest()


class Ranges:
    """The kept parts of all files. Safe with other threads and processes; what the disk refuses is not kept.

    Raises ConfigError where KDATA_CACHE_LIMIT is no amount; it is read once, here.
    """

    def __init__(self) -> None:
        self._most = cache_limit() // SHARE
        self._written: int | None = None  # bytes since they were counted
        self._parts = 0

    def read(self, key: str, begin: int, end: int) -> bytes | None:
        """Bytes begin to end of the file with this key; None where they are not kept."""
        try:
            names = os.listdir(_folder(key))
        except OSError:
            return None
        for name in names:
            part = _PART.fullmatch(name)
            if part is None or not int(part[1]) <= begin <= end <= int(part[2]):
                continue
            with suppress(OSError):  # another process has removed it, or the disk cannot read it
                content = _checked(_folder(key) / name)
                if content is not None:
                    return content[begin - int(part[1]) : end - int(part[1])]
        return None

    def keep(self, key: str, begin: int, content: bytes) -> None:
        """Keep the bytes from `begin` on. More than fits is not kept."""
        self._sweep()
        size = _DIGEST + len(content)
        if not content or size > self._most // SWEEPS:
            return
        self._written, self._parts = (self._written or 0) + -(-size // BLOCK) * BLOCK, self._parts + 1
        path = _folder(key) / f"{begin}-{begin + len(content)}"
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                    file.write(_digest(path, content) + content)
                os.replace(temporary, path)  # not flushed: what a power cut leaves is compared, and fetched again
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _sweep(self) -> None:
        """Make room where enough was written since the last time; one thread does it, the others go on."""
        while self._is_due() and (lock := _sweeping).acquire(blocking=False):
            try:
                if self._is_due():
                    self._written, self._parts = 0, 0  # first: what others write meanwhile counts
                    _make_room(self._most)
            finally:
                lock.release()

    def _is_due(self) -> bool:
        if self._written is None:
            return True
        return self._written > self._most // SWEEPS or self._parts > MOST_PARTS // SWEEPS

    def forget(self, key: str) -> None:
        """Remove the parts of a file."""
        shutil.rmtree(_folder(key), ignore_errors=True)


class KeptRanges(BaseCache):
    """What fsspec knows of a file that is read in ranges: each is kept, and fetched only where it is not.

    ranges, key: of its parts, see `key_of`. errors: raises what a client raises as an error of kdata.
    """

    name = "kdata-ranges"

    def __init__(
        self,
        blocksize: int,
        fetcher: Any,
        size: int,
        *,
        ranges: Ranges,
        key: str,
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(blocksize, fetcher, size)
        self._ranges, self._key, self._errors = ranges, key, errors

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        begin, end = start or 0, self.size if stop is None else min(stop, self.size)
        if begin >= end:
            return b""
        content = self._ranges.read(self._key, begin, end)
        if content is None:
            with self._errors():
                content = bytes(self.fetcher(begin, end))
            if len(content) == end - begin:
                self._ranges.keep(self._key, begin, content)
        return content


register_cache(KeptRanges, clobber=True)


def _folder(key: str) -> Path:
    return cache_dir() / "ranges" / key


def _digest(path: Path, content: bytes) -> bytes:
    """Of a part: of its name, with the key of its file, and its bytes."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode() + content).digest()


def _checked(path: Path) -> bytes | None:
    """The content of a part; None where it is not what was kept, or others could have written it."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
    try:
        about = os.fstat(handle)
        others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or others:
            return None
        with open(handle, "rb", closefd=False) as file:
            found = file.read()
        with suppress(OSError):  # a disk that is read only
            os.utime(handle)  # used now
    finally:
        os.close(handle)
    digest, content = found[:_DIGEST], found[_DIGEST:]
    if digest != _digest(path, content):
        path.unlink()
        return None
    return content


def _make_room(most: int) -> None:
    """Remove parts, those that were used last at the end, until an eighth of `most` is free; and what was abandoned."""
    parts = []
    found = (Path(folder) / name for folder, _, names in os.walk(cache_dir() / "ranges") for name in names)
    for path in found:  # not glob: it fails where another process removes a folder meanwhile
        with suppress(OSError):
            about = path.lstat()
            if is_abandoned(path, about):
                path.unlink()
            else:  # the disk may not have decided yet how many blocks a new file takes
                parts.append((about.st_mtime_ns, path, max(about.st_size, about.st_blocks * 512)))
    used, count = sum(size for _, _, size in parts), len(parts)
    for _, path, size in sorted(parts):
        if used <= most - 2 * most // SWEEPS and count <= MOST_PARTS - 2 * MOST_PARTS // SWEEPS:
            break
        with suppress(OSError):
            path.unlink()
            used, count = used - size, count - 1
            path.parent.rmdir()  # the last one of its file

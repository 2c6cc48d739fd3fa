"""Parts of files that are elsewhere, kept in the cache from one process to the next: footers and columns of Parquet.

`ranges/SHA256/BEGIN-END` holds bytes BEGIN to END of the file that has this digest in a manifest, behind a SHA-256 of name
and bytes. So parts of another version are never taken, and neither is one that was damaged on the disk. Only the whole file
has a digest that somebody else gave, so a part that came damaged over the network is not known for it; where it is noticed,
the parts of its file are forgotten. A part counts only if this user wrote it and nobody else could.

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
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.caching import BaseCache, register_cache

from kdata.store.cache import cache_limit
from kdata.store.url import cache_dir

SHARE = 10  # of the limit, parts may take one in so many bytes
SWEEPS = 16  # parts are counted at the first write of a process, and each time when so much of their limit was written
ABANDONED_SEC = 600  # a temporary file that is older was left by a process that ended
_DIGEST = 32  # bytes of a SHA-256
_PART = re.compile(r"(\d+)-(\d+)")


class Ranges:
    """The kept parts of all files. Safe with other threads and processes; what the disk refuses is not kept."""

    def __init__(self) -> None:
        self._written: int | None = None  # since they were counted

    def read(self, digest: str, begin: int, end: int) -> bytes | None:
        """Bytes begin to end of the file with this digest; None where they are not kept."""
        with suppress(OSError):
            for name in os.listdir(_folder(digest)):
                part = _PART.fullmatch(name)
                if part is None or not int(part[1]) <= begin <= end <= int(part[2]):
                    continue
                content = _checked(_folder(digest) / name)
                if content is not None:
                    return content[begin - int(part[1]) : end - int(part[1])]
        return None

    def keep(self, digest: str, begin: int, content: bytes) -> None:
        """Keep the bytes from `begin` on. More than fits is not kept."""
        most = cache_limit() // SHARE
        if self._written is None or self._written > most // SWEEPS:
            _make_room(most)
            self._written = 0
        if not content or _DIGEST + len(content) > most // SWEEPS:
            return
        self._written += _DIGEST + len(content)
        path = _folder(digest) / f"{begin}-{begin + len(content)}"
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

    def forget(self, digest: str) -> None:
        """Remove the parts of a file."""
        shutil.rmtree(_folder(digest), ignore_errors=True)


class KeptRanges(BaseCache):
    """What fsspec knows of a file that is read in ranges: each is kept, and fetched only where it is not.

    digest: SHA-256 of the file, by its manifest; None: nothing is kept.
    """

    name = "kdata-ranges"

    def __init__(self, blocksize: int, fetcher: Any, size: int, *, ranges: Ranges, digest: str | None) -> None:
        super().__init__(blocksize, fetcher, size)
        self._ranges, self._digest = ranges, digest

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        begin, end = start or 0, self.size if stop is None else min(stop, self.size)
        if begin >= end:
            return b""
        content = None if self._digest is None else self._ranges.read(self._digest, begin, end)
        if content is None:
            content = bytes(self.fetcher(begin, end))
            if self._digest is not None and len(content) == end - begin:
                self._ranges.keep(self._digest, begin, content)
        return content


register_cache(KeptRanges, clobber=True)


def _folder(digest: str) -> Path:
    return cache_dir() / "ranges" / digest


def _digest(path: Path, content: bytes) -> bytes:
    """Of a part: of its name, with that of its file, and its bytes."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode() + content).digest()


def _checked(path: Path) -> bytes | None:
    """The content of a part; None where it is not what was kept, or others could have written it."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or others:
            return None
        found = file.read()
        os.utime(file.fileno())  # used now
    digest, content = found[:_DIGEST], found[_DIGEST:]
    if digest != _digest(path, content):
        path.unlink()
        return None
    return content


def _make_room(most: int) -> None:
    """Remove parts, those that were used last at the end, until an eighth of `most` is free; and what was abandoned."""
    parts, now = [], time.time()
    for path in (cache_dir() / "ranges").glob("*/*"):
        with suppress(OSError):
            about = path.lstat()
            if path.suffix == ".tmp" and now - about.st_mtime > ABANDONED_SEC:
                path.unlink()
            parts.append((about.st_mtime_ns, path, about.st_size))
    used = sum(size for _, _, size in parts)
    for _, path, size in sorted(parts):
        if used <= most - 2 * most // SWEEPS:
            break
        with suppress(OSError):
            path.unlink()
            used -= size
            path.parent.rmdir()  # the last one of its file

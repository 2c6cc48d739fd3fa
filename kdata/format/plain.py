"""Files that somebody else may have put there, opened so that reading them ends: no pipe, no device, no endless line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from kdata.errors import CorruptError

POINTER = b"version https://git-lfs"
GET_FILES = "is a pointer of Git LFS, not the file itself; fetch the files with `git lfs pull` in its folder"


def open_plain(path: Path) -> BufferedReader:
    """Open a file to read its bytes. Raises CorruptError for a pipe, a socket or a device, and OSError."""
    refuse_special(path)
    return open(path, "rb", opener=_not_waiting)


def refuse_special(path: Path) -> None:
    """Raise CorruptError where a path is neither a file nor a folder; none at all is no matter."""
    if is_special(path):
        raise CorruptError(
            f"{path} is a pipe, a socket or a device, not a file; remove it, and restore the file from a copy"
        )


def is_special(path: Path) -> bool:
    """Whether a path is that of a pipe, a socket or a device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a zero byte in its name
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS: what a clone without Git LFS has in the place of a large file."""
    try:
        with open_plain(path) as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # whatever became of it meanwhile


def plain_lines(path: Path, most: int) -> Iterator[bytes]:
    """Lines of a file as they are, the last one perhaps without its end.

    Raises CorruptError for a line of more than `most` bytes, before it is in memory, and OSError.
    """
    with open_plain(path) as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most:
                raise CorruptError(
                    f"{path} line {number} has more than {most:,} bytes, and kdata writes none as long; restore "
                    "the file from a copy"
                )
            yield line

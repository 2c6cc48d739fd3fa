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


# How files begin that stand in the place of others: what they are, and what to do.
_AGAIN = "copy or download it again"
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (POINTER, "a pointer of Git LFS", "fetch the file itself with `git lfs pull` in its folder"),
    (
        b"\x1f\x8b",
        "a file that gzip compressed",
        "unpack it with `gunzip`, or give it its own ending, such as .jsonl.gz",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "a file that zstd compressed",
        "unpack it with `unzstd`, or give it its own ending, such as .jsonl.zst",
    ),
    (b"BZh", "a file that bzip2 compressed", "unpack it with `bunzip2`, or give it its own ending, such as .jsonl.bz2"),
    (b"\xfd7zXZ", "a file that xz compressed", "unpack it with `unxz`"),
    (b"PK\x03\x04", "a zip archive", "unpack it with `unzip`"),
    (b"\xff\xfe", "text in UTF-16", "write it as UTF-8"),
    (b"PARE", "encrypted Parquet", "write it without encryption"),
    (b"PAR1", "Parquet", "give it the ending .parquet"),
    (b"ARROW1", "an Arrow file", "give it the ending .arrow"),
)
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2"}
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")


def what_instead(path: Path, ending: str) -> str:
    """What a file looks like that cannot be read by its ending, and what to do, as one sentence without its end.

    Args:
        ending: .parquet, .csv, .json or .arrow: the kind that it was read as.
    """
    try:
        with open_plain(path) as file:
            first = file.read(4096)
    except OSError:
        return f"see who may read it, or {_AGAIN}"
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not first.strip(b"\0") or not text:
        return f"it {'has no more than zeros' if text else 'is empty'}; {_AGAIN}"
    if text.lower().startswith(_PAGES):
        return (
            "it looks like a web page, as a server sends one to sign in or to say that there is no such file; open its "
            "address in a browser, and download the file itself (on the Hub .../resolve/main/...)"
        )
    for beginning, what, remedy in _BEGINNINGS:
        if first.startswith(beginning):
            own = ending.strip(".") in what.lower() or path.suffix == _PACKED.get(beginning)
            return (
                f"it begins as {what}, and was cut off or damaged; {_AGAIN}"
                if own
                else f"it looks like {what}; {remedy}"
            )
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.start < len(text) - 3:  # not a character that the end of `first` cuts
            return f"it looks like no kind of file that kdata reads; {_AGAIN}"
    lines = text.splitlines()
    kind, other = ("JSON", ".jsonl") if text[:1] in b"{[" else ("CSV", ".csv") if b"," in lines[0] else ("text", "")
    if not other:
        return f"it looks like plain text; {_AGAIN}"
    if other[:4] == ending[:4]:
        if path.suffix in _PACKED.values():
            return f"it is not compressed; take {path.suffix} off its name"
        return "mend the file, or write it again"
    return f"it looks like {kind}; give it the ending {other}"


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

"""What a query failed for that is not in its text: a disk, a server, or the bytes of a file.

DuckDB gives a failure of the file system through which it reads (`url_dataset.RangeFiles`) as the text of a traceback. That
file system raises errors of kdata, whose message is the last line.
"""

from __future__ import annotations

import os
import re

import duckdb

from kdata.errors import CorruptError, MismatchError, MissingError, StorageError, first_line
from kdata.format.files import REMEDIES, disk_errno
from kdata.store.queryable import Queryable, listed_views


def refuse_storage(dataset: Queryable, error: duckdb.Error) -> None:
    """Raise StorageError where DuckDB failed because a disk refused (full, broken, too many files), or a server."""
    reason = first_line(error)
    number = disk_errno(str(error)) if isinstance(error, duckdb.IOException) else None
    if number is not None:
        reason = reason.removesuffix(f": {os.strerror(number)}")  # the remedy says it
        raise StorageError(
            f"{dataset.path}: {reason}: {REMEDIES[number]}, then run the same command again. What was committed is intact."
        ) from error
    own = _own_text(error)
    if own.startswith(OF_PYTHON) and (own_error := OF_KDATA.search(own)) is not None:
        raise StorageError(own_error[1]) from error


OF_KDATA = re.compile(rf"^(?:[\w.]+\.)?{StorageError.__name__}: (.+)$", re.MULTILINE)
OF_PYTHON = "Traceback"  # how DuckDB's text of an exception begins that a file system raised


def _own_text(error: duckdb.Error) -> str:
    """DuckDB's text without the lines of the query that it shows."""
    return str(error).partition("\n\nLINE ")[0].strip()


def is_of_bytes(error: duckdb.Error) -> bool:
    """Whether a query failed for the bytes of a file, not for what it asks, for Ctrl-C or for the network.

    Most of what DuckDB says of a damaged Parquet file names no kind of error.
    """
    text = _own_text(error)
    kind = re.match(r"([A-Za-z ]+) Error: ", text)
    if kind is None:
        return not text.startswith(OF_PYTHON)
    if kind[1] == "Invalid Input":
        return re.search("parquet|thrift|magic bytes|failed to read file", text, re.IGNORECASE) is not None
    return kind[1] in ("IO", "Serialization", "INTERNAL")


def _forget_parts(dataset: Queryable, error: duckdb.Error) -> None:
    """Remove the kept parts of the file that the error names, or of all, so that the next query fetches them."""
    names = set(re.findall(rf"{dataset.sql_filesystem.protocol}://([^\s'\"]+)", _own_text(error)))
    files = {path: info for entry in dataset.manifest for path, info in entry.files.items()}
    if not names or not names <= files.keys():
        dataset.sql_filesystem.forget()
        return
    for name in names:
        dataset.sql_filesystem.drop(files[name])


def name_damage(dataset: Queryable, error: duckdb.Error, text: str = "") -> None:
    """Raise what is wrong with the files where a query failed for that: damage, or a score or plan that does not belong here.

    Args:
        text: the query; scores and plans whose names are in it are compared too.
    """
    if dataset.sql_filesystem is None:
        for entry in dataset.manifest:
            for folder in ("index", "rejects") if entry.rejected else ("index",):
                try:
                    dataset.checked_file(entry, folder)
                except CorruptError as damage:
                    raise damage from error
    elif is_of_bytes(error):
        _forget_parts(dataset, error)
    for kind, name in listed_views(dataset):
        if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE):
            try:
                dataset.listed_files(kind, name)
            except (CorruptError, MissingError, MismatchError) as damage:
                raise damage from error

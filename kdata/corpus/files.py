"""Rows of local files: Parquet, CSV and Arrow are read with pyarrow, JSON lines one by one.

JSON lines are not read with pyarrow, because it takes the columns of a file from its first block and would ignore keys that
appear later, such as the first tool call of a chat.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from kdata.errors import ConfigError, DataError, KdataError, MissingError

# By the end of the file's name.
FORMATS = {
    ".parquet": "parquet",
    **{
        f"{ending}{packed}": "json"
        for ending in (".jsonl", ".ndjson", ".json")
        for packed in ("", ".gz", ".zst", ".bz2")
    },
    ".csv": "csv",
    ".csv.gz": "csv",
    ".arrow": "ipc",
}

BLOCK_BYTES = 1 << 24  # a row of CSV must fit a block; pyarrow's own default is 1 MiB


def format_of(path: Path) -> str | None:
    """How a file is read: parquet, json, csv or ipc; None where kdata does not read it."""
    ends = (".".join(["", *path.name.split(".")[-parts:]]) for parts in (2, 1))
    return next((FORMATS[end] for end in ends if end in FORMATS), None)


class FileRows:
    """See `kdata.corpus.corpus.Rows`.

    Args:
        path: a file, or a folder of files of one kind.
        texts: columns of a CSV that are text, even where they look like numbers.
    """

    def __init__(self, path: Path, texts: list[str]) -> None:
        self._path, self._texts = path, texts
        self._files = _files(path)
        self._kind = format_of(self._files[0])
        with self._readable():
            if self._kind == "json":
                self.num_rows, self.names = self._survey()
            else:
                self._data = pads.dataset([str(f) for f in self._files], format=self._format())
                self.names, self.num_rows = self._data.schema.names, self._data.count_rows()

    def _format(self) -> pads.FileFormat | str:
        """The format for pyarrow: rows of up to BLOCK_BYTES, and ids and texts of a CSV as text."""
        if self._kind != "csv":
            assert self._kind is not None
            return self._kind
        return pads.CsvFileFormat(
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(self._texts, pa.string()),
                check_utf8=False,  # see `_rows_as_python`
            ),
        )

    def _survey(self) -> tuple[int, list[str]]:
        """Number of JSON lines, and the keys of all of them in order of appearance."""
        count, names = 0, dict[str, None]()
        for row in self._json_rows():
            count += 1
            names.update(dict.fromkeys(row))
        if not count:
            raise DataError(f"{self._path} holds no row: it has no line of JSON; write one object a line")
        return count, list(names)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Rows in the order of file names and lines."""
        with self._readable():
            if self._kind == "json":
                for row in self._json_rows():
                    yield {name: row.get(name) for name in columns}
                return
            for batch in self._data.to_batches(columns=columns, batch_size=1024):
                yield from rows_of(batch)

    def _json_rows(self) -> Iterator[dict[str, Any]]:
        for file in self._files:
            with (
                pa.input_stream(str(file), compression="detect") as packed,
                # A byte that is not UTF-8 spoils its own row only: `Corpus` rejects that row.
                io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines,
            ):
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield self._json_row(line, file, number)

    def _json_row(self, line: str, file: Path, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{self._path} cannot be read as json: {file.name}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{self._path}: {file.name}, line {number} is not a JSON object; write one object a line")
        return row

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn errors about broken input into one DataError."""
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, OSError, EOFError) as error:
            if isinstance(error, KdataError):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if "straddl" in reason:
                reason = f"a row is longer than {BLOCK_BYTES:,} bytes; store such text as Parquet or JSONL"
            raise DataError(f"{self._path} cannot be read as {self._kind}: {reason}") from error

    def identity(self) -> dict[str, Any]:
        """SHA-256 over the SHA-256 of each file."""
        return {"sha256": files_digest(self._files)}


def files_digest(files: list[Path]) -> str:
    """SHA-256 (hex) over the SHA-256 of each file, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def rows_of(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow batch as Python values; columns stay, null or not.

    A struct has every key of any row, so a null in it means that the row lacks the key, and the key is left out. Values of
    Arrow's JSON type (`datasets` uses it for objects with differing keys) are parsed, and keep their nulls.
    """
    kinds = {field.name: field.type for field in batch.schema}
    for row in _rows_as_python(batch):
        yield {name: _value(value, kinds[name]) for name, value in row.items()}


def _rows_as_python(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Rows as Python values. A byte that is not UTF-8 becomes half of a surrogate pair: it spoils its own row only."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        texts = {field.name for field in batch.schema if field.type in (pa.string(), pa.large_string())}
        raw = batch.cast(
            pa.schema([field.with_type(pa.large_binary()) if field.name in texts else field for field in batch.schema])
        )
        return [
            {
                name: value.decode(errors="surrogateescape") if name in texts and value is not None else value
                for name, value in row.items()
            }
            for row in raw.to_pylist()
        ]


def _value(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _value(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_value(item, kind.value_type) for item in value]
    return value


def exists(path: Path) -> bool:
    """As `Path.exists`; False too for what the file system does not take as a name, such as a long text."""
    try:
        return path.exists()
    except OSError:
        return False


def _files(path: Path) -> list[Path]:
    known = ", ".join(sorted({"." + end.split(".")[1] for end in FORMATS}))
    if not exists(path):
        raise MissingError(f"{str(path)[:200]} does not exist; name a file or folder of text rows (corpus.path)")
    if path.is_file():
        if format_of(path) is None:
            raise ConfigError(f"{path}: unknown ending; kdata reads {known}")
        return [path]
    files = sorted(p for p in path.rglob("*") if format_of(p) is not None)
    if not files:
        raise DataError(f"{path} holds no file that kdata reads ({known})")
    if len({format_of(p) for p in files}) > 1:
        raise ConfigError(f"{path} mixes formats; name a folder with one kind of file")
    return files

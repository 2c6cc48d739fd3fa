"""Rows of local files: Parquet, CSV and Arrow are read with pyarrow, JSON one object after another.

JSON is not read with pyarrow, because it takes the columns of a file from its first block and would ignore keys that
appear later, such as the first tool call of a chat.

Each file of a folder is read with its own columns and types. The folder has every column that one of its files has, and those
that its folders' names give (`domain=code/part-0.parquet`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from kdata.corpus.json_rows import JsonFile, refuse_bomb
from kdata.corpus.values import time_with_nanoseconds
from kdata.errors import ConfigError, DataError, KdataError, MissingError, first_line
from kdata.format.json_text import parse_json, parse_row
from kdata.format.plain import GET_FILES, is_pointer, what_instead
from kdata.format.records import RowError

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

ENDINGS = {"parquet": ".parquet", "json": ".json", "csv": ".csv", "ipc": ".arrow"}
BLOCK_BYTES = 1 << 24  # a row of CSV must fit a block; pyarrow's own default is 1 MiB
KEY_FOLDER = re.compile(r"^([^=]+)=(.*)$", re.DOTALL)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # how Hive and Spark write null in the name of a folder


def format_of(path: Path) -> str | None:
    """How a file is read: parquet, json, csv or ipc; None where kdata does not read it."""
    ends = (".".join(["", *path.name.split(".")[-parts:]]) for parts in (2, 1))
    return next((FORMATS[end] for end in ends if end in FORMATS), None)


class OneFile(Protocol):
    """The rows of one file."""

    names: list[str]
    num_rows: int

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
        """Rows in their order, with these columns (of `names`); a row that cannot be read comes as its error."""
        ...


class FileRows:
    """See `kdata.corpus.corpus.Rows`.

    Args:
        path: a file, or a folder of files of one kind.
        texts: columns that will be read. In a CSV they are text, even where they look like numbers.
        optional: further columns that will be read, where they exist; also text in a CSV.
    """

    def __init__(self, path: Path, texts: list[str], optional: tuple[str, ...] = ()) -> None:
        self._path, self._files = path, _files(path)
        self._kind = format_of(self._files[0])
        self._tables: list[OneFile] = []
        for file in self._files:
            with self._readable(file):
                self._tables.append(self._open(file, texts, optional))
        self.num_rows = sum(table.num_rows for table in self._tables)
        if self._kind == "json" and not self.num_rows:
            raise DataError(f"{path} holds no row: it has no line of JSON; write one object a line")
        # What the folders' names say counts where the file itself has no such column.
        self._keys = [
            {key: value for key, value in _keys(path, file).items() if key not in table.names}
            for file, table in zip(self._files, self._tables, strict=True)
        ]
        columns = [name for table in self._tables for name in table.names]
        self.names = list(dict.fromkeys([*columns, *(key for keys in self._keys for key in keys)]))
        self._read_keys = {*texts, *optional}

    def _open(self, file: Path, texts: list[str], optional: tuple[str, ...]) -> OneFile:
        if self._kind == "json":
            return JsonFile(file, str(self._path))
        if self._kind == "csv":
            if file.suffix == ".gz":
                refuse_bomb(file)
            return CsvFile(file, texts, optional)
        return StreamFile(file) if self._kind == "ipc" and _is_stream(file) else ArrowFile(file, str(self._kind))

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
        """Rows in the order of file names and lines; a column that a row's file lacks is None. See `Rows.rows`."""
        for file, table, keys in zip(self._files, self._tables, self._keys, strict=True):
            own = [name for name in columns if name in table.names]
            rest = {name: keys.get(name) for name in columns if name not in table.names}
            with self._readable(file):
                for row in table.rows(own):
                    yield row if isinstance(row, RowError) else {**row, **rest}

    @contextmanager
    def _readable(self, file: Path) -> Iterator[None]:
        """Turn errors about broken input into one DataError."""
        try:
            yield
        except (
            pa.ArrowException, OSError, EOFError, ValueError, TypeError, LookupError, OverflowError, RecursionError,
            MemoryError,
        ) as error:  # fmt: skip  # of pyarrow, and of Python where a value has no object
            if isinstance(error, KdataError) and not is_pointer(file):
                raise
            if is_pointer(file):
                raise DataError(f"{file} {GET_FILES}") from error
            reason = first_line(error)
            reason = reason.rpartition(f"'{file}'")[2].lstrip(".: ") or reason  # pyarrow names the file, twice
            if "straddl" in reason:
                reason = f"a row is longer than {BLOCK_BYTES:,} bytes; store such text as Parquet or JSONL"
                raise DataError(f"{file} cannot be read as csv: {reason}") from error
            instead = what_instead(file, ENDINGS[str(self._kind)])
            raise DataError(f"{file} cannot be read as {self._kind}: {reason.removesuffix('.')}; {instead}") from error

    def identity(self) -> dict[str, Any]:
        """SHA-256 over the SHA-256 of each file, each with the columns that its folders' names give and that are read."""
        used = [{k: v for k, v in keys.items() if k in self._read_keys} for keys in self._keys]
        labels = {name for table in self._tables for name in getattr(table, "labels", ())}
        return {"sha256": files_digest(self._files, used), **labels_identity(labels, self._read_keys)}


class ArrowFile:
    """A Parquet file, or an Arrow file with random access. See `OneFile`."""

    def __init__(self, file: Path, kind: pads.FileFormat | str) -> None:
        self._data = pads.dataset([str(file)], format=kind)
        self.names, self.num_rows = self._data.schema.names, self._data.count_rows()
        self.labels = class_labels(self._data.schema)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """See `OneFile`."""
        for batch in self._data.to_batches(columns=columns, batch_size=1024):
            yield from rows_of(_checked(batch), self.labels)


class CsvFile(ArrowFile):
    """A CSV: ids and texts are text, even where they look like numbers; an empty cell of them is null."""

    def __init__(self, file: Path, texts: list[str], optional: tuple[str, ...]) -> None:
        kinds = dict.fromkeys(texts, pa.string())
        super().__init__(file, _csv_format(kinds))
        own = [name for name in optional if name in self.names and name not in kinds]
        # pyarrow takes a column that is empty in the first block for one of nulls. A CSV has no other way to write null: an
        # empty id would be the id of one row, and a second one there twice; an empty domain could not be named.
        self._nulls = {name for name in own if pa.types.is_null(self._data.schema.field(name).type)} | {*texts}
        self._data = pads.dataset([str(file)], format=_csv_format({**kinds, **dict.fromkeys(own, pa.string())}))

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """See `OneFile`."""
        for row in super().rows(columns):
            yield {name: None if name in self._nulls and value == "" else value for name, value in row.items()}


class StreamFile:
    """A file in Arrow's stream format, as `datasets` writes it into its folders and its cache. See `OneFile`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as stream:
            self.names, self.labels = stream.schema.names, class_labels(stream.schema)
            self.num_rows = sum(batch.num_rows for batch in stream)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """See `OneFile`."""
        with pa.OSFile(str(self._file)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                chosen = _checked(batch.select(columns))
                for begin in range(0, batch.num_rows, 1024):
                    yield from rows_of(chosen.slice(begin, 1024), self.labels)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch. Raises ArrowInvalid where an offset or a length in it leads out of its memory.

    Text that is not UTF-8 passes: it spoils its own row only.
    """
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column.view(_with_bytes(column.type)).validate(full=True)
    return batch


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of text, at any depth, and without fields of nulls, which `Array.view` leaves empty."""
    types = pa.types

    def inner(field: pa.Field) -> pa.Field:
        return field.with_type(_with_bytes(field.type))

    if isinstance(kind, pa.BaseExtensionType):
        return _with_bytes(kind.storage_type)
    if types.is_struct(kind):
        return pa.struct([inner(field) for field in kind if not types.is_null(field.type)])
    if types.is_map(kind):
        return pa.map_(inner(kind.key_field), inner(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _with_bytes(kind.value_type), kind.ordered)
    if types.is_run_end_encoded(kind):
        return pa.run_end_encoded(kind.run_end_type, _with_bytes(kind.value_type))
    for is_one, list_of in (
        (types.is_list, pa.list_),
        (types.is_large_list, pa.large_list),
        (types.is_list_view, pa.list_view),
        (types.is_large_list_view, pa.large_list_view),
    ):
        if is_one(kind):
            return list_of(inner(kind.value_field))
    texts = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return texts.get(kind, kind)


def _is_stream(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(4) == b"\xff\xff\xff\xff"


def _csv_format(kinds: dict[str, pa.DataType]) -> pads.CsvFileFormat:
    """Rows of up to BLOCK_BYTES, with lines inside of cells."""
    return pads.CsvFileFormat(
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES),
        convert_options=pacsv.ConvertOptions(column_types=kinds, check_utf8=False),  # see `_values`
    )


def files_digest(files: list[Path], keys: list[dict[str, str | None]] | None = None) -> str:
    """SHA-256 (hex) over the SHA-256 of each file, in order; behind it as JSON what the file's folders say of its rows."""
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
        if keys and keys[number]:
            digest.update(json.dumps(keys[number], sort_keys=True).encode())
    return digest.hexdigest()


def _keys(root: Path, file: Path) -> dict[str, str | None]:
    """Columns that the names of a file's folders give, as Hive and Spark write them: KEY=VALUE, percent-encoded.

    Folders below `root` count, and those directly above it.
    """
    folder = file.parent.absolute() if file == root else root.absolute()
    above: list[str] = []
    for part in reversed(folder.parts):
        if not KEY_FOLDER.match(part):
            break
        above.insert(0, part)
    keys: dict[str, str | None] = {}
    for part in [*above, *(file.relative_to(root).parts[:-1] if file != root else ())]:
        if match := KEY_FOLDER.match(part):
            keys[unquote(match[1])] = None if match[2] == NO_VALUE else unquote(match[2])
    return keys


# ---------------------------------------------------------------------------------------------------- Arrow to Python


def class_labels(schema: pa.Schema) -> dict[str, Any]:
    """Columns with labels that `datasets` stores as numbers, and the names of these labels, from a file's own metadata.

    Returns:
        For each such column its description (see `with_names`); {} where the file was not written by `datasets`.
    """
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return labelled(features)


def labelled(features: Any) -> dict[str, Any]:
    """Those of the features of `datasets` (as a dictionary) that hold a ClassLabel somewhere."""
    columns = features if isinstance(features, dict) else {}
    return {name: feature for name, feature in columns.items() if "ClassLabel" in json.dumps(feature, default=str)}


def labels_identity(labels: Iterable[str], columns: set[str]) -> dict[str, str]:
    """Part of the identity of a corpus: class labels that are read are read by name.

    Args:
        labels: columns that hold class labels.
        columns: columns that are read.
    """
    return {"class_labels": "names"} if columns.intersection(labels) else {}


def with_names(value: Any, feature: Any) -> Any:
    """A value in which class labels have their names.

    Args:
        feature: as `datasets` describes it: {"_type": "ClassLabel", "names": [...]}, {"_type": "List", "feature": ...}, a
            list of one such description, or a dictionary of them for an object.
    """
    if value is None or feature is None:
        return value
    if isinstance(feature, list):
        feature = {"_type": "List", "feature": feature[0]}
    kind = feature.get("_type")
    if kind == "ClassLabel":
        names = feature.get("names") or []
        inside = isinstance(value, int) and 0 <= value < len(names)
        return names[value] if inside else None if value == -1 else value
    if isinstance(value, list):
        return [with_names(item, feature.get("feature")) for item in value]
    if isinstance(value, dict):
        own = (
            feature.get("feature") if isinstance(kind, str) else feature
        )  # a Sequence of objects is an object of lists
        return {name: with_names(item, (own or {}).get(name)) for name, item in value.items()}
    return value


def rows_of(batch: pa.RecordBatch | pa.Table, labels: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow batch as Python values; columns stay, null or not.

    A struct has every key of any row, so a null in it means that the row lacks the key, and the key is left out. Values of
    Arrow's JSON type (`datasets` uses it for objects with differing keys) are parsed, and keep their nulls.

    Args:
        labels: see `class_labels`.
    """
    names = batch.schema.names
    columns = [_values(batch.column(name), (labels or {}).get(name)) for name in names]
    for row in zip(*columns, strict=True) if columns else ({} for _ in range(batch.num_rows)):
        yield dict(zip(names, row, strict=True))


def _values(column: pa.Array | pa.ChunkedArray, labels: Any) -> list[Any]:
    """A column as Python values, none of which depends on what else is installed."""
    kind = column.type
    # Times of nanoseconds, also inside of lists and objects: pyarrow gives objects of pandas where that is installed.
    values = _by_type(column) if "[ns" in str(kind) else _as_python(column)
    if pa.types.is_primitive(kind) and labels is None:
        return values
    values = [_value(value, kind) for value in values]
    return values if labels is None else [with_names(value, labels) for value in values]


def _as_python(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """As `to_pylist`, also where a text is not UTF-8, or a date is beyond the year 9999: Python has no object for these."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (UnicodeDecodeError, ValueError, OverflowError):
        return _by_type(column)


def _by_type(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """As `_as_python`, from the innermost values on."""
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in _by_type(chunk)]
    kind, types = column.type, pa.types
    if isinstance(kind, pa.BaseExtensionType) and not types.is_primitive(kind.storage_type):
        return _leaf(column) if isinstance(kind, pa.UuidType) else _by_type(column.storage)
    if types.is_dictionary(kind):
        return _by_type(column.dictionary_decode())
    if types.is_run_end_encoded(kind):
        return _by_type(pc.run_end_decode(column))
    if types.is_struct(kind):
        fields = [_by_type(column.field(n)) for n in range(kind.num_fields)]
        names = [field.name for field in kind]
        rows = zip(*fields, strict=True) if fields else ((),) * len(column)
        return [
            dict(zip(names, row, strict=True)) if is_valid else None
            for row, is_valid in zip(rows, column.is_valid().to_pylist(), strict=True)
        ]
    if types.is_map(kind):
        starts = column.offsets.to_pylist()
        inside = slice(starts[0], starts[-1])
        pairs = list(zip(_by_type(column.keys[inside]), _by_type(column.items[inside]), strict=True))
        spans = zip(starts, starts[1:], column.is_valid().to_pylist(), strict=False)
        return [pairs[a - starts[0] : b - starts[0]] if is_valid else None for a, b, is_valid in spans]
    if hasattr(kind, "value_type"):  # lists of every kind
        items = iter(_by_type(column.flatten()))
        lengths = pc.list_value_length(column).to_pylist()
        return [None if length is None else list(islice(items, length)) for length in lengths]
    return _leaf(column)


def _leaf(column: pa.Array) -> list[Any]:
    """Values that hold no others. A byte that is not UTF-8 becomes half of a surrogate pair: it spoils its own row only."""
    kind, types = column.type, pa.types
    if getattr(kind, "unit", None) == "ns":
        return _nanoseconds(column)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in raw]
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):  # a date beyond the year 9999
        texts = column.cast(pa.string()).to_pylist()
        return [None if text is None else re.sub(r"\.0+$", "", text) for text in texts]


def _nanoseconds(column: pa.Array) -> list[Any]:
    """Times of nanoseconds as Python values; those that Python has no object for as text."""
    kind = column.type
    coarse = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else None
    coarse = coarse or (pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us"))
    below = [None if value is None else value % 1000 for value in column.cast(pa.int64()).to_pylist()]
    times = column.cast(coarse, safe=False).to_pylist()
    return [None if n is None else time_with_nanoseconds(time, n) for time, n in zip(times, below, strict=True)]


def _value(value: Any, kind: pa.DataType) -> Any:
    types = pa.types
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return parse_row(value)
    if types.is_struct(kind):
        return {field.name: _value(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if types.is_map(kind):
        pairs = [(key, _value(item, kind.item_type)) for key, item in value]
        return dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else [list(pair) for pair in pairs]
    if isinstance(value, list) and hasattr(kind, "value_type"):  # lists of every kind
        return [_value(item, kind.value_type) for item in value]
    return value


# ------------------------------------------------------------------------------------------------------ files of a path


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
    files = sorted(p for p in path.rglob("*") if _is_data(p, path))
    if not files:
        raise DataError(f"{path} holds no file that kdata reads ({known})")
    kinds = sorted({str(format_of(p)) for p in files})
    saved = sorted({str(p.parent.relative_to(path)) for p in files if p.name == "state.json"})
    if saved and "ipc" in kinds:
        raise ConfigError(f"{path} holds folders that `datasets` saved ({', '.join(saved)}); name one of them")
    if len(kinds) > 1:
        raise ConfigError(f"{path} mixes formats ({', '.join(kinds)}); name a folder with one kind of file")
    return files


def _is_data(file: Path, root: Path) -> bool:
    """Whether a file of a folder holds rows.

    Passed over is what tools leave beside data: names that begin with a dot (._a.jsonl, .ipynb_checkpoints/) and folders that
    begin with an underscore (_temporary/, _delta_log/).
    """
    parts = file.relative_to(root).parts
    hidden = any(part.startswith(".") for part in parts) or any(part.startswith("_") for part in parts[:-1])
    return not hidden and format_of(file) is not None and file.is_file()

"""Read index files: one row per sequence, in the order of the payload."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdata.errors import CorruptError, KdataError, MismatchError
from kdata.format.manifest import read_manifest
from kdata.format.plain import GET_FILES, is_pointer
from kdata.format.schema import ManifestEntry, index_schema

_COUNTED: set[tuple[str, int, int, int]] = set()  # digest of an index part, and what it was compared with
# What pyarrow and numpy raise when they read damaged bytes.
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


def damaged(path: Path, reason: object) -> KdataError:
    """The error for a file that is not what was committed; the reason itself where it is such an error already.

    Where another process has replaced the shard between the look at the file and its opening, the error says so.
    """
    if isinstance(reason, CorruptError | MismatchError):
        return reason
    if isinstance(reason, FileNotFoundError) and not path.exists():
        root, folder = path.parent.parent, path.parent.name
        of_a_shard = folder in ("data", "index", "rejects") and (root / "manifest.jsonl").exists()
        if of_a_shard and all(f"{folder}/{path.name}" not in entry.files for entry in read_manifest(root)):
            return replaced(root, path.stem)
    if is_pointer(path):
        return CorruptError(f"{path} {GET_FILES}")
    return CorruptError(
        f"{path} is damaged: {reason}. Restore it from a copy, or run `kdata verify` to see what is whole."
    )


def replaced(place: object, shard: str) -> MismatchError:
    """The error for a shard that another process has replaced since the dataset was opened."""
    return MismatchError(
        f"{place} has changed since it was opened: another process has replaced shard {shard}, whose rows changed in the "
        "corpus. Run this again, or open the dataset again"
    )


def check_columns(table: pa.Table, schema: pa.Schema) -> None:
    """Raise ValueError where a column of the schema has another type, is repeated, or has nulls that it may not have.

    So where a text is not UTF-8: pyarrow reads it, and fails where Python asks for the value.
    """
    check_types(table.schema, schema)
    for name in table.column_names:
        place = schema.get_field_index(name)
        if place >= 0 and table.column(name).null_count and not schema.field(place).nullable:
            raise ValueError(f"column {name} has nulls")
    table.validate(full=True)


def check_types(stored: pa.Schema, schema: pa.Schema) -> None:
    """Raise ValueError where a column of the schema is stored with another type, or a name is repeated."""
    names = set()
    for field in stored:
        if field.name in names:
            raise ValueError(f"column {field.name!r} is repeated")
        names.add(field.name)
        place = schema.get_field_index(field.name)
        if place >= 0 and field.type != schema.field(place).type:
            raise ValueError(f"column {field.name} has the type {field.type}, not {schema.field(place).type}")


def check_counts(path: Path, entry: ManifestEntry) -> None:
    """Compare the numbers of rows, tokens and targets of an index part with the manifest, once per process and content.

    A stranger fits digests, and a query counts what is there: with a row twice, all of its answers would be others.

    Raises:
        CorruptError: they differ, or a row has a negative number of them.
    """
    totals = {"num_tokens": entry.tokens, "num_target_tokens": entry.target_tokens}
    key = (entry.files[f"index/{entry.name}.parquet"].sha256, entry.rows, entry.tokens, entry.target_tokens)
    if key in _COUNTED:
        return
    try:
        with pq.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            if rows != entry.rows:
                raise ValueError(f"it holds {rows} rows, the manifest says {entry.rows}")
            check_types(file.schema_arrow, index_schema())
            table = file.read(list(totals))
            counted = {name: table[name].to_numpy() for name in totals}  # a null becomes NaN, which is no sum
    except UNREADABLE as error:
        raise damaged(path, error) from error
    for name, total in totals.items():
        counts = counted[name]
        if counts.min(initial=0) < 0:
            raise damaged(path, f"its column {name} has a negative number")
        if counts.sum() != total:
            raise damaged(path, f"its column {name} has the sum {counts.sum()}, the manifest says {total}")
    _COUNTED.add(key)


def largest_column(path: Path) -> int:
    """Number of values of the column that has most, as a Parquet file says: a small file can hold more than the memory."""
    about = pq.read_metadata(path)
    groups = (about.row_group(group) for group in range(about.num_row_groups))
    counts = np.zeros(about.num_columns, np.int64)
    for group in groups:
        counts += [group.column(place).num_values for place in range(about.num_columns)]
    return int(counts.max(initial=0))


def read_part(path: Path, schema: pa.Schema, columns: list[str]) -> pa.Table:
    """Columns of a Parquet part that was written with this schema. Raises ValueError where it has another one."""
    table = pq.read_table(path, columns=columns)
    if table.column_names != columns:
        raise ValueError(f"it has the columns {table.column_names}, and lacks one of {columns}")
    check_columns(table, schema)
    return table


def read_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    """An index part, or some of its columns. A column that the part lacks, because it is older, is null.

    Raises:
        CorruptError: it cannot be read, or its columns are not those of an index.
    """
    try:
        with pq.ParquetFile(path) as file:
            stored = file.schema_arrow.names
            table = file.read([name for name in columns if name in stored] if columns else None)
        check_columns(table, index_schema())
        for name in sorted(set(columns or ()) - set(stored)):
            field = index_schema().field(name)
            if not field.nullable:
                raise ValueError(f"it has no column {name}")
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        return table.select(columns) if columns else table
    except UNREADABLE as error:
        raise damaged(path, error) from error

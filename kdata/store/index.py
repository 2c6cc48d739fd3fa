"""Read index files: one row per sequence, in the order of the payload."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdata.errors import CorruptError
from kdata.format.schema import index_schema

# What pyarrow and numpy raise when they read damaged bytes.
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


def damaged(path: Path, reason: object) -> CorruptError:
    """The error for a file that is not what was committed."""
    return CorruptError(
        f"{path} is damaged: {reason}. Restore it from a copy, or run `kdata verify` to see what is whole."
    )


def read_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    """An index part, or some of its columns. A column that the part lacks, because it is older, is null."""
    with pq.ParquetFile(path) as file:
        stored = file.schema_arrow.names
        table = file.read([name for name in columns if name in stored] if columns else None)
    for name in sorted(set(columns or ()) - set(stored)):
        field = index_schema().field(name)
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(columns) if columns else table

"""Scores from a file: a Parquet of ids and numbers becomes a sidecar of the dataset.

The numbers may be anything that has an id: a judge's marks, lengths, risks, another tool's reference NLLs. Rows that the
file does not name get null. Ids that the dataset does not have are refused, as they would be lost silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from kdata.errors import DataError, MissingError, first_line
from kdata.format.files import file_info, require_writable
from kdata.format.schema import index_schema
from kdata.selection.session import exclusive
from kdata.selection.sidecar import ScoreInfo, begin_sidecar, check_score_name, finish_sidecar, write_part
from kdata.store.dataset import Dataset
from kdata.store.queryable import is_name
from kdata.store.sql import Room, files_view, literal, unglobbed

WHOLE = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
REAL = {"FLOAT", "DOUBLE", "UBIGINT", "HUGEINT", "UHUGEINT", "DECIMAL"}

UNKNOWN = "select id from imported anti join rows using (id) order by id limit 3"
TWICE = "select id from imported group by id having count(*) > 1 limit 1"
IN_ORDER = "select rows.id, {columns} from rows left join imported using (id) order by rows.shard, rows.row"


@dataclass(frozen=True)
class ImportedScores:
    """The sidecar that a file became, and for each column how many sequences have a number."""

    info: ScoreInfo
    covered: dict[str, int]


def bring(
    dataset: Dataset, file: Path, name: str, *, unit: str = "as brought", room: Room | None = None
) -> ImportedScores:
    """Write the sidecar scores/NAME from a Parquet file with a column `id` and numeric columns.

    Args:
        unit: what the numbers are, for a reader of the sidecar's description.
    Raises:
        MissingError: no such file.
        DataError: a column is not numeric or not finite; an id is null, repeated, or not in the dataset.
        MismatchError: a sidecar of that name exists with other settings.
        StorageError: the disk refused, or another process is writing.
    """
    if not file.is_file():
        raise MissingError(f"{file} does not exist; name a Parquet file with a column `id` and numeric columns")
    check_score_name(name)
    try:
        with exclusive(dataset, "score") as folder:
            require_writable(dataset.path / "scores" / name)
            with _connection(dataset, file, folder, room or Room()) as connection:
                return _bring(dataset, file, name, unit, connection)
    except duckdb.Error as error:
        if not _is_parquet(file):
            raise DataError(
                f"{file} is no Parquet file; write your numbers as one, with a column `id` and numeric columns"
            ) from error
        raise DataError(f"{file} cannot be read as scores: {first_line(error)}") from error


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) in (b"PAR1", b"PARE")


def _connection(dataset: Dataset, file: Path, folder: Path, room: Room) -> duckdb.DuckDBPyConnection:
    """A connection with the views `rows` and `imported`; it runs only queries of this module."""
    dataset.check_index()
    connection = duckdb.connect()
    connection.execute(f"set temp_directory = {literal(str(folder))}")
    if room.memory_limit is not None:
        connection.execute(f"set memory_limit = {literal(room.memory_limit)}")
    if room.threads is not None:
        connection.execute(f"set threads = {int(room.threads)}")
    # Whole files, at a URL too: what is written here must not follow from ids that were not compared.
    index = [unglobbed(dataset.checked_file(entry, "index").resolve()) for entry in dataset.manifest]
    files_view(connection, "rows", index, index_schema())
    files_view(connection, "imported", [unglobbed(file.resolve())], pa.schema([]))
    return connection


def _bring(dataset: Dataset, file: Path, name: str, unit: str, connection: duckdb.DuckDBPyConnection) -> ImportedScores:
    schema = _schema(file, connection)
    numbers = schema.names[1:]
    _check_ids(dataset, file, connection)
    counts = ", ".join(f'count("{n}"), count(*) filter (isnan("{n}"::double) or isinf("{n}"::double))' for n in numbers)
    [numbers_and_infinite] = connection.execute(f"select {counts} from imported").fetchall()
    for column, num_infinite in zip(numbers, numbers_and_infinite[1::2], strict=True):
        if num_infinite:
            raise DataError(f"{file}: column {column!r} has {num_infinite} NaN or infinite values; write null instead")
    info = ScoreInfo(
        name=name,
        unit=unit,
        model=None,
        tokenizer_hash=None,
        dataset_digest=dataset.content_digest,
        columns=numbers,
        origin=file_info(file),
        files={},
    )
    begin_sidecar(dataset, info)
    _write_parts(dataset, name, schema, connection)
    return ImportedScores(finish_sidecar(dataset, info), dict(zip(numbers, numbers_and_infinite[::2], strict=True)))


def _schema(file: Path, connection: duckdb.DuckDBPyConnection) -> pa.Schema:
    """`id`, then the numeric columns as int64 or float64. Raises DataError for any other."""
    columns = dict(connection.execute("select column_name, column_type from (describe imported)").fetchall())
    if columns.get("id") != "VARCHAR":
        raise DataError(
            f"{file} needs a column `id` of text; its columns are {', '.join(f'{n} {t}' for n, t in columns.items())}"
        )
    fields = [pa.field("id", pa.string(), False)]
    for column, kind in columns.items():
        plain = re.sub(r"\(.*", "", kind)
        if column != "id":
            if plain not in WHOLE | REAL or not is_name(column):
                what = f"is {kind}, not a number" if plain not in WHOLE | REAL else "has a name that SQL needs quoted"
                raise DataError(
                    f"{file}: column {column!r} {what}; keep `id` and numeric columns with plain names only"
                )
            fields.append(pa.field(column, pa.int64() if plain in WHOLE else pa.float64(), True))
    if len(fields) == 1:
        raise DataError(f"{file} has no column beside `id`; add a column with a number for each id")
    return pa.schema(fields)


def _check_ids(dataset: Dataset, file: Path, connection: duckdb.DuckDBPyConnection) -> None:
    if connection.execute("select 1 from imported where id is null limit 1").fetchall():
        raise DataError(f"{file} has rows whose id is null; remove them, or give them the id of a row")
    for (twice,) in connection.execute(TWICE).fetchall():
        raise DataError(f"{file}: id {twice!r} is repeated; keep one row for each id")
    if unknown := [row_id for (row_id,) in connection.execute(UNKNOWN).fetchall()]:
        raise DataError(
            f"{file} has ids that {dataset.path} does not have: {', '.join(map(repr, unknown))}, ...; remove them, or name "
            "the dataset that they belong to"
        )


def _write_parts(dataset: Dataset, name: str, schema: pa.Schema, connection: duckdb.DuckDBPyConnection) -> None:
    """A part for each shard, with its ids in its order, as `kdata score` writes them."""
    casts = ", ".join(
        f'imported."{f.name}"::{"bigint" if f.type == pa.int64() else "double"} as "{f.name}"' for f in list(schema)[1:]
    )
    reader: Any = connection.sql(IN_ORDER.format(columns=casts)).to_arrow_reader(100_000)
    waiting: list[pa.RecordBatch] = []
    for entry in dataset.manifest:
        while sum(batch.num_rows for batch in waiting) < entry.rows:
            waiting.append(next(reader).cast(schema))
        table = pa.Table.from_batches(waiting, schema)
        write_part(dataset, name, entry, table.slice(0, entry.rows).combine_chunks())
        waiting = table.slice(entry.rows).to_batches()

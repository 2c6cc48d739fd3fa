"""SQL over a dataset: DuckDB views on exactly the committed files.

Views (columns in `schemas/README.md`): `rows` (the index), `rejects`, `manifest`, `scores.NAME` per sidecar, `plans.NAME`
per plan. The connection reads the dataset's folder and nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from kdata.errors import CorruptError, QueryError
from kdata.schema import index_schema, rejects_schema

if TYPE_CHECKING:
    from kdata.dataset import Dataset

NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _unglobbed(path: Path) -> str:
    """A path that DuckDB does not take for a pattern, whatever the folder is called."""
    return re.sub(r"([\[*?])", r"[\1]", str(path))


def _files_view(connection: duckdb.DuckDBPyConnection, view: str, files: list[Path], schema: pa.Schema) -> None:
    if files:
        listing = ", ".join(_literal(_unglobbed(path)) for path in files)
        connection.execute(f"create view {view} as select * from read_parquet([{listing}])")
    else:
        empty = ", ".join(f'null::{_duck_type(f.type)} as "{f.name}"' for f in schema)
        connection.execute(f"create view {view} as select {empty} where false")


def _duck_type(kind: pa.DataType) -> str:
    return {"string": "varchar", "int32": "integer", "int64": "bigint", "double": "double"}[str(kind)]


def connect(dataset: Dataset, memory_limit: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the dataset's views; it may read inside the dataset's folder only."""
    root = dataset.path.resolve()
    connection = duckdb.connect()
    if memory_limit:
        connection.execute(f"set memory_limit = {_literal(memory_limit)}")
    index = [dataset.shard_file(e, "index").resolve() for e in dataset.manifest]
    rejects = [dataset.shard_file(e, "rejects").resolve() for e in dataset.manifest if e.rejected]
    _files_view(connection, "rows", index, index_schema())
    _files_view(connection, "rejects", rejects, rejects_schema())
    connection.register("_manifest", manifest_table(dataset))
    connection.execute("create view manifest as from _manifest")
    connection.execute("create schema scores")
    for folder in sorted(p for p in root.glob("scores/*") if p.is_dir() and NAME.match(p.name)):
        files = sorted(folder.glob("*.parquet"))
        if files:
            _files_view(connection, f'scores."{folder.name}"', files, pa.schema([]))
    connection.execute("create schema plans")
    for path in sorted(p for p in root.glob("plans/*.parquet") if NAME.match(p.stem)):
        _files_view(connection, f'plans."{path.stem}"', [path], pa.schema([]))
    # A pattern is checked as it is written, and again each file that it stands for.
    allowed = ", ".join(_literal(name) for name in sorted({str(root), _unglobbed(root)}))
    connection.execute(f"set allowed_directories = [{allowed}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
    return connection


def manifest_table(dataset: Dataset) -> pa.Table:
    """The manifest as a table: one row per shard, with its bytes and codec error."""
    rows = [
        {
            "shard": e.name,
            "source": e.source,
            "unit": e.unit,
            "rows": e.rows,
            "tokens": e.tokens,
            "target_tokens": e.target_tokens,
            "rejected": e.rejected,
            "payload_bytes": sum(f.bytes for n, f in e.files.items() if n.startswith("data/")),
            "index_bytes": sum(f.bytes for n, f in e.files.items() if n.startswith("index/")),
            "mean_error_nats": e.codec_error.mean_nats if e.codec_error else None,
            "kl_nats": e.codec_error.kl_nats if e.codec_error else None,
        }
        for e in dataset.manifest
    ]
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    schema = pa.schema(
        [("shard", text), ("source", text)]
        + [(n, whole) for n in ("unit", "rows", "tokens", "target_tokens", "rejected", "payload_bytes", "index_bytes")]
        + [("mean_error_nats", real), ("kl_nats", real)]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def query(dataset: Dataset, text: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
    """Run one query and return its result as an Arrow table.

    Raises:
        QueryError: DuckDB refused it (with its own reason), or it is no query.
        CorruptError: it failed, and a file of the index is not what was committed.
    """
    try:
        with connect(dataset) as connection:
            try:
                _refuse_writing(connection, text)
                return connection.sql(text, params=parameters).to_arrow_table()
            except duckdb.Error as error:
                _name_damage(dataset, error)
                raise QueryError(f"{str(error).strip()}\nViews: {', '.join(views(connection))}") from error
    except duckdb.Error as error:
        _name_damage(dataset, error)
        raise QueryError(f"{dataset.path}: the views cannot be made: {str(error).strip()}") from error


def _refuse_writing(connection: duckdb.DuckDBPyConnection, text: str) -> None:
    """Only queries: DuckDB lets COPY write where it may read, and that is the dataset's folder."""
    statements = connection.extract_statements(text)
    if not statements or any(s.type != duckdb.StatementType.SELECT for s in statements):
        raise QueryError("kdata sql reads, it does not change a dataset: write a select (or describe, summarize, show)")


def _name_damage(dataset: Dataset, error: duckdb.Error) -> None:
    """Raise CorruptError where the cause of a failed query is a damaged file."""
    for entry in dataset.manifest:
        for folder in ("index", "rejects") if entry.rejected else ("index",):
            try:
                dataset.checked_file(entry, folder)
            except CorruptError as damage:
                raise damage from error


def views(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Names of the views that a query may use."""
    found = connection.execute(
        "select case when schema_name = 'main' then view_name else schema_name || '.' || view_name end "
        "from duckdb_views() where not internal order by 1"
    ).fetchall()
    return [name for (name,) in found if not name.startswith("_")]

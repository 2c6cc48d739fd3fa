"""SQL over a dataset: DuckDB views on exactly the committed files.

Views (columns in `schemas/README.md`): `rows` (the index), `rejects`, `manifest`, `scores.NAME` per sidecar, `plans.NAME`
per plan. The connection reads the dataset's folder and nothing else.
"""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import duckdb
import pyarrow as pa

from kdata.errors import ConfigError, CorruptError, QueryError
from kdata.format.schema import ManifestEntry, index_schema, rejects_schema


class Queryable(Protocol):
    """What SQL needs of a dataset: its manifest, and how DuckDB opens its files."""

    @property
    def path(self) -> Path:
        """Folder of the dataset, or of its local copy."""
        ...

    @property
    def manifest(self) -> list[ManifestEntry]:
        """Its shards, by name."""
        ...

    @property
    def sql_filesystem(self) -> Any:
        """The fsspec file system through which DuckDB reads; None: the local one."""
        ...

    def sql_file(self, entry: ManifestEntry, folder: str) -> str:
        """The name under which DuckDB opens a file of a shard."""
        ...

    def sql_sidecars(self) -> dict[str, list[str]]:
        """The same for the parts of each sidecar."""
        ...

    def fetch_sidecar(self, name: str) -> None:
        """Copy scores/NAME.json here where the dataset is elsewhere."""
        ...

    def fetch_plan(self, name: str) -> None:
        """Copy plans/NAME.json and NAME.parquet here where the dataset is elsewhere."""
        ...

    def checked_file(self, entry: ManifestEntry, folder: str) -> Path:
        """A file of a shard whose bytes were compared with the manifest."""
        ...


NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


def is_name(text: str) -> bool:
    """Whether sidecars, their columns and plans may be called so. (`$` alone would let a newline pass.)"""
    return NAME.fullmatch(text) is not None


def check_new_name(kind: str, name: str, there: Iterable[str]) -> None:
    """Raise ConfigError where SQL, which does not tell upper case from lower, would take a new name for another's."""
    for other in there:
        if other.lower() == name.lower() and other != name:
            raise ConfigError(
                f"there is a {kind} {other!r} already, and SQL does not tell it from {name!r}; take another name"
            )


RECORDABLE = {"range", "generate_series", "unnest", "repeat", "repeat_row"}  # table functions that read nothing


def literal(text: str) -> str:
    """A string as it stands in SQL."""
    return "'" + text.replace("'", "''") + "'"


def unglobbed(path: Path) -> str:
    """A path that DuckDB does not take for a pattern, whatever the folder is called."""
    return re.sub(r"([\[*?])", r"[\1]", str(path))


def files_view(
    connection: duckdb.DuckDBPyConnection, view: str, files: list[str], schema: pa.Schema, columns: str = "*"
) -> None:
    """Make or replace a view on Parquet files, named as by `Queryable.sql_file`. Without files it is empty, of `schema`."""
    if files:
        listing = ", ".join(literal(path) for path in files)
        source = f"read_parquet([{listing}], union_by_name = true)"
    else:
        empty = ", ".join(f'null::{_duck_type(f.type)} as "{f.name}"' for f in schema)
        source = f"(select {empty} where false)"
    connection.execute(f"create or replace view {view} as select {columns} from {source}")


def _duck_type(kind: pa.DataType) -> str:
    return {"string": "varchar", "int32": "integer", "int64": "bigint", "double": "double"}[str(kind)]


@dataclass(frozen=True)
class Room:
    """What a connection may use: memory ("3GB"; None: DuckDB's choice, 80 % of the machine's), threads (None: one per core),
    and a folder where it may write, for what does not fit the memory."""

    memory_limit: str | None = None
    threads: int | None = None
    folder: Path | None = None


def connect(dataset: Queryable, room: Room | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the dataset's views; it may read inside the dataset's folder only.

    Raises ConfigError for a memory limit that is none.
    """
    room, root = room or Room(), dataset.path.resolve()
    connection = duckdb.connect()
    if room.memory_limit is not None:
        try:
            connection.execute(f"set memory_limit = {literal(room.memory_limit)}")
        except duckdb.Error as error:
            raise ConfigError(f"{room.memory_limit!r} is no amount of memory; write 4GB or 500MB") from error
    if room.threads is not None:
        connection.execute(f"set threads = {int(room.threads)}")
    places = {str(root), unglobbed(root)}
    spill = Path(tempfile.gettempdir()) / f"kdata-sql-{secrets.token_hex(4)}"  # DuckDB makes and removes it
    if room.folder is not None:
        places |= {str(room.folder.resolve()), unglobbed(room.folder.resolve())}
        spill = room.folder.resolve() / "spill"
    connection.execute(f"set temp_directory = {literal(str(spill))}")
    if dataset.sql_filesystem is not None:
        connection.register_filesystem(dataset.sql_filesystem)
        connection.execute("set parquet_metadata_cache = true")  # a footer is fetched once
        places.add(f"{dataset.sql_filesystem.protocol}://")
    _make_views(connection, dataset, root)
    # A pattern is checked as it is written, and again each file that it stands for.
    allowed = ", ".join(literal(name) for name in sorted(places))
    connection.execute(f"set allowed_directories = [{allowed}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
    return connection


def _make_views(connection: duckdb.DuckDBPyConnection, dataset: Queryable, root: Path) -> None:
    files_view(connection, "rows", [dataset.sql_file(e, "index") for e in dataset.manifest], index_schema())
    rejects = [dataset.sql_file(e, "rejects") for e in dataset.manifest if e.rejected]
    files_view(connection, "rejects", rejects, rejects_schema())
    connection.register("_manifest", manifest_table(dataset))
    connection.execute("create view manifest as from _manifest")
    connection.execute("create schema scores")
    _check_distinct("scores", dataset.sql_sidecars())
    _check_distinct("plans", [path.stem for path in root.glob("plans/*.parquet")])
    for name, parts in dataset.sql_sidecars().items():
        if parts and is_name(name):
            files_view(connection, f'scores."{name}"', parts, pa.schema([]))
    connection.execute("create schema plans")
    for path in sorted(p for p in root.glob("plans/*.parquet") if is_name(p.stem)):
        files_view(connection, f'plans."{path.stem}"', [unglobbed(path)], pa.schema([]))


def _check_distinct(schema: str, names: Iterable[str]) -> None:
    """Raise ConfigError where two names are one to SQL: the second would stand for the first without a word."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        if (first := seen.setdefault(name.lower(), name)) != name:
            raise ConfigError(f"{schema}/{first} and {schema}/{name} are one name to SQL; rename or remove one of them")


def _parsed(text: str) -> dict[str, Any]:
    """DuckDB's own parse of a query; with `error` where it is none."""
    with duckdb.connect() as connection:
        (tree,) = connection.execute("select json_serialize_sql(?::varchar)", [text]).fetchone() or ("{}",)
    return json.loads(tree)


def check_recordable(text: str) -> None:
    """Raise QueryError where a query reads what `mentions` cannot see: a plan could not record what it was made from."""
    parsed = _parsed(text)
    if parsed.get("error"):
        raise QueryError(f"the query cannot be taken apart, and so not recorded: {parsed.get('error_message')}")

    def walk(node: Any) -> None:
        if isinstance(node, dict) and node.get("type") == "TABLE_FUNCTION":
            function = str((node.get("function") or {}).get("function_name")).lower()
            if function not in RECORDABLE:
                raise QueryError(
                    f"a plan cannot record what {function}() reads; name views (rows, scores.NAME, plans.NAME), and bring "
                    "numbers of your own by `kdata score --from`"
                )
        if isinstance(node, dict) and node.get("type") == "BASE_TABLE" and not is_name(str(node.get("table_name"))):
            raise QueryError(
                f"{node.get('table_name')!r} is no view; bring numbers of your own by `kdata score --from`"
            )
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inner)

    walk(parsed)


def mentions(dataset: Queryable, text: str) -> dict[str, list[str]]:
    """Which `scores` and `plans` of the dataset a query names; nothing where it cannot be parsed."""
    named: dict[str, set[str]] = {"scores": set(), "plans": set()}

    def walk(node: Any) -> None:
        if isinstance(node, dict) and node.get("type") == "BASE_TABLE":
            named.get(str(node.get("schema_name")).lower(), set()).add(str(node.get("table_name")))
        for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(inner)

    walk(_parsed(text))
    for name in filter(is_name, sorted(named["scores"])):
        dataset.fetch_sidecar(name)
    for name in filter(is_name, sorted(named["plans"])):
        dataset.fetch_plan(name)
    there = {
        "scores": list(dataset.sql_sidecars()),
        "plans": [path.stem for path in dataset.path.glob("plans/*.parquet")],
    }
    # DuckDB does not tell upper case from lower.
    wanted = {schema: {name.lower() for name in names} for schema, names in named.items()}
    return {schema: sorted(name for name in there[schema] if name.lower() in wanted[schema]) for schema in named}


def manifest_table(dataset: Queryable) -> pa.Table:
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


def query(dataset: Queryable, text: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
    """Run one query and return its result as an Arrow table.

    Raises:
        QueryError: DuckDB refused it (with its own reason), or it is no query.
        CorruptError: it failed, and a file of the index is not what was committed.
    """
    if dataset.sql_filesystem is not None:
        mentions(dataset, text)  # sidecars are fetched when they are named
    try:
        with connect(dataset) as connection:
            try:
                refuse_writing(connection, text)
                return connection.sql(text, params=parameters).to_arrow_table()
            except duckdb.Error as error:
                name_damage(dataset, error)
                raise QueryError(f"{str(error).strip()}\nViews: {', '.join(views(connection))}") from error
    except duckdb.Error as error:
        name_damage(dataset, error)
        raise QueryError(f"{dataset.path}: the views cannot be made: {str(error).strip()}") from error


def refuse_writing(connection: duckdb.DuckDBPyConnection, text: str) -> None:
    """Only queries: DuckDB lets COPY write where it may read, and that is the dataset's folder."""
    statements = connection.extract_statements(text)
    if not statements or any(s.type != duckdb.StatementType.SELECT for s in statements):
        raise QueryError("kdata sql reads, it does not change a dataset: write a select (or describe, summarize, show)")


def name_damage(dataset: Queryable, error: duckdb.Error) -> None:
    """Raise CorruptError where the cause of a failed query is a damaged file."""
    if dataset.sql_filesystem is not None:
        return  # not here, to be compared
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

"""SQL over a dataset: DuckDB views on exactly the committed files.

Views (columns in `schemas/README.md`): `rows` (the index), `rejects`, `manifest`, `scores.NAME` per sidecar, `plans.NAME`
per plan, and `tokens` and `entries` (the payload, see `kdata.store.token_views`). The connection reads the
dataset's folder and nothing else.

A view is made only for a query that names it, of the files that manifest or JSON list, once their bytes were compared with
their digests. So a query cannot read what was not compared.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import duckdb
import pyarrow as pa

from kdata.errors import (
    ConfigError,
    KdataError,
    MismatchError,
    MissingError,
    QueryError,
    nearest,
)
from kdata.format.schema import index_schema, rejects_schema
from kdata.store.background import ctrl_c_first, interruptible
from kdata.store.late_rows import shards_of
from kdata.store.listed import PLANS, SCORES
from kdata.store.queryable import Queryable, is_name, listed_views
from kdata.store.sql_errors import name_damage, refuse_storage
from kdata.store.sql_tree import Parameters, missing_column, nodes, parsed
from kdata.store.token_scores import missing_score, present_scores
from kdata.store.token_table import TABLES
from kdata.store.token_views import named_scores, token_views

Values = Literal["arrow", "text", "json"]


CONNECTIONS = 16  # to a dataset that is elsewhere, at once: an answer of the Hub takes some 50 ms, whatever its size
ROWS_AT_A_TIME = 100_000  # of a result that is read as a stream
RECORDABLE = {"range", "generate_series", "unnest", "repeat", "repeat_row"}  # table functions that read nothing


def literal(text: str) -> str:
    """A string as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def unglobbed(path: Path) -> str:
    """A path in which DuckDB sees no pattern, even where the folder's name has [, * or ?."""
    return re.sub(r"([\[*?])", r"[\1]", str(path))


def files_view(
    connection: duckdb.DuckDBPyConnection,
    view: str,
    files: list[str],
    schema: pa.Schema,
    columns: str = "*",
    where: str = "true",
) -> None:
    """Make or replace a view on Parquet files (names of `Queryable.sql_file`). Without files it is empty, with `schema`."""
    if files:
        listing = ", ".join(literal(path) for path in files)
        source = f"read_parquet([{listing}], union_by_name = true)"
    else:
        source = "_empty_" + re.sub(r"\W", "_", view)
        connection.register(source, schema.empty_table())
    text = f"create or replace view {view} as select {columns} from {source} where {where}"
    interruptible(connection, lambda: connection.execute(text))  # it reads the footers


@dataclass(frozen=True)
class Room:
    """What a connection may use: memory ("3GB"; None: DuckDB's choice, 80 % of the machine's), threads (None: one per core),
    and a folder where it may write, for what does not fit the memory."""

    memory_limit: str | None = None
    threads: int | None = None
    folder: Path | None = None


# The views that a query reads, in lower case ("rows", "scores.ref"); None: its text does not say, so any.
Reads = frozenset[str] | None


def connect(dataset: Queryable, reads: Reads, room: Room | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB connection with the views in `reads`; it may read inside the dataset's folder only.

    Raises:
        ConfigError: a memory limit that DuckDB does not understand; two names that SQL takes for one.
        CorruptError, MissingError, MismatchError: a file of a view is not what was committed, or a score or plan does not
            belong to the dataset as it is now.
    """
    room, root = room or Room(), dataset.path.resolve()
    connection = duckdb.connect()
    connection.execute("set enable_progress_bar = false")  # it would be printed into the answer of a slow query
    if room.memory_limit is not None:
        try:
            connection.execute(f"set memory_limit = {literal(room.memory_limit)}")
        except duckdb.Error as error:
            raise ConfigError(
                f"{room.memory_limit!r} is not an amount of memory; write for instance 4GB or 500MB"
            ) from error
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
        if room.threads is None:  # they wait for answers more than they work
            connection.execute(f"set threads = {max(CONNECTIONS, os.cpu_count() or 1)}")
        places.add(f"{dataset.sql_filesystem.protocol}://")
    _make_views(connection, dataset, reads)
    # DuckDB checks a pattern as it is written, and each file that matches it.
    allowed = ", ".join(literal(name) for name in sorted(places))
    connection.execute(f"set allowed_directories = [{allowed}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
    return connection


def _make_views(connection: duckdb.DuckDBPyConnection, dataset: Queryable, reads: Reads) -> None:
    compare = dataset.check != "later"

    def wanted(view: str) -> bool:
        if reads is not None and view.lower() not in reads:
            return False
        if not compare:
            dataset.unchecked.add(view)
        return True

    for kind in (SCORES, PLANS):
        _check_distinct(kind.folder, dataset.listed(kind))
        connection.execute(f"create schema {kind.folder}")
    if wanted("rows"):
        index = [dataset.sql_file(entry, "index", compare=compare) for entry in dataset.manifest]
        files_view(connection, "rows", index, index_schema())
    if wanted("rejects"):
        files = [dataset.sql_file(entry, "rejects", compare=compare) for entry in dataset.manifest if entry.rejected]
        files_view(connection, "rejects", files, rejects_schema())
    connection.register("_manifest", manifest_table(dataset))
    connection.execute("create view manifest as from _manifest")
    for kind, name in listed_views(dataset):
        if wanted(f"{kind.folder}.{name}"):
            try:
                files = dataset.listed_files(kind, name, compare=compare)
            except (MissingError, MismatchError):
                if reads is not None:
                    raise
                continue  # the query may not read it; where it does, DuckDB's error leads to `name_damage`
            files_view(connection, f'{kind.folder}."{name}"', files, pa.schema([]))


def _check_distinct(schema: str, names: Iterable[str]) -> None:
    """Raise ConfigError where two names differ in case alone: SQL would read the second for the first, silently."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        if (first := seen.setdefault(name.lower(), name)) != name:
            raise ConfigError(
                f"{schema}/{first} and {schema}/{name} are the same name in SQL, which ignores case; rename or remove one"
            )


def check_recordable(text: str) -> None:
    """Raise QueryError where a query reads something that `mentions` cannot see, so that a plan could not record it."""
    tree = parsed(text)
    if tree.get("error"):
        raise QueryError(
            f"DuckDB cannot parse the query, so a plan cannot record what it reads: {tree.get('error_message')}"
        )

    for node in nodes(tree):
        if node.get("type") == "TABLE_FUNCTION":
            function = str((node.get("function") or {}).get("function_name")).lower()
            if function not in RECORDABLE:
                raise QueryError(
                    f"a plan cannot record what {function}() reads; name views (rows, tokens, entries, scores.NAME, "
                    "plans.NAME), and bring numbers of your own by `kdata score --from`"
                )
        if node.get("type") == "BASE_TABLE" and not is_name(str(node.get("table_name"))):
            raise QueryError(
                f"{node.get('table_name')!r} is not the name of a view; bring numbers of your own by `kdata score --from`"
            )


def reads_of(dataset: Queryable, text: str) -> Reads:
    """Which views a query reads. Scores and plans that it names are copied here where the dataset is elsewhere."""
    tree = parsed(text)
    if tree.get("error"):  # a pivot, or no query at all
        return None
    views, names_all = set(), True
    for node in nodes(tree):
        kind, function = node.get("type"), node.get("function")
        if kind == "BASE_TABLE":
            schema, table = str(node.get("schema_name")).lower(), str(node.get("table_name"))
            names_all = names_all and schema in ("", "main", SCORES.folder, PLANS.folder) and is_name(table)
            views.add(f"{schema}.{table.lower()}" if schema in (SCORES.folder, PLANS.folder) else table.lower())
            if is_name(table) and schema == SCORES.folder:
                dataset.fetch_sidecar(table)
            elif is_name(table) and schema == PLANS.folder:
                dataset.fetch_plan(table)
        elif kind == "TABLE_FUNCTION" and isinstance(function, dict):
            names_all = names_all and str(function.get("function_name")).lower() in RECORDABLE
        elif kind == "SHOW_REF" and node.get("table_name"):  # show tables
            names_all = False
    return frozenset(views) if names_all else None


def mentions(dataset: Queryable, text: str) -> dict[str, list[str]]:
    """Which `scores` and `plans` of the dataset a query names; nothing where its text does not say."""
    reads = reads_of(dataset, text) or frozenset()  # DuckDB ignores case
    names = {
        kind.folder: {name for name in dataset.listed(kind) if f"{kind.folder}.{name}".lower() in reads}
        for kind in (SCORES, PLANS)
    }
    if "tokens" in reads:
        names[SCORES.folder].update(present_scores(dataset, named_scores(text)))
    return {folder: sorted(own) for folder, own in names.items()}


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


def query(dataset: Queryable, text: str, parameters: Parameters = None, values: Values = "arrow") -> pa.Table:
    """Run one query and return its result as a table.

    Args:
        values: what the columns hold. arrow: Arrow's types. text: numbers and booleans as they are, lists, structs, maps and
            unions as JSON text, all other values as DuckDB writes them. json: each value as JSON text; SQL's null is null.
    Raises:
        QueryError: DuckDB refused it (with DuckDB's reason), it is not one query, or a column has a type that Arrow lacks.
        StorageError: a disk refused.
        CorruptError, MissingError, MismatchError: see `connect`, or a payload is not what was committed.
    """
    with _relation_of(dataset, text, parameters) as (connection, relation, _):
        shown, is_json = _shown(relation, values)
        return _strict(interruptible(connection, shown.to_arrow_table), is_json, relation.columns)


@contextmanager
def query_stream(
    dataset: Queryable, text: str, parameters: Parameters = None, values: Values = "arrow"
) -> Iterator[pa.RecordBatchReader]:
    """Run one query and yield its result as a stream, for a result that may be larger than the memory; otherwise as `query`.

    DuckDB works while the stream is read, so the errors of `query` may come between two record batches.
    """
    with _relation_of(dataset, text, parameters) as (connection, relation, failures):
        shown, is_json = _shown(relation, values)
        reader = interruptible(connection, lambda: shown.to_arrow_reader(ROWS_AT_A_TIME))
        schema = _strict(reader.schema.empty_table(), is_json, relation.columns).schema

        def batches() -> Iterator[pa.RecordBatch]:
            while True:
                try:
                    batch = interruptible(connection, lambda: next(reader, None))
                except (OSError, pa.ArrowException) as error:  # what ended the query behind its first record batch
                    if failures:
                        raise failures[0] from error
                    raise_named(dataset, text, _duckdb_error(error))
                if batch is None:
                    return
                yield from _strict(pa.Table.from_batches([batch]), is_json, relation.columns).to_batches()

        yield pa.RecordBatchReader.from_batches(schema, batches())


def _duckdb_error(error: Exception) -> duckdb.Error:
    """DuckDB's error, which Arrow's stream has made one of Arrow's, with the same text."""
    return duckdb.IOException(str(error)) if str(error).startswith("IO Error") else duckdb.Error(str(error))


@contextmanager
def _relation_of(
    dataset: Queryable, text: str, parameters: Parameters
) -> Iterator[tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyRelation, list[KdataError]]]:
    """A connection, one query of it, not yet run, and the errors that ended its streams so far.

    What DuckDB raises until the end is raised as an error of kdata, see `query`.
    """
    try:
        with ctrl_c_first(), ExitStack() as stack:
            reads = reads_of(dataset, text)
            connection = stack.enter_context(connect(dataset, reads))
            try:
                refuse_writing(connection, text)
                if dataset.sql_filesystem is not None and reads is not None and "rows" in reads:
                    _fetch_late(connection, dataset, text, parameters)
                with token_views(connection, dataset, reads, text, parameters) as failures:
                    yield connection, _bound(connection, text, parameters), failures
            except duckdb.Error as error:
                raise_named(dataset, text, error)
    except duckdb.Error as error:
        refuse_storage(dataset, error)
        name_damage(dataset, error, text)
        raise QueryError(f"{dataset.path}: DuckDB cannot read the files: {str(error).strip()}") from error


def _fetch_late(connection: duckdb.DuckDBPyConnection, dataset: Queryable, text: str, parameters: Parameters) -> None:
    """Let `rows` be those of the shards that a query needs, where its text says that they are some."""
    shards = shards_of(connection, text, parameters, {entry.name for entry in dataset.manifest})
    if shards is None:
        return
    index = [dataset.sql_file(entry, "index", compare=dataset.check != "later") for entry in dataset.manifest]
    # Each file has one value of `shard`, so those of others are not read.
    names = ", ".join(literal(name) for name in sorted(shards)) or "null"
    files_view(connection, "rows", index, index_schema(), where=f"shard in ({names})")


def _bound(connection: duckdb.DuckDBPyConnection, text: str, parameters: Parameters) -> duckdb.DuckDBPyRelation:
    """The query with its names resolved. Raises duckdb.Error."""
    try:
        return interruptible(connection, lambda: connection.sql(text, params=parameters))
    except RuntimeError as error:  # of DuckDB's binding to Python, for a column of a damaged file
        raise duckdb.Error(f"a name in a file that it reads is no UTF-8 ({error})") from error


def raise_named(dataset: Queryable, text: str, error: duckdb.Error) -> NoReturn:
    """Raise what a query failed for: the disk, damage, or else QueryError with DuckDB's reason."""
    refuse_storage(dataset, error)
    name_damage(dataset, error, text)
    later = "" if dataset.check != "later" else "\nNothing was compared with its digest (check='later')."
    known, reason = views(dataset), str(error).strip()
    if (missing := re.search(r"Table with name (\w+) does not exist!", reason)) is not None:
        # DuckDB's own suggestion is a table of its catalog.
        reason = re.sub(r'\nDid you mean "[^"]*"\?', "", reason) + nearest(missing[1], known)
    raise QueryError(f"{reason}{_hint(dataset, error, text)}\nViews: {', '.join(known)}{later}") from error


def _hint(dataset: Queryable, error: duckdb.Error, text: str) -> str:
    """Where a column is that a query names and its tables lack, or what it may be called."""
    missing = missing_column(error)
    if missing is None:
        return ""
    name = missing[missing.lastindex or 0]
    if (reason := missing_score(dataset, name)) is not None:
        return f"\n{reason}"
    of_using = missing.lastindex == 3
    if not of_using and name in index_schema().names and re.search(r"\b(tokens|entries)\b", text) is not None:
        return f"\n{name} is a column of rows: write `tokens join rows using (id)`"
    if "Candidate bindings" not in str(error):  # DuckDB names none for USING, and for a table that has an alias
        return nearest(name, _columns(dataset, reads_of(dataset, text)))
    return ""


def _columns(dataset: Queryable, reads: Reads) -> list[str]:
    """Columns of the views that a query reads."""
    own = {
        "rows": index_schema().names,
        "rejects": rejects_schema().names,
        "manifest": manifest_table(dataset).column_names,
        **{name: list(columns) for name, columns in TABLES.items()},
        **{f"{PLANS.folder}.{name}".lower(): ["id", "repeats"] for name in dataset.listed(PLANS)},
        **{f"{SCORES.folder}.{name}".lower(): ["id"] for name in dataset.listed(SCORES)},
    }
    return [name for view, columns in own.items() if reads is None or view in reads for name in columns]


def refuse_writing(connection: duckdb.DuckDBPyConnection, text: str) -> None:
    """Refuse everything but one query: COPY could write wherever DuckDB may read, into the dataset's folder."""
    statements = connection.extract_statements(text)
    if len(statements) > 1:
        raise QueryError(f"there are {len(statements)} statements in one query; run one query at a time")
    if not statements or not _only_reads(connection, statements[0].type, text):
        raise QueryError(
            "kdata sql reads, it does not change a dataset: write a select (or describe, pivot, show, summarize, with)"
        )


def _only_reads(connection: duckdb.DuckDBPyConnection, kind: duckdb.StatementType, text: str) -> bool:
    """Whether one statement is a query.

    DuckDB takes a pivot, and whatever has a pivot in it (COPY too), for several statements. Only a query can be a subquery.
    """
    if kind != duckdb.StatementType.MULTI:
        return bool(kind == duckdb.StatementType.SELECT)
    try:
        parts = connection.extract_statements(f"from (\n{_without_end(text)}\n)")
    except duckdb.ParserException:
        return False
    return len(parts) == 1


def _without_end(text: str) -> str:
    """A statement without the semicolons and comments behind it."""
    content = text.encode()  # DuckDB counts bytes
    tokens = duckdb.tokenize(text)
    while tokens and (tokens[-1][1] == duckdb.token_type.comment or content[tokens[-1][0] :].lstrip()[:1] == b";"):
        content = content[: tokens.pop()[0]]
    return content.decode()


# DuckDB hands these to Arrow as other values: 2 ** 128 - 1 as -1, a time without its zone, bits and digits as raw bytes.
NOT_IN_ARROW = {"uhugeint", "time with time zone", "bit", "bignum", "geometry", "variant"}
NESTED = {"list", "array", "struct", "tuple", "map", "union"}
AS_THEY_ARE = {
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger", "ubigint", "hugeint",
    "float", "double", "decimal",
}  # fmt: skip


def _leaf_types(kind: Any) -> Iterator[str]:
    """The names of the types in a DuckDB type, those inside of lists and the like too."""
    if kind.id in NESTED:
        for _, inner in kind.children:
            if isinstance(inner, type(kind)):  # an array has its length as a child
                yield from _leaf_types(inner)
    else:
        yield kind.id


def _shown(relation: duckdb.DuckDBPyRelation, values: Values) -> tuple[duckdb.DuckDBPyRelation, list[bool]]:
    """The relation with columns for `values` of `query`, and which of them are JSON.

    Raises QueryError for a column whose type Arrow lacks.
    """
    if values == "arrow":
        for name, kind in zip(relation.columns, relation.types, strict=True):
            if lacking := sorted(NOT_IN_ARROW & set(_leaf_types(kind))):
                raise QueryError(
                    f"column {name!r} has the type {kind}, and Arrow has no {lacking[0].upper()}; write ::varchar behind it "
                    "in the query, or ask for the values as text"
                )
        return relation, [False] * len(relation.columns)
    is_json = [kind.id in NESTED or values == "json" for kind in relation.types]
    columns = (
        f"to_json(#{n})" if as_json else f"#{n}" if kind.id in AS_THEY_ARE else f"#{n}::varchar"
        for n, (kind, as_json) in enumerate(zip(relation.types, is_json, strict=True), 1)
    )
    return relation.project(", ".join(columns)), is_json


def _strict(table: pa.Table, is_json: list[bool], names: list[str]) -> pa.Table:
    """A part of a result with its names, and strict JSON where it is JSON."""
    columns = [
        pa.chunked_array([pa.array(map(_strict_json, column.to_pylist()), pa.string())]) if as_json else column
        for column, as_json in zip(table.columns, is_json, strict=True)
    ]
    return pa.table(columns, names=names)


def _strict_json(text: str | None) -> str | None:
    return None if text is None else strict_json(text)


def strict_json(text: str) -> str:
    """JSON whose NaN, Infinity and -Infinity, which JSON does not have, are strings."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    return re.sub(r'("(?:[^"\\]|\\.)*")|-?Infinity|NaN', lambda match: match[1] or f'"{match[0]}"', text)


def views(dataset: Queryable) -> list[str]:
    """Names of the views that a query may use."""
    listed = (f"{kind.folder}.{name}" for kind, name in listed_views(dataset))
    return sorted(["entries", "manifest", "rejects", "rows", "tokens", *listed])

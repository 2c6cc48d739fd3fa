"""The SQL views `tokens` and `entries`: DuckDB pulls them as streams, of the columns and rows that a query needs.

DuckDB asks for columns, anew for each scan. It does not say which rows a join needs (tried with DuckDB 2.0.1), so these come
from the query's text, see `kdata.store.sql_tree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset
from duckdb._sources import ArrowScanSource

from kdata.errors import KdataError
from kdata.format.schema import index_schema, rejects_schema
from kdata.store.listed import PLANS, SCORES
from kdata.store.sql_tree import (
    ROWS,
    Columns,
    Parameters,
    columns_of,
    empty_database,
    meant_columns,
    parsed,
    rows_of,
    tables_of,
)
from kdata.store.token_scores import TOKEN_NLL, present_scores, scores_in
from kdata.store.token_table import ENTRIES, TABLES, TOKENS, TokenSource, read_table, rows_in, schema_of

Open = Callable[[list[str]], pa.RecordBatchReader]


class StreamedView(pyarrow.dataset.Dataset, ArrowScanSource):
    """A table that DuckDB reads anew for every scan.

    It is a dataset of Arrow, since DuckDB registers such objects, and a source of DuckDB's Python client. That class has no
    public name, but only a source can say how long it is. Without that DuckDB plans with a single row, and would build the
    hash table of a join from all tokens.

    Args:
        schema: all columns.
        num_rows: about how many rows a scan gives.
        open_columns: reads some columns as a stream.
        failures: gets the errors of kdata that ended a stream, since DuckDB shows their text only.
    """

    schema_is_stable = True

    def __init__(self, schema: pa.Schema, num_rows: int, open_columns: Open, failures: list[KdataError]) -> None:
        self._schema, self._num_rows, self._open, self._failures = schema, num_rows, open_columns, failures

    @property
    def schema(self) -> pa.Schema:
        """All columns."""
        return self._schema

    def __arrow_c_schema__(self) -> object:
        """The same, as DuckDB reads it."""
        return self._schema.__arrow_c_schema__()

    def rows(self) -> int:
        """About how many rows a scan gives: what DuckDB plans with."""
        return self._num_rows

    def stream(self, columns: Sequence[int] | None, filters: Sequence[Any]) -> tuple[object, bool]:
        """A scan of some columns; DuckDB applies the filters itself."""
        names = self._schema.names if columns is None else [self._schema.names[number] for number in columns]

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from self._open(names)
            except KdataError as error:
                self._failures.append(error)
                raise

        schema = pa.schema([self._schema.field(name) for name in names])
        return pa.RecordBatchReader.from_batches(schema, batches()).__arrow_c_stream__(), True


@contextmanager
def token_views(
    connection: duckdb.DuckDBPyConnection,
    dataset: TokenSource,
    reads: frozenset[str] | None,
    text: str,
    parameters: Parameters = None,
) -> Iterator[list[KdataError]]:
    """Give a connection the views `tokens` and `entries` for one query. Yields the errors that ended their streams so far.

    Args:
        connection: has the other views that the query reads.
        reads: names of the views that the query reads; None: any.
        text: the query. `tokens` has a column for each score that it means by `nll_NAME`, see `named_scores`.
    Raises:
        CorruptError, FormatError, StorageError: what ended a stream, in place of DuckDB's error.
    """
    failures: list[KdataError] = []
    names = [name for name in TABLES if reads is None or name in reads]
    whole = [name for name in reads or () if name in ("rows", "manifest", "rejects") or "." in name]
    try:
        if names:
            scores = []
            if "tokens" in names:
                views = None if reads is None else columns_of(connection, whole)
                scores = present_scores(dataset, named_scores(text, parameters, views))
            columns = {"tokens": [*TOKENS, *(f"nll_{score}" for score in scores)], "entries": [*ENTRIES]}
            schema, open_rows = _row_numbers(dataset)
            connection.register(ROWS, StreamedView(schema, int(dataset.shard_starts[-1]), open_rows, failures))
            tree = parsed(text)
            chosen = {} if reads is None else {n: rows_of(connection, tree, n, whole, parameters) for n in names}
            connection.unregister(ROWS)
            for name in names:
                rows = chosen.get(name)
                schema = schema_of(name, columns[name])
                view = StreamedView(schema, rows_in(dataset, name, rows), _opener(dataset, name, rows), failures)
                connection.register(name, view)
        yield failures
    except duckdb.Error as error:
        if failures:
            raise failures[0] from error
        raise


def named_scores(text: str, parameters: Parameters = None, views: Mapping[str, Columns] | None = None) -> list[str]:
    """Names, as they are written, of the scores whose column `nll_NAME` of `tokens` a query means; they need not exist.

    An alias or a column of a CTE of such a name is none. Of a query that cannot be looked into (a pivot, an unknown name)
    each word `nll_NAME` counts.

    Args:
        parameters: of the query.
        views: columns of the other views that it reads; None: those that every dataset has.
    """
    words = scores_in(text)
    if not words or (tree := parsed(text)).get("error"):
        return words
    views = _usual_views(tree) if views is None else views
    with empty_database({**views, **{name: schema_of(name) for name in TABLES}}) as scratch:
        meant = meant_columns(scratch, text, parameters, {f"nll_{word}".lower() for word in words})
    return words if meant is None else [word for word in words if f"nll_{word}".lower() in meant]


def _usual_views(tree: dict[str, Any]) -> dict[str, Columns]:
    """Columns of the views that a parsed query reads, as far as they are the same for every dataset and plan."""
    numbers = [("id", "varchar"), ("nll", "double"), ("num_target_tokens", "bigint"), (TOKEN_NLL.name, "float[]")]
    of_a_plan = [pa.field("repeats", pa.int32()), pa.field("place", pa.int64())]
    kinds: dict[str, Columns] = {
        "rows": pa.schema([*index_schema(), *of_a_plan]),
        "rejects": rejects_schema(),
        SCORES.folder: numbers,
        PLANS.folder: [("id", "varchar"), ("repeats", "integer")],
    }
    return {view: kinds[kind] for view in tables_of(tree) if (kind := view.split(".")[0]) in kinds}


def _opener(dataset: TokenSource, table: str, rows: np.ndarray | None) -> Open:
    return lambda columns: read_table(dataset, table, columns, rows)


def _row_numbers(dataset: TokenSource) -> tuple[pa.Schema, Open]:
    """Id and global row number of every row, a shard at a time."""
    schema = pa.schema([("id", pa.string()), ("global_row", pa.int64())])

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for shard, entry in enumerate(dataset.manifest):
            ids = dataset.shard_index(entry, ["id"])["id"].combine_chunks()
            start = int(dataset.shard_starts[shard])
            arrays = [ids, pa.array(np.arange(start, start + len(ids)))]
            yield pa.record_batch(arrays, schema=schema).select(columns)

    def open_columns(columns: list[str]) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(pa.schema([schema.field(name) for name in columns]), batches(columns))

    return schema, open_columns

"""The tables `tokens` and `entries` as lazy Polars frames: only the columns and rows that Polars needs are read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdata.errors import QueryError
from kdata.store.token_scores import token_scores
from kdata.store.token_table import TABLES, TEXT, TokenSource, read_table, schema_of

if TYPE_CHECKING:
    import polars

ROW_COLUMNS = {"id", "global_row"}


def frame_of(source: TokenSource, table: str, more: Sequence[str] = ()) -> polars.LazyFrame:
    """A table of `kdata.store.token_table` as a lazy frame. Its columns of text are strings.

    Args:
        more: columns of scores, behind the table's own.
    Raises:
        ConfigError, MissingError, MismatchError, CorruptError: see `read_table`.
    """
    import polars
    from polars.io.plugins import register_io_source

    def read(
        columns: list[str] | None, predicate: polars.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[polars.DataFrame]:
        conditions = [] if predicate is None else conditions_of(predicate)
        names = schema.names if columns is None else columns
        needed = [*names, *sorted({name for c in conditions for name in c.meta.root_names()} - {*names})]
        left = n_rows  # counted before the conditions: Polars hands over `head` below `filter`, never above
        rows = None if left is not None else rows_that_meet(source, conditions)
        for batch in read_table(source, table, needed, rows):
            part = batch if left is None else batch.slice(0, left)
            yield polars.DataFrame(plain(part)).filter(*conditions).select(names)
            left = None if left is None else left - len(part)
            if left == 0:
                return

    schema = schema_of(table, [*TABLES[table], *more])
    token_scores(source, more)  # raises now what would come when the frame is collected
    empty = polars.DataFrame(plain(pa.RecordBatch.from_pylist([], schema)))
    return register_io_source(read, schema=dict(empty.schema), validate_schema=True)


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A record batch with its dictionaries undone."""
    columns = [c.dictionary_decode() if c.type == TEXT else c for c in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def rows_that_meet(source: TokenSource, conditions: list[polars.Expr]) -> np.ndarray | None:
    """Global row numbers, rising, of the rows that meet those conditions that are about whole rows; None: all."""
    import polars

    of_rows = [c for c in conditions if {*c.meta.root_names()} and {*c.meta.root_names()} <= ROW_COLUMNS]
    if not of_rows:
        return None
    numbers = [np.zeros(0, np.int64)]
    for shard, entry in enumerate(source.manifest):
        ids, start = source.shard_index(entry, ["id"])["id"], int(source.shard_starts[shard])
        rows = pa.table({"id": ids, "global_row": np.arange(start, start + len(ids))})
        numbers.append(polars.DataFrame(rows).filter(*of_rows)["global_row"].to_numpy())
    return np.concatenate(numbers)


def conditions_of(predicate: polars.Expr) -> list[polars.Expr]:
    """The parts of a predicate that must all hold.

    Polars adds a part of its own where it sorts and cuts: a hint about what it has seen. `filter` cannot take it, and the
    answer without it is the same.

    Raises QueryError where such a hint is inside of another part.
    """
    import polars

    conditions = []
    whole = predicate.meta.serialize(format="json")
    for tree in _parts(json.loads(whole)):
        if _is_hint(tree):
            continue
        text = json.dumps(tree)
        if '"dynamic_pred' in text:
            raise QueryError("Polars asks for a filter that kdata cannot apply; call collect() before you sort and cut")
        try:
            conditions.append(polars.Expr.deserialize(io.BytesIO(text.encode()), format="json"))
        except polars.exceptions.ComputeError as error:  # JSON has no infinities and no NaN
            if '"dynamic_pred' in whole:
                raise QueryError("Polars asks for a filter that kdata cannot apply; call collect() first") from error
            return [predicate]
    return conditions


def _parts(tree: Any) -> Iterator[Any]:
    both = tree.get("BinaryExpr") if isinstance(tree, dict) else None
    if both and both.get("op") == "And":
        yield from _parts(both["left"])
        yield from _parts(both["right"])
    else:
        yield tree


def _is_hint(tree: Any) -> bool:
    display = tree.get("Display") if isinstance(tree, dict) else None
    return isinstance(display, dict) and str(display.get("fmt_str")).startswith("dynamic_pred")

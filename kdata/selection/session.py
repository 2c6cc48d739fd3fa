"""The DuckDB connection in which a step works: views of the rows to choose from, one piece of the dataset at a time.

A sidecar has one part per shard, with the ids of that shard, so a join of rows and scores splits into joins of pieces of a
few million rows. Each piece fits in memory, whatever the size of the dataset and the length of its ids (measured on 10
million rows: 2.1 s, against 5.1 s for one join of everything, which spills to disk). Between pieces only temporary tables
are kept; DuckDB moves them to disk when memory is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from kdata.errors import QueryError, StorageError
from kdata.format.files import folder_beside, lock_of, storage_errors
from kdata.format.schema import ManifestEntry, index_schema
from kdata.observe.progress import Task
from kdata.selection.plan import Plan
from kdata.store.conditions import added, all_true, counts_query
from kdata.store.dataset import Dataset
from kdata.store.listed import SCORES
from kdata.store.sql import (
    Room,
    connect,
    files_view,
    name_damage,
    reads_of,
    refuse_disk,
    refuse_writing,
    unglobbed,
)
from kdata.store.token_views import token_views

PIECE_ROWS = 2_000_000

ALL_ROWS = "select *, 1::integer as repeats, null::bigint as place from {rows}"
ROWS_OF_A_PLAN = """select r.*, p.repeats, p.place
    from {rows} as r join (select *, row_number() over () - 1 as place from plans."{plan}") as p using (id)"""


class DomainSize(NamedTuple):
    """What the dataset holds of one domain."""

    sequences: int
    tokens: int


DomainSizes = Mapping[str, DomainSize]


@dataclass(frozen=True)
class Conditions:
    """Conditions on the rows to choose from, in the words of `kdata.store.conditions`, and the scores that they name."""

    texts: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()

    def source(self, rows: str) -> str:
        """What stands behind `from` to evaluate the conditions on a query of rows, in parentheses."""
        joins = "".join(f'\n    left join scores."{name}" as "{name}" using (id)' for name in self.scores)
        return f"({rows}) as rows{joins}"


def rows_of(plan: str | None, rows: str, conditions: Conditions | None = None) -> str:
    """The query that a step reads as `rows`: the index, and how often and at which place the parent plan has each row.

    Args:
        conditions: only rows for which they are true.
    """
    every = ALL_ROWS.format(rows=rows) if plan is None else ROWS_OF_A_PLAN.format(rows=rows, plan=plan)
    if conditions is None or not conditions.texts:
        return every
    return f"select rows.* from {conditions.source(every)}\n    where {all_true(conditions.texts)}"


class Session:
    """The open connection of one step; see `open_session`.

    Args:
        connection: see `kdata.store.sql.connect`; the view `rows` is replaced for every piece.
        folder: for temporary files.
        parent: the plan to choose from; None: the whole dataset. A plan is read as a single piece.
    """

    def __init__(
        self,
        dataset: Dataset,
        connection: duckdb.DuckDBPyConnection,
        folder: Path,
        parent: Plan | None,
        task: Task,
        conditions: Conditions,
    ) -> None:
        self.dataset, self.folder, self.parent, self.conditions = dataset, folder, parent, conditions
        self._connection, self._task = connection, task

    def rows(self, view: str) -> str:
        """The query behind `rows`, over a view of the index."""
        return rows_of(self._plan, view, self.conditions)

    @property
    def _plan(self) -> str | None:
        return None if self.parent is None else self.parent.info.name

    @property
    def chooses_among_some(self) -> bool:
        """Whether rows of the dataset may be missing in `rows`."""
        return self.parent is not None or bool(self.conditions.texts)

    def left_out(self) -> list[Any]:
        """How many rows each condition leaves out, and which: see `kdata.store.conditions.counts_query`."""
        source = self.conditions.source(rows_of(self._plan, "every_row"))
        query, totals = counts_query(source, self.conditions.texts), None
        for _ in self.pieces([]):
            [row] = self.fetch(query)
            totals = added(totals, row)
        assert totals is not None
        return totals

    def execute(self, sql: str, bindings: dict[str, Any] | None = None) -> duckdb.DuckDBPyConnection:
        """Run one statement with bound parameters."""
        return self._connection.execute(sql, bindings) if bindings else self._connection.execute(sql)

    def fetch(self, sql: str, bindings: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a small result."""
        return self.execute(sql, bindings).fetchall()

    def table(self, sql: str) -> pa.Table:
        """The result of one query as a table."""
        return self._connection.sql(sql).to_arrow_table()

    def put(self, table: str, columns: dict[str, pa.DataType], rows: list[tuple[Any, ...]]) -> None:
        """Create or replace a temporary table of a few rows."""
        values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
        schema = pa.schema(list(columns.items()))
        self._connection.register(
            "_put", pa.table([pa.array(v, t) for v, t in zip(values, schema.types, strict=True)], schema=schema)
        )
        self.execute(f"create or replace temp table {table} as from _put")
        self._connection.unregister("_put")

    def pieces(self, scores: list[str]) -> Iterator[None]:
        """Show the rows to choose from, a piece at a time, in the views `rows` and `scores.NAME` of these sidecars."""
        groups = _groups(self.dataset.manifest) if self.parent is None else [self.dataset.manifest]
        for entries in groups:
            self.show(entries, scores)
            yield
            self._task.advance(sum(entry.rows for entry in entries))

    def read(self, rows: int) -> None:
        """Count rows that were read outside of DuckDB, for the progress that is shown."""
        self._task.advance(rows)

    def show(self, entries: list[ManifestEntry], scores: list[str]) -> None:
        """Create the views of some shards: `every_row` (the index), `rows` (to choose from), `scores.NAME`."""
        index = [self.dataset.sql_file(entry, "index") for entry in entries]
        files_view(self._connection, "every_row", index, index_schema())
        shards = {f"{entry.name}.parquet" for entry in entries}
        for name in dict.fromkeys([*self.conditions.scores, *scores]):
            files = self.dataset.listed_files(SCORES, name)
            parts = [part for part in files if part.rpartition("/")[2] in shards]
            files_view(self._connection, f'scores."{name}"', parts, index_schema())
        self.execute(f"create or replace view rows as {self.rows('every_row')}")

    def show_file(self, view: str, file: Path, schema: pa.Schema) -> None:
        """Show a Parquet file of `folder` in a view."""
        files_view(self._connection, view, [unglobbed(file.resolve())], schema)

    def domains(self, *, countable: bool = False) -> dict[str, DomainSize]:
        """Sequences and tokens that the dataset holds of each domain, whatever the parent plan holds.

        Args:
            countable: count only sequences with a target, and only domains with a row to choose.
        """
        where = "where num_target_tokens > 0" if countable else ""
        counted = (
            f"select domain, count(*), sum(num_tokens)::bigint from every_row {where} group by domain order by domain"
        )
        in_rows = "select distinct domain from rows where num_target_tokens > 0"
        sizes: dict[str, DomainSize] = {}
        present: set[str] = set()
        for entries in _groups(self.dataset.manifest):
            self.show(entries, [])
            for domain, sequences, tokens in self.fetch(counted):
                before = sizes.get(domain, DomainSize(0, 0))
                sizes[domain] = DomainSize(before.sequences + sequences, before.tokens + tokens)
            if countable and self.chooses_among_some:
                present |= {domain for (domain,) in self.fetch(in_rows)}
        return {d: size for d, size in sizes.items() if not countable or not self.chooses_among_some or d in present}

    def tokens_of(self, text: str) -> AbstractContextManager[object]:
        """Show `tokens` and `entries` to one query, which must be run before the end; see `token_views`."""
        return token_views(self._connection, self.dataset, reads_of(self.dataset, text), text)

    def refuse_writing(self, text: str) -> None:
        """Raise QueryError unless the text is a single query."""
        refuse_writing(self._connection, text)


def _groups(entries: list[ManifestEntry]) -> Iterator[list[ManifestEntry]]:
    """Shards in order, in groups of at most PIECE_ROWS rows; a larger shard is a group of its own."""
    group: list[ManifestEntry] = []
    for entry in entries:
        if group and sum(e.rows for e in group) + entry.rows > PIECE_ROWS:
            yield group
            group = []
        group.append(entry)
    yield group


@contextmanager
def exclusive(dataset: Dataset, purpose: str) -> Iterator[Path]:
    """Hold the dataset's lock; yield a folder beside the dataset for what does not fit in memory, removed at the end.

    Raises StorageError where another process holds the lock, or the disk refuses.
    """
    root = dataset.path.resolve()
    with storage_errors(root), lock_of(dataset.path), folder_beside(root.with_name(f"{root.name}.{purpose}")) as folder:
        yield folder


@contextmanager
def open_session(
    dataset: Dataset,
    parent: Plan | None,
    what: str,
    reads: frozenset[str],
    room: Room | None = None,
    conditions: Conditions | None = None,
) -> Iterator[Session]:
    """Open the connection of a step, hold the dataset's lock and show progress.

    Args:
        reads: views that the step reads beside `rows` and the parent plan.
        conditions: on the rows to choose from.
    Raises:
        StorageError: another process writes to the dataset, or memory or disk do not suffice.
        CorruptError, QueryError: see `kdata.store.sql.query`.
    """
    room = room or Room()
    own = {"rows"} if parent is None else {"rows", f"plans.{parent.info.name}".lower()}
    with (
        exclusive(dataset, "select") as folder,
        query_errors(dataset),
        Task(what, unit="rows read") as task,
        connect(dataset, reads | own, Room(room.memory_limit, room.threads, folder)) as connection,
    ):
        yield Session(dataset, connection, folder, parent, task, conditions or Conditions())


@contextmanager
def query_errors(dataset: Dataset) -> Iterator[None]:
    """Raise DuckDB's errors as kdata's: StorageError where memory or disk refused, CorruptError for damage, or QueryError."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise StorageError(
            f"out of memory while reading {dataset.path}: {str(error).splitlines()[0]}. Allow more (--memory), or free space "
            "on its disk"
        ) from error
    except duckdb.Error as error:
        refuse_disk(dataset, error)
        name_damage(dataset, error)
        raise QueryError(str(error).strip()) from error

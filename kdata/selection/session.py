"""Where one step works: DuckDB views of what may be taken, a piece of the dataset at a time.

A sidecar has a part for each shard with the same ids, so a join of rows and scores by id falls apart into small joins of
pieces of some million rows: each fits the memory, whatever the size of the dataset and however long its ids (measured on
10 million rows: 2.1 s against 5.1 s for one join of everything, which spills). What is kept between pieces are temporary
tables, which DuckDB moves to disk when the memory is used up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from filelock import Timeout

from kdata.errors import QueryError, StorageError
from kdata.format.files import lock_of, storage_errors
from kdata.format.schema import ManifestEntry, index_schema
from kdata.observe.progress import Task
from kdata.selection.plan import Plan
from kdata.store.dataset import Dataset
from kdata.store.sql import Room, connect, files_view, name_damage, refuse_writing, views

PIECE_ROWS = 2_000_000

ALL_ROWS = "select *, 1::integer as repeats, null::bigint as place from {rows}"
ROWS_OF_A_PLAN = """select r.*, p.repeats, p.place
    from {rows} as r join (select *, row_number() over () - 1 as place from plans."{plan}") as p using (id)"""


def rows_of(plan: str | None, rows: str) -> str:
    """What a step reads as `rows`: a view of the index, how often the plan that is taken further has each row, and where."""
    return ALL_ROWS.format(rows=rows) if plan is None else ROWS_OF_A_PLAN.format(rows=rows, plan=plan)


class Session:
    """An open connection of one step; made by `open_session`.

    Args:
        connection: see `kdata.store.sql.connect`; the view `rows` is made anew for every piece.
        folder: for files of its own.
        parent: the plan that is taken further; None: the dataset itself. With one, everything is a single piece.
    """

    def __init__(
        self, dataset: Dataset, connection: duckdb.DuckDBPyConnection, folder: Path, parent: Plan | None, task: Task
    ) -> None:
        self.dataset, self.folder, self.parent = dataset, folder, parent
        self._connection, self._task = connection, task

    def rows(self, view: str) -> str:
        """The query behind `rows`, over a view of the index."""
        return rows_of(None if self.parent is None else self.parent.info.name, view)

    def execute(self, sql: str, given: dict[str, Any] | None = None) -> duckdb.DuckDBPyConnection:
        """Run one statement with bound parameters."""
        return self._connection.execute(sql, given) if given else self._connection.execute(sql)

    def fetch(self, sql: str, given: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a small result."""
        return self.execute(sql, given).fetchall()

    def put(self, table: str, columns: dict[str, pa.DataType], rows: list[tuple[Any, ...]]) -> None:
        """Make or replace a temporary table of a few rows."""
        values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
        schema = pa.schema(list(columns.items()))
        self._connection.register(
            "_put", pa.table([pa.array(v, t) for v, t in zip(values, schema.types, strict=True)], schema=schema)
        )
        self.execute(f"create or replace temp table {table} as from _put")
        self._connection.unregister("_put")

    def pieces(self, scores: list[str]) -> Iterator[None]:
        """Show what may be taken, a piece at a time, in the views `rows` and `scores.NAME` of these sidecars."""
        groups = _groups(self.dataset.manifest) if self.parent is None else [self.dataset.manifest]
        for entries in groups:
            self.show(entries, scores)
            yield
            self._task.advance(sum(entry.rows for entry in entries))

    def show(self, entries: list[ManifestEntry], scores: list[str]) -> None:
        """Make the views of some shards: `every_row` (the index), `rows` (what may be taken), `scores.NAME`."""
        index = [self.dataset.sql_file(entry, "index") for entry in entries]
        files_view(self._connection, "every_row", index, index_schema())
        self.execute(f"create or replace view rows as {self.rows('every_row')}")
        shards = {f"{entry.name}.parquet" for entry in entries}
        for name in scores:
            parts = [part for part in self.dataset.sql_sidecars()[name] if part.rpartition("/")[2] in shards]
            files_view(self._connection, f'scores."{name}"', parts, index_schema())

    def domains(self, *, countable: bool = False) -> dict[str, tuple[int, int]]:
        """Sequences and tokens of each domain of the dataset, whatever plan is taken further.

        countable: only of sequences with a target, and only domains of which something may be taken.
        """
        where = "where num_target_tokens > 0" if countable else ""
        counted = (
            f"select domain, count(*), sum(num_tokens)::bigint from every_row {where} group by domain order by domain"
        )
        there = "select distinct domain from rows where num_target_tokens > 0"
        found: dict[str, tuple[int, int]] = {}
        present: set[str] = set()
        for entries in _groups(self.dataset.manifest):
            self.show(entries, [])
            for domain, sequences, tokens in self.fetch(counted):
                before = found.get(domain, (0, 0))
                found[domain] = before[0] + sequences, before[1] + tokens
            if countable and self.parent is not None:
                present |= {domain for (domain,) in self.fetch(there)}
        return {d: n for d, n in found.items() if not countable or self.parent is None or d in present}

    def refuse_writing(self, text: str) -> None:
        """Raise QueryError unless the text is a single query."""
        refuse_writing(self._connection, text)
        if len(self._connection.extract_statements(text)) > 1:
            raise QueryError("one query makes a plan; there are several, separated by a semicolon")

    def views(self) -> list[str]:
        """Names of the views that a query may use."""
        return [name for name in views(self._connection) if name != "every_row"]


def _groups(entries: list[ManifestEntry]) -> Iterator[list[ManifestEntry]]:
    """Shards in order, as many at a time as have PIECE_ROWS rows together."""
    group: list[ManifestEntry] = []
    for entry in entries:
        if group and sum(e.rows for e in group) + entry.rows > PIECE_ROWS:
            yield group
            group = []
        group.append(entry)
    yield group


@contextmanager
def exclusive(dataset: Dataset, purpose: str) -> Iterator[Path]:
    """Hold the dataset's lock; yield a folder beside it for what does not fit the memory, gone in the end.

    Raises StorageError where another process holds the lock, or the disk refuses.
    """
    root = dataset.path.resolve()
    lock, folder = lock_of(root), root.parent / f".{root.name}.{purpose}"
    with storage_errors(root):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StorageError(f"{dataset.path} is being written by another process; wait for it") from error
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


@contextmanager
def open_session(dataset: Dataset, parent: Plan | None, what: str, room: Room | None = None) -> Iterator[Session]:
    """Everything that a step needs.

    Raises:
        StorageError: another process writes to the dataset, or memory or disk do not suffice.
        CorruptError, QueryError: see `kdata.store.sql.query`.
    """
    room = room or Room()
    with (
        exclusive(dataset, "select") as folder,
        query_errors(dataset),
        Task(what, unit="rows") as task,
        connect(dataset, Room(room.memory_limit, room.threads, folder)) as connection,
    ):
        yield Session(dataset, connection, folder, parent, task)


@contextmanager
def query_errors(dataset: Dataset) -> Iterator[None]:
    """Turn what DuckDB refuses into kdata's errors."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise StorageError(
            f"the memory does not suffice: {str(error).splitlines()[0]}. Allow more (--memory), or free space on the disk of "
            f"{dataset.path}"
        ) from error
    except duckdb.Error as error:
        name_damage(dataset, error)
        raise QueryError(str(error).strip()) from error

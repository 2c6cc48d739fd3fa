"""The DuckDB connection in which a step works: views of the rows to choose from, one piece of the dataset at a time.

A sidecar has one part per shard, with the ids of that shard, so a join of rows and scores splits into joins of pieces of a
few million rows. Each piece fits in memory, whatever the size of the dataset and the length of its ids (measured on 10
million rows: 2.1 s, against 5.1 s for one join of everything, which spills to disk). Between pieces only temporary tables
are kept; DuckDB moves them to disk when memory is full.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import duckdb
import pyarrow as pa

from kdata.errors import MismatchError, QueryError, StorageError, first_line
from kdata.format.files import folder_beside, lock_of, storage_errors
from kdata.format.schema import ManifestEntry, index_schema
from kdata.observe.progress import Task
from kdata.selection.plan import Plan
from kdata.selection.sidecar import score_digest
from kdata.store.background import ctrl_c_first, interruptible
from kdata.store.conditions import added, all_true, counts_query
from kdata.store.dataset import Dataset
from kdata.store.listed import SCORES
from kdata.store.open import open_dataset
from kdata.store.sql import Room, connect, files_view, reads_of, refuse_writing, unglobbed
from kdata.store.sql_errors import name_damage, refuse_storage
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


class Pool(Protocol):
    """What runs functions elsewhere, for instance on the machines of a cluster; arguments and results are pickled."""

    @property
    def under_way(self) -> int:
        """Calls that may wait or run at a time."""
        ...

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function of a module. Its errors are those of the future."""
        ...


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
        pool: what reads the pieces of a whole dataset, in place of this connection; see `gather`.
    """

    def __init__(
        self,
        dataset: Dataset,
        connection: duckdb.DuckDBPyConnection,
        folder: Path,
        parent: Plan | None,
        task: Task,
        conditions: Conditions,
        pool: Pool | None = None,
    ) -> None:
        self.pool = pool
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
        own = self._connection
        return interruptible(own, lambda: own.execute(sql, bindings) if bindings else own.execute(sql))

    def fetch(self, sql: str, bindings: dict[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a small result."""
        return interruptible(self._connection, self.execute(sql, bindings).fetchall)

    def table(self, sql: str) -> pa.Table:
        """The result of one query as a table."""
        return interruptible(self._connection, lambda: self._connection.sql(sql).to_arrow_table())

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

    def gather(
        self,
        table: str,
        query: str,
        scores: list[str],
        bindings: dict[str, Any] | None = None,
        tables: Sequence[str] = (),
    ) -> None:
        """Add to a table what a query gives of each piece.

        Args:
            scores: sidecars that the query reads. tables: temporary tables that it reads; they are small.
        """
        if self.pool is None or self.parent is not None:
            for _ in self.pieces(scores):
                self.execute(f"insert into {table} {query}", bindings)
            return
        sent = {name: self.table(f"from {name}") for name in tables}
        pieces, under_way = _groups(self.dataset.manifest), deque[tuple[int, Future[pa.Table]]]()
        names = dict.fromkeys([*self.conditions.scores, *scores])
        state = State(
            self.dataset.place,
            self.dataset.content_digest,
            tuple((name, score_digest(self.dataset, name)) for name in names),
        )
        while True:
            for entries in islice(pieces, self.pool.under_way - len(under_way)):
                shards = [entry.name for entry in entries]
                answer = self.pool.submit(piece_of, state, shards, self.conditions, scores, query, bindings or {}, sent)
                under_way.append((sum(entry.rows for entry in entries), answer))
            if not under_way:
                return
            rows, answer = under_way.popleft()
            self._connection.register("_piece", answer.result())
            self.execute(f"insert into {table} from _piece")
            self._connection.unregister("_piece")
            self._task.advance(rows)

    def read(self, rows: int) -> None:
        """Count rows that were read outside of DuckDB, for the progress that is shown."""
        self._task.advance(rows)

    def show(self, entries: list[ManifestEntry], scores: list[str], *, compare: bool = True) -> None:
        """Create the views of some shards: `every_row` (the index), `rows` (to choose from), `scores.NAME`.

        Args:
            compare: whether files are compared with their digests, once in a process.
        """
        index = [self.dataset.sql_file(entry, "index", compare=compare) for entry in entries]
        files_view(self._connection, "every_row", index, index_schema())
        shards = {f"{entry.name}.parquet" for entry in entries}
        for name in dict.fromkeys([*self.conditions.scores, *scores]):
            files = self.dataset.listed_files(SCORES, name, compare=compare)
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


@dataclass(frozen=True)
class State:
    """Where a dataset is, the digest of its content, and name and digest of each score that is read."""

    place: str
    content_digest: str
    scores: tuple[tuple[str, str], ...]


def piece_of(
    state: State, shards: list[str], conditions: Conditions, scores: list[str], query: str,
    bindings: dict[str, Any], tables: dict[str, pa.Table],
) -> pa.Table:  # fmt: skip
    """What a query of `Session.gather` gives of some shards, in the process of a pool.

    Args:
        state: of the dataset in the process that began the work, which compared index and scores with their digests.
        tables: to be read beside `rows` and the scores.
    Raises:
        MismatchError: at that place is another state of the dataset, as where a machine has an old copy.
        CorruptError, QueryError, StorageError: see `open_session`.
    """
    opened = _opened(state)
    with query_errors(opened), connect(opened, frozenset(), Room(threads=1)) as connection:
        session = Session(opened, connection, Path(), None, Task("piece"), conditions)
        for name, table in tables.items():
            connection.register(name, table)
        session.show([entry for entry in opened.manifest if entry.name in set(shards)], scores, compare=False)
        return session.execute(query, bindings).to_arrow_table()


@cache
def _opened(state: State) -> Dataset:
    """A dataset, opened once in a process."""
    dataset = open_dataset(state.place, check="later")
    scores = tuple((name, score_digest(dataset, name)) for name, _ in state.scores)
    if (dataset.content_digest, scores) != (state.content_digest, state.scores):
        raise MismatchError(
            f"{state.place} on {socket.gethostname()} is not the dataset in its present state, or has other scores; give "
            "every machine the same folder, or push the scores to the URL"
        )
    return dataset


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
    pool: Pool | None = None,
) -> Iterator[Session]:
    """Open the connection of a step, hold the dataset's lock and show progress.

    Args:
        reads: views that the step reads beside `rows` and the parent plan.
        conditions: on the rows to choose from.
        pool: see `Session`.
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
        ctrl_c_first(),
        connect(dataset, reads | own, Room(room.memory_limit, room.threads, folder)) as connection,
    ):
        yield Session(dataset, connection, folder, parent, task, conditions or Conditions(), pool)


@contextmanager
def query_errors(dataset: Dataset) -> Iterator[None]:
    """Raise DuckDB's errors as kdata's: StorageError where memory or disk refused, CorruptError for damage, or QueryError."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise StorageError(
            f"out of memory while reading {dataset.path}: {first_line(error)}. Allow more (--memory), or free space "
            "on its disk"
        ) from error
    except duckdb.Error as error:
        refuse_storage(dataset, error)
        name_damage(dataset, error)
        raise QueryError(str(error).strip()) from error

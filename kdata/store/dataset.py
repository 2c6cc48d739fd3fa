"""Reading a dataset: rows, the readable index, SQL over it, and the teacher's sparse distributions as arrays.

A dataset at a URL or on the Hub is the same class with other ways to a file: see `kdata.store.url_dataset`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdata.calls import validated
from kdata.config import shown
from kdata.errors import (
    ConfigError,
    CorruptError,
    DependencyError,
    MismatchError,
    MissingError,
    OutOfRangeError,
    ShapeError,
)
from kdata.format.codec import codec_of
from kdata.format.files import inside, matches, without_hidden
from kdata.format.keep_rules import SORTED_MAPS
from kdata.format.manifest import check_binding, read_info, read_manifest
from kdata.format.schema import (
    DatasetInfo,
    FileInfo,
    InputInfo,
    ManifestEntry,
    content_hash,
    index_schema,
    json_digest,
    rejects_schema,
)
from kdata.format.sequences import Sequences, decode, flat, nothing
from kdata.store.hidden import HiddenStates
from kdata.store.index import UNREADABLE, check_counts, damaged, read_index, read_part, replaced
from kdata.store.listed import HIDDEN, PLANS, SCORES, Kind, Listing, listed, read_listing, refuse_other_dataset
from kdata.store.payload import PayloadReader, used_columns
from kdata.store.queryable import Check
from kdata.store.row import Row
from kdata.store.shard import check_header
from kdata.store.sql import Values, query_stream, unglobbed
from kdata.store.sql import query as run_query
from kdata.store.token_bytes import TokenBytes
from kdata.store.token_frame import frame_of
from kdata.store.token_table import TABLES, read_table, row_numbers
from kdata.store.tokens import NumberText, TokenText
from kdata.store.torch_rows import TorchRows

if TYPE_CHECKING:
    import polars

CACHED_BYTES = 64 << 20  # decompressed record batches kept for `take`, per open dataset
OPEN_SHARDS = 64  # shards that are mapped at a time, per open dataset


def _read(path: Path) -> tuple[DatasetInfo, list[ManifestEntry]]:
    """dataset.json, and the manifest's lines by name. Raises CorruptError where the two do not belong together."""
    while True:
        info = read_info(path)
        manifest = sorted(read_manifest(path), key=lambda entry: entry.name)
        try:
            _check_belonging(path, info, manifest)
        except CorruptError:
            if read_info(path) == info:
                raise
            continue  # a writer has replaced both between the two reads
        return info, manifest


def _check_belonging(path: Path, info: DatasetInfo, manifest: list[ManifestEntry]) -> None:
    check_binding(path, info, manifest)
    for name, source in info.sources.items():
        units = {entry.unit for entry in manifest if entry.source == name}
        missing = list(islice((unit for unit in range(source.num_units or 0) if unit not in units), 10))
        if missing:
            raise CorruptError(
                f"{path}/manifest.jsonl lacks units {missing} of source {name!r}, which is marked complete; restore the "
                f"file from a copy, or run the same `kdata {source.kind}` again"
            )


class Dataset:
    """A logit dataset, opened for reading. Cheap to open; payload is read and decoded on demand.

    data[0], data[-1]          a `Row`
    data[2:5], data[[7, 3]]    `Sequences`; so does a bool mask with a value per row
    for row in data            every `Row`, in order
    data.sql("select ...")     DuckDB over rows, scores and plans

    Attributes:
        check: when `sql` compares index, scores and plans with their digests: first (before it answers), or later (not at
            all; `verify` does). Whatever else reads them, and the payload, compares first. whole: as first, also at a URL,
            see `kdata.store.url_dataset`.
        unchecked: views that answered queries without that comparison.
    """

    @validated
    def __init__(self, path: Path, check: Check = "first") -> None:
        self.path, self.place = path, str(path)  # the folder; the address by which it was opened
        self.check = check
        self.unchecked: set[str] = set()
        self.info: DatasetInfo
        self.manifest: list[ManifestEntry]
        self.info, self.manifest = _read(path)
        self.shard_starts = np.concatenate(([0], np.cumsum([e.rows for e in self.manifest], dtype=np.int64)))
        self._readers: OrderedDict[int, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], tuple[pa.RecordBatch, int]] = OrderedDict()  # with their bytes
        self._batch_starts: dict[int, np.ndarray] = {}
        self._shard_rows: tuple[int, pa.Table] | None = None  # the shard whose index was read last, and that index

    def __repr__(self) -> str:
        later = "" if self.check == "first" else f", check={self.check!r}"
        return f"Dataset({self.place!r}, rows={self.num_rows:,}, tokens={self.num_tokens:,}{later})"

    def __reduce__(self) -> tuple[type[Dataset], tuple[Any, ...]]:
        """Another process opens the dataset again: maps and caches do not travel."""
        return Dataset, (self.path, self.check)

    @property
    def num_rows(self) -> int:
        """Sequences in all."""
        return int(self.shard_starts[-1])

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return sum(entry.tokens for entry in self.manifest)

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder with the teacher's tokenizer files, or None where the dataset carries none.

        Raises CorruptError where a file in it is not what was committed, or belongs to nothing: libraries that read such a
        folder look for files by name. An older kdata recorded no files.
        """
        path, recorded = self.path / "tokenizer", self.info.tokenizer_files
        if not path.is_dir():
            return None
        for name, info in recorded.items():
            file = inside(self.path, f"tokenizer/{name}")
            if not file.is_file() or not matches(file, info):
                raise damaged(file, "it is missing, or its SHA-256 is not the one in dataset.json")
        for file in without_hidden(path, "*"):
            if recorded and file.name not in recorded:
                raise CorruptError(
                    f"{file} is no file of this dataset's tokenizer; remove it (dataset.json lists them)"
                )
        return path

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 (hex) over the identity and every shard's digests: changes when a row does."""
        shards = [(entry.name, sorted((k, v.sha256) for k, v in entry.files.items())) for entry in self.manifest]
        return json_digest({"identity": self.info.identity_digest, "shards": shards})

    def as_input(self, source: str) -> InputInfo:
        """What a dataset that is made from the rows of a source records of this one."""
        teacher = self.info.teacher
        address = {} if self.place == str(self.path) else {"address": self.place, "commit": self.commit}
        return InputInfo(
            digest=self.content_digest,
            kind=self.info.sources[source].kind,
            teacher=teacher.model,
            teacher_revision=teacher.revision,
            teacher_weights_hash=teacher.weights_hash,
            inputs=self.info.sources[source].inputs,
            **address,
        )

    @property
    def commit(self) -> str | None:
        """Commit of a repository on the Hub; None for every other place."""
        return None

    def listings(self, kind: Kind) -> dict[str, Listing] | None:
        """What NAME.json says of each score or plan by name; None where the place cannot list them (a web server)."""
        return {name: read_listing(self.path / kind.folder / f"{name}.json", kind)[0] for name in self.listed(kind)}

    @validated
    def rejected(self, sources: list[str] | None = None) -> dict[str, int]:
        """Number of rejects of some sources (None: all), by reason."""
        counts: Counter[str] = Counter()
        for entry in self.manifest:
            if entry.rejected and (sources is None or entry.source in sources):
                path = self.checked_file(entry, "rejects")
                try:
                    counts.update(read_part(path, rejects_schema(), ["reason"])["reason"].to_pylist())
                except UNREADABLE as error:
                    raise damaged(path, error) from error
        return dict(sorted(counts.items(), key=str))

    @validated
    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The readable index, one row per sequence in global row order. Raises ConfigError for a column that it lacks."""
        parts = [self.shard_index(entry, columns) for entry in self.manifest]
        if not parts:
            schema = index_schema()
            return schema.empty_table().select(columns) if columns else schema.empty_table()
        # Parts that are older than a column lack it; their rows are null.
        return pa.concat_tables(parts, promote_options="default")

    def index_ranges(self, entries: list[ManifestEntry], columns: list[str]) -> pa.Table:
        """Columns of the index of some shards, at a URL without a copy of the files; then nothing compares them."""
        parts = [self.shard_index(entry, columns) for entry in entries]
        return pa.concat_tables([index_schema().empty_table().select(columns), *parts], promote_options="default")

    @property
    def streams(self) -> bool:
        """Whether shards come from elsewhere, so that it matters how many a reader needs at once."""
        return False

    def copy_ahead(self, shards: Iterable[int]) -> None:
        """Say which shards are read now and soon, the first needed first; at a URL copies are made. Nothing for a folder."""

    def shard_index(self, entry: ManifestEntry, columns: list[str] | None) -> pa.Table:
        unknown = sorted(set(columns or ()) - set(index_schema().names))
        if unknown:
            raise ConfigError(f"the index has no column {shown(unknown[0])}; it has {index_schema().names}")
        if len(set(columns or ())) != len(columns or ()):
            raise ConfigError(f"columns name one twice: {shown(columns)}; name each once")
        path = self.checked_file(entry, "index")
        try:
            table = read_index(path, columns)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        if table.num_rows != entry.rows:
            raise damaged(path, f"it holds {table.num_rows} rows, the manifest says {entry.rows}")
        return table

    def file_name(self, entry: ManifestEntry, folder: str) -> str:
        """Relative path of one file of a shard ("data", "index" or "rejects"). Raises MissingError where it has none."""
        for relative in entry.files:
            if relative.split("/")[0] == folder:
                return relative
        raise MissingError(f"{self.place}: shard {entry.name} has no file in {folder}/")

    def shard_file(self, entry: ManifestEntry, folder: str) -> Path:
        """Path of one file of a shard ("data", "index" or "rejects").

        Raises CorruptError where it is missing, and MismatchError where another process has replaced the shard.
        """
        path = inside(self.path, self.file_name(entry, folder))
        if not path.exists():
            self._refuse_replaced(entry)
            raise CorruptError(f"{path} is missing; `kdata verify {self.path}` lists what is whole")
        return path

    def checked_file(self, entry: ManifestEntry, folder: str) -> Path:
        """The same; its bytes are compared with the digest in the manifest (`matches`), and counts of an index with its line.

        Raises CorruptError where they differ.
        """
        path = self.shard_file(entry, folder)
        try:
            is_committed = matches(path, entry.files[self.file_name(entry, folder)])
        except OSError as error:  # it was there a moment ago
            self._refuse_replaced(entry)
            raise damaged(path, error) from error
        if not is_committed:
            self._refuse_replaced(entry)
            raise damaged(path, "its SHA-256 is not the one in the manifest")
        if folder == "index":
            check_counts(path, entry)
        return path

    def _refuse_replaced(self, entry: ManifestEntry) -> None:
        """Raise MismatchError where another process has replaced a shard since the dataset was opened."""
        if (self.path / "manifest.jsonl").exists() and entry not in read_manifest(self.path):
            raise replaced(self.place, entry.name)

    def fetch(self) -> None:
        """Copy all files of a dataset at a URL or on the Hub into `path`, except those that are there. Nothing for a folder.

        Raises:
            CorruptError: a file is not what was committed.
            StorageError: the URL cannot be read.
        """

    def check_index(self) -> None:
        """Compare every index file with the manifest. Raises CorruptError where one differs."""
        for entry in self.manifest:
            self.checked_file(entry, "index")

    @validated
    def sql(
        self, query: str, parameters: list[Any] | dict[str, Any] | None = None, *, values: Values = "arrow"
    ) -> pa.Table:
        """Run a DuckDB query over the views of `schemas/README.md`.

        Args:
            values: arrow: columns of Arrow's types. text: numbers and booleans as they are, lists and the like as JSON text,
                all other values as DuckDB writes them. json: each value as JSON text.
        Raises:
            QueryError: DuckDB refused it, with DuckDB's reason; or a column has a type that Arrow lacks.
        """
        return run_query(self, query, parameters, values)

    @validated
    def sql_stream(
        self, query: str, parameters: list[Any] | dict[str, Any] | None = None, *, values: Values = "arrow"
    ) -> AbstractContextManager[pa.RecordBatchReader]:
        """The same as a stream of record batches, for a result that may be larger than the memory.

        Use it in a `with`: `with data.sql_stream("from tokens") as batches: ...`. Errors may come between two batches.
        """
        return query_stream(self, query, parameters, values)

    @property
    def sql_filesystem(self) -> Any:
        """The fsspec file system through which DuckDB reads the dataset; None: the local one."""
        return None

    def sql_file(self, entry: ManifestEntry, folder: str, *, compare: bool = True) -> str:
        """The name by which DuckDB opens a file of a shard.

        Raises CorruptError where it is missing, or, with `compare`, not what was committed.
        """
        return unglobbed((self.checked_file if compare else self.shard_file)(entry, folder).resolve())

    def listed(self, kind: Kind) -> list[str]:
        """Names of those of a kind that are here; see `kdata.store.listed`."""
        return listed(self.path, kind)

    def listing(self, kind: Kind, name: str) -> Listing:
        """What NAME.json says of a complete score or set of hidden states, or of a plan.

        Raises:
            MissingError: there is none, or it is not complete, or of another state of the dataset (a plan: MismatchError).
            MismatchError: it is of another dataset, or the plan of another state of this one.
            CorruptError: it is damaged, was renamed, or lists other files than the dataset has shards.
        """
        path = self.path / kind.folder / f"{name}.json"
        info, _ = read_listing(path, kind)
        refuse_other_dataset(info, kind, self.info.identity_digest, self.path)
        if kind is PLANS and info.dataset_digest != self.content_digest:
            raise MismatchError(
                f"plan {name!r} belongs to another state of {self.path} (digest {info.dataset_digest[:12]}, now "
                f"{self.content_digest[:12]}): rows were added or changed. Run `kdata select` again."
            )
        if kind is not PLANS:
            command = info.command if kind is SCORES else kind.command
            parts = {kind.part(name, entry.name) for entry in self.manifest}
            unfinished = not info.files or (kind is HIDDEN and set(info.files) < parts)
            if info.dataset_digest != self.content_digest or unfinished:
                raise MissingError(
                    f"{kind.noun} {name!r} does not cover the dataset as it is now; run `{command}` again"
                )
            if set(info.files) != parts:
                raise CorruptError(f"{path} does not list one part for each shard; remove it and run `{command}` again")
        return info

    def listed_files(self, kind: Kind, name: str, *, compare: bool = True) -> list[str]:
        """The names by which DuckDB opens the files of a complete score, or of a plan.

        Raises as `listing`, and CorruptError where one is missing or, with `compare`, not what was committed.
        """
        info = self.listing(kind, name)
        if kind is PLANS and info.table is None:  # an older kdata recorded no digest
            self.unchecked.add(f"plans.{name}")
            return [unglobbed(inside(self.path, f"plans/{name}.parquet").resolve())]
        return [self._listed_file(*file, kind, compare) for file in sorted(info.files_of(kind).items())]

    def score_part(self, relative: str, info: FileInfo) -> Path:
        """Path of a part of a score whose bytes were compared with its digest. Raises CorruptError where they differ."""
        self._listed_file(relative, info, SCORES, compare=True)
        return inside(self.path, relative)

    def _listed_file(self, relative: str, info: FileInfo, kind: Kind, compare: bool) -> str:
        path = inside(self.path, relative)
        if not path.is_file() or (compare and not matches(path, info)):
            raise CorruptError(
                f"{path} is not what was committed (missing, or another SHA-256); remove {relative.rpartition('/')[0]} and "
                f"run `{kind.command}` again"
                if kind is SCORES
                else f"{path} is not the plan that was saved; run `{kind.command}` again"
            )
        if kind is SCORES and compare:
            self._check_score_rows(path, relative)
        return unglobbed(path.resolve())

    @cached_property
    def _rows_of_shards(self) -> dict[str, int]:
        return {entry.name: entry.rows for entry in self.manifest}

    def _check_score_rows(self, path: Path, relative: str) -> None:
        """Raise CorruptError where a part of a score has more rows than its shard: a join would count rows twice."""
        most = self._rows_of_shards[PurePosixPath(relative).stem]
        try:
            rows = pq.read_metadata(path).num_rows
        except UNREADABLE as error:
            raise damaged(path, error) from error
        if rows > most:
            raise damaged(path, f"it holds {rows:,} rows, its shard {most:,}")

    @validated
    def hidden(self, name: str) -> HiddenStates:
        """A model's hidden states of every token, by row (`kdata hidden`). Raises as `kdata.store.hidden.HiddenStates`."""
        return HiddenStates(self, name)

    def fetch_hidden(self, name: str) -> None:
        """Copy hidden/NAME.json here where the dataset is elsewhere."""

    def hidden_part(self, relative: str, info: FileInfo) -> Path:
        """Path of a part of hidden states whose bytes were compared with its digest. Raises CorruptError."""
        path = inside(self.path, relative)
        if not path.is_file() or not matches(path, info):
            raise damaged(path, "it is missing, or its SHA-256 is not the one in the JSON beside its folder")
        return path

    def fetch_sidecar(self, name: str) -> None:
        """Copy scores/NAME.json here where the dataset is elsewhere."""

    def fetch_plan(self, name: str) -> None:
        """Copy plans/NAME.json and NAME.parquet here where the dataset is elsewhere."""

    def fetch_listed(self) -> None:
        """Copy what says which scores there are, and all plans, here where the dataset is elsewhere and can list them."""

    @validated
    def rows_of(self, ids: list[str]) -> np.ndarray:
        """Global row numbers int64 of these ids. Raises MissingError with the first unknown id."""
        positions = pc.index_in(pa.array(ids, pa.string()), value_set=self._ids)
        if positions.null_count:
            absent = ids[int(np.flatnonzero(positions.is_null().to_numpy(zero_copy_only=False))[0])]
            raise MissingError(f"{self.path} has no row with id {absent!r}")
        rows: np.ndarray = positions.to_numpy().astype(np.int64)
        return rows

    @cached_property
    def _ids(self) -> pa.Array:
        return self.index(["id"])["id"].combine_chunks()

    @validated
    def take(self, rows: np.ndarray) -> Sequences:
        """Decode sequences by global row number, in the order of `rows`.

        Args:
            rows: int64 [S], each in [0, num_rows).
        Raises:
            OutOfRangeError: there is no such row.
            ShapeError: `rows` is no list of numbers; `data[mask]` takes a mask.
            CorruptError: a shard is not what was committed.
        """
        numbers = np.asarray(rows)
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise ShapeError(f"take needs int64 [S], one row number each, got {numbers.dtype} {list(numbers.shape)}")
        located = np.stack(self.locate(numbers.astype(np.int64)), 1)
        begins = np.flatnonzero(
            (np.diff(located, axis=0, prepend=-1) != (0, 0, 1)).any(1)
        )  # of runs of neighbours within a record batch
        ends = np.append(begins[1:], len(located))
        slices = []
        for (shard, number, first), count in zip(located[begins].tolist(), (ends - begins).tolist(), strict=True):
            slices.append(self._cached(shard, number).slice(first, count))
        return self.decode(slices)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, record batch of the shard, and row of the record batch of each of `rows` int64 [S]; int64 [S] each.

        A shard is checked at first use. Raises as `take`.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise OutOfRangeError(f"rows must lie in [0, {self.num_rows}), got {rows.min()} to {rows.max()}")
        shard = np.searchsorted(self.shard_starts, rows, side="right") - 1
        local = rows - self.shard_starts[shard]
        number = np.zeros_like(local)
        for shard_number in np.unique(shard):
            starts, inside_S = self.open_shard(int(shard_number)), shard == shard_number
            number[inside_S] = np.searchsorted(starts, local[inside_S], side="right") - 1
            local[inside_S] -= starts[number[inside_S]]
        return shard, number, local

    def decode(self, slices: list[pa.RecordBatch]) -> Sequences:
        """Join slices of record batches of any shards, and decode them together.

        Raises:
            CorruptError: the columns do not fit together.
            FormatError: the codec is unknown to this kdata, or newer.
        """
        if not slices:
            return nothing()
        codec_of(self.info.codec)
        try:
            return decode(pa.concat_batches(slices), self.info)
        except UNREADABLE as error:
            raise damaged(self.path / "data", error) from error

    @validated
    def shard(self, number: int) -> Sequences:
        """All sequences of one shard, in order. Raises OutOfRangeError where there is no such shard, and as `take`."""
        if not 0 <= number < len(self.manifest):
            raise OutOfRangeError(f"{self.path} has {len(self.manifest):,} shards; there is no shard {number}")
        self.open_shard(
            number
        )  # compares the rows of the manifest line, which may be any number, with those that are there
        return self.take(np.arange(self.shard_starts[number], self.shard_starts[number + 1]))

    def __iter__(self) -> Iterator[Row]:
        """Every row in order, decoded a record batch at a time."""
        for shard in range(len(self.manifest)):
            starts = self.open_shard(shard).tolist()
            for number, (begin, end) in enumerate(pairwise(starts)):
                sequences = self.decode([self.record_batch(shard, number)])
                columns = self._index_of(shard).slice(begin, end - begin).to_pylist()
                for local, values in enumerate(columns):
                    yield Row(int(self.shard_starts[shard]) + begin + local, values, sequences.one(local), self)

    @overload
    def __getitem__(self, rows: int | np.integer) -> Row: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Sequences: ...

    def __getitem__(self, rows: int | np.integer | slice | Sequence[int] | np.ndarray) -> Row | Sequences:
        """One row by its number, negative ones from the end; or the `Sequences` of a slice, of row numbers, or of a mask.

        Raises:
            OutOfRangeError: there is no such row. (It is an IndexError.)
            ShapeError: a mask has another length than the dataset, or `rows` is something else.
        """
        if isinstance(rows, slice):
            return self.take(np.arange(self.num_rows)[rows])
        values = np.asarray(rows)
        if values.size == 0 and values.ndim == 1:
            return self.take(np.zeros(0, np.int64))
        if values.dtype == bool and values.shape == (self.num_rows,):
            return self.take(np.flatnonzero(values))
        if values.dtype.kind not in "iu" or values.ndim > 1:
            raise ShapeError(
                f"{shown(rows)} names no rows: give a row number, a slice, a list of row numbers, or {self.num_rows} bools"
            )
        numbers = np.where(values < 0, values + self.num_rows, values).astype(np.int64)
        if ((numbers < 0) | (numbers >= self.num_rows)).any():
            raise OutOfRangeError(f"{self.path} has {self.num_rows:,} rows; there is no row {shown(rows)}")
        return self.take(numbers) if values.ndim else self._row(int(numbers))

    def _row(self, number: int) -> Row:
        sequence = self.take(np.array([number]))
        shard = int(np.searchsorted(self.shard_starts, number, side="right")) - 1
        [columns] = self._index_of(shard).slice(number - int(self.shard_starts[shard]), 1).to_pylist()
        return Row(number, columns, sequence, self)

    def _index_of(self, shard: int) -> pa.Table:
        """The index of one shard. The last one that was read stays in memory."""
        if self._shard_rows is None or self._shard_rows[0] != shard:
            self._shard_rows = shard, self.shard_index(self.manifest[shard], index_schema().names)
        return self._shard_rows[1]

    @cached_property
    def token_text(self) -> TokenText:
        """Token ids as text, by the tokenizer that the dataset carries."""
        return TokenText(self.tokenizer_dir, self.path)

    @cached_property
    def entry_text(self) -> TokenText:
        """Ids of entries as text: tokens, but where a retokenized dataset has sorted probabilities."""
        if self.info.codec.token_map in SORTED_MAPS:
            return NumberText(None, self.path)
        return self.token_text

    @validated
    def token_bytes(self, row: int) -> np.ndarray | None:
        """Bytes of text per token of one row, uint16 [T]; None where they are not stored. Raises as `take`."""
        own = self.bytes_of(np.array([row]))
        return own.sizes if own.starts[0] >= 0 else None

    def bytes_of(self, rows: np.ndarray) -> TokenBytes:
        """Bytes of text per token of distinct rows, int64 [R] in rising order. Raises as `take`."""
        columns: list[pa.ListArray] = []
        shard_R, number_R, local_R = self.locate(rows)
        for shard in np.unique(shard_R):
            path = self.checked_file(self.manifest[shard], "data")
            try:
                reader = PayloadReader(path, ["id", "token_bytes"])
                for number in np.unique(number_R[shard_R == shard]):
                    batch, local = reader.batch(int(number)), local_R[(shard_R == shard) & (number_R == number)]
                    is_there = "token_bytes" in batch.schema.names
                    columns.append(
                        batch.column("token_bytes").take(pa.array(local))
                        if is_there
                        else pa.nulls(len(local), pa.list_(pa.uint16()))
                    )
            except UNREADABLE as error:
                raise damaged(path, error) from error
        return TokenBytes.of(rows, columns)

    def iter_sequences(self) -> Iterator[Sequences]:
        """All sequences in order, a record batch at a time."""
        for shard in range(len(self.manifest)):
            for number in range(len(self.open_shard(shard)) - 1):
                yield self.decode([self.record_batch(shard, number)])

    @validated
    def to_arrow(self, columns: list[str] | None = None) -> pa.Table:
        """The readable index, one row per sequence; the teacher's numbers are in `data[...].to_arrow()`."""
        return self.index(columns)

    @validated
    def to_polars(
        self, table: Literal["rows", "tokens", "entries"] = "rows", *, scores: Sequence[str] = ()
    ) -> polars.LazyFrame:
        """The index as a lazy Polars frame, which reads the columns that a query needs; or each token, or each kept entry.

        Args:
            table: rows: the index. tokens, entries: the columns of these views in `schemas/README.md`. Of the payload only
                the columns that are needed are decoded, and of the rows those that a filter on id and global_row leaves.
            scores: names of scores with a number for each token; each becomes a column `nll_NAME` of the table tokens.
        Raises:
            ConfigError: another table, or scores for another table than tokens.
            MissingError: there is no such score, or it has no number for each token.
            DependencyError: Polars is not installed.
            CorruptError: an index file is not what was committed, or, while the frame is collected, a payload.
        """
        try:
            import polars
        except ModuleNotFoundError as error:
            raise DependencyError("to_polars needs Polars: pip install 'kdata[polars]'") from error
        columns = [f"nll_{name}" for name in scores]
        if table in TABLES:
            return frame_of(self, table, columns)
        if columns:
            raise ConfigError(f"scores are columns of the table tokens; join {table!r} with data.sql instead")
        files = [self.checked_file(entry, "index") for entry in self.manifest]
        schema = polars.from_arrow(index_schema().empty_table()).schema  # type: ignore[union-attr]
        if not files:
            return polars.LazyFrame(schema=schema)
        return polars.scan_parquet(files, schema=schema, missing_columns="insert", extra_columns="ignore", glob=False)

    @validated
    def tokens(
        self, columns: Sequence[str] | None = None, rows: Sequence[int] | np.ndarray | None = None
    ) -> pa.RecordBatchReader:
        """Every token with the teacher's numbers of it, as a stream of Arrow record batches in the order of the dataset.

        The columns are those of the view `tokens` in `schemas/README.md`; id and token are dictionary-encoded. Only what is
        asked for is read, a few record batches at a time.

        Args:
            columns: None takes all but `nll_NAME`, which must be named: the NLL of the token by the score NAME.
            rows: global row numbers; None takes all.
        Raises:
            ConfigError: an unknown column.
            MissingError: there is no score of that name, or it has no number for each token.
            OutOfRangeError: there is no such row.
            CorruptError: while it is read: a shard is not what was committed.
        """
        return read_table(self, "tokens", columns, None if rows is None else row_numbers(rows, self.num_rows))

    @validated
    def entries(
        self, columns: Sequence[str] | None = None, rows: Sequence[int] | np.ndarray | None = None
    ) -> pa.RecordBatchReader:
        """Every kept entry of every token, likewise: the columns of the view `entries`."""
        return read_table(self, "entries", columns, None if rows is None else row_numbers(rows, self.num_rows))

    def to_torch(self) -> TorchRows:
        """A map-style dataset for `torch.utils.data.DataLoader`: item n is row n as a dict of tensors.

        See `Sequences.to_torch` for the tensors. Rows differ in length, so the DataLoader needs a `collate_fn` (or
        `batch_size=None`); `kdata.loader.batches.Batches` packs rows for training instead.
        """
        return TorchRows(self)

    def open_shard(self, shard: int) -> np.ndarray:
        """Row starts of a shard's record batches; at first use its bytes, rows and token ids are checked."""
        if shard not in self._batch_starts:
            codec_of(self.info.codec)
            entry = self.manifest[shard]
            path = self.checked_file(entry, "data")
            try:
                sizes = self._check_content(entry, path)
            except UNREADABLE as error:
                raise damaged(path, error) from error
            self._batch_starts[shard] = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        return self._batch_starts[shard]

    def _check_content(self, entry: ManifestEntry, path: Path) -> list[int]:
        """Compare the token ids of a payload with the content hashes of its index.

        Returns the rows of each record batch.
        """
        index = self.shard_index(entry, ["id", "content_hash"])
        expected = zip(index["id"].to_pylist(), index["content_hash"].to_pylist(), strict=True)
        check_header(pa.ipc.open_file(pa.OSFile(str(path))), self.info, entry)
        reader, sizes = PayloadReader(path, ["id", "input_ids"]), []
        for number in range(reader.num_record_batches):
            batch = reader.batch(number)
            values, offsets = flat(batch.column("input_ids"))
            for row, row_id in enumerate(batch.column("id").to_pylist()):
                index_id, digest = next(expected, (None, None))
                if row_id != index_id or content_hash(values[offsets[row] : offsets[row + 1]]) != digest:
                    raise damaged(path, f"row {row_id!r} has other token ids than the index says")
            sizes.append(batch.num_rows)
        if sum(sizes) != entry.rows:
            raise damaged(path, f"it holds {sum(sizes)} rows, the manifest says {entry.rows}")
        return sizes

    def record_batch(self, shard: int, number: int) -> pa.RecordBatch:
        """Decompress one record batch: the columns that decoding needs, encoded as they are stored.

        Raises:
            CorruptError: its bytes cannot be decompressed.
        """
        path = self.shard_file(self.manifest[shard], "data")
        try:
            reader = self._readers.pop(shard, None)
            if reader is None:
                reader = PayloadReader(path, used_columns(path))
                # After it is open: another process may have put a shard of that name here since it was checked.
                self.checked_file(self.manifest[shard], "data")
            batch = reader.batch(number)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        self._readers[shard] = reader  # popped and put back, so the order is by last use
        while len(self._readers) > OPEN_SHARDS:
            self._readers.popitem(last=False)
        return batch

    def _cached(self, shard: int, number: int) -> pa.RecordBatch:
        cached = self._batches.pop((shard, number), None)
        if cached is None:
            batch = self.record_batch(shard, number)
            cached = batch, batch.nbytes
        self._batches[shard, number] = cached
        while len(self._batches) > 1 and sum(size for _, size in list(self._batches.values())) > CACHED_BYTES:
            self._batches.popitem(last=False)
        return cached[0]

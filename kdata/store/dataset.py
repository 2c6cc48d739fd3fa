"""Reading a dataset: the readable index, SQL over it, and the teacher's sparse distributions as arrays."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdata.errors import ConfigError, CorruptError, MissingError, ShapeError
from kdata.format.codec import codec_of
from kdata.format.files import inside
from kdata.format.manifest import read_info, read_manifest
from kdata.format.schema import DatasetInfo, ManifestEntry, content_hash, index_schema, json_digest
from kdata.format.sequences import Sequences, decode, flat, nothing
from kdata.store.index import UNREADABLE, damaged, read_index
from kdata.store.sql import query as run_query
from kdata.store.sql import unglobbed

CACHED_BYTES = 64 << 20  # decompressed record batches kept for `take`, per open dataset
OPEN_SHARDS = 64  # shards that are mapped at a time, per open dataset


class Dataset:
    """A logit dataset on disk, opened for reading. Cheap to open; payload is memory-mapped and decoded on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: DatasetInfo = read_info(path)
        self.manifest: list[ManifestEntry] = sorted(read_manifest(path), key=lambda e: e.name)
        self.shard_starts = np.concatenate(([0], np.cumsum([e.rows for e in self.manifest], dtype=np.int64)))
        self._readers: OrderedDict[int, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], tuple[pa.RecordBatch, int]] = OrderedDict()  # with their bytes
        self._batch_starts: dict[int, np.ndarray] = {}
        self._checked: set[str] = set()
        for name, source in self.info.sources.items():
            units = {entry.unit for entry in self.manifest if entry.source == name}
            missing = sorted(set(range(source.num_units or 0)) - units)
            if missing:
                raise CorruptError(
                    f"{path}/manifest.jsonl lacks units {missing[:10]} of the complete source {name!r}; restore it from a "
                    f"copy, or run the same `kdata {source.kind}` again"
                )

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, rows={self.num_rows:,}, tokens={self.num_tokens:,})"

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path]]:
        """Another process opens the dataset again: maps and caches do not travel."""
        return Dataset, (self.path,)

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
        """Folder with the teacher's tokenizer files, or None where the dataset carries none."""
        path = self.path / "tokenizer"
        return path if path.is_dir() else None

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 (hex) over the identity and every shard's digests: changes when a row does."""
        shards = [(entry.name, sorted((k, v.sha256) for k, v in entry.files.items())) for entry in self.manifest]
        return json_digest({"identity": self.info.identity_digest, "shards": shards})

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The readable index, one row per sequence in global row order."""
        parts = [self._read_index(entry, columns) for entry in self.manifest]
        if not parts:
            schema = index_schema()
            return schema.empty_table().select(columns) if columns else schema.empty_table()
        # A part from before a column was added lacks it: null there.
        return pa.concat_tables(parts, promote_options="default")

    def _read_index(self, entry: ManifestEntry, columns: list[str] | None) -> pa.Table:
        unknown = sorted(set(columns or ()) - set(index_schema().names))
        if unknown:
            raise ConfigError(f"the index has no column {unknown[0]!r}; it has {index_schema().names}")
        path = self.checked_file(entry, "index")
        try:
            table = read_index(path, columns)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        if table.num_rows != entry.rows:
            raise damaged(path, f"it holds {table.num_rows} rows, the manifest says {entry.rows}")
        return table

    def shard_file(self, entry: ManifestEntry, folder: str) -> Path:
        """Path of one file of a shard ("data", "index" or "rejects"). Raises CorruptError when it is gone."""
        relative = next((name for name in entry.files if name.split("/")[0] == folder), None)
        if relative is None:
            raise MissingError(f"{self.path}: shard {entry.name} has no file in {folder}/")
        path = inside(self.path, relative)
        if not path.exists():
            raise CorruptError(f"{path} is missing; `kdata verify {self.path}` lists what is whole")
        return path

    def checked_file(self, entry: ManifestEntry, folder: str) -> Path:
        """The same, and at the first touch its bytes are compared with the digest in the manifest (about 1.5 GB/s).

        Raises CorruptError where they differ.
        """
        path = self.shard_file(entry, folder)
        relative = path.relative_to(self.path).as_posix()
        if relative not in self._checked:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry.files[relative].sha256:
                raise damaged(path, "its bytes are not those that were committed (SHA-256 differs)")
            self._checked.add(relative)
        return path

    def check_index(self) -> None:
        """Compare every index file with the manifest. Raises CorruptError where one differs."""
        for entry in self.manifest:
            self.checked_file(entry, "index")

    def sql(self, query: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
        """Run a DuckDB query over the views of `schemas/README.md`. Raises QueryError with DuckDB's reason."""
        return run_query(self, query, parameters)

    @property
    def sql_filesystem(self) -> Any:
        """The fsspec file system through which DuckDB reads the dataset; None: the local one."""
        return None

    def sql_file(self, entry: ManifestEntry, folder: str) -> str:
        """How DuckDB names a file of a shard. Raises CorruptError when it is gone."""
        return unglobbed(self.shard_file(entry, folder).resolve())

    def fetch_sidecar(self, name: str) -> None:
        """Bring scores/NAME.json here where the dataset is elsewhere."""

    def sql_sidecars(self) -> dict[str, list[str]]:
        """How DuckDB names the parts of each sidecar that can be queried, complete or not."""
        folders = sorted(path for path in self.path.resolve().glob("scores/*") if path.is_dir())
        return {path.name: [unglobbed(part) for part in sorted(path.glob("*.parquet"))] for path in folders}

    def rows_of(self, ids: list[str]) -> np.ndarray:
        """Global row numbers int64 of these ids. Raises MissingError naming the first that is not there."""
        positions = pc.index_in(pa.array(ids, pa.string()), value_set=self._ids)
        if positions.null_count:
            absent = ids[int(np.flatnonzero(positions.is_null().to_numpy(zero_copy_only=False))[0])]
            raise MissingError(f"{self.path} has no row with id {absent!r}")
        return positions.to_numpy().astype(np.int64)

    @cached_property
    def _ids(self) -> pa.Array:
        return self.index(["id"])["id"].combine_chunks()

    def take(self, rows: np.ndarray) -> Sequences:
        """Decode sequences by global row number, in the order asked.

        Args:
            rows: int64 [S], each in [0, num_rows).
        Raises:
            ShapeError: a row is out of range.
            CorruptError: bytes are not those that were committed.
        """
        located = np.stack(self.locate(np.asarray(rows, np.int64)), 1)
        begins = np.flatnonzero((np.diff(located, axis=0, prepend=-1) != (0, 0, 1)).any(1))  # of runs within a batch
        ends = np.append(begins[1:], len(located))
        slices = []
        for (shard, number, first), count in zip(located[begins].tolist(), (ends - begins).tolist(), strict=True):
            slices.append(self._cached(shard, number).slice(first, count))
        return self.decode(slices)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where rows int64 [S] are: shard, record batch of the shard, row of the record batch; int64 [S] each.

        Raises: see `take`; a shard that is touched for the first time is checked.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise ShapeError(f"rows must lie in [0, {self.num_rows}), got {rows.min()} to {rows.max()}")
        shard = np.searchsorted(self.shard_starts, rows, side="right") - 1
        local = rows - self.shard_starts[shard]
        number = np.zeros_like(local)
        for one in np.unique(shard):
            starts, here = self._open_shard(int(one)), shard == one
            number[here] = np.searchsorted(starts, local[here], side="right") - 1
            local[here] -= starts[number[here]]
        return shard, number, local

    def decode(self, slices: list[pa.RecordBatch]) -> Sequences:
        """Join slices of record batches, whatever shards they are from, and decode them in one go.

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

    def shard(self, number: int) -> Sequences:
        """All sequences of one shard, in order."""
        return self.take(np.arange(self.shard_starts[number], self.shard_starts[number + 1]))

    def __iter__(self) -> Iterator[Sequences]:
        return (self[row] for row in range(self.num_rows))

    def __getitem__(self, row: int) -> Sequences:
        return self.take(np.array([row if row >= 0 else row + self.num_rows]))

    def iter_sequences(self) -> Iterator[Sequences]:
        """All sequences in order, a record batch at a time."""
        for shard in range(len(self.manifest)):
            for number in range(len(self._open_shard(shard)) - 1):
                yield self.decode([self.record_batch(shard, number)])

    def _open_shard(self, shard: int) -> np.ndarray:
        """Row starts of a shard's record batches; at first touch its bytes, rows and token ids are checked."""
        if shard not in self._batch_starts:
            entry = self.manifest[shard]
            path = self.checked_file(entry, "data")
            try:
                sizes = self._check_content(entry, path)
            except UNREADABLE as error:
                raise error if isinstance(error, CorruptError) else damaged(path, error) from error
            self._batch_starts[shard] = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        return self._batch_starts[shard]

    def _check_content(self, entry: ManifestEntry, path: Path) -> list[int]:
        """Compare token ids with the content hashes of the index: a payload that is not its index is refused.

        Returns the rows of each record batch.
        """
        index = self._read_index(entry, ["id", "content_hash"])
        expected = zip(index["id"].to_pylist(), index["content_hash"].to_pylist(), strict=True)
        reader, sizes = _reader(path, ["id", "input_ids"]), []
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            values, offsets = flat(batch.column("input_ids"))
            for row, row_id in enumerate(batch.column("id").to_pylist()):
                index_id, digest = next(expected, (None, None))
                if row_id != index_id or content_hash(values[offsets[row] : offsets[row + 1]]) != digest:
                    raise damaged(path, f"row {row_id!r} does not have the content that the index says")
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
            reader = self._readers.pop(shard, None) or _reader(path, _used_columns(path))
            batch = reader.get_batch(number)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        self._readers[shard] = reader  # popped and put back: the last is the latest used, in two threads as in one
        while len(self._readers) > OPEN_SHARDS:
            self._readers.popitem(last=False)
        return batch

    def _cached(self, shard: int, number: int) -> pa.RecordBatch:
        known = self._batches.pop((shard, number), None)
        if known is None:
            batch = self.record_batch(shard, number)
            known = batch, batch.nbytes
        self._batches[shard, number] = known
        while len(self._batches) > 1 and sum(size for _, size in list(self._batches.values())) > CACHED_BYTES:
            self._batches.popitem(last=False)
        return known[0]


def _reader(path: Path, columns: list[str]) -> pa.ipc.RecordBatchFileReader:
    """Map a shard, to read these columns only: each costs 20 microseconds per record batch, needed or not."""
    source = pa.memory_map(str(path))
    schema = pa.ipc.open_file(source).schema
    fields = [schema.get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    return pa.ipc.open_file(source, options=options)


def _used_columns(path: Path) -> list[str]:
    """Columns that a decoder reads, without those that are null throughout (told by the first record batch)."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    unused = {"id", "token_bytes"}
    if reader.num_record_batches:
        first = reader.get_batch(0)
        unused |= {name for name in first.schema.names if first.column(name).null_count == first.num_rows > 0}
    return [name for name in reader.schema.names if name not in unused]

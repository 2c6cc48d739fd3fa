"""Reading a dataset: the readable index, SQL over it, and the teacher's sparse distributions as arrays."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdata import codec as codecs
from kdata.errors import ConfigError, CorruptError, MissingError, ShapeError
from kdata.manifest import inside, read_info, read_manifest
from kdata.schema import DatasetInfo, ManifestEntry, content_hash, fingerprint, index_schema, payload_schema

# What pyarrow and numpy raise at bytes that are not what they should be.
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)
CACHED_BATCHES = 64  # decoded record batches kept per open dataset: about 50 MB at 64 entries per token


@dataclass(frozen=True)
class Sequences:
    """S decoded sequences, concatenated: T tokens and N kept entries in all. Entry t is the prediction OF token t.

    token_ids int32 [T]; offsets int64 [S+1]; target_mask bool [T]; logprob float32 [T] (nats, NaN where nothing was
    recorded); rank int32 [T] (1 = first choice, 0 = nothing recorded); log_tail float32 [T] (nats); entropy
    float32 [T] (nats, NaN where unknown); num_exact int32 [T] entries kept exactly; num_kept int32 [T] entries in all,
    the exact ones first, then draws; log_z float32 [T, temperatures] or None; entry_offsets int64 [T+1]; entry_ids
    int32 [N]; entry_logprobs float32 [N] (nats, not renormalised; of a draw the log of its unbiased weight);
    draw_logprobs float32 [N], the log-probability of draws (NaN for exact entries), or None where not stored.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    target_mask: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    log_tail: np.ndarray
    entropy: np.ndarray
    num_exact: np.ndarray
    num_kept: np.ndarray
    log_z: np.ndarray | None
    entry_offsets: np.ndarray
    entry_ids: np.ndarray
    entry_logprobs: np.ndarray
    draw_logprobs: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def spans(self) -> list[tuple[int, int]]:
        """(begin, end) of each sequence in the token arrays."""
        return [(int(a), int(b)) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def padded(self, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Kept entries as a grid.

        Args:
            width: number of columns; None takes the widest position.
        Returns:
            ids int32 [T, K] padded with -1 and logprobs float32 [T, K] padded with -inf.
        Raises:
            ShapeError: a position holds more than `width` entries.
        """
        width = int(self.num_kept.max(initial=0)) if width is None else width
        return codecs.pad(self.num_kept, self.entry_ids, self.entry_logprobs, width)


class Dataset:
    """A logit dataset on disk, opened for reading. Cheap to open; payload is memory-mapped and decoded on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: DatasetInfo = read_info(path)
        self.manifest: list[ManifestEntry] = sorted(read_manifest(path), key=lambda e: e.name)
        self._starts = np.concatenate(([0], np.cumsum([e.rows for e in self.manifest], dtype=np.int64)))
        self._files: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._batches: OrderedDict[tuple[int, int], Sequences] = OrderedDict()
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

    @property
    def num_rows(self) -> int:
        """Sequences in all."""
        return int(self._starts[-1])

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
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the identity and every shard's digests: changes when a row does."""
        shards = [(entry.name, sorted((k, v.sha256) for k, v in entry.files.items())) for entry in self.manifest]
        return fingerprint({"identity": self.info.fingerprint, "shards": shards})

    def index(self, columns: list[str] | None = None) -> pa.Table:
        """The readable index, one row per sequence in global row order."""
        parts = [self._read_index(entry, columns) for entry in self.manifest]
        if not parts:
            schema = index_schema()
            return schema.empty_table().select(columns) if columns else schema.empty_table()
        return pa.concat_tables(parts)

    def _read_index(self, entry: ManifestEntry, columns: list[str] | None) -> pa.Table:
        unknown = sorted(set(columns or ()) - set(index_schema().names))
        if unknown:
            raise ConfigError(f"the index has no column {unknown[0]!r}; it has {index_schema().names}")
        path = self.checked_file(entry, "index")
        try:
            table = pq.read_table(path, columns=columns)
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

    def sql(self, query: str, parameters: list[Any] | dict[str, Any] | None = None) -> pa.Table:
        """Run a DuckDB query over the views of `schemas/README.md`. Raises QueryError with DuckDB's reason."""
        from kdata.sql import query as run

        return run(self, query, parameters)

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
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise ShapeError(f"rows must lie in [0, {self.num_rows}), got {rows.min()} to {rows.max()}")
        parts = []
        for row in rows:
            shard = int(np.searchsorted(self._starts, row, side="right")) - 1
            starts = self._open_shard(shard)
            local = int(row - self._starts[shard])
            batch = int(np.searchsorted(starts, local, side="right")) - 1
            parts.append((self._batch(shard, batch), local - int(starts[batch])))
        return _gather(parts)

    def shard(self, number: int) -> Sequences:
        """All sequences of one shard, in order."""
        return self.take(np.arange(self._starts[number], self._starts[number + 1]))

    def __iter__(self) -> Iterator[Sequences]:
        return (self[row] for row in range(self.num_rows))

    def __getitem__(self, row: int) -> Sequences:
        return self.take(np.array([row if row >= 0 else row + self.num_rows]))

    def iter_sequences(self) -> Iterator[Sequences]:
        """All sequences in order, a record batch at a time."""
        for shard in range(len(self.manifest)):
            for batch in range(len(self._open_shard(shard)) - 1):
                yield self._batch(shard, batch)

    def _open_shard(self, shard: int) -> np.ndarray:
        """Map a shard, check it against the manifest on first touch; return row starts of its record batches."""
        if shard not in self._files:
            entry = self.manifest[shard]
            path = self.checked_file(entry, "data")
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            except UNREADABLE as error:
                raise damaged(path, error) from error
            if sum(sizes) != entry.rows:
                raise damaged(path, f"it holds {sum(sizes)} rows, the manifest says {entry.rows}")
            self._check_content(shard, path, reader)
            self._files[shard] = reader
            self._batch_starts[shard] = np.concatenate(([0], np.cumsum(sizes)))
        return self._batch_starts[shard]

    def _check_content(self, shard: int, path: Path, reader: pa.ipc.RecordBatchFileReader) -> None:
        """Compare token ids with the content hashes of the index: a payload that is not its index is refused."""
        index = self._read_index(self.manifest[shard], ["id", "content_hash"])
        expected = zip(index["id"].to_pylist(), index["content_hash"].to_pylist(), strict=True)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            values, offsets = _flat(batch.column("input_ids"))
            for row, row_id in enumerate(batch.column("id").to_pylist()):
                index_id, digest = next(expected, (None, None))
                if row_id != index_id or content_hash(values[offsets[row] : offsets[row + 1]]) != digest:
                    raise damaged(path, f"row {row_id!r} does not have the content that the index says")

    def _batch(self, shard: int, number: int) -> Sequences:
        key = (shard, number)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        path = self.shard_file(self.manifest[shard], "data")
        try:
            decoded = _decode(self._files[shard].get_batch(number), self.info)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        self._batches[key] = decoded
        if len(self._batches) > CACHED_BATCHES:
            self._batches.popitem(last=False)
        return decoded


def damaged(path: Path, reason: object) -> CorruptError:
    """One wording for a file that is not what was committed."""
    return CorruptError(
        f"{path} is damaged: {reason}. Restore it from a copy, or run `kdata verify` to see what is whole."
    )


def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and zero-based offsets of a list column, without copying numbers."""
    offsets = column.offsets.to_numpy()
    return column.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0]


def _decode(batch: pa.RecordBatch, info: DatasetInfo) -> Sequences:
    flat = {name: _flat(batch.column(name)) for name in COMMON}
    token_ids, offsets = flat["input_ids"]
    if not all(len(values) == len(token_ids) for values, _ in flat.values()):
        raise ShapeError("columns disagree in length")
    values = {name: array for name, (array, _) in flat.items()}
    num_exact, num_drawn = values["num_exact"].astype(np.int32), values["num_drawn"].astype(np.int32)
    own = [n for n in payload_schema(info.codec.id).names if n.split("_")[0] in ("entry", "exact", "draw")]
    present = [n for n in own if batch.num_rows and batch.column(n).null_count == 0]
    kept = codecs.from_columns(
        {n: _flat(batch.column(n))[0] for n in present},
        codecs.Positions(num_exact, num_drawn, values["log_tail"]),
        info.codec,
    )
    temperatures = len(info.codec.parameters.get("temperatures", []))
    log_z = _flat(batch.column("log_z"))[0].reshape(-1, temperatures) if temperatures else None
    draws = None
    if kept.draw_logprobs is not None:
        draws = np.full(len(kept.ids), np.nan, np.float32)
        draws[kept.is_draw] = kept.draw_logprobs
    return Sequences(
        token_ids=token_ids,
        offsets=offsets.astype(np.int64),
        target_mask=values["target_mask"],
        logprob=values["logprob"].astype(np.float32),
        rank=values["rank"],
        log_tail=values["log_tail"],
        entropy=values["entropy"].astype(np.float32),
        num_exact=num_exact,
        num_kept=num_exact + num_drawn,
        log_z=log_z,
        entry_offsets=np.concatenate(([0], np.cumsum(num_exact + num_drawn, dtype=np.int64))),
        entry_ids=kept.ids,
        entry_logprobs=kept.logprobs,
        draw_logprobs=draws,
    )


COMMON = (
    "input_ids", "target_mask", "logprob", "rank", "log_tail", "entropy", "num_exact", "num_drawn",
)  # fmt: skip


def _gather(parts: list[tuple[Sequences, int]]) -> Sequences:
    """Concatenate single sequences out of decoded batches."""
    spans = [(s, int(s.offsets[i]), int(s.offsets[i + 1])) for s, i in parts]
    entries = [(s, int(s.entry_offsets[a]), int(s.entry_offsets[b])) for s, a, b in spans]

    def join(name: str, dtype: type, ranges: list[tuple[Sequences, int, int]] = spans) -> np.ndarray:
        return np.concatenate([getattr(s, name)[a:b] for s, a, b in ranges] or [np.zeros(0, dtype)])

    num_kept = join("num_kept", np.int32)
    first = parts[0][0] if parts else None
    return Sequences(
        token_ids=join("token_ids", np.int32),
        offsets=np.concatenate(([0], np.cumsum([b - a for _, a, b in spans], dtype=np.int64))),
        target_mask=join("target_mask", np.bool_),
        logprob=join("logprob", np.float32),
        rank=join("rank", np.int32),
        log_tail=join("log_tail", np.float32),
        entropy=join("entropy", np.float32),
        num_exact=join("num_exact", np.int32),
        num_kept=num_kept,
        log_z=join("log_z", np.float32) if first is not None and first.log_z is not None else None,
        entry_offsets=np.concatenate(([0], np.cumsum(num_kept, dtype=np.int64))),
        entry_ids=join("entry_ids", np.int32, entries),
        entry_logprobs=join("entry_logprobs", np.float32, entries),
        draw_logprobs=(
            join("draw_logprobs", np.float32, entries)
            if first is not None and first.draw_logprobs is not None
            else None
        ),
    )


def open_dataset(path: str | Path) -> Dataset:
    """Open a local dataset, or one on the Hub as "hf://OWNER/NAME" (downloaded once by the Hub's client).

    Raises:
        MissingError: nothing there.
        FormatError: written by a newer major version.
        CorruptError: dataset.json or manifest.jsonl is damaged.
    """
    if str(path).startswith("hf://"):
        from kdata.hub import download

        return Dataset(download(str(path)))
    local = Path(path)
    if not local.exists():
        raise MissingError(f"{local} does not exist; a Hub dataset is named hf://OWNER/NAME")
    if not local.is_dir():
        raise ConfigError(f"{local} is a file; name the dataset's folder")
    return Dataset(local)

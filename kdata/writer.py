"""Writing a dataset: work units become shards, each committed whole or not at all.

A unit's files are written under temporary names, flushed to disk and renamed; its manifest line comes last, so a crash
at any moment loses at most the unit in flight. Nothing that depends on the clock or the machine is written: the
same units give the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kdata import codec as codecs
from kdata.codec import Kept
from kdata.errors import (
    ConfigError,
    CorruptError,
    DataError,
    KdataError,
    MismatchError,
    StorageError,
    settings_difference,
)
from kdata.manifest import (
    append_entry,
    file_info,
    inside,
    order_manifest,
    read_info,
    read_manifest,
    sync_directory,
    write_info,
)
from kdata.schema import (
    CodecError,
    DatasetInfo,
    FileInfo,
    ManifestEntry,
    SourceInfo,
    canonical_json,
    content_hash,
    fingerprint,
    index_schema,
    payload_schema,
    rejects_schema,
)

# Random access decompresses a whole record batch: 32 rows, or 16, 8, ... 1 where 32 of them hold more than so many
# tokens. Halves of 32, so that blocks of 32 rows (the loader's unit of shuffling) never share a record batch. Smaller
# costs bytes: limits of 4,096 and 2,048 tokens 1 and 2 %, single rows 13 to 25 % (64 kept entries; 16 + 16).
ROWS_PER_BATCH, TOKENS_PER_BATCH = 32, 8192
MASS_SLACK = 1e-3  # a float32 softmax sums to 1 within 1e-6; more than this over 1 is no distribution
# What a run that was killed may leave under a temporary name. Nothing else is ever removed.
TEMPORARY = ("dataset.json.tmp", "tokenizer.tmp", "data/*.tmp", "index/*.tmp", "rejects/*.tmp")
# Names that may stand in a folder that is no dataset yet: what a run leaves that was killed before dataset.json.
BEGUN = {"data", "index", "rejects", "tokenizer", "tokenizer.tmp", "dataset.json.tmp"}
# Level 1: the planes are entropy-coded, and the matches that higher levels look for make them larger (90 against 93 bytes
# per token for 64 ids).


@dataclass
class Record:
    """One sequence ready to be stored; arrays [T] are aligned with `token_ids` (entry t predicts token t)."""

    id: str
    domain: str
    token_ids: np.ndarray
    target_mask: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    log_tail: np.ndarray
    kept: Kept
    text: str | None
    entropy: np.ndarray | None = None
    log_z: np.ndarray | None = None
    token_bytes: np.ndarray | None = None
    origin: str | None = None
    license: str | None = None
    prompt: str | None = None
    finish_reason: str | None = None


@dataclass
class Reject:
    """One input that was refused."""

    id: str
    domain: str | None
    reason: str
    detail: str


@dataclass
class Unit:
    """What one work unit hands over for commit."""

    number: int
    records: list[Record]
    rejects: list[Reject] = field(default_factory=list)
    inputs: str = ""


class Writer:
    """Adds the units of one source to a dataset; a context manager that holds the dataset's lock.

    Args:
        root: dataset directory, made when absent.
        info: identity of the dataset (teacher, tokenizer, codec); compared with what is there.
        source: name of the work, the prefix of its shards.
        source_info: kind and settings of the work; compared with what is there.
        resume: "auto" goes on where a former run stopped, "never" refuses a source that has rows, "must" refuses one
            that was never begun.
        tokenizer_dir: folder whose files are copied to DATASET/tokenizer, so that the dataset is self-contained.
    Raises:
        MismatchError: the dataset was begun with other settings; the message lists them.
        ConfigError: the folder holds other things than a dataset.
        StorageError: the disk refused, or another process is writing.
    """

    def __init__(
        self,
        root: Path,
        info: DatasetInfo,
        source: str,
        source_info: SourceInfo,
        *,
        resume: str = "auto",
        tokenizer_dir: Path | None = None,
    ) -> None:
        self.root, self.source, self.info = root, source, info
        self._source_info = source_info
        self._resume = resume
        self._tokenizer_dir = tokenizer_dir
        self._lock = lock_of(root)

    def __enter__(self) -> Writer:
        with storage_errors(self.root):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise StorageError(f"{self.root} is being written by another process; wait for it") from error
            with ExitStack() as undo:
                undo.callback(self._lock.release)
                self._open()
                undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _open(self) -> None:
        known = None
        if (self.root / "dataset.json").exists():
            before = read_info(self.root)
            _refuse_difference("the dataset", before.identity(), self.info.identity(), self.root)
            known = before.sources.get(self.source)
            if known is not None:
                _refuse_difference(
                    f"source {self.source!r}",
                    {**known.settings, "work": known.kind},
                    {**self._source_info.settings, "work": self._source_info.kind},
                    self.root,
                )
                self._source_info = known
            self.info = before
        else:
            _refuse_foreign(self.root)
        if known is None and self._resume == "must":
            raise MismatchError(f"--resume must: {self.root} has no {self.source!r} to go on with")
        for name in ("data", "index"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._clear_temporary()
        manifest = read_manifest(self.root, heal=True)
        self._ids = _committed_ids(self.root, manifest)
        entries = [e for e in manifest if e.source == self.source]
        if entries and self._resume == "never":
            raise MismatchError(
                f"--resume never: {self.root} already holds {len(entries)} shards of {self.source!r}; "
                "choose another folder, or --resume auto"
            )
        self.committed = {entry.unit: entry for entry in entries}
        self._copy_tokenizer()
        self._write_info(self._source_info)

    def _write_info(self, source_info: SourceInfo) -> None:
        sources = {**self.info.sources, self.source: source_info}
        self.info = self.info.model_copy(update={"sources": dict(sorted(sources.items()))})
        write_info(self.root, self.info)

    def _copy_tokenizer(self) -> None:
        """Copy the tokenizer's files where none stand, and record their digests once."""
        target = self.root / "tokenizer"
        if self._tokenizer_dir is not None and not target.exists():
            temporary = self.root / "tokenizer.tmp"
            temporary.mkdir()
            for file in sorted(self._tokenizer_dir.iterdir()):  # copytree would hide a full disk in its own error
                shutil.copyfile(file, temporary / file.name)
            os.rename(temporary, target)
        elif self.info.tokenizer_files:
            return
        files = {path.name: file_info(path) for path in sorted(target.glob("*")) if path.is_file()}
        self.info = self.info.model_copy(update={"tokenizer_files": files})

    def _clear_temporary(self) -> None:
        for pattern in TEMPORARY:
            for path in list(self.root.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def commit(self, unit: Unit) -> ManifestEntry:
        """Store one unit: payload, index and rejects are renamed into place, then the manifest line is written.

        Raises:
            StorageError: the disk refused; nothing that was committed is touched.
            DataError: an id stands twice, in the unit or with a row of the dataset.
        """
        self._refuse_twice([record.id for record in unit.records])
        name = self.shard_name(unit.number)
        tables = shard_tables(unit, name, self.source, self.info)
        return self.commit_tables(unit.number, *tables, rejects=unit.rejects, inputs=unit.inputs)

    def shard_name(self, unit: int) -> str:
        """Name of the shard that holds a unit."""
        return f"{self.source}-{unit:05d}"

    def _refuse_twice(self, ids: list[str]) -> None:
        for row_id in ids:
            if row_id in self._ids:
                raise DataError(
                    f"{self.root} already has a row with id {row_id!r}; ids are unique in a dataset. Rename it in "
                    "the input (a text that is split takes ID#0, ID#1, a completion ID~0), or use another dataset."
                )

    def commit_tables(
        self, number: int, table: pa.Table, index: pa.Table, error: CodecError | None, *,
        rejects: Sequence[Reject] = (), inputs: str = "",
    ) -> ManifestEntry:  # fmt: skip
        """Store one unit whose payload and index are made: rows of another dataset, say."""
        ids = index["id"].to_pylist()
        self._refuse_twice(ids)
        name = self.shard_name(number)
        files: dict[str, FileInfo] = {}
        with storage_errors(self.root):
            files[f"data/{name}.arrow"] = self._write_arrow(f"data/{name}.arrow", table)
            files[f"index/{name}.parquet"] = self._write_parquet(f"index/{name}.parquet", index)
            if rejects:
                refused = [{**vars(reject), "source": self.source} for reject in rejects]
                (self.root / "rejects").mkdir(exist_ok=True)
                path = f"rejects/{name}.parquet"
                files[path] = self._write_parquet(path, pa.Table.from_pylist(refused, schema=rejects_schema()))
            entry = ManifestEntry(
                name=name,
                source=self.source,
                unit=number,
                rows=table.num_rows,
                tokens=pc.sum(index["num_tokens"]).as_py() or 0,
                target_tokens=pc.sum(index["num_target_tokens"]).as_py() or 0,
                rejected=len(rejects),
                inputs=inputs,
                files=files,
                codec_error=error,
            )
            append_entry(self.root, entry)
        self.committed[number] = entry
        self._ids.update(ids)
        return entry

    def finish(self, num_units: int) -> None:
        """Mark the source complete with `num_units` units; its manifest lines come into the order of units."""
        with storage_errors(self.root):
            order_manifest(self.root, self.source)
            self._write_info(self._source_info.model_copy(update={"num_units": num_units}))

    def _write_arrow(self, relative: str, table: pa.Table) -> FileInfo:
        path = self.root / f"{relative}.tmp"
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, table.schema, options=options) as writer,
        ):
            lengths = pc.list_value_length(table["input_ids"]).to_numpy()
            for begin in range(0, table.num_rows, ROWS_PER_BATCH):
                rows = rows_per_batch(lengths[begin : begin + ROWS_PER_BATCH])
                part = table.slice(begin, ROWS_PER_BATCH).combine_chunks()
                writer.write_table(part, max_chunksize=rows)
        return self._settle(relative)

    def _write_parquet(self, relative: str, table: pa.Table) -> FileInfo:
        pq.write_table(table, self.root / f"{relative}.tmp", compression="zstd")
        return self._settle(relative)

    def _settle(self, relative: str) -> FileInfo:
        """Flush, digest and rename a temporary file."""
        temporary = self.root / f"{relative}.tmp"
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        os.replace(temporary, self.root / relative)
        sync_directory((self.root / relative).parent)
        return FileInfo(sha256=digest, bytes=size)


def lock_of(root: Path) -> FileLock:
    """The lock of whoever writes to a dataset: beside it, not in it, as a lock is no part of what is shared."""
    place = root.resolve()  # one lock however the folder is named: relative, ".", through a link
    return FileLock(place.parent / f".{place.name}.lock")


def rows_per_batch(lengths: np.ndarray) -> int:
    """Into how many rows ROWS_PER_BATCH rows of these token counts are cut, so that a record batch stays small."""
    rows = ROWS_PER_BATCH
    while rows > 1 and int(lengths.sum()) * rows > TOKENS_PER_BATCH * ROWS_PER_BATCH:
        rows //= 2
    return rows


def _refuse_foreign(root: Path) -> None:
    """Refuse to begin a dataset among other files, or beside a manifest whose dataset.json is gone."""
    if (root / "manifest.jsonl").exists():
        raise CorruptError(f"{root} has a manifest but no dataset.json; restore it from a copy of the dataset")
    names = sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) if root.exists() else []
    foreign = [name for name in names if name not in BEGUN]
    if foreign:
        raise ConfigError(f"{root} is no dataset and holds other things ({foreign[0]!r}); name a new or empty folder")


def _committed_ids(root: Path, manifest: list[ManifestEntry]) -> set[str]:
    """Ids of all rows that are committed, of every source. Raises CorruptError at an index that cannot be read."""
    ids: set[str] = set()
    for entry in manifest:
        path = inside(root, f"index/{entry.name}.parquet")
        try:
            ids.update(pq.read_table(path, columns=["id"])["id"].to_pylist())
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise CorruptError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); restore it from a copy of the dataset"
            ) from error
    return ids


def _refuse_difference(what: str, before: dict, after: dict, root: Path) -> None:
    difference = settings_difference(before, after)
    if difference:
        raise MismatchError(
            f"{root}: {what} was begun with other settings (before -> now):\n{difference}\n"
            "Use the former settings to go on, or another folder (or source name) for the new ones."
        )


class Behind:
    """Commits units in order on a thread of its own, one behind the teacher: encoding and hashing overlap the engine.

    A context manager; what a commit raises is raised by the next call, or at the end.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdata-commit")
        self._pending: Future[ManifestEntry] | None = None

    def __enter__(self) -> Behind:
        return self

    def commit(self, unit: Unit) -> None:
        """Hand one unit over, once the one before is committed. Raises what that one raised."""
        self.wait()
        self._pending = self._thread.submit(self._writer.commit, unit)

    def wait(self) -> None:
        """Return when everything handed over is committed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # After an error of the teacher what was read before it is still committed; the teacher's error is the one told.
            with suppress(Exception) if kind else nullcontext():
                self.wait()
        finally:
            self._thread.shutdown()


@contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Turn an OSError of the disk into one StorageError that names cause and remedy."""
    remedies = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "no permission to write there; choose another folder",
        errno.EPERM: "no permission to write there; choose another folder",
        errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
    }
    try:
        yield
    except OSError as error:
        if isinstance(error, KdataError) or error.errno is None:
            raise
        remedy = remedies.get(error.errno) or f"{os.strerror(error.errno)}; see to that"
        raise StorageError(
            f"cannot write {error.filename or root}: {remedy}, then run the same command again. "
            "What was committed is intact."
        ) from error


def new_info(**fields: object) -> DatasetInfo:
    """Build a DatasetInfo whose fingerprint is that of its identity."""
    draft = DatasetInfo.model_validate({**fields, "sources": {}, "fingerprint": ""})
    return draft.model_copy(update={"fingerprint": fingerprint(draft.identity())})


def shard_tables(unit: Unit, name: str, source: str, info: DatasetInfo):
    """Return payload table, index table and measured codec error of one unit."""
    records = unit.records
    ids = [record.id for record in records]
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"id {twice!r} stands twice in the input; ids must be unique")
    for record in records:
        _check_record(record, info)
    lengths = np.array([len(record.token_ids) for record in records], np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    kept = Kept.concatenate([record.kept for record in records])
    tail = np.concatenate([r.log_tail for r in records] or [np.zeros(0)]).astype(np.float32)
    entries, stored = codecs.to_columns(kept, tail, offsets, info.codec)
    comparison = codecs.compare(kept, stored, info.codec)
    error = comparison.error
    if info.codec.id != "verbatim":
        _check_mass(comparison.true_mass, offsets, ids)
    if error is not None and error.max_sum > 1.0 and info.codec.id != "verbatim":
        raise DataError(
            f"{name}: kept probabilities would sum to {error.max_sum} > 1; the teacher's output is not a distribution"
        )
    entropy = [r.entropy if r.entropy is not None else np.full(len(r.token_ids), np.nan) for r in records]
    columns = {
        "id": pa.array(ids, pa.string()),
        "input_ids": _lists(offsets, [r.token_ids for r in records], pa.int32()),
        "target_mask": _lists(offsets, [r.target_mask for r in records], pa.bool_()),
        "logprob": _lists(offsets, [r.logprob for r in records], pa.float16()),
        "rank": _lists(offsets, [r.rank for r in records], pa.int32()),
        "log_tail": _lists(offsets, [r.log_tail for r in records], pa.float32()),
        "log_z": _nullable_lists([None if r.log_z is None else r.log_z.reshape(-1) for r in records], pa.float32()),
        "entropy": _lists(offsets, entropy, pa.float16()),
        "num_exact": _lists(offsets, [r.kept.num_exact for r in records], pa.uint16()),
        "num_drawn": _lists(offsets, [r.kept.num_drawn for r in records], pa.uint16()),
        "token_bytes": _nullable_lists([r.token_bytes for r in records], pa.uint16()),
        **entries,
    }
    for absent in set(payload_schema(info.codec.id).names) - columns.keys():
        columns[absent] = pa.nulls(len(records), payload_schema(info.codec.id).field(absent).type)
    schema = payload_schema(info.codec.id).with_metadata(
        {
            "kdata.format_version": info.format_version,
            "kdata.codec": canonical_json(info.codec.model_dump()),
            "kdata.vocab_size": str(info.vocab_size),
            "kdata.tail": info.tail,
        }
    )
    table = pa.table(columns, schema=schema)
    mass = comparison.stored_mass
    rows = [_index_row(r, name, source, i, mass[offsets[i] : offsets[i + 1]]) for i, r in enumerate(records)]
    return table, pa.Table.from_pylist(rows, schema=index_schema()), error


def _check_record(record: Record, info: DatasetInfo) -> None:
    tokens = len(record.token_ids)
    for field_name in ("target_mask", "logprob", "rank", "log_tail"):
        if len(getattr(record, field_name)) != tokens:
            raise DataError(
                f"{record.id}: {field_name} has {len(getattr(record, field_name))} values for {tokens} tokens"
            )
    if len(record.kept.num_kept) != tokens:
        raise DataError(f"{record.id}: kept entries cover {len(record.kept.num_kept)} of {tokens} positions")
    if tokens and (record.target_mask[0] or record.kept.num_kept[0]):
        raise DataError(f"{record.id}: position 0 cannot be a target, nothing predicts it")
    for what, values in (("token", record.token_ids), ("kept", record.kept.ids)):
        if len(values) and (values.min() < 0 or values.max() >= info.vocab_size):
            raise DataError(f"{record.id}: a {what} id lies outside [0, {info.vocab_size})")
    if info.tail != "absent" and not np.isfinite(record.logprob[record.target_mask]).all():
        raise DataError(f"{record.id}: a target position has no finite teacher log-probability")
    exact, as_given = record.kept.logprobs[~record.kept.is_draw], info.codec.id == "verbatim"
    if not np.isfinite(record.kept.logprobs).all() or ((exact > 1e-5).any() and not as_given):
        raise DataError(f"{record.id}: a kept log-probability is not a finite number <= 0")
    if record.kept.num_kept.max(initial=0) > np.iinfo(np.uint16).max:
        raise DataError(f"{record.id}: {record.kept.num_kept.max()} entries at a position, the format holds 65,535")


def _check_mass(mass_T: np.ndarray, offsets: np.ndarray, ids: list[str]) -> None:
    worst = int(mass_T.argmax()) if len(mass_T) else 0
    if len(mass_T) and mass_T[worst] > 1 + MASS_SLACK:
        row = int(np.searchsorted(offsets, worst, side="right")) - 1
        raise DataError(
            f"{ids[row]}: kept probabilities sum to {mass_T[worst]:.4f} > 1; the teacher's output is not a distribution"
        )


def _index_row(record: Record, name: str, source: str, row: int, mass_T: np.ndarray) -> dict[str, object]:
    target = record.target_mask
    counted = int(target.sum())
    entropy = record.entropy
    nll = float(-record.logprob[target].astype(np.float64).mean()) if counted else None
    return {
        "id": record.id,
        "content_hash": content_hash(record.token_ids),
        "domain": record.domain,
        "source": source,
        "origin": record.origin,
        "license": record.license,
        "num_tokens": len(record.token_ids),
        "num_target_tokens": counted,
        "num_bytes": len((record.text or "").encode()),
        "text": record.text,
        "prompt": record.prompt,
        "finish_reason": record.finish_reason,
        "nll": nll if nll is not None and np.isfinite(nll) else None,
        "mean_entropy": float(entropy[target].mean(dtype=np.float64)) if counted and entropy is not None else None,
        "kept_mass": float(mass_T[target].mean()) if counted else None,
        "shard": name,
        "row": row,
    }


def _lists(offsets: np.ndarray, parts: list[np.ndarray], item: pa.DataType) -> pa.Array:
    values = np.concatenate(parts) if parts else np.zeros(0)
    array = pa.array(values.astype(item.to_pandas_dtype(), copy=False), item)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), array, type=pa.list_(pa.field("item", item, nullable=False))
    )


def _nullable_lists(parts: list[np.ndarray | None], item: pa.DataType) -> pa.Array:
    kind = pa.list_(pa.field("item", item, nullable=False))
    return pa.array([None if part is None else part.tolist() for part in parts], kind)

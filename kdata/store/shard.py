"""Write one shard: the result of a work unit becomes two or three files, each whole or not at all.

Files are written under temporary names, flushed to disk and renamed. They hold nothing that depends on the clock or the
machine, so the same unit always gives the same bytes. The manifest decides which shards belong to a dataset
(`kdata.store.writer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdata.errors import DataError, ShapeError
from kdata.format import codec as codecs
from kdata.format.files import file_info, new_file, settle, storage_errors
from kdata.format.json_text import parse_json
from kdata.format.kept import Kept
from kdata.format.records import Record, Reject, RowError, Shard, UnitResult
from kdata.format.schema import (
    CodecError,
    CodecInfo,
    DatasetInfo,
    FileInfo,
    ManifestEntry,
    canonical_json,
    content_hash,
    index_schema,
    payload_schema,
    rejects_schema,
    shard_files,
    shard_name,
)
from kdata.format.stored import IDS_KEY, readable_schema, to_stored
from kdata.store.index import UNREADABLE, damaged, read_index, read_part

# Random access decompresses a whole record batch: 32 rows, or 16, 8, ... 1 where 32 rows hold more than
# TOKENS_PER_BATCH tokens. Always 32 divided by a power of two, so that blocks of 32 rows (the loader's unit of
# shuffling) never share a record batch. Smaller batches cost bytes: 1 and 2 % at 4,096 and 2,048 tokens, 13 to 25 % for
# single rows (64 kept entries; 16 + 16).
ROWS_PER_BATCH, TOKENS_PER_BATCH = 32, 8192
# Of a row group of the index, before compression. The Hub's viewer reads whole groups, 100 rows at a time, and gives up at
# 300,000,000 bytes. Documents of 32,768 tokens to a shard stay far below; one very long document, or an import, may not.
GROUP_BYTES = 64 << 20
MASS_SLACK = 1e-3  # a float32 softmax sums to 1 within 1e-6; a larger sum than 1 + 1e-3 is not a distribution
# Level 1: higher levels look for matches, and these make the entropy-coded planes larger (93 against 90 bytes per token for
# 64 ids).
_COMPRESSED = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))


def write_shard(root: Path, info: DatasetInfo, source: str, unit: UnitResult) -> Shard:
    """Write a unit's payload, index and rejects; the manifest is not touched.

    Raises:
        DataError: the teacher's output is not a distribution, or an id occurs twice in the unit.
        StorageError: the disk refused.
    """
    table, index, error = shard_tables(unit, shard_name(source, unit.number), source, info)
    return write_tables(root, info, source, unit.number, table, index, error, rejects=unit.rejects, inputs=unit.inputs)


def write_tables(
    root: Path, info: DatasetInfo, source: str, number: int, table: pa.Table, index: pa.Table, error: CodecError | None,
    *, rejects: Sequence[Reject] = (), inputs: str = "", work_digest: str | None = None,
) -> Shard:  # fmt: skip
    """The same from a payload table and an index table, for instance rows of another dataset.

    Args:
        info: of the dataset that the shard becomes part of; it has the source.
        table: whatever its metadata names, the shard is bound to `info`.
        work_digest: of the inputs that the rows were made from; by default those that the source has now.
    """
    name, work = shard_name(source, number), work_digest or info.sources[source].work_digest
    paths = shard_files(name)
    files: dict[str, FileInfo] = {}
    with storage_errors(root):
        for folder in ("data", "index", *(["rejects"] if rejects else [])):
            (root / folder).mkdir(exist_ok=True)  # but not `root`: see kdata.store.staging
        files[paths["data"]] = write_payload(root, paths["data"], table, info, work)
        files[paths["index"]] = _write_parquet(root, paths["index"], index)
        if rejects:
            refused = [{**vars(reject), "source": source} for reject in rejects]
            rejected = pa.Table.from_pylist(refused, schema=rejects_schema())
            files[paths["rejects"]] = _write_parquet(root, paths["rejects"], rejected)
    entry = ManifestEntry(
        name=name,
        source=source,
        unit=number,
        rows=table.num_rows,
        tokens=pc.sum(index["num_tokens"]).as_py() or 0,
        target_tokens=pc.sum(index["num_target_tokens"]).as_py() or 0,
        kept_positions=kept_positions_of(table) if info.codec.keeps_some_positions else None,
        rejected=len(rejects),
        inputs=inputs,
        files=files,
        codec_error=error,
        identity_digest=info.identity_digest,
        work_digest=work,
    )
    return Shard(entry, index["id"].to_pylist(), _kept_mass(index, entry))


def stored_shard(root: Path, entry: ManifestEntry) -> Shard:
    """A shard that an earlier run wrote, from its index. Raises CorruptError where it cannot be read."""
    index = read_index(root / f"index/{entry.name}.parquet", ["id", "kept_mass", "num_target_tokens"])
    return Shard(entry, index["id"].to_pylist(), _kept_mass(index, entry))


def stored_rejects(root: Path, entry: ManifestEntry) -> list[Reject]:
    """The rejects of a shard that an earlier run wrote. Raises CorruptError where they cannot be read."""
    if not entry.rejected:
        return []
    path = root / f"rejects/{entry.name}.parquet"
    try:
        rows = read_part(path, rejects_schema(), ["id", "domain", "reason", "detail"])
    except UNREADABLE as error:
        raise damaged(path, error) from error
    return [Reject(**row) for row in rows.to_pylist()]


def _kept_mass(index: pa.Table, entry: ManifestEntry) -> float | None:
    """Mean kept mass of a shard: of rows that keep something, by their target tokens; None where it is not known."""
    counts = pc.if_else(pc.is_valid(index["kept_mass"]), index["num_target_tokens"], 0)
    weighted, targets = pc.sum(pc.multiply(index["kept_mass"], counts)).as_py(), pc.sum(counts).as_py()
    return weighted / targets if weighted is not None and targets else None


def kept_positions_of(table: pa.Table) -> int:
    """Targets of a payload table that have entries."""
    target_T, exact_T, drawn_T = (
        table[name].combine_chunks().flatten() for name in ("target_mask", "num_exact", "num_drawn")
    )
    kept: int | None = pc.sum(pc.and_(target_T, pc.or_(pc.greater(exact_T, 0), pc.greater(drawn_T, 0)))).as_py()
    return kept or 0


def write_payload(root: Path, relative: str, table: pa.Table, info: DatasetInfo, work_digest: str) -> FileInfo:
    """Write a payload table with the columns of `readable_schema`, as the codec of `info` stores it and bound to `info`."""
    lengths, footer = pc.list_value_length(table["input_ids"]).to_numpy(), None
    if info.codec.is_coded:
        # Without the columns' descriptions: 12 kB of a shard, half a byte a token in one of 25,000 tokens.
        schema = pa.schema([field.remove_metadata() for field in payload_schema(info.codec.id, info.codec.version)])
        table, common_ids = to_stored(table, info.vocab_size, schema)
        footer = {IDS_KEY: common_ids}
    table = table.replace_schema_metadata(header_of(info, work_digest))
    with (
        new_file(root / f"{relative}.tmp") as file,
        pa.ipc.new_file(file, table.schema, options=_COMPRESSED, metadata=footer) as writer,
    ):
        for begin in range(0, table.num_rows, ROWS_PER_BATCH):
            rows = rows_per_batch(lengths[begin : begin + ROWS_PER_BATCH])
            part = table.slice(begin, ROWS_PER_BATCH).combine_chunks()
            writer.write_table(part, max_chunksize=rows)
    return _settle(root, relative)


def _write_parquet(root: Path, relative: str, table: pa.Table) -> FileInfo:
    with new_file(root / f"{relative}.tmp") as file:
        write_parquet(table, file)
    return _settle(root, relative)


def write_parquet(table: pa.Table, file: BinaryIO) -> None:
    """Write a part of the index or of the rejects: row groups of at most GROUP_BYTES, a larger row in one of its own."""
    table = table.combine_chunks()
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        for begin, end in row_groups(row_bytes(table), GROUP_BYTES):
            writer.write_table(table.slice(begin, end - begin), row_group_size=max(end - begin, 1))


def row_bytes(table: pa.Table) -> np.ndarray:
    """Bytes of the texts of each row, int64 [rows]; numbers, 8 bytes each at most, are counted with them."""
    sizes = np.full(table.num_rows, 8 * table.num_columns, np.int64)
    for name, field in zip(table.column_names, table.schema, strict=True):
        if pa.types.is_string(field.type) and table.num_rows:
            sizes += pc.fill_null(pc.binary_length(table[name]), 0).to_numpy()
    return sizes


def row_groups(bytes_R: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Begin and end of runs of rows that have at most `most` bytes, or are a single row; one empty run of no rows."""
    groups, begin, filled = [], 0, 0
    for row, size in enumerate(bytes_R.tolist()):
        if filled + size > most and row > begin:
            groups.append((begin, row))
            begin, filled = row, 0
        filled += size
    return [*groups, (begin, len(bytes_R))]


def _settle(root: Path, relative: str) -> FileInfo:
    """Give a temporary file its name; return its digest and size."""
    temporary = root / f"{relative}.tmp"
    info = file_info(temporary)
    settle(temporary, root / relative)
    return info


def rows_per_batch(lengths: np.ndarray) -> int:
    """Rows of a record batch, at most ROWS_PER_BATCH, for rows of these token counts."""
    rows = ROWS_PER_BATCH
    while rows > 1 and int(lengths.sum()) * rows > TOKENS_PER_BATCH * ROWS_PER_BATCH:
        rows //= 2
    return rows


def shard_tables(
    unit: UnitResult, name: str, source: str, info: DatasetInfo
) -> tuple[pa.Table, pa.Table, CodecError | None]:
    """Payload table, index table and measured codec error of one unit."""
    records = unit.records
    ids = [record.id for record in records]
    if len(set(ids)) != len(ids):
        repeated = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"id {repeated!r} occurs twice in the input; ids must be unique")
    for record in records:
        check_record(record, info.vocab_size, imported=info.tail == "absent")
    lengths = np.array([len(record.token_ids) for record in records], np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    kept = Kept.concatenate([record.kept for record in records])
    tail = np.concatenate([r.log_tail for r in records] or [np.zeros(0)]).astype(np.float32)
    entries, stored = codecs.to_columns(kept, tail, offsets, info.codec)
    comparison = codecs.compare(kept, stored, info.codec)
    error = comparison.error
    if error is not None and not np.isfinite([error.max_nats, error.kl_nats]).all():
        own = np.flatnonzero(~np.isfinite(stored.logprobs[~stored.is_draw]))[0]
        place = int(np.searchsorted(np.cumsum(stored.num_exact), own, side="right"))
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        raise DataError(
            f"{ids[row]}: the exact entries of token {place - offsets[row]} have too little mass to be stored beside a tail "
            f"of {np.exp(np.float64(tail[place])):.17g}, by codec {info.codec.id} {info.codec.version}; keep a likelier "
            "entry there, or none"
        )
    if info.codec.id != "verbatim":
        _check_mass(comparison.true_mass, offsets, ids)
    if error is not None and error.max_sum > 1.0 and info.codec.id != "verbatim":
        raise DataError(
            f"{name}: kept probabilities would sum to {error.max_sum} > 1; the teacher's output is not a distribution"
        )
    schema = readable_schema(info.codec.id, info.codec.version)
    item = {name: schema.field(name).type.value_type for name in ("logprob", "entropy")}
    columns = {
        "id": pa.array(ids, pa.string()),
        "input_ids": _lists(offsets, [r.token_ids for r in records], pa.int32()),
        "target_mask": _lists(offsets, [r.target_mask for r in records], pa.bool_()),
        "logprob": _lists(offsets, [r.logprob for r in records], item["logprob"]),
        "rank": _lists(offsets, [r.rank for r in records], pa.int32()),
        "log_tail": _lists(offsets, [tail], pa.float32()),
        "log_z": _nullable_lists([None if r.log_z is None else r.log_z.reshape(-1) for r in records], pa.float32()),
        "entropy": _lists(offsets, [r.entropy for r in records], item["entropy"]),
        "num_exact": _lists(offsets, [r.kept.num_exact for r in records], pa.uint16()),
        "num_drawn": _lists(offsets, [r.kept.num_drawn for r in records], pa.uint16()),
        "token_bytes": _nullable_lists([r.token_bytes for r in records], pa.uint16()),
        **entries,
    }
    for absent in set(schema.names) - columns.keys():
        columns[absent] = pa.nulls(len(records), schema.field(absent).type)
    table = pa.table(columns, schema=schema)
    mass, some = comparison.stored_mass, info.codec.keeps_some_positions
    rows = [_index_row(r, name, source, i, mass[offsets[i] : offsets[i + 1]], some) for i, r in enumerate(records)]
    return table, pa.Table.from_pylist(rows, schema=index_schema()), error


def header_of(info: DatasetInfo, work_digest: str) -> dict[str, bytes]:
    """Metadata of a shard: what a reader must know of the dataset that it belongs to, and the work that wrote it."""
    return {
        "kdata.format_version": info.format_version.encode(),
        "kdata.codec": canonical_json(info.codec.model_dump()),
        "kdata.vocab_size": str(info.vocab_size).encode(),
        "kdata.tail": info.tail.encode(),
        "kdata.fingerprint": info.identity_digest.encode(),
        "kdata.work_digest": work_digest.encode(),
    }


def fits(path: Path, own: DatasetInfo, entry: ManifestEntry, other: DatasetInfo) -> bool:
    """Whether a payload of the dataset `own` can be one of `other` as it is: it names that dataset, or none.

    Raises CorruptError where it is not the payload of `own` that the manifest line says.
    """
    try:
        reader = pa.ipc.open_file(pa.OSFile(str(path)))
        check_header(reader, own, entry)
    except UNREADABLE as error:
        raise damaged(path, error) from error
    return (reader.schema.metadata or {}).get(b"kdata.fingerprint") in (None, other.identity_digest.encode())


def bind_payload(path: Path, target: Path, info: DatasetInfo, work_digest: str) -> None:
    """Copy a payload, record batch by record batch and without decoding it, with metadata that bind it to `info`.

    Raises CorruptError where its bytes cannot be decompressed.
    """
    try:
        reader = pa.ipc.open_file(pa.OSFile(str(path)))
        schema = reader.schema.with_metadata(header_of(info, work_digest))
        with (
            pa.OSFile(str(target), "wb") as file,
            pa.ipc.new_file(file, schema, options=_COMPRESSED, metadata=reader.metadata) as writer,
        ):
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    except pa.ArrowException as error:
        raise damaged(path, error) from error


def check_header(reader: pa.ipc.RecordBatchFileReader, info: DatasetInfo, entry: ManifestEntry) -> None:
    """Compare the schema of a stored shard, the metadata and the number of its record batches with dataset and manifest line.

    Raises:
        ShapeError: a column is missing or has another type, or the shard was written for another codec, vocabulary or tail,
            for another dataset, or by other work; or there are more record batches than rows.
    """
    schema = reader.schema
    if reader.num_record_batches > max(entry.rows, 1):  # each takes time, whatever is in it
        raise ShapeError(f"it has {reader.num_record_batches:,} record batches for {entry.rows:,} rows")
    expected = payload_schema(info.codec.id, info.codec.version)
    for field in expected:
        place = schema.get_field_index(field.name)
        if place < 0 and not field.nullable:
            raise ShapeError(f"it has no column {field.name}, or more than one")
        if place >= 0 and not _same_type(schema.field(place).type, field.type):
            raise ShapeError(f"column {field.name} is {schema.field(place).type}, not {field.type}")
    stored = {key.decode(errors="replace"): value for key, value in (schema.metadata or {}).items()}
    expected_header = header_of(info, entry.work_digest or "")
    unread = {"kdata.format_version"}
    if not entry.is_bound:  # of an older version, or one that an older version has written into the manifest again
        unread |= {"kdata.work_digest"} | ({"kdata.fingerprint"} - stored.keys())
    for key, value in expected_header.items():
        if key not in unread and _parsed(key, stored.get(key)) != _parsed(key, value):
            if key == "kdata.work_digest":
                raise ShapeError(
                    "it was written by other work, of another corpus or settings, than its manifest line says"
                )
            raise ShapeError(
                f"it was written for another dataset: its {key.removeprefix('kdata.')} is not that of dataset.json"
            )


def _same_type(stored: pa.DataType, expected: pa.DataType) -> bool:
    """Whether lists hold the same kind of value, whatever is said about nulls."""
    if pa.types.is_list(expected):
        return isinstance(stored, pa.ListType) and bool(stored.value_type == expected.value_type)
    return bool(stored == expected)


def _parsed(key: str, value: bytes | None) -> object:
    """A value of the metadata; of the codec what this kdata knows of it. None where it is not readable."""
    if key != "kdata.codec" or value is None:
        return value
    try:
        return CodecInfo.model_validate(parse_json(value))
    except ValueError:
        return None


def check_record(record: Record, vocab_size: int, *, imported: bool = False) -> None:
    """Refuse a record that cannot be stored.

    Args:
        imported: rows of another tool: their log-probabilities may be unknown or above 0.
    Raises:
        RowError: ids outside the vocabulary, numbers that are no distribution's, or too many entries, with the reason.
        DataError: arrays that do not belong together.
    """
    tokens = len(record.token_ids)
    for field_name in ("target_mask", "logprob", "rank", "log_tail", "entropy"):
        if len(getattr(record, field_name)) != tokens:
            raise DataError(
                f"{record.id}: {field_name} has {len(getattr(record, field_name))} values for {tokens} tokens"
            )
    if len(record.kept.num_kept) != tokens:
        raise DataError(f"{record.id}: kept entries cover {len(record.kept.num_kept)} of {tokens} positions")
    if tokens and (record.target_mask[0] or record.kept.num_kept[0]):
        raise DataError(f"{record.id}: position 0 cannot be a target, because nothing predicts it")
    for what, values in (("token", record.token_ids), ("kept", record.kept.ids)):
        if len(values) and (values.min() < 0 or values.max() >= vocab_size):
            raise RowError("teacher_failed", f"{record.id}: a {what} id lies outside [0, {vocab_size})")
    if not imported and not np.isfinite(record.logprob[record.target_mask]).all():
        raise RowError("not_finite", f"{record.id}: a target position has no finite teacher log-probability")
    exact = record.kept.logprobs[~record.kept.is_draw]
    if not np.isfinite(record.kept.logprobs).all() or ((exact > 1e-5).any() and not imported):
        raise RowError("not_finite", f"{record.id}: a kept log-probability is not a finite number <= 0")
    if record.kept.num_kept.max(initial=0) > np.iinfo(np.uint16).max:
        detail = f"{record.id}: {record.kept.num_kept.max()} entries at a position, the format holds 65,535"
        raise RowError("teacher_failed", detail)


def _check_mass(mass_T: np.ndarray, offsets: np.ndarray, ids: list[str]) -> None:
    worst = int(mass_T.argmax()) if len(mass_T) else 0
    if len(mass_T) and mass_T[worst] > 1 + MASS_SLACK:
        row = int(np.searchsorted(offsets, worst, side="right")) - 1
        raise DataError(
            f"{ids[row]}: kept probabilities sum to {mass_T[worst]:.4f} > 1; the teacher's output is not a distribution"
        )


def _index_row(
    record: Record, name: str, source: str, row: int, mass_T: np.ndarray, keeps_some: bool
) -> dict[str, object]:
    target = record.target_mask
    kept = target & (record.kept.num_kept > 0) if keeps_some else target
    counted = int(target.sum())
    nll = float(-record.logprob[target].astype(np.float64).mean()) if counted else np.nan
    entropy = float(record.entropy[target].mean(dtype=np.float64)) if counted else np.nan
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
        "messages": record.messages,
        "tools": record.tools,
        "prompt": record.prompt,
        "finish_reason": record.finish_reason,
        "nll": nll if np.isfinite(nll) else None,
        "mean_entropy": entropy if np.isfinite(entropy) else None,
        "kept_mass": float(mass_T[kept].mean()) if kept.any() else None,
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

"""Read the record batches of a shard's payload: columns as readers know them, each only where it is needed.

The one place where stored columns become readable ones (`kdata.format.stored`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from kdata.errors import ShapeError
from kdata.format.common_ids import LARGEST, CommonIds
from kdata.format.schema import CodecInfo
from kdata.format.stored import IDS_KEY, from_stored, readable_names, readable_schema, stored_names


class PayloadReader:
    """Some columns of one shard.

    columns: names as readers know them; those that the shard lacks are left out.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        source = pa.OSFile(str(path))
        whole = pa.ipc.open_file(source)
        schema, self._is_coded = whole.schema, "exact_codes" in whole.schema.names
        # A table of the whole vocabulary, so only where an id of an entry is wanted.
        needs_ids = self._is_coded and not {"exact_ids", "draw_ids"}.isdisjoint(columns)
        self._common = common_ids(whole) if needs_ids else None
        wanted = stored_names(columns) if self._is_coded else list(columns)
        # Each column costs 20 microseconds per record batch.
        fields = [place for place in map(schema.get_field_index, wanted) if place >= 0]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        self._reader = pa.ipc.open_file(source, options=options)
        there = readable_names(schema.names) if self._is_coded else schema.names
        self._columns = [name for name in columns if name in there]

    @property
    def num_record_batches(self) -> int:
        """Record batches of the shard."""
        number: int = self._reader.num_record_batches
        return number

    def batch(self, number: int) -> pa.RecordBatch:
        """Decompress one record batch. pyarrow checks it wholly before anything reads its buffers by their offsets.

        Raises:
            ShapeError: codes, bits and counts disagree.
            pyarrow.ArrowException: the bytes are damaged.
        """
        batch = self._reader.get_batch(number)
        batch.validate(full=True)
        return from_stored(batch, self._columns, self._common) if self._is_coded else batch


def common_ids(reader: pa.ipc.RecordBatchFileReader) -> CommonIds | None:
    """The order of ids that a shard's codes stand for; None where ids are stored whole.

    Raises ShapeError where its metadata lacks it, or it is none.
    """
    if "exact_codes" not in reader.schema.names:
        return None
    metadata = reader.metadata or {}
    size = (reader.schema.metadata or {}).get(b"kdata.vocab_size", b"")
    if not size.isdigit() or len(size) > 8 or not 1 < int(size) <= LARGEST + 1:
        raise ShapeError("its metadata names no vocabulary size that its codes can have")
    if IDS_KEY not in metadata:
        raise ShapeError("its metadata lacks the common ids that its codes stand for")
    return CommonIds.from_bytes(metadata[IDS_KEY], int(size))


def used_columns(path: Path) -> list[str]:
    """Columns that a decoder reads, without those that are null throughout (the first record batch decides)."""
    reader = pa.ipc.open_file(pa.OSFile(str(path)))
    unused = {"id", "token_bytes"}
    names = reader.schema.names
    if reader.num_record_batches:
        first = reader.get_batch(0)
        first.validate(full=True)
        names = [name for name in names if not first.column(name).null_count == first.num_rows > 0]
    if "exact_codes" in reader.schema.names:
        names = readable_names(names)
    return [name for name in names if name not in unused]


def read_payload(path: Path, codec: CodecInfo) -> pa.Table:
    """A whole shard with every column that readers know, see `readable_schema`."""
    reader = pa.ipc.open_file(pa.OSFile(str(path)))
    common = common_ids(reader)
    if common is None:
        table = reader.read_all()
        table.validate(full=True)
        return table
    schema = readable_schema(codec.id, codec.version)
    batches = []
    for number in range(reader.num_record_batches):
        stored = reader.get_batch(number)
        stored.validate(full=True)
        made = from_stored(stored, schema.names, common)
        batches.append(pa.record_batch(made.columns, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)

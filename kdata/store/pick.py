"""Copy rows of a shard into new payload and index tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kdata.format.schema import CodecInfo, ManifestEntry, index_schema
from kdata.format.stored import as_earlier
from kdata.store.dataset import Dataset
from kdata.store.index import UNREADABLE, damaged, read_index
from kdata.store.payload import read_payload
from kdata.store.shard import check_header


def renamed(table: pa.Table, shard: str, source: str) -> pa.Table:
    """The table with other values in its columns `shard` and `source`, where it has them."""
    for column, value in (("shard", shard), ("source", source)):
        place = table.schema.get_field_index(column)
        if place >= 0:
            table = table.set_column(place, table.schema.field(place), pa.array([value] * table.num_rows, pa.string()))
    return table


def tables(
    dataset: Dataset, entry: ManifestEntry, local: np.ndarray, name: str, codec: CodecInfo | None = None
) -> tuple[pa.Table, pa.Table]:
    """Payload and index of some rows of a shard, their entries not decoded, to be written as the shard `name`.

    Args:
        codec: of the dataset that they are written to; None: the same. An earlier version of the same codec will do.
    """
    data, index_path = dataset.checked_file(entry, "data"), dataset.checked_file(entry, "index")
    chosen = pa.array(local)
    try:
        check_header(pa.ipc.open_file(pa.OSFile(str(data))), dataset.info, entry)
        payload = read_payload(data, dataset.info.codec).take(chosen)
        index = read_index(index_path, index_schema().names).take(chosen)
    except UNREADABLE as error:
        raise damaged(data, error) from error
    index = renamed(index, name, entry.source).drop_columns("row")
    index = index.append_column(index_schema().field("row"), pa.array(np.arange(len(local)), pa.int32()))
    if codec is not None and dataset.info.codec.is_coded and not codec.is_coded:
        payload = as_earlier(payload, codec)
    return payload.combine_chunks(), index.select(index_schema().names).cast(index_schema())

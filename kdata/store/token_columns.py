"""Columns of a dataset with a number for each token, read alone: the kept entries stay compressed on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kdata.format.sequences import flat
from kdata.store.dataset import Dataset
from kdata.store.index import UNREADABLE, damaged
from kdata.store.payload import PayloadReader

COUNTS = ("num_exact", "num_drawn")  # columns that `has_entries` reads


@dataclass(frozen=True)
class TokenColumns:
    """The rows of one record batch: S rows of T tokens, laid end to end.

    shard, batch: which record batch. first_row: global number of its first row. offsets: int64 [S+1], where the tokens of
    each row begin. values: numbers [T] by column; of a row that lacks them none is here, and `known` says so. known: bool
    [S] by column.
    """

    shard: int
    batch: int
    first_row: int
    offsets: np.ndarray
    values: dict[str, np.ndarray]
    known: dict[str, np.ndarray]


def token_columns(dataset: Dataset, columns: list[str], wanted: np.ndarray) -> Iterator[TokenColumns]:
    """Read some columns of the payload, a record batch at a time, in the order of rows.

    Args:
        columns: names of list columns with a value for each token, `target_mask` among them.
        wanted: bool [R], global rows; a record batch without any of them is left out.
    Raises:
        CorruptError: a shard is not what was committed.
    """
    for shard, entry in enumerate(dataset.manifest):
        begin, end = (int(row) for row in dataset.shard_starts[shard : shard + 2])
        if not wanted[begin:end].any():
            continue
        dataset.locate(np.array([begin]))  # checks the shard
        path = dataset.shard_file(entry, "data")
        try:
            reader = PayloadReader(path, columns)
            dataset.checked_file(entry, "data")  # after it is open, see `Dataset.record_batch`
            for batch in range(reader.num_record_batches):
                part = reader.batch(batch)
                if wanted[begin : begin + part.num_rows].any():
                    yield _flat(shard, batch, begin, part)
                begin += part.num_rows
        except UNREADABLE as error:
            raise damaged(path, error) from error


def has_entries(read: TokenColumns) -> np.ndarray:
    """Tokens at which a distribution is kept, bool [T]; the columns COUNTS must have been read."""
    kept_T: np.ndarray = (read.values["num_exact"] > 0) | (read.values["num_drawn"] > 0)
    return kept_T


def _flat(shard: int, batch: int, first_row: int, part: pa.RecordBatch) -> TokenColumns:
    """Raises ValueError where the columns of a row have different lengths."""
    _, offsets = flat(part.column("target_mask"))
    counts = np.diff(offsets)
    values, known = {}, {}
    for name in part.schema.names:
        column = part.column(name)
        known[name] = ~column.is_null().to_numpy(zero_copy_only=False)
        values[name], _ = flat(column)
        own = np.diff(column.offsets.to_numpy())
        if not np.array_equal(own[known[name]], counts[known[name]]):
            raise ValueError(f"column {name} has rows of other lengths than target_mask")
    return TokenColumns(shard, batch, first_row, offsets.astype(np.int64), values, known)

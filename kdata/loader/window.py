"""A window of rows that will be read soon. Each record batch is decompressed once, in whatever order its rows are read.

Payload is compressed a record batch at a time (up to 32 rows), and a shuffled order asks for its rows at different
times. A window knows which rows are still to come. It decompresses a record batch at the first of them, keeps the rows
that are needed as they are stored (about 200 bytes per token at 64 entries, against 520 decoded), and drops them after
the last. Memory is bounded by the window's tokens, not by the dataset.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from kdata.store.dataset import Dataset

Key = tuple[int, int]  # shard, record batch of that shard


class Window:
    """Rows of a dataset to be read in any order, each as often as it was announced.

    Args:
        dataset: what is read.
        rows: int64 [S], global rows, repeats included.
    Raises:
        OutOfRangeError: there is no such row.
        CorruptError: a shard is not what was committed (checked at first use).
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        self._dataset = dataset
        located = [((shard, batch), local) for shard, batch, local in np.stack(dataset.locate(rows), 1).tolist()]
        self._place = dict(zip(rows.tolist(), located, strict=True))
        self._left = Counter(key for key, _ in located)
        self._needed: dict[Key, list[int]] = {}
        for key, local in set(self._place.values()):
            self._needed.setdefault(key, []).append(local)
        self._held: dict[Key, tuple[pa.RecordBatch, dict[int, int]]] = {}

    def slices(self, rows: list[int]) -> list[pa.RecordBatch]:
        """The stored columns of each row, one record batch of one row each; `Dataset.decode` makes arrays of them.

        Raises:
            KeyError: a row that was not announced, or not as often.
            CorruptError: bytes cannot be decompressed.
        """
        return [self._slice(*self._place[row]) for row in rows]

    def _slice(self, key: Key, local: int) -> pa.RecordBatch:
        if key not in self._held:
            self._held[key] = self._read(key)
        batch, number_of = self._held[key]
        self._left[key] -= 1
        if not self._left[key]:
            del self._held[key], self._left[key]
        return batch.slice(number_of.get(local, local), 1)

    def _read(self, key: Key) -> tuple[pa.RecordBatch, dict[int, int]]:
        """Decompress; where fewer than half of the rows are needed, keep a copy of these alone."""
        batch, needed = self._dataset.record_batch(*key), sorted(self._needed.pop(key))
        if 2 * len(needed) >= batch.num_rows:
            return batch, {}
        return batch.take(pa.array(needed)), {local: number for number, local in enumerate(needed)}

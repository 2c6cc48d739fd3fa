"""The packed rows of `kdata.loader.batches` by number, for loaders that ask for items by index.

Row n is the n-th row of the endless stream that `Batches` reads, so a loader that asks for 0, 1, 2, ... gets exactly that
stream. Rising numbers are read a window at a time, as the stream is: a record batch is decompressed once. Numbers in
another order are right too, but each jump opens its window anew and decompresses a record batch for about every document.

The layout of an epoch (which documents are in which row) is computed when a row of it is first asked for, and kept: 8 bytes
for each planned document and row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from kdata.errors import OutOfRangeError
from kdata.loader.batches import Arrays, Batches
from kdata.loader.packing import Place, Shape, windows
from kdata.loader.window import Window


@dataclass(frozen=True)
class _Epoch:
    """One epoch's rows. documents: int64, numbers of planned documents, row after row. row_starts: int64 [rows+1], into
    `documents`. window_starts: int64 [windows+1], row at which each window begins. first: the epoch's first row number."""

    documents: np.ndarray
    row_starts: np.ndarray
    window_starts: np.ndarray
    first: int

    @property
    def end(self) -> int:
        return self.first + len(self.row_starts) - 1


class IndexedRows:
    """Rows of a stream by number.

    Args:
        batches: dataset, plan and order; its `batch_rows`, rank and place do not matter here.
        single: a row is one document, in the order of the packed rows, instead of as many as fit.
    """

    def __init__(self, batches: Batches, *, single: bool = False) -> None:
        self.batches, self.single = batches, single
        self._epochs: list[_Epoch] = []
        self._window: tuple[tuple[int, int], Window, set[int]] | None = None

    def rows_of(self, epochs: int) -> int:
        """Number of rows of the first `epochs` epochs."""
        while len(self._epochs) < epochs:
            self._lay_out()
        return self._epochs[epochs - 1].end if epochs else 0

    def documents(self, number: int) -> np.ndarray:
        """Global dataset rows of the documents in row `number`, int64."""
        epoch = self._epochs[self._epoch_of(number)]
        rows: np.ndarray = self.batches.rows[_part(epoch, number)]
        return rows

    def read(self, numbers: Sequence[int]) -> Arrays:
        """These rows as one batch, in this order. `place` is the beginning of the stream and means nothing.

        Raises:
            OutOfRangeError: a number is negative.
            CorruptError: see `kdata.loader.window.Window.slices`.
        """
        documents: list[list[int]] = []
        slices: list[pa.RecordBatch] = []
        for (epoch, window), group in groupby(numbers, self._window_of):
            rows = list(group)
            documents += [_part(self._epochs[epoch], number).tolist() for number in rows]
            for number in rows:
                slices += self._slices(epoch, window, number)
        return self.batches.assemble(documents, slices, Place())

    def _slices(self, epoch: int, window: int, number: int) -> list[pa.RecordBatch]:
        """The stored documents of a row, from the open window where that still holds it."""
        laid_out = self._epochs[epoch]
        if self._window is None or self._window[0] != (epoch, window) or number not in self._window[2]:
            end = laid_out.first + int(laid_out.window_starts[window + 1])
            documents = laid_out.documents[
                laid_out.row_starts[number - laid_out.first] : laid_out.row_starts[end - laid_out.first]
            ]
            opened = Window(self.batches.dataset, self.batches.rows[documents])
            self._window = ((epoch, window), opened, set(range(number, end)))
        self._window[2].discard(number)
        return self._window[1].slices(self.batches.rows[_part(laid_out, number)].tolist())

    def _epoch_of(self, number: int) -> int:
        if number < 0:
            raise OutOfRangeError(f"row {number} of the stream: rows are numbered from 0")
        while not self._epochs or number >= self._epochs[-1].end:
            self._lay_out()
        return int(np.searchsorted([epoch.end for epoch in self._epochs], number, side="right"))

    def _window_of(self, number: int) -> tuple[int, int]:
        epoch = self._epoch_of(number)
        laid_out = self._epochs[epoch]
        return epoch, int(np.searchsorted(laid_out.window_starts, number - laid_out.first, side="right")) - 1

    def _lay_out(self) -> None:
        """Compute the layout of the next epoch."""
        batches, number = self.batches, len(self._epochs)
        c = batches.config
        shape = Shape(c.context_tokens, c.window_documents, c.window_tokens)
        stream = windows(
            batches.lengths, batches.blocks, batches.identity, c.seed, shape, Place(number), batches.groups
        )
        rows: list[list[int]] = []
        window_starts = [0]
        for window in stream:
            packed = [documents for documents, _ in window]
            rows += [[document] for row in packed for document in row] if self.single else packed
            window_starts.append(len(rows))
            if window[-1][1].epoch > number:
                break
        documents = np.array([document for row in rows for document in row], np.int64)
        row_starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        first = self._epochs[-1].end if self._epochs else 0
        self._epochs.append(_Epoch(documents, row_starts, np.array(window_starts), first))


def _part(epoch: _Epoch, number: int) -> np.ndarray:
    """Numbers of the planned documents in row `number` of the stream."""
    row = number - epoch.first
    part: np.ndarray = epoch.documents[epoch.row_starts[row] : epoch.row_starts[row + 1]]
    return part

"""Documents into rows of fixed length: whole, in an order that only the data and the seed decide.

Documents are shuffled once per epoch and cut into windows; within a window they are packed by best-fit
decreasing and the finished rows are shuffled. Windows do not know of each other, so a position in the stream
of rows is three numbers (epoch, window, row) and resuming costs one window. The trade: a larger window fills
rows better and lets each row see a wider mix; each window ends in about one row that is not full.

Property: the stream of rows is a pure function of (lengths, identity, seed, context, window), whatever the
batch size, the number of ranks or the number of worker threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where a stream of rows stands: the next row to come."""

    epoch: int = 0
    window: int = 0
    row: int = 0


def identity_of(fingerprint: str, rows: np.ndarray) -> str:
    """SHA-256 (hex) of what is read: the dataset's fingerprint and the planned global rows int64 [R]."""
    return hashlib.sha256(fingerprint.encode() + b"\0" + np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest()


def row_stream(
    lengths: np.ndarray, identity: str, seed: int, context_tokens: int, window_documents: int, start: Place
) -> Iterator[tuple[list[int], Place]]:
    """Yield (documents of a row, place after it) for ever, epoch after epoch.

    Args:
        lengths: int64 [R], tokens of each planned document, each in [1, context_tokens].
        identity: from `identity_of`; part of the shuffle's seed.
        start: where to begin; Place() is the beginning.
    """
    windows = -(-len(lengths) // window_documents)
    place = start
    while True:
        order = _generator(identity, seed, place.epoch, 0).permutation(len(lengths))
        for window in range(place.window, windows):
            documents = order[window * window_documents : (window + 1) * window_documents]
            rows = best_fit(lengths[documents], context_tokens)
            shuffled = _generator(identity, seed, place.epoch, 1 + window).permutation(len(rows))
            for number in range(place.row if window == place.window else 0, len(rows)):
                last_row, last_window = number + 1 == len(rows), window + 1 == windows
                if last_row and last_window:
                    after = Place(place.epoch + 1, 0, 0)
                elif last_row:
                    after = Place(place.epoch, window + 1, 0)
                else:
                    after = Place(place.epoch, window, number + 1)
                yield [int(d) for d in documents[rows[shuffled[number]]]], after
        place = Place(place.epoch + 1, 0, 0)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing: longest first, each into the fullest bin that takes it.

    Bins of equal room stand on one stack, and a bit set of the rooms in use finds the smallest sufficient
    one, so an item costs O(capacity / word) bit operations instead of a search over bins.

    Args:
        lengths: int [N], each in [1, capacity].
    Returns:
        Item numbers of each bin; every item exactly once.
    """
    stacks: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while a bin with room r exists
    bins: list[list[int]] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            target = stacks[room].pop()
            if not stacks[room]:
                rooms &= ~(1 << room)
        else:
            room, target = capacity, []
            bins.append(target)
        target.append(item)
        stacks[room - length].append(target)
        rooms |= 1 << (room - length)
    return bins


def _generator(identity: str, seed: int, epoch: int, part: int) -> np.random.Generator:
    """A random generator of its own for each (data, seed, epoch, part)."""
    key = [int(identity[i : i + 8], 16) for i in range(0, 32, 8)]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*key, seed, epoch, part])))

"""Pack whole documents into rows of fixed length, in an order that only the data and the seed decide.

Each epoch shuffles blocks of planned documents over the whole plan and cuts the result into windows; within a window
documents are packed by best-fit decreasing and the finished rows are shuffled. Windows do not know of each other, so a
position in the stream of rows is three numbers (epoch, window, row) and resuming costs one window.

A block is a run of neighbors on disk (see `blocks_of`). The trade-off: payload is compressed some ten documents at a
time, so an order that scatters single documents over more data than a window holds decompresses ten to read one. Blocks
of 32 are read at full speed, and the 32 documents of a block meet the 1,000 of their window in random order; blocks of
1 are the uniform shuffle. A larger window mixes more, fills rows better and needs more memory; each window ends in
about one row that is not full. Where shards come from elsewhere, they are taken in random order, some at a time
(`ShardGroups`), so that the first row needs a few of them and not all; such an order mixes less.

Property: the stream of rows is a pure function of (lengths, blocks, identity, seed, epoch, `Shape`), whatever the batch size,
the number of ranks or of workers. It uses raw bits of PCG64, whose stream numpy guarantees, and a stable sort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kdata.errors import CorruptError

MAX_EPOCHS = 2**31  # more than any run has
SHARDS = 2**40  # number of the random stream for the order of shards: above those of windows


@dataclass(frozen=True)
class Place:
    """A place in the stream of rows: the next row."""

    epoch: int = 0
    window: int = 0
    row: int = 0


def place_of(state: object, num_documents: int) -> Place:
    """The place in a saved state. Raises CorruptError where it is none of a stream over so many documents."""
    values: dict[str, int] = {}
    for name, limit in (("epoch", MAX_EPOCHS), ("window", num_documents), ("row", num_documents)):
        value = state.get(name) if isinstance(state, Mapping) else None
        if type(value) is not int or not 0 <= value <= limit:
            raise CorruptError(
                f"the loader's state has {name} {value!r}, which must be a whole number from 0 to {limit:,}"
            )
        values[name] = value
    return Place(**values)


@dataclass(frozen=True)
class Shape:
    """What rows are made of: tokens of a row, and the most documents and tokens of a window (never less than one)."""

    context_tokens: int
    window_documents: int
    window_tokens: int


@dataclass(frozen=True)
class ShardGroups:
    """Shards that are read together: random ones, as many as hold about `group_tokens` stored tokens.

    of_document: int64 [R], shard of each planned document. shard_tokens: int64 [shards], tokens that each shard stores.
    """

    of_document: np.ndarray
    shard_tokens: np.ndarray
    group_tokens: int

    def numbers(self, keys: np.ndarray) -> np.ndarray:
        """Number of the group of each planned document, int64 [R], by random keys uint64 [shards]."""
        used = np.unique(self.of_document)
        order = used[np.argsort(keys[used], kind="stable")]
        tokens = self.shard_tokens[order]
        group_of = np.zeros(len(self.shard_tokens), np.int64)
        group_of[order] = (np.cumsum(tokens) - tokens) // self.group_tokens
        return np.unique(group_of[self.of_document], return_inverse=True)[1].reshape(-1)


def identity_of(content_digest: str, rows: np.ndarray) -> str:
    """SHA-256 (hex) of what is read: the dataset's content digest and the planned global rows int64 [R]."""
    return hashlib.sha256(content_digest.encode() + b"\0" + np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest()


def blocks_of(rows: np.ndarray, shard_starts: np.ndarray, block_rows: int) -> np.ndarray:
    """Number of the block of each planned row, int64 [R]. A block is up to `block_rows` aligned rows of a shard.

    The second, third ... mention of a row is in another block than the first, so that repeats are spread over the epoch.

    Args:
        rows: int64 [R], global rows, repeats included.
        shard_starts: int64 [shards+1], global row at which each shard begins.
        block_rows: 1 gives each planned row a block of its own.
    """
    if block_rows == 1:
        return np.arange(len(rows))
    shard = np.searchsorted(shard_starts, rows, side="right") - 1
    block = (rows - shard_starts[shard]) // block_rows
    keys = np.stack([_mention(rows), shard, block], 1)
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _mention(rows: np.ndarray) -> np.ndarray:
    """How often each row was named before, int64 [R]."""
    order = np.argsort(rows, kind="stable")
    first = np.flatnonzero(np.diff(rows[order], prepend=-1))
    mention = np.empty_like(rows)
    mention[order] = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
    return mention


def windows(
    lengths: np.ndarray,
    blocks: np.ndarray,
    identity: str,
    seed: int,
    shape: Shape,
    start: Place,
    groups: ShardGroups | None = None,
) -> Iterator[list[tuple[list[int], Place]]]:
    """Yield the rows of each window without end, epoch after epoch; a row is (its documents, the place after it).

    Args:
        lengths: int64 [R], tokens of each planned document, each in [1, context_tokens].
        blocks: int64 [R], from `blocks_of`.
        identity: from `identity_of`; part of the shuffle's seed.
        start: where to begin; Place() is the beginning.
        groups: documents are shuffled, and windows are cut, inside of these alone; None: over the whole plan.
    """
    while True:
        keys = _random(identity, seed, start.epoch, 0, int(blocks.max()) + 1)
        group = None
        if groups is not None:
            group = groups.numbers(_random(identity, seed, start.epoch, SHARDS, len(groups.shard_tokens)))
        order, bounds = _order(lengths, keys[blocks], shape, group)
        for window in range(start.window, len(bounds) - 1):
            documents = order[bounds[window] : bounds[window + 1]]
            rows = best_fit(lengths[documents], shape.context_tokens)
            shuffled = np.argsort(_random(identity, seed, start.epoch, 1 + window, len(rows)), kind="stable")
            places = [Place(start.epoch, window, number + 1) for number in range(len(rows) - 1)]
            last = window + 2 == len(bounds)
            places.append(Place(start.epoch + 1) if last else Place(start.epoch, window + 1))
            shuffled_rows = [(documents[rows[n]].tolist(), place) for n, place in zip(shuffled, places, strict=True)]
            yield shuffled_rows[start.row :] if window == start.window else shuffled_rows
        start = Place(start.epoch + 1)


def _order(
    lengths: np.ndarray, keys: np.ndarray, shape: Shape, group: np.ndarray | None
) -> tuple[np.ndarray, list[int]]:
    """Documents of an epoch in their order, int64 [R], and where its windows begin and end. group: int64 [R], rising."""
    if group is None:
        order = np.argsort(keys, kind="stable")
        return order, _bounds(lengths[order], shape)
    order = np.lexsort((keys, group))
    starts = np.searchsorted(group[order], np.arange(int(group.max()) + 2)).tolist()
    bounds = [0]
    for begin, end in pairwise(starts):
        bounds += [begin + bound for bound in _bounds(lengths[order[begin:end]], shape)[1:]]
    return order, bounds


def _bounds(lengths: np.ndarray, shape: Shape) -> list[int]:
    """Where windows begin, and the end of the last, over documents in their order."""
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        begin = bounds[-1]
        before = int(ends[begin - 1]) if begin else 0
        full = int(np.searchsorted(ends, before + shape.window_tokens, side="right"))
        bounds.append(max(min(begin + shape.window_documents, full, len(lengths)), begin + 1))
    return bounds


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing: longest first, each into the fullest bin that takes it.

    Bins with equal room are on one stack, and a bit set of the rooms in use gives the smallest sufficient
    room, so an item costs O(capacity / word) bit operations instead of a search over bins.

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


def _random(identity: str, seed: int, epoch: int, part: int, count: int) -> np.ndarray:
    """Random uint64 [count], a stream of its own for each (data, seed, epoch, part)."""
    key = [int(identity[i : i + 8], 16) for i in range(0, 32, 8)]
    return np.random.PCG64(np.random.SeedSequence([*key, seed, epoch, part])).random_raw(count)

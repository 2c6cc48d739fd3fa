"""Batches of plain numpy arrays from a dataset and a plan, for the trainer of this repository or your own.

    rows, positions = plan.choice(dataset)
    for batch in Batches(dataset, rows, BatchesConfig(context_tokens=2048), positions=positions):
        ...  # batch.input_ids, batch.entry_ids, batch.entry_logprobs, ...

A row of a batch holds several whole documents. No document is cut or dropped, and none attends to another (positions
restart, segments differ). The order is that of `kdata.loader.packing`: a pure function of data, plan, seed and epoch.
Where a plan chooses positions, documents are read whole all the same, as context, and in the same order; only those positions
count. Ranks share every batch and workers take whole batches in turn, so neither changes the order. The state is six numbers
and a digest, and it is exact.

How reading is organised, by measurement (tests/benchmarks/loader.py; 2M tokens in documents of 400, top-64, packed codec,
page cache, tokens per second of processor time): a record batch is decompressed once per window (`kdata.loader.window`), the
rows of a batch are joined as they are stored and decoded in one go, compiled passes join the ids' byte planes and lay
out the kept entries of counted positions. 1.8M; what it replaced, decoding 32 rows to take one and joining rows in
numpy, 0.06M. What is left: the codec's gaps a third, decompression a quarter, the grid an eighth. A uniform shuffle
(`shuffle_block_rows` 1) costs a record batch per document: 0.64M here, where a window is a fifth of the data, and 0.28M
with windows of 64 documents, as on much larger data; blocks of 32, the record batches of the writer, do not depend on
the size of the data. Smaller record batches were no way out: decompressing takes 0.01 ms for each buffer however small,
0.2 ms for a document by itself, and single rows make shards 13 to 25 % larger.
Everything runs in a background thread when `prefetch_batches` is not 0; its loops hold no interpreter lock.

Shapes: B rows, L context, S documents of the batch, T tokens of the batch, M counted positions, K kept entries, Z
temperatures.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field

from kdata.calls import validated
from kdata.config import Settings
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, OutOfRangeError, ShapeError
from kdata.format.measures import Measures
from kdata.format.positions import ChosenPositions
from kdata.format.sequences import Sequences
from kdata.loader.grid import entry_grid
from kdata.loader.packing import Place, Shape, ShardGroups, blocks_of, identity_of, place_of, windows
from kdata.loader.window import Window
from kdata.store.dataset import Dataset

Item = TypeVar("Item")


def _row_numbers(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Global row numbers as int64, in their order. A mask, or fractions, would be other rows than were meant."""
    if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
        raise ShapeError(f"rows need int64 [S], one row number each, got {rows.dtype} {list(rows.shape)}")
    if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
        raise OutOfRangeError(f"rows must lie in [0, {num_rows}), got {rows.min()} to {rows.max()}")
    return rows.astype(np.int64)


class BatchesConfig(Settings):
    """How documents are packed, ordered and read ahead."""

    model_config = ConfigDict(extra="forbid")

    context_tokens: int = Field(default=512, ge=2, description="Tokens of a row; no document may be longer.")
    batch_rows: int = Field(
        default=8, ge=1, description="Rows of a batch, of all ranks together. Does not change the order of rows."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order.")
    window_documents: int = Field(
        default=1024, ge=1, description="Shuffled documents that are packed together; more fills rows better."
    )
    window_tokens: int = Field(
        default=524_288,
        ge=1,
        description="Most tokens of a window: what bounds memory, about 200 bytes each at 64 kept entries.",
    )
    shuffle_block_rows: int = Field(
        default=32,
        ge=1,
        description="Neighbours on disk that are shuffled as one, over the whole plan, and then mixed within a window. "
        "1: every document on its own, a uniform shuffle, slower on data larger than a few windows.",
    )
    shuffle_group_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Shards are read in random order, as many together as hold about this many tokens, and rows are shuffled "
        "inside of such a group alone. 0: all shards together. None: 0 for a folder; 524,288 for a dataset at a URL or on "
        "the Hub, where a group is copied before its first batch and the next one meanwhile.",
    )
    prefetch_batches: int = Field(
        default=4, ge=0, description="Batches read ahead by a background thread; 0 reads in the caller's thread."
    )


@dataclass(frozen=True, kw_only=True)
class Arrays(Measures):
    """One grid of packed documents, and the teacher's view of the tokens that count.

    input_ids, position_ids, segment_ids: int32 [B, L]; positions restart at 0 in each document, segments count from 0
    within a row, free cells are one trailing segment -1 of token 0. predictor: int64 [M], flat index into [B * L] of the
    cell whose hidden state predicts each counted token (the one before it). token_ids: int32 [M], the tokens themselves.
    entry_ids: int32 (or `entry_dtype` of `Batches`) [M, K], -1 pads; entry_logprobs: float32 [M, K], nats, not renormalised,
    -inf pads. num_exact: int32 [M], kept entries that are no draws. draw_logprobs: float32 [M, K] or None, see `Sequences`.
    logprob, rank, log_tail, entropy, log_z: of the M counted tokens, see `Measures`. document: int64 [M], which of `rows`
    a counted token belongs to. rows: int64 [S], global dataset rows. first_target: int64 [S], see `first_targets`; it does
    not depend on what is kept or chosen. num_tokens: tokens in documents. place: the place in the stream after it. weights:
    float32 [M], how much each counted token counts, or None where each counts 1. chosen: bool [M], which counted tokens the
    plan chooses, where the other targets are wanted too (`elsewhere` of `Batches`); those have no entries, a log_tail of 0
    and weight 1. None: all.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    predictor: np.ndarray
    token_ids: np.ndarray
    entry_ids: np.ndarray
    entry_logprobs: np.ndarray
    num_exact: np.ndarray
    draw_logprobs: np.ndarray | None
    document: np.ndarray
    rows: np.ndarray
    first_target: np.ndarray
    num_tokens: int
    place: Place
    weights: np.ndarray | None = None
    chosen: np.ndarray | None = None

    @property
    def fill(self) -> float:
        """Share of cells that hold a token."""
        return self.num_tokens / self.input_ids.size


class Batches:
    """An endless, resumable stream of batches over a dataset and the rows of a plan.

    Args:
        dataset: what is read.
        rows: int64 [R] global rows, repeats expanded (`Plan.rows`); None reads every row once an epoch.
        config: see BatchesConfig.
        rank, world_size: this process takes the `rank`-th of `world_size` equal parts of every batch.
        entry_dtype: of `entry_ids`; torch indexes with int64.
        positions: which targets of the rows count (`Plan.choice`); None: all of them.
        elsewhere: hand over the other targets too, without their entries.
    Raises:
        DataError: nothing to read, or a document is longer than the context.
        ShapeError, OutOfRangeError: `rows` are no row numbers of the dataset, such as a mask.
        ConfigError: the ranks cannot share a batch evenly, or a row has no chosen position; while reading, the dataset keeps
            nothing at a chosen position.
        CorruptError: while reading, a chosen position is not a target of its row.

    A dataset that keeps distributions at some positions only is read as if a plan had chosen these: they count where
    `positions` is None. Rows that keep nothing are then left out, as such a plan leaves them out, unless `elsewhere` is set.
    """

    @validated
    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray | None,
        config: BatchesConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        entry_dtype: type = np.int32,
        positions: ChosenPositions | None = None,
        elsewhere: bool = False,
    ) -> None:
        if not 0 <= rank < world_size or config.batch_rows % world_size:
            raise ConfigError(
                f"rank {rank} of {world_size} cannot share batch_rows={config.batch_rows} evenly; batch_rows counts the "
                "rows of all ranks and must be a multiple of their number"
            )
        self.dataset, self.config, self.entry_dtype, self.positions = dataset, config, entry_dtype, positions
        self.keeps_some = dataset.info.codec.keeps_some_positions
        self.elsewhere = elsewhere and (positions is not None or self.keeps_some)
        share = config.batch_rows // world_size
        self._share = range(rank * share, (rank + 1) * share)
        rows = np.arange(dataset.num_rows, dtype=np.int64) if rows is None else _row_numbers(rows, dataset.num_rows)
        if self.keeps_some and positions is None and not self.elsewhere:
            rows = rows[keeps_something(dataset)[rows]]
        lengths = dataset.index(["num_tokens"])["num_tokens"].to_numpy().astype(np.int64)[rows]
        self._refuse_long(rows, lengths)
        # A document without tokens has nothing to train on, and packing could not place it.
        self.rows, self.lengths = rows[lengths > 0], lengths[lengths > 0]
        if not len(self.rows):
            raise DataError(f"{dataset!r}: the plan selects no token, so there is nothing to train on")
        if positions is not None and len(missing := positions.missing(self.rows)):
            raise ConfigError(
                f"row {self._id_of(missing[0])!r} is to be read, and no position of it is chosen; give rows and positions of "
                "one plan"
            )
        self.identity = identity_of(dataset.content_digest, self.rows)
        self.blocks = blocks_of(self.rows, dataset.shard_starts, config.shuffle_block_rows)
        self.groups = groups_of(dataset, self.rows, config.shuffle_group_tokens)
        self.place = Place()

    def __iter__(self) -> Iterator[Arrays]:
        """Batches from the current place, which moves when a batch is consumed, not when it is read ahead."""
        for batch in ahead(self.read(self.place), self.config.prefetch_batches):
            self.place = batch.place
            yield batch

    def epoch(self) -> Iterator[Arrays]:
        """Every planned document once, from the beginning, for evaluation; the last batch may be smaller."""
        return ahead(self.read(Place(), epochs=1), self.config.prefetch_batches)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and what decides its order, of constant size. It does not depend on the rank.

        The positions do not change the order. Their digest is in the state all the same, where there are any.
        """
        own = {} if self.positions is None else {"positions": self.positions.digest}
        # Absent without groups: so the states of older versions are of the same order.
        grouped = {} if self.groups is None else {"shuffle_group_tokens": self.groups.group_tokens}
        order = {**self.config.model_dump(include=ORDER), **grouped}
        return {**asdict(self.place), "identity": self.identity, **own, **order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from another loader's state, of any rank.

        Raises:
            MismatchError: data or order differ.
            CorruptError: the place in the stream is not one of this data.
        """
        own = {"positions": None, "shuffle_group_tokens": None, **self.state_dict()}
        different = [k for k in own if k not in asdict(self.place) and own[k] != state.get(k)]
        if different:
            raise MismatchError(
                f"the loader's state is of other data ({', '.join(different)} differ); resume with the same "
                "dataset, plan and loader settings, or start again in another folder (shuffle_group_tokens has one default "
                "for a folder, and another for a URL)"
            )
        self.place = place_of(state, len(self.rows))

    def read(self, start: Place, *, epochs: int | None = None, worker: int = 0, workers: int = 1) -> Iterator[Arrays]:
        """Read batches in the caller's thread, the state untouched.

        Args:
            start: where to begin.
            epochs: stop before this epoch, with a smaller batch where it does not come out even; None goes on for ever.
            worker, workers: only every `workers`-th batch, beginning with the `worker`-th.
        """
        size, number = self.config.batch_rows, 0  # rows of the stream since `start`
        documents: list[list[int]] = []
        slices: list[pa.RecordBatch] = []
        c = self.config
        shape = Shape(c.context_tokens, c.window_documents, c.window_tokens)
        stream = windows(self.lengths, self.blocks, self.identity, c.seed, shape, start, self.groups)
        for rows in self._copied_ahead(stream, epochs) if self.dataset.streams else stream:
            own = [n // size % workers == worker and n % size in self._share for n in range(number, number + len(rows))]
            window = Window(self.dataset, self.rows[_flat([d for (d, _), mine in zip(rows, own, strict=True) if mine])])
            for (row, place), mine in zip(rows, own, strict=True):
                if mine:
                    documents.append(row)
                    slices += window.slices(self.rows[row].tolist())
                number += 1
                done = place.epoch == epochs
                if documents and (number % size == 0 or done):
                    yield self.assemble(documents, slices, place)
                    documents, slices = [], []
                if done:
                    return

    def _copied_ahead(
        self, stream: Iterator[list[tuple[list[int], Place]]], epochs: int | None
    ) -> Iterator[list[tuple[list[int], Place]]]:
        """The same windows; while one is read, at least as many shards as it has are copied for those after it."""
        ahead: deque[list[tuple[list[int], Place]]] = deque()
        shards: deque[list[int]] = deque()
        done = False
        while True:
            while not done and (not shards or (_more(shards) < len(shards[0]) and len(shards) < MOST_WINDOWS_AHEAD)):
                window = next(stream)
                rows = self.rows[_flat([documents for documents, _ in window])]
                ahead.append(window)
                shards.append(np.unique(np.searchsorted(self.dataset.shard_starts, rows, side="right") - 1).tolist())
                done = window[-1][1].epoch == epochs
            if not ahead:
                return
            self.dataset.copy_ahead(shard for window_shards in shards for shard in window_shards)
            yield ahead.popleft()
            shards.popleft()

    def _id_of(self, row: np.integer) -> str:
        name: str = self.dataset.index(["id"])["id"][int(row)].as_py()
        return name

    def _refuse_long(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        context = self.config.context_tokens
        too_long = np.flatnonzero(lengths > context)
        if len(too_long):
            name = self._id_of(rows[too_long[0]])
            raise DataError(
                f"document {name!r} has {lengths[too_long[0]]} tokens, more than context_tokens={context} "
                f"({len(too_long)} of {len(rows)} are longer). Documents are never cut: set context_tokens "
                f"to {lengths.max()} or more, or train on a plan with num_tokens <= {context}"
            )

    def _counted(
        self, seqs: Sequences, target_T: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Which tokens count, int64 [M]; their weights, and which of them are chosen, see `Arrays`."""
        if self.positions is None and not self.keeps_some:
            return np.flatnonzero(target_T), None, None
        weights_N: np.ndarray | None = None
        if self.positions is None:
            token_N = np.flatnonzero(target_T & (seqs.num_kept > 0))
        else:
            token_N, weights_N = self.positions.tokens(rows, seqs.offsets)
            self._refuse_masked(token_N[~target_T[token_N]], seqs.offsets, rows)
            if self.keeps_some:
                self._refuse_without_entries(token_N[seqs.num_kept[token_N] == 0], seqs.offsets, rows)
        if not self.elsewhere:
            return token_N, weights_N, None
        chosen_T, weights_T = np.zeros(len(target_T), bool), np.ones(len(target_T), np.float32)
        chosen_T[token_N] = True
        if weights_N is not None:
            weights_T[token_N] = weights_N
        counted_M = np.flatnonzero(target_T)
        return counted_M, None if weights_N is None else weights_T[counted_M], chosen_T[counted_M]

    def _refuse_masked(self, masked_N: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
        if len(masked_N):
            document = int(np.searchsorted(offsets, masked_N[0], side="right")) - 1
            raise CorruptError(
                f"row {self._id_of(rows[document])!r}: the plan chooses position {masked_N[0] - offsets[document]}, which is "
                "no target of the dataset; run `kdata select` again"
            )

    def _refuse_without_entries(self, bare_N: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
        if len(bare_N):
            document = int(np.searchsorted(offsets, bare_N[0], side="right")) - 1
            raise ConfigError(
                f"row {self._id_of(rows[document])!r}: the plan chooses position {bare_N[0] - offsets[document]}, at which "
                "the dataset keeps no distribution; choose among the positions that it keeps: `kdata select` does, and so "
                "does a query with `num_exact + num_drawn > 0`"
            )

    def assemble(self, documents: list[list[int]], slices: list[pa.RecordBatch], place: Place) -> Arrays:
        """Decode the documents of a batch and lay them out on the grid, row by row."""
        seqs, context = self.dataset.decode(slices), self.config.context_tokens
        lengths = np.diff(seqs.offsets)
        counts = np.array([len(row) for row in documents])
        first = np.repeat(np.cumsum(counts) - counts, counts)  # of the row's documents, for each document
        row_start = np.repeat(np.arange(len(documents)), counts) * context
        starts = row_start + seqs.offsets[:-1] - seqs.offsets[first]
        segments = np.arange(len(lengths)) - first
        position_T = np.arange(len(seqs.token_ids)) - np.repeat(seqs.offsets[:-1], lengths)
        cell_T = np.repeat(starts, lengths) + position_T
        # Entry t is the prediction of token t, made by the hidden state of the cell before it; entry 0 has none.
        rows = self.rows[_flat(documents)]
        target_T = seqs.target_mask & (position_T > 0)
        counted_M, weights_M, chosen_M = self._counted(seqs, target_T, rows)
        input_ids, position_ids, segment_ids = _grid(
            len(documents), context, cell_T, seqs.token_ids, position_T, np.repeat(segments, lengths)
        )
        return Arrays(
            input_ids=input_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            predictor=cell_T[counted_M] - 1,
            **_targets(seqs, counted_M, chosen_M, self.entry_dtype),
            document=np.repeat(np.arange(len(lengths)), lengths)[counted_M],
            rows=rows,
            first_target=first_targets(target_T, seqs.offsets),
            num_tokens=len(seqs.token_ids),
            place=place,
            weights=weights_M,
            chosen=chosen_M,
        )


ORDER = {"context_tokens", "seed", "window_documents", "window_tokens", "shuffle_block_rows"}  # fields that decide it


GROUP_TOKENS = 524_288  # of shards that are read together where they come from elsewhere: a window has as many
MOST_WINDOWS_AHEAD = 64


def groups_of(dataset: Dataset, rows: np.ndarray, group_tokens: int | None) -> ShardGroups | None:
    """The shards that are read together, by the setting `shuffle_group_tokens`; None: all of them.

    Args:
        rows: int64 [R], global rows.
    """
    tokens = (GROUP_TOKENS if dataset.streams else 0) if group_tokens is None else group_tokens
    if not tokens:
        return None
    of_document = np.searchsorted(dataset.shard_starts, rows, side="right") - 1
    return ShardGroups(of_document, np.array([entry.tokens for entry in dataset.manifest], np.int64), tokens)


def _more(shards: deque[list[int]]) -> int:
    """Shards of windows that are not those of the first one."""
    return len(set().union(*shards) - set(shards[0]))


def keeps_something(dataset: Dataset) -> np.ndarray:
    """Which rows of a dataset that keeps some positions only have a position with entries, bool [R]; see `kept_mass`."""
    known: np.ndarray = dataset.index(["kept_mass"])["kept_mass"].is_valid().to_numpy()
    return known


def first_targets(target_T: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Position of the first target of each document, int64 [S]; the number of its tokens where it has none.

    Args:
        target_T: bool [T], of documents laid end to end; their first tokens are no targets.
        offsets: int64 [S+1], where each document's tokens begin.
    """
    target_N = np.append(np.flatnonzero(target_T), len(target_T))
    first_S = target_N[np.searchsorted(target_N, offsets[:-1])]
    position_S: np.ndarray = np.minimum(first_S, offsets[1:]) - offsets[:-1]
    return position_S


def _flat(documents: list[list[int]]) -> np.ndarray:
    return np.array([d for row in documents for d in row], np.int64)


def _grid(
    rows: int, context: int, cell_T: np.ndarray, token_T: np.ndarray, position_T: np.ndarray, segment_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, position_ids and segment_ids, int32 [rows, context]; free cells count their own positions."""
    input_ids, position_ids = np.zeros((2, rows, context), np.int32)
    segment_ids = np.full((rows, context), -1, np.int32)
    for grid, values_T in ((input_ids, token_T), (position_ids, position_T), (segment_ids, segment_T)):
        grid.reshape(-1)[cell_T] = values_T
    free = segment_ids < 0
    position_ids[free] = (np.cumsum(free, axis=1) - 1)[free]
    return input_ids, position_ids, segment_ids


def _targets(seqs: Sequences, counted_M: np.ndarray, chosen_M: np.ndarray | None, entry_dtype: type) -> dict[str, Any]:
    """The fields of `Arrays` that are the teacher's view of the counted positions."""

    def grid(values_N: np.ndarray, fill: float, dtype: type = np.float32) -> np.ndarray:
        return entry_grid(counted_M, seqs.entry_offsets, values_N, fill, dtype, chosen_M)

    num_exact_M, measures = seqs.num_exact[counted_M], seqs.measures(lambda values: values[counted_M])
    if chosen_M is not None:
        num_exact_M = np.where(chosen_M, num_exact_M, 0)
        measures["log_tail"] = np.where(chosen_M, measures["log_tail"], np.float32(0))
    return {
        "token_ids": seqs.token_ids[counted_M],
        "entry_ids": grid(seqs.entry_ids, -1, entry_dtype),
        "entry_logprobs": grid(seqs.entry_logprobs, -np.inf),
        "num_exact": num_exact_M,
        **measures,
        "draw_logprobs": None if seqs.draw_logprobs is None else grid(seqs.draw_logprobs, np.nan),
    }


def ahead(source: Iterator[Item], depth: int) -> Iterator[Item]:
    """Run `source` in a thread, at most `depth` items ahead; its exception is raised in its place. Depth 0: no thread.

    The thread ends when the consumer stops iterating (the generator is closed or collected).
    """
    if not depth:
        yield from source
        return
    ready: queue.Queue[tuple[list[Item], BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def hand_over(items: list[Item], error: BaseException | None = None) -> None:
        while not stop.is_set():
            try:
                return ready.put((items, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                hand_over([item])
                if stop.is_set():
                    return
            hand_over([])
        except BaseException as error:  # raised again in the consumer's thread
            hand_over([], error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            items, error = ready.get()
            if error is not None:
                raise error
            if not items:
                return
            yield from items
    finally:
        stop.set()
        thread.join()

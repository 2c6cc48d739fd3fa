"""Apply a rule of `kdata.selection.position_rules` to the rows that a step chose, out of core.

A share of all positions is exact in bounded memory. Each candidate's number is computed once and goes into a temporary
file as a 32-bit key that rises with the preference (4 bytes a candidate), and the upper half of the key into a
histogram. The bin in which the choice ends is counted once more by the lower half, from the file. Then the target masks
are read again, beside the keys, and what is chosen goes into a temporary Parquet file, from which DuckDB writes the
plan. Equal numbers at the edge are taken in the order of (row, position).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdata.errors import DataError
from kdata.format.positions import ChosenPositions
from kdata.selection.plan import plan_schema
from kdata.selection.position_base import Marker, Piece, PositionRule, ShareRule, TokenReader, number_to_choose
from kdata.store.dataset import Dataset
from kdata.store.index import read_index
from kdata.store.token_columns import COUNTS, has_entries, token_columns
from kdata.store.token_scores import TokenScore

HALF = 1 << 16  # values of half a key
BLOCK_KEYS = 1 << 22  # keys that are read from the temporary file at a time
GROUP_ROWS = 10_000  # rows of a group of the temporary Parquet


@dataclass(frozen=True)
class Picked:
    """What a rule chose.

    file: Parquet of id, positions and perhaps weights, a line for each row with a position. counts: int64 [R], positions of
    each wanted row. parameters: of the rule, for the plan to record.
    """

    file: Path
    counts: np.ndarray
    weighted: bool
    parameters: dict[str, Any]


def choose_positions(
    dataset: Dataset,
    rule: PositionRule,
    rows: np.ndarray,
    parent: ChosenPositions | None,
    folder: Path,
    reader: TokenReader | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Picked:
    """Choose positions of some rows.

    Args:
        rows: int64 [R], distinct global rows.
        parent: positions to choose from; None: every target of the rows. Of a dataset that keeps distributions at some
            positions only, these alone are chosen from.
        folder: where temporary files go.
        reader: the model of the rule `gap`.
        on_rows: called with the number of rows that were read since the last call, so that progress can be shown.
    Raises:
        DataError, ConfigError: see the rule. DataError also where it reads log-probabilities, and those of the dataset are of
            chunks of another tokenizer.
        MissingError: a score that the rule reads has no number for each token.
        CorruptError: a shard, or a part of a score, is not what was committed.
    """
    positions = dataset.info.codec.parameters.get("positions") or {}
    if "logprob" in rule.COLUMNS and positions.get("rule") == "aligned":
        raise DataError(
            f"the rule {rule.rule!r} compares the log-probabilities of single tokens, and those of {dataset.path} are of "
            "chunks: it was made for another tokenizer. Choose in the dataset that it was made of, or by another rule"
        )
    wanted = np.zeros(dataset.num_rows, bool)
    wanted[rows] = True
    parameters = {**rule.recorded(), **({} if reader is None else reader.recorded)}
    scores = {name: TokenScore(dataset, name) for name in rule.token_scores()}

    def candidates(*columns: str) -> Iterator[Piece]:
        for piece in pieces(dataset, columns, wanted, parent, reader, scores):
            yield piece
            on_rows(len(piece.rows))

    if isinstance(rule, ShareRule) and rule.per == "dataset":
        keys = folder / "position-keys"
        edge, rest = _edge(_keys(rule, candidates(*rule.COLUMNS), keys), keys, rule.share)
        if (number := rule.number_of(edge)) is not None:
            parameters["threshold"] = number
        marker, source = _above(keys, edge, rest), candidates()
    else:
        marker, source = rule.marker(dataset), candidates(*rule.COLUMNS)
    file = folder / "positions.parquet"
    counts_all = np.zeros(dataset.num_rows, np.int64)
    weighted = False
    for first_row, counts, has_weights in _written(source, marker, file):
        counts_all[first_row : first_row + len(counts)] = counts
        weighted = has_weights
    return Picked(file, counts_all[rows], weighted, parameters)


def pieces(
    dataset: Dataset,
    columns: Sequence[str],
    wanted: np.ndarray,
    parent: ChosenPositions | None,
    reader: TokenReader | None = None,
    scores: Mapping[str, TokenScore] | None = None,
) -> Iterator[Piece]:
    """The record batches with wanted rows, these columns of theirs, and the tokens in them that may be chosen."""

    @lru_cache(maxsize=2)  # a shard has many record batches
    def index_of(shard: int, columns: tuple[str, ...]) -> pa.Table:
        return read_index(dataset.checked_file(dataset.manifest[shard], "index"), list(columns))

    keeps_some = dataset.info.codec.keeps_some_positions
    for read in token_columns(dataset, ["target_mask", *(COUNTS if keeps_some else ()), *columns], wanted):
        counts = np.diff(read.offsets)
        here = wanted[read.first_row : read.first_row + len(counts)]
        candidate_T = read.values["target_mask"] & np.repeat(here, counts)
        candidate_T[read.offsets[:-1][counts > 0]] = False  # the first token is not predicted
        if keeps_some:
            candidate_T &= has_entries(read)
        weights_T: np.ndarray | None = None
        if parent is not None:
            rows = np.flatnonzero(here)
            token_N, weights_N = parent.tokens(rows + read.first_row, np.append(read.offsets[rows], 0))
            in_parent_T = np.zeros(len(candidate_T), bool)
            in_parent_T[token_N] = True
            candidate_T &= in_parent_T
            if weights_N is not None:
                weights_T = np.zeros(len(candidate_T), np.float32)
                weights_T[token_N] = weights_N
        candidate_C = np.flatnonzero(candidate_T)
        weights_C = None if weights_T is None else weights_T[candidate_C]
        yield Piece(dataset, read, here, candidate_C, weights_C, index_of, reader, scores or {})


def _keys(rule: ShareRule, source: Iterator[Piece], file: Path) -> np.ndarray:
    """Write the key of every candidate to a file, in order. Returns their histogram by upper half, int64 [HALF]."""
    histogram = np.zeros(HALF, np.int64)
    with file.open("wb") as sink:
        for piece in source:
            keys_C = rule.keys(piece)
            histogram += np.bincount(keys_C >> np.uint32(16), minlength=HALF)
            sink.write(keys_C.astype("<u4").tobytes())
    return histogram


def _edge(histogram: np.ndarray, file: Path, share: float) -> tuple[int, int]:
    """The key at which the choice ends, and how many candidates with exactly this key are chosen (at least one).

    Raises DataError where there is no candidate.
    """
    if not histogram.sum():
        raise DataError("the chosen rows have no target position to choose from; choose other rows")
    upper, rest = _bin(histogram, number_to_choose(share, int(histogram.sum())))
    inner = np.zeros(HALF, np.int64)
    with file.open("rb") as source:
        while block := source.read(4 * BLOCK_KEYS):
            keys = np.frombuffer(block, "<u4")
            inner += np.bincount(keys[keys >> 16 == upper] & (HALF - 1), minlength=HALF)
    lower, rest = _bin(inner, rest)
    return upper * HALF + lower, rest


def _bin(histogram: np.ndarray, number: int) -> tuple[int, int]:
    """The bin in which the `number`-th from the top is, and its place in that bin, from 1."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, number))
    return len(histogram) - 1 - place, number - int(from_top[place] - histogram[::-1][place])


def _above(file: Path, edge: int, rest: int) -> Marker:
    """Choose the candidates whose key is above the edge, and the first `rest` with the edge's; pieces must come in order."""
    done = 0

    def mark(piece: Piece) -> tuple[np.ndarray, None]:
        nonlocal done, rest
        keys_C = np.fromfile(file, "<u4", count=len(piece.candidate_C), offset=4 * done)
        done += len(keys_C)
        at_edge_C = keys_C == edge
        chosen_C = (keys_C > edge) | (at_edge_C & (np.cumsum(at_edge_C) <= rest))
        rest -= min(rest, int(at_edge_C.sum()))
        return chosen_C, None

    return mark


def _written(source: Iterator[Piece], marker: Marker, file: Path) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Write what is chosen of each piece. Yields the first row, the positions of each row, and whether there are weights."""
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    try:
        for piece in source:
            chosen_C, weights_C = marker(piece)
            weights_C = piece.parent_weights_C if weights_C is None else weights_C
            counts = np.bincount(piece.row_C[chosen_C], minlength=len(piece.rows))
            yield piece.read.first_row, counts, weights_C is not None
            waiting.append(_table(piece, chosen_C, weights_C, counts))
            writer = writer or pq.ParquetWriter(file, waiting[0].schema, compression="zstd")
            if sum(table.num_rows for table in waiting) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()


def _table(piece: Piece, chosen_C: np.ndarray, weights_C: np.ndarray | None, counts: np.ndarray) -> pa.Table:
    schema = plan_schema(positions=True, weights=weights_C is not None)
    schema = schema.remove(schema.get_field_index("repeats"))
    present = np.flatnonzero(counts)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts[present])]), pa.int32())
    columns: list[pa.Array] = [
        pa.array([piece.ids[row] for row in present.tolist()], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(piece.position_C[chosen_C], pa.int32())),
    ]
    if weights_C is not None:
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(weights_C[chosen_C], pa.float32())))
    return pa.table(columns, schema=schema)

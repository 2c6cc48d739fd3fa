"""Decoded sequences, and the decoding of a shard's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kdata.errors import DependencyError, ShapeError
from kdata.format import codec as codecs
from kdata.format.kept import Kept, pad
from kdata.format.measures import Measures, unknown
from kdata.format.schema import DatasetInfo

if TYPE_CHECKING:
    import polars
    import torch

COMMON = (
    "input_ids", "target_mask", "logprob", "rank", "log_tail", "entropy", "num_exact", "num_drawn",
)  # fmt: skip


PER_TOKEN = ("token_ids", "target_mask", "logprob", "rank", "log_tail", "entropy", "num_exact", "num_kept")
PER_ENTRY = ("entry_ids", "entry_logprobs", "draw_logprobs")


def as_polars(table: pa.Table) -> polars.DataFrame:
    """An Arrow table as a Polars frame. Raises DependencyError where Polars is not installed."""
    try:
        import polars
    except ModuleNotFoundError as error:
        raise DependencyError("to_polars needs Polars: pip install 'kdata[polars]'") from error
    frame = polars.from_arrow(table)
    assert isinstance(frame, polars.DataFrame)  # of a table; a column would be a series
    return frame


@dataclass(frozen=True, kw_only=True)
class Sequences(Measures):
    """S decoded sequences, concatenated: T tokens and N kept entries in all. Entry t is the prediction OF token t.

    logprob float32 [T], rank int32 [T], log_tail float32 [T], entropy float32 [T] and log_z float32 [T, n] or None:
    numbers of each position, see `Measures`. token_ids int32 [T]; offsets int64 [S+1]; target_mask bool [T]; num_exact
    int32 [T] entries kept exactly; num_kept int32 [T] entries in all, the exact ones first, then draws; entry_offsets
    int64 [T+1]; entry_ids int32 [N]; entry_logprobs float32 [N] (nats, not renormalised; of a draw the log of its
    unbiased weight); draw_logprobs float32 [N], the log-probability of draws (NaN for exact entries), or None where not
    stored.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    target_mask: np.ndarray
    num_exact: np.ndarray
    num_kept: np.ndarray
    entry_offsets: np.ndarray
    entry_ids: np.ndarray
    entry_logprobs: np.ndarray
    draw_logprobs: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def spans(self) -> list[tuple[int, int]]:
        """(begin, end) of each sequence in the token arrays."""
        return [(int(a), int(b)) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def one(self, number: int) -> Sequences:
        """The `number`-th sequence alone, without copying. `number` is in [0, S)."""
        begin, end = (int(place) for place in self.offsets[number : number + 2])
        first, last = (int(place) for place in self.entry_offsets[[begin, end]])
        tokens, entries = slice(begin, end), slice(first, last)
        return Sequences(
            token_ids=self.token_ids[tokens],
            offsets=np.array([0, end - begin], np.int64),
            target_mask=self.target_mask[tokens],
            **self.measures(lambda values: values[tokens]),
            num_exact=self.num_exact[tokens],
            num_kept=self.num_kept[tokens],
            entry_offsets=self.entry_offsets[begin : end + 1] - first,
            entry_ids=self.entry_ids[entries],
            entry_logprobs=self.entry_logprobs[entries],
            draw_logprobs=None if self.draw_logprobs is None else self.draw_logprobs[entries],
        )

    def to_arrow(self) -> pa.Table:
        """A table of S rows: one list per sequence and number, and lists of lists of what is kept at each position."""
        rows, positions = pa.array(self.offsets, pa.int32()), pa.array(self.entry_offsets, pa.int32())
        per_token = {name: pa.array(getattr(self, name)) for name in PER_TOKEN}
        if self.log_z is not None:
            per_token["log_z"] = pa.FixedSizeListArray.from_arrays(
                pa.array(self.log_z.reshape(-1)), self.log_z.shape[1]
            )
        per_entry = {name: getattr(self, name) for name in PER_ENTRY if getattr(self, name) is not None}
        per_token |= {name: pa.ListArray.from_arrays(positions, pa.array(values)) for name, values in per_entry.items()}
        return pa.table({name: pa.ListArray.from_arrays(rows, values) for name, values in per_token.items()})

    def to_polars(self) -> polars.DataFrame:
        """The same as a Polars frame. Raises DependencyError where Polars is not installed."""
        return as_polars(self.to_arrow())

    def to_torch(self) -> dict[str, torch.Tensor]:
        """The arrays of this class as tensors of their own memory, laid end to end as here; ids are int64.

        `entry_ids` int64 [T, K] (-1 pads) and `entry_logprobs` [T, K] (-inf pads) are grids, as `padded` gives them.
        `offsets` [S+1] says where sequences begin: `tensors["token_ids"].split(tensors["offsets"].diff().tolist())`.

        Raises:
            DependencyError: torch is not installed.
        """
        try:
            import torch
        except ModuleNotFoundError as error:
            raise DependencyError("to_torch needs torch: pip install 'kdata[train]'") from error
        ids_TK, logprobs_TK = self.padded()
        arrays = {name: getattr(self, name) for name in ("offsets", *PER_TOKEN)}
        arrays |= {"entry_ids": ids_TK.astype(np.int64), "entry_logprobs": logprobs_TK}
        arrays["token_ids"] = self.token_ids.astype(np.int64)
        if self.log_z is not None:
            arrays["log_z"] = self.log_z
        return {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}

    def padded(self, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Kept entries as a grid.

        Args:
            width: number of columns; None takes the widest position.
        Returns:
            ids int32 [T, K] padded with -1 and logprobs float32 [T, K] padded with -inf.
        Raises:
            ShapeError: a position holds more than `width` entries.
        """
        width = int(self.num_kept.max(initial=0)) if width is None else width
        return pad(self.num_kept, self.entry_ids, self.entry_logprobs, width)


def flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and zero-based offsets of a list column, without copying numbers."""
    if column.values.null_count:
        raise ShapeError("a list has an item that is null")
    offsets = column.offsets.to_numpy()
    return column.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0]


def decode(batch: pa.RecordBatch, info: DatasetInfo) -> Sequences:
    """Decode the rows of a record batch. Nothing in it is trusted: lengths and ranges are checked, row by row.

    Raises:
        ShapeError: columns disagree in length, or an id is outside the vocabulary.
        KeyError: a column is missing.
    """
    offsets = flat(batch.column("input_ids"))[1]
    values = {name: values_of(batch, name, offsets) for name in COMMON}
    token_ids = values["input_ids"]
    num_exact, num_drawn = values["num_exact"].astype(np.int32), values["num_drawn"].astype(np.int32)
    kept = entries_of(batch, offsets, codecs.Positions(num_exact, num_drawn, values["log_tail"]), info)
    check_ids("token", token_ids, info.vocab_size)
    temperatures = info.codec.temperatures
    log_z = None
    if temperatures:
        log_z = values_of(batch, "log_z", offsets * len(temperatures)).reshape(-1, len(temperatures))
    draws = None
    if kept.draw_logprobs is not None:
        draws = np.full(len(kept.ids), np.nan, np.float32)
        draws[kept.is_draw] = kept.draw_logprobs
    return Sequences(
        token_ids=token_ids,
        offsets=offsets.astype(np.int64),
        target_mask=values["target_mask"],
        logprob=values["logprob"].astype(np.float32),
        rank=values["rank"],
        log_tail=values["log_tail"],
        entropy=values["entropy"].astype(np.float32),
        num_exact=num_exact,
        num_kept=num_exact + num_drawn,
        log_z=log_z,
        entry_offsets=np.concatenate(([0], np.cumsum(num_exact + num_drawn, dtype=np.int64))),
        entry_ids=kept.ids,
        entry_logprobs=kept.logprobs,
        draw_logprobs=draws,
    )


def entries_of(batch: pa.RecordBatch, offsets: np.ndarray, positions: codecs.Positions, info: DatasetInfo) -> Kept:
    """Decode the kept entries of a record batch, checked as `decode` does.

    Args:
        offsets: int64 [S+1], where the rows begin among the T positions.
        positions: of these T positions. Exact entries alone are decoded where its `num_drawn` is 0 and `batch` has no
            columns of draws.
    """
    columns = _entry_columns(batch, offsets, positions.num_exact, positions.num_drawn)
    kept = codecs.from_columns(columns, positions, info.codec)
    check_ids("kept", kept.ids, info.vocab_size)
    return kept


def values_of(batch: pa.RecordBatch, name: str, offsets: np.ndarray) -> np.ndarray:
    """Values of a list column whose rows must begin and end at these offsets. Raises ShapeError where they do not."""
    values, own_offsets = flat(batch.column(name))
    if len(values) != offsets[-1] or not np.array_equal(own_offsets, offsets):
        raise ShapeError(f"column {name} has rows of other lengths than the counts beside it")
    return values


def _entry_columns(
    batch: pa.RecordBatch, offsets: np.ndarray, num_exact: np.ndarray, num_drawn: np.ndarray
) -> dict[str, np.ndarray]:
    """The codec's own columns, without those that are null throughout; one value per entry, exact entry or draw."""
    counts = {"entry": num_exact + num_drawn, "exact": num_exact, "draw": num_drawn}
    ends = {kind: np.concatenate(([0], np.cumsum(counts[kind], dtype=np.int64)))[offsets] for kind in counts}
    own = [(name, name.split("_")[0]) for name in batch.schema.names if name.split("_")[0] in counts]
    return {
        name: values_of(batch, name, ends[kind])
        for name, kind in own
        if batch.num_rows and batch.column(name).null_count == 0
    }


def check_ids(what: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raise ShapeError where one of these int32 ids is outside the vocabulary."""
    # As unsigned numbers negative ids are the largest, so that one pass finds both.
    if len(ids) and ids.view(np.uint32).max() >= vocab_size:
        raise ShapeError(f"a {what} id is outside [0, {vocab_size})")


def nothing() -> Sequences:
    """Zero sequences."""
    reals, counts, offsets = np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(1, np.int64)
    return Sequences(
        token_ids=counts,
        offsets=offsets,
        target_mask=np.zeros(0, bool),
        **unknown(0).measures(),
        num_exact=counts,
        num_kept=counts,
        entry_offsets=offsets,
        entry_ids=counts,
        entry_logprobs=reals,
        draw_logprobs=None,
    )

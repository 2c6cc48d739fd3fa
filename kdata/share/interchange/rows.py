"""A row of another tool, and the positions that its lists of entries belong to.

Another tool stores one list of entries per position, either with the token that the list predicts or with the token before
it. `place` puts each list with the token that it predicts, and counts everything that is wrong with it.

Shapes: T tokens, P lists of entries, N entries in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdata.errors import DataError
from kdata.format.kept import Kept, segment_sum
from kdata.format.measures import unknown
from kdata.format.records import Record, RowError

# Which token list j is about: j (with), j + 1 (after), or T - P + j (end: the last list is about the last token).
Aligned = Literal["with", "after", "end"]
OverOne = Literal["keep", "mask", "refuse"]
COUNTERS = (
    "rows",
    "tokens",
    "positions",
    "entries",
    "sums_over_one",
    "over_one_in_base_two",
    "about_one_in_base_two",
    "rising",
    "beyond_end",
    "padding_entries",
    "actual",
)


@dataclass(frozen=True)
class PeerRow:
    """One row as another tool stores it, before its P lists are placed.

    token_ids int32 [T]; counts int32 [P], entries of each list; ids int32 [N]; logprobs float32 [N], nats; target_mask
    bool [T], or None where every position that has a list counts. ranks: int32 [P], of the actual token, 1 = first choice,
    0 = not known; the tool that has them puts the actual token into every list, so that its log-probability is there, too.
    Other fields are None where the tool does not keep them.
    `refusal` is why the reader of a format cannot use the row.
    """

    token_ids: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    id: str | None = None
    domain: str | None = None
    text: str | None = None
    target_mask: np.ndarray | None = None
    ranks: np.ndarray | None = None
    refusal: RowError | None = None


def unusable(error: RowError, *, id: str | None = None, domain: str | None = None, text: str | None = None) -> PeerRow:
    """A row that its reader cannot use: `place` rejects it with this reason."""
    nothing = np.zeros(0, np.int32)
    return PeerRow(nothing, nothing, nothing, np.zeros(0, np.float32), id, domain, text, refusal=error)


@dataclass
class ImportReport:
    """Counters of what was imported, without rejects; positions, unless the name says otherwise.

    over_one_in_base_two, about_one_in_base_two: positions whose sum would be above 1.001 if the numbers were logarithms to
    base 2; and above 0.95, but not above 1.001, though as natural ones they sum to less than 0.9.
    """

    rows: int = 0
    tokens: int = 0
    positions: int = 0
    entries: int = 0
    sums_over_one: int = 0
    max_sum: float = 0.0
    over_one_in_base_two: int = 0
    about_one_in_base_two: int = 0
    rising: int = 0
    beyond_end: int = 0
    padding_entries: int = 0
    actual: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, other: ImportReport) -> None:
        """Count what another report counts, too."""
        self.max_sum = max(self.max_sum, other.max_sum)
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def lines(self, over_one: OverOne) -> list[str]:
        """The report as text."""
        outcome = {"keep": "; kept as they are", "mask": "; left out of the targets", "refuse": ""}[over_one]
        share = self.sums_over_one / max(self.positions, 1)
        actual = "" if self.actual else "the actual token's log-probability and rank, "
        lines = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.positions:,} positions with {self.entries:,} entries",
            f"positions whose probabilities sum to more than 1: {self.sums_over_one:,} ({share:.2%}), "
            f"largest sum {self.max_sum:.4f}{outcome if self.sums_over_one else ''}",
            f"marked absent: the mass of the rest, {actual}the entropy",
        ]
        if self.rising:
            lines.append(f"positions where a log-probability rises along the list: {self.rising:,}; order kept")
        if self.beyond_end:
            lines.append(f"lists about the token after the last one: {self.beyond_end:,}; left out")
        if self.padding_entries:
            lines.append(f"entries of probability 0 (padding): {self.padding_entries:,}; left out")
        return lines + self.notes


def nested(column: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """A list<list<X>> column as (lists per row int64 [S], values per list int64 [P], values X [N]); null becomes empty.

    Raises:
        DataError: the column does not hold lists of lists.
    """
    if not is_list(column.type) or not (is_list(column.type.value_type) or pa.types.is_null(column.type.value_type)):
        raise DataError(
            f"a column has the type {column.type}, but lists of lists are needed; check --format and the files"
        )
    per_row, inner = _lengths(column), column.flatten()
    if pa.types.is_null(inner.type):
        return per_row, np.zeros(len(inner), np.int64), pa.nulls(0)
    return per_row, _lengths(inner), inner.flatten()


def flat(column: pa.Array, convert: Callable[[pa.Array], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (values per row int64 [S], values [N] as `convert` gives them). Raises DataError for another type."""
    if not is_list(column.type):
        raise DataError(
            f"a column has the type {column.type}, but lists of numbers are needed; check --format and the files"
        )
    return _lengths(column), convert(column.flatten())


def as_logprobs(values: pa.Array) -> np.ndarray:
    """Log-probabilities of any numeric type as float32 [N]; NaN for null. Raises DataError for another type."""
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan, np.float32)
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise DataError(f"a column of log-probabilities has the type {values.type}, but numbers are needed")
    numbers: np.ndarray = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return numbers


def as_mask(values: pa.Array) -> np.ndarray:
    """True and false, or 1 and 0, as bool [N]. Raises DataError for anything else, null too."""
    numbers: np.ndarray = values.to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(values.type) and not values.null_count:
        return numbers
    if not pa.types.is_integer(values.type) or values.null_count or ((numbers != 0) & (numbers != 1)).any():
        raise DataError(f"a column of masks has values of the type {values.type} that are neither true nor false")
    return numbers > 0


def as_ids(values: pa.Array) -> np.ndarray:
    """Token ids of any numeric type as int32 [N]; -1, which no vocabulary has, for what is not one: 2**32 + 5, 1.5, null."""
    if pa.types.is_null(values.type):
        return np.full(len(values), -1, np.int32)
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in "iuf":
        raise DataError(f"a column of token ids has the type {values.type}, but numbers are needed")
    fits = (numbers >= 0) & (numbers < 2**31) & (numbers == np.floor(numbers))
    return np.where(fits, np.where(fits, numbers, 0).astype(np.int32), np.int32(-1))


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of any length or of one."""
    a_list: bool = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return a_list


def _lengths(column: pa.Array) -> np.ndarray:
    lengths: np.ndarray = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def spans(lengths: np.ndarray) -> list[slice]:
    """Consecutive slices of these lengths."""
    ends = np.cumsum(lengths)
    return [slice(int(end - size), int(end)) for end, size in zip(ends, lengths, strict=True)]


def place(row: PeerRow, aligned: Aligned, vocab_size: int, over_one: OverOne) -> tuple[Record, ImportReport]:
    """Put a row's lists with the tokens that they predict.

    Returns:
        The record, and what the row adds to the report of an import.
    Raises:
        RowError: the row cannot be used: ids outside the vocabulary or repeated in a list, lists that do not fit the tokens.
        DataError: a sum above 1 is refused.
    """
    if row.refusal is not None:
        raise row.refusal
    report = ImportReport(rows=1, tokens=len(row.token_ids))
    row = _without_padding(_cut(row, aligned, report), report)
    tokens = len(row.token_ids)
    counts_T = np.zeros(tokens, np.int32)
    first = {"with": 0, "after": 1, "end": tokens - len(row.counts)}[aligned]
    counts_T[first : first + len(row.counts)] = row.counts
    _check(row, counts_T, vocab_size)
    sum_T = segment_sum(np.exp(row.logprobs.astype(np.float64)), counts_T)
    if not np.isfinite(sum_T).all():
        raise RowError(
            "not_finite", "the log-probabilities of a position are so far above 0 that their sum is infinite"
        )
    over_T = sum_T > 1
    report.max_sum, report.sums_over_one = float(sum_T.max(initial=0.0)), int(over_T.sum())
    in_base_two_T = segment_sum(np.exp2(row.logprobs.astype(np.float64)), counts_T)
    report.over_one_in_base_two = int((in_base_two_T > 1.001).sum())
    report.about_one_in_base_two = int(((in_base_two_T > 0.95) & (in_base_two_T <= 1.001) & (sum_T < 0.9)).sum())
    report.rising = _rising(row.logprobs, counts_T)
    report.positions, report.entries = int((counts_T > 0).sum()), len(row.ids)
    kept = Kept(counts_T, np.zeros(tokens, np.int32), row.ids, row.logprobs)
    if over_T.any() and over_one == "refuse":
        raise DataError(
            f"row {row.id!r}: probabilities at {int(over_T.sum())} positions sum to more than 1 (largest {sum_T.max():.4f}); "
            "import them as they are with --over-one keep, or leave those positions out with --over-one mask"
        )
    if over_one == "mask":
        kept = _leave_out(kept, over_T)
    record = _record(row, kept, aligned)
    report.actual = int(np.isfinite(record.logprob).sum())
    return record, report


def _cut(row: PeerRow, aligned: Aligned, report: ImportReport) -> PeerRow:
    """Remove a list about the token after the last one; refuse lists that do not fit the tokens."""
    tokens, lists = len(row.token_ids), len(row.counts)
    if tokens < 2:
        raise RowError("no_targets", f"{tokens} tokens: nothing to predict")
    if lists > tokens or (aligned != "end" and lists < tokens - 1):
        raise RowError("misaligned", f"{lists} lists of entries for {tokens} tokens")
    if aligned == "after" and lists == tokens:
        report.beyond_end += int(row.counts[-1] > 0)
        end = len(row.ids) - int(row.counts[-1])
        return replace(row, counts=row.counts[:-1], ids=row.ids[:end], logprobs=row.logprobs[:end])
    if lists == tokens and row.counts[0] > 0:
        detail = "the first token has a list of entries, but nothing predicts it; if list j is about token j + 1, set "
        raise RowError("misaligned", f"{detail}--aligned after")
    if aligned == "with" and lists == tokens - 1:  # the empty first list was left off
        ranks = None if row.ranks is None else np.concatenate(([0], row.ranks))
        return replace(row, counts=np.concatenate(([0], row.counts)), ranks=ranks)
    return row


def _without_padding(row: PeerRow, report: ImportReport) -> PeerRow:
    """Remove entries of probability 0, with which some tools pad their lists."""
    empty = np.isneginf(row.logprobs)
    if not empty.any():
        return row
    report.padding_entries += int(empty.sum())
    num_empty = segment_sum(empty.astype(np.float64), row.counts).astype(np.int32)
    return replace(row, counts=row.counts - num_empty, ids=row.ids[~empty], logprobs=row.logprobs[~empty])


def _check(row: PeerRow, counts_T: np.ndarray, vocab_size: int) -> None:
    for what, ids in (("token", row.token_ids), ("kept", row.ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise RowError("vocabulary", f"a {what} id is outside [0, {vocab_size})")
    if not np.isfinite(row.logprobs).all():
        raise RowError("not_finite", "a log-probability is not a number")
    place_N = np.repeat(np.arange(len(counts_T), dtype=np.int64), counts_T)
    if len(np.unique(place_N * vocab_size + row.ids)) < len(row.ids):
        raise RowError("twice", "an id is repeated in a list")


def _rising(logprobs_N: np.ndarray, counts_T: np.ndarray) -> int:
    """Positions where a log-probability is above the one before it."""
    place_N = np.repeat(np.arange(len(counts_T)), counts_T)
    rises = (np.diff(logprobs_N) > 0) & (np.diff(place_N) == 0)
    return len(np.unique(place_N[1:][rises]))


def _leave_out(kept: Kept, out_T: np.ndarray) -> Kept:
    """The entries without those of some positions."""
    stays_N = ~np.repeat(out_T, kept.num_exact)
    counts_T = np.where(out_T, 0, kept.num_exact).astype(np.int32)
    return Kept(counts_T, kept.num_drawn, kept.ids[stays_N], kept.logprobs[stays_N])


def _record(row: PeerRow, kept: Kept, aligned: Aligned) -> Record:
    """The row as a record; what the row does not hold is marked absent, by NaN or rank 0."""
    recorded_T = kept.num_exact > 0
    measures = unknown(len(row.token_ids))
    if row.ranks is not None and aligned == "with":
        place_N = np.repeat(np.arange(len(row.token_ids)), kept.num_exact)
        actual_N = kept.ids == row.token_ids[place_N]
        logprob_T = measures.logprob.copy()
        logprob_T[place_N[actual_N]] = kept.logprobs[actual_N]
        measures = replace(
            measures, logprob=logprob_T, rank=np.where(np.isnan(logprob_T), 0, row.ranks).astype(np.int32)
        )
    return Record(
        id=row.id or "",
        domain=row.domain or "",
        token_ids=row.token_ids,
        target_mask=recorded_T if row.target_mask is None else recorded_T & row.target_mask,
        kept=kept,
        **measures.measures(),
        text=row.text,
    )

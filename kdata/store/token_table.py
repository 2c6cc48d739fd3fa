"""Every token, and every kept entry, as Arrow record batches: the tables `tokens` and `entries` of SQL, Polars and Python.

The payload is decoded a few record batches at a time, and of it only the columns that are asked for. So a reader needs the
memory of some record batches, whatever the size of the dataset. A number that is not known is null, where `Sequences` has NaN
and rank 0.

Shapes: S rows, T tokens, N kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from kdata.errors import ConfigError, OutOfRangeError, ShapeError, nearest
from kdata.format.codec import Positions
from kdata.format.kept import Kept, draw_mask
from kdata.format.schema import DatasetInfo, ManifestEntry
from kdata.format.sequences import check_ids, entries_of, values_of
from kdata.store.index import UNREADABLE, damaged
from kdata.store.payload import PayloadReader, used_columns
from kdata.store.token_scores import ScoreSource, TokenScore, score_of, token_scores
from kdata.store.tokens import TokenText

TableName = Literal["tokens", "entries"]
TEXT = pa.dictionary(pa.int32(), pa.string())  # ids and tokens repeat: each text is there once per record batch
TOKENS_AT_A_TIME = {"tokens": 1 << 15, "entries": 1 << 13}  # decoded together, or one record batch where it has more
ROWS_AT_A_TIME = 64  # where no payload is read


class TokenSource(ScoreSource, Protocol):
    """What the tables need of a dataset."""

    info: DatasetInfo
    shard_starts: np.ndarray

    @property
    def token_text(self) -> TokenText:
        """The dataset's tokenizer."""
        ...

    @property
    def entry_text(self) -> TokenText:
        """Ids of entries as text."""
        ...

    def open_shard(self, shard: int) -> np.ndarray:
        """Row starts of a shard's record batches; the shard is checked at first use."""
        ...

    def shard_file(self, entry: ManifestEntry, folder: str) -> Path:
        """Path of one file of a shard."""
        ...

    def checked_file(self, entry: ManifestEntry, folder: str) -> Path:
        """The same, compared with the manifest."""
        ...

    def shard_index(self, entry: ManifestEntry, columns: list[str] | None) -> pa.Table:
        """Columns of a shard's index, compared with the manifest."""
        ...


@dataclass
class Piece:
    """Some rows of one shard: S rows with T tokens.

    ids: string [S]. rows: int64 [S], global row numbers. offsets: int64 [S+1], where the rows begin among the tokens.
    batch: the payload columns that are needed. source: the dataset. scores: float32 [T], nats, of each column of a score that
    is needed.
    """

    ids: pa.Array
    rows: np.ndarray
    offsets: np.ndarray
    batch: pa.RecordBatch
    source: TokenSource = field(repr=False)
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        """A payload column with one value per token, [T]. Raises ShapeError where its rows have other lengths."""
        return values_of(self.batch, name, self.offsets)

    @cached_property
    def row(self) -> np.ndarray:
        """Row of each token among the S rows, int32 [T]."""
        return np.repeat(np.arange(len(self.rows), dtype=np.int32), np.diff(self.offsets))

    @cached_property
    def position(self) -> np.ndarray:
        """Position of each token in its row, int32 [T]."""
        position: np.ndarray = np.arange(self.offsets[-1]) - self.offsets[self.row]
        return position.astype(np.int32)

    @cached_property
    def token_ids(self) -> np.ndarray:
        """int32 [T]. Raises ShapeError where one is outside the vocabulary."""
        ids = self.values("input_ids")
        check_ids("token", ids, self.source.info.vocab_size)
        return ids

    @cached_property
    def num_exact(self) -> np.ndarray:
        """Exact entries at each position, int32 [T]."""
        return self.values("num_exact").astype(np.int32)

    @cached_property
    def num_drawn(self) -> np.ndarray:
        """Draws at each position, int32 [T]."""
        return self.values("num_drawn").astype(np.int32)

    @cached_property
    def num_kept(self) -> np.ndarray:
        """Kept entries at each position, int32 [T]."""
        num_kept: np.ndarray = self.num_exact + self.num_drawn
        return num_kept

    @cached_property
    def kept(self) -> Kept:
        """All kept entries."""
        return self._entries(self.num_drawn)

    def _entries(self, num_drawn: np.ndarray) -> Kept:
        positions = Positions(self.num_exact, num_drawn, self.values("log_tail"))
        return entries_of(self.batch, self.offsets, positions, self.source.info)

    @cached_property
    def kept_mass(self) -> np.ndarray:
        """Probability mass of the exact entries at each position, float64 [T]."""
        if self.source.info.codec.id != "packed":
            return self.kept.exact_mass()
        return self._entries(np.zeros_like(self.num_drawn)).exact_mass()  # without the columns of draws

    @cached_property
    def token(self) -> np.ndarray:
        """Token that each entry belongs to, int32 [N]."""
        return np.repeat(np.arange(len(self.num_kept), dtype=np.int32), self.num_kept)

    @cached_property
    def entry(self) -> np.ndarray:
        """Place of each entry among those of its position, int32 [N]: exact ones first."""
        first_T = np.cumsum(self.num_kept, dtype=np.int32) - self.num_kept
        place: np.ndarray = np.arange(len(self.token), dtype=np.int32) - np.repeat(first_T, self.num_kept)
        return place

    @cached_property
    def is_draw(self) -> np.ndarray:
        """Which entries are draws, bool [N]."""
        return draw_mask(self.num_exact, self.num_drawn)

    def entry_logprob(self) -> pa.Array:
        """The teacher's log-probability of each entry, float32 [N]; null of draws for which it is not stored."""
        kept = self.kept
        if not self.is_draw.any():
            return pa.array(kept.logprobs)
        if kept.draw_logprobs is None:
            return pa.array(kept.logprobs, mask=self.is_draw)
        logprobs = kept.logprobs.copy()
        logprobs[self.is_draw] = kept.draw_logprobs
        return known(logprobs)


def known(values: np.ndarray) -> pa.Array:
    """Floats as float32, null where they are NaN."""
    return pa.array(values.astype(np.float32, copy=False), from_pandas=True)


def repeated(texts: pa.Array, places: np.ndarray) -> pa.Array:
    """`texts[places]`, each text stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(places), texts)


@dataclass(frozen=True)
class Column:
    """A column of a table: its type, what it is, the payload columns that it is made of, and how."""

    kind: pa.DataType
    doc: str
    payload: tuple[str, ...]
    make: Callable[[Piece], pa.Array]


COUNTS = ("num_exact", "num_drawn")
KEPT = (*COUNTS, "log_tail", "entry_", "exact_", "draw_")  # names that end with _ are beginnings of names
TOKENS: dict[str, Column] = {
    "id": Column(TEXT, "Id of the sequence.", (), lambda p: repeated(p.ids, p.row)),
    "global_row": Column(
        pa.int64(), "Global row number of the sequence in the dataset, from 0.", (), lambda p: pa.array(p.rows[p.row])
    ),
    "position": Column(
        pa.int32(),
        "Position in the sequence, from 0, which no distribution predicts.",
        (),
        lambda p: pa.array(p.position),
    ),
    "token_id": Column(pa.int32(), "The token at this position.", ("input_ids",), lambda p: pa.array(p.token_ids)),
    "token": Column(
        TEXT,
        "Its text by the dataset's tokenizer, with the space before it; a part of a character reads as U+FFFD. Null where "
        "the dataset carries no tokenizer.",
        ("input_ids",),
        lambda p: p.source.token_text.column(p.token_ids),
    ),
    "logprob": Column(
        pa.float32(),
        "Teacher's log-probability of it, nats. Null where no distribution was recorded.",
        ("logprob",),
        lambda p: known(p.values("logprob")),
    ),
    "rank": Column(
        pa.int32(),
        "Its rank in the teacher's distribution, 1 = most probable. Null where it is not known.",
        ("rank",),
        lambda p: pa.array(p.values("rank"), mask=p.values("rank") == 0),
    ),
    "entropy": Column(
        pa.float32(),
        "Entropy of the teacher's whole distribution, nats. Null where it is not known.",
        ("entropy",),
        lambda p: known(p.values("entropy")),
    ),
    "log_tail": Column(
        pa.float32(),
        "Natural log of the probability mass outside the exact entries, as it is stored; -inf when nothing is outside. Null "
        "where it is not known.",
        ("log_tail",),
        lambda p: known(p.values("log_tail")),
    ),
    "kept_mass": Column(
        pa.float64(),
        "Probability mass of the exact entries, as they are stored. Null where no entry is.",
        (*COUNTS, "log_tail", "entry_", "exact_"),
        lambda p: pa.array(p.kept_mass, mask=p.num_kept == 0),
    ),
    "target": Column(
        pa.bool_(),
        "Whether the position counts as a target (`target_mask`).",
        ("target_mask",),
        lambda p: pa.array(p.values("target_mask")),
    ),
    "num_exact": Column(
        pa.int32(),
        "Entries kept exactly; 0 where no distribution was recorded or kept.",
        COUNTS,
        lambda p: pa.array(p.num_exact),
    ),
    "num_drawn": Column(pa.int32(), "Distinct ids drawn at random.", COUNTS, lambda p: pa.array(p.num_drawn)),
}
ENTRIES: dict[str, Column] = {
    "id": Column(TEXT, "Id of the sequence.", COUNTS, lambda p: repeated(p.ids, np.repeat(p.row, p.num_kept))),
    "global_row": Column(
        pa.int64(),
        "Global row number of the sequence in the dataset, from 0.",
        COUNTS,
        lambda p: pa.array(np.repeat(p.rows[p.row], p.num_kept)),
    ),
    "position": Column(
        pa.int32(),
        "Position in the sequence, from 0, of the token that the entry was thought of for.",
        COUNTS,
        lambda p: pa.array(np.repeat(p.position, p.num_kept)),
    ),
    "entry": Column(
        pa.int32(),
        "Place among the kept entries of the position, from 0: exact ones by falling probability, then draws by rising id.",
        COUNTS,
        lambda p: pa.array(p.entry),
    ),
    "token_id": Column(pa.int32(), "The token that the entry is about.", KEPT, lambda p: pa.array(p.kept.ids)),
    "token": Column(TEXT, "Its text, as in `tokens`.", KEPT, lambda p: p.source.entry_text.column(p.kept.ids)),
    "logprob": Column(
        pa.float32(),
        "Teacher's log-probability of it, nats. Null of a draw, unless further temperatures are stored.",
        KEPT,
        lambda p: p.entry_logprob(),
    ),
    "is_draw": Column(pa.bool_(), "True: a random draw. False: an exact entry.", COUNTS, lambda p: pa.array(p.is_draw)),
    "weight": Column(
        pa.float32(),
        "What the loss uses: of an exact entry its probability, of a draw its unbiased weight.",
        KEPT,
        lambda p: pa.array(np.exp(p.kept.logprobs)),
    ),
}
TABLES: dict[str, dict[str, Column]] = {"tokens": TOKENS, "entries": ENTRIES}


def column_of(table: str, name: str) -> Column:
    """A column of a table. Raises ConfigError where there is none of the name, with the nearest one."""
    own = TABLES[table]
    if name in own:
        return own[name]
    score = score_of(name) if table == "tokens" else None
    if score is None:
        raise ConfigError(f"{table} has no column {name!r}{nearest(name, list(own))}; it has {', '.join(own)}")
    doc = f"NLL of it by the score {score}, nats. Null where the score has none."
    return Column(pa.float32(), doc, (), lambda p: known(p.scores[name]))


def schema_of(table: str, columns: Sequence[str] | None = None) -> pa.Schema:
    """Arrow schema of a table, or of some of its columns, each with its `doc`.

    Raises ConfigError for an unknown column, with the nearest one.
    """
    names = list(TABLES[table]) if columns is None else list(columns)
    if not names:
        raise ConfigError(f"no column of {table} is named; it has {', '.join(TABLES[table])}")
    own = {name: column_of(table, name) for name in names}
    return pa.schema([pa.field(name, own[name].kind, metadata={"doc": own[name].doc}) for name in names])


def row_numbers(rows: Sequence[int] | np.ndarray, num_rows: int) -> np.ndarray:
    """Global row numbers in rising order, each once, int64. Raises OutOfRangeError where one is outside [0, num_rows)."""
    values = np.asarray(rows)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ShapeError(f"rows must be global row numbers, got {rows!r}; of a mask take np.flatnonzero(mask)")
    numbers = np.unique(values.astype(np.int64))
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= num_rows):
        raise OutOfRangeError(f"rows must lie in [0, {num_rows}), got {numbers[0]} to {numbers[-1]}")
    return numbers


def rows_in(source: TokenSource, table: str, rows: np.ndarray | None = None) -> int:
    """About how many rows a table has, of all rows of the dataset or of some, see `read_table`."""
    tokens = sum(entry.tokens for entry in source.manifest)
    if rows is not None:
        tokens = tokens * len(rows) // max(int(source.shard_starts[-1]), 1)
    codec = source.info.codec
    entries = int(codec.parameters.get("k", 0)) + codec.most_draws  # about as many at most, at each position
    return tokens * (max(entries, 1) if table == "entries" else 1)


def read_table(
    source: TokenSource, table: str, columns: Sequence[str] | None = None, rows: np.ndarray | None = None
) -> pa.RecordBatchReader:
    """A table as a stream of record batches, in the order of the dataset.

    Args:
        columns: None takes all but those of scores.
        rows: of which rows, as `row_numbers` returns them; None takes all. Record batches without one of them are not read.
    Raises:
        ConfigError: an unknown column.
        MissingError, MismatchError, CorruptError: a score that does not fit, see `TokenScore`.
        CorruptError, FormatError, StorageError: while it is read; see `Dataset.take`.
    """
    schema = schema_of(table, columns)
    own = [column_of(table, name) for name in schema.names]
    scores = token_scores(source, schema.names) if table == "tokens" else {}
    wanted = {name for column in own for name in column.payload}

    def batches() -> Iterator[pa.RecordBatch]:
        if "token" in schema.names:
            _ = source.token_text  # which may have to be copied here first
        for path, piece in _pieces(source, table, wanted, scores, rows):
            try:
                arrays = [column.make(piece) for column in own]
            except UNREADABLE as error:
                raise damaged(path, error) from error
            if len(arrays[0]):
                yield pa.record_batch(arrays, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _pieces(
    source: TokenSource, table: str, wanted: set[str], scores: dict[str, TokenScore], rows: np.ndarray | None
) -> Iterator[tuple[Path, Piece]]:
    """The rows in pieces of about TOKENS_AT_A_TIME, each with the file that its payload is in.

    Args:
        wanted: columns of the payload. scores: columns of scores.
    """
    for shard, entry in enumerate(source.manifest):
        start, end = source.shard_starts[shard : shard + 2].tolist()
        local = np.arange(end - start)
        if rows is not None:
            local = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
        if not len(local):
            continue
        index = source.shard_index(entry, ["id", "num_tokens"])
        ids, lengths = index["id"].combine_chunks(), index["num_tokens"].to_numpy().astype(np.int64)
        if len(lengths) and (lengths.min() < 0 or lengths.sum() != entry.tokens):
            reason = f"its rows hold {lengths.sum()} tokens, the manifest says {entry.tokens}"
            raise damaged(source.shard_file(entry, "index"), reason)
        if wanted:
            path = source.shard_file(entry, "data")
            parts = _payload(source, shard, path, wanted, local)
        else:
            path = source.shard_file(entry, "index")
            parts = _without_payload(local)
        for numbers, batch in _joined(parts, lengths, TOKENS_AT_A_TIME[table]):
            counts = lengths[numbers]
            offsets = np.concatenate(([0], np.cumsum(counts)))
            piece_ids = ids.take(pa.array(numbers))
            values = {column: score.nll(shard, numbers, counts) for column, score in scores.items()}
            yield path, Piece(piece_ids, numbers + start, offsets, batch, source, values)


Part = tuple[np.ndarray, pa.RecordBatch]  # rows of a shard, and their payload


def _payload(source: TokenSource, shard: int, path: Path, wanted: set[str], local: np.ndarray) -> Iterator[Part]:
    """The record batches of a shard that hold some of the rows `local`, cut to them, with the columns that are wanted."""
    starts = source.open_shard(shard)
    try:
        if any(name.endswith("_") for name in wanted):  # of a codec: some of its columns may be null throughout
            beginnings = tuple(name for name in wanted if name.endswith("_"))
            columns = [name for name in used_columns(path) if name in wanted or name.startswith(beginnings)]
        else:
            columns = sorted(wanted)
        reader = PayloadReader(path, columns)
        source.checked_file(source.manifest[shard], "data")  # after it is open, see `Dataset.record_batch`
    except UNREADABLE as error:
        raise damaged(path, error) from error
    for number, (begin, end) in enumerate(pairwise(starts.tolist())):
        numbers = local[np.searchsorted(local, begin) : np.searchsorted(local, end)]
        if not len(numbers):
            continue
        try:
            batch = reader.batch(number)
        except UNREADABLE as error:
            raise damaged(path, error) from error
        yield numbers, batch if len(numbers) == end - begin else batch.take(pa.array(numbers - begin))


def _without_payload(local: np.ndarray) -> Iterator[Part]:
    for begin in range(0, len(local), ROWS_AT_A_TIME):
        numbers = local[begin : begin + ROWS_AT_A_TIME]
        yield numbers, pa.record_batch([pa.nulls(len(numbers))], names=["nothing"])


def _joined(parts: Iterator[Part], lengths: np.ndarray, tokens: int) -> Iterator[Part]:
    """Parts laid end to end until they hold `tokens` tokens."""
    waiting: list[Part] = []
    held = 0
    for part in parts:
        size = int(lengths[part[0]].sum())
        if waiting and held + size > tokens:
            yield _end_to_end(waiting)
            waiting, held = [], 0
        waiting.append(part)
        held += size
    if waiting:
        yield _end_to_end(waiting)


def _end_to_end(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([numbers for numbers, _ in parts]), pa.concat_batches([batch for _, batch in parts])

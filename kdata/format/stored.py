"""Between the columns that readers and writers know and those that version 3 of the codec packed stores.

Everything outside of `kdata.store.payload` and `kdata.store.shard` sees one set of columns: whole ids, and numbers as they
are meant (`readable_schema`). On disk stand codes (`coded`, `common_ids`). An exact entry that is the actual token has no id
of its own: the rank says which one it is, and input_ids what it is.

Shapes: T tokens, S rows, N exact entries, D draws.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pyarrow as pa

from kdata.errors import ShapeError
from kdata.format import coded, packed
from kdata.format.common_ids import CommonIds, decode_values, encode_values, ids_of_draws, steps_of_draws
from kdata.format.compiled import compiled
from kdata.format.schema import CodecInfo, is_coded, payload_schema

IDS_KEY = b"kdata.common_ids"  # in the metadata of a shard's footer: the schema's would stand in the file twice

# Columns of the list of numbers without a code: `far_columns` holds the place in this tuple, `far_values` the number's bits.
FAR_COLUMNS = ("logprob", "rank", "entropy", "num_exact", "num_drawn", "token_bytes")
_FAR = ("far_columns", "far_values")
_FLOATS = {"logprob": coded.LOGPROB, "entropy": coded.ENTROPY}
_TYPES = {
    "logprob": pa.float32(),
    "rank": pa.int32(),
    "log_tail": pa.float32(),
    "entropy": pa.float32(),
    "num_exact": pa.uint16(),
    "num_drawn": pa.uint16(),
    "token_bytes": pa.uint16(),
    "exact_ids": pa.int32(),
    "draw_ids": pa.int32(),
}
_ENTRIES = ("exact_codes", "draw_codes", "entry_bits", "num_exact_codes", "num_drawn_codes", *_FAR)
# Stored columns that each readable column is made of; any other is stored as it is.
MADE_OF: dict[str, tuple[str, ...]] = {
    "log_tail": ("tail_codes",),
    **{name: (f"{name}_codes", *_FAR) for name in FAR_COLUMNS},
    "exact_ids": ("input_ids", "rank_codes", *_ENTRIES),
    "draw_ids": _ENTRIES,
}

_CODES = {part for parts in MADE_OF.values() for part in parts} - {"input_ids"}


@cache
def readable_schema(codec: str, version: int) -> pa.Schema:
    """Arrow schema of a payload as readers and writers see it; of codecs that store it so, `payload_schema` itself."""
    stored = payload_schema(codec, version)
    if not is_coded(codec, version):
        return stored
    fields, common = [], payload_schema(codec, 1)
    for name in (*common.names, "exact_ids", "draw_ids"):
        nullable = name in ("token_bytes", "draw_ids")
        if name in MADE_OF:
            fields.append(pa.field(name, pa.list_(pa.field("item", _TYPES[name], nullable=False)), nullable))
        elif name in stored.names and name not in _CODES:
            fields.append(stored.field(name).remove_metadata())
    return pa.schema(fields)


def stored_names(columns: Iterable[str]) -> list[str]:
    """Stored columns that these readable columns are made of, each once."""
    return list(dict.fromkeys(part for name in columns for part in MADE_OF.get(name, (name,))))


def readable_names(stored: Iterable[str]) -> list[str]:
    """Readable columns that can be made of these stored ones."""
    there = list(stored)
    whole = [name for name in there if name not in _CODES]
    return whole + [name for name, parts in MADE_OF.items() if _needed(name, parts) <= set(there)]


def _needed(name: str, parts: tuple[str, ...]) -> set[str]:
    """Without the column of draws, which shards of some kinds lack."""
    return set(parts) - ({"draw_codes"} if name == "exact_ids" else set())


# ---------------------------------------------------------------------------------------------------------- writing


def to_stored(table: pa.Table, vocab_size: int, schema: pa.Schema) -> tuple[pa.Table, bytes]:
    """A readable payload table as it is stored.

    Args:
        table: columns of `readable_schema`, S rows.
        schema: the stored one.
    Returns:
        the table, and the shard's common ids for its footer.
    """
    flat = {name: _Flat.of(table[name]) for name in ("input_ids", *MADE_OF)}
    exact, drawn, rank = flat["num_exact"].values, flat["num_drawn"].values, flat["rank"].values
    columns: dict[str, pa.Array] = {
        name: table[name].combine_chunks() for name in schema.names if name in table.schema.names
    }
    columns["tail_codes"] = flat["log_tail"].lists(coded.encode_tail(flat["log_tail"].values, exact))
    codes = {name: _code_of(name, flat[name].values) for name in FAR_COLUMNS}
    given = np.empty(len(flat["exact_ids"].values), bool)
    _find_actual(flat["input_ids"].values, rank, exact.astype(np.int32), flat["exact_ids"].values, codes["rank"], given)
    for name in FAR_COLUMNS:
        columns[f"{name}_codes"] = flat[name].lists(codes[name])
    columns |= _far_lists(flat, codes)
    others = flat["exact_ids"].values[~given]
    draws = flat["draw_ids"].values
    common = CommonIds.of(np.bincount(np.concatenate([others, draws]), minlength=vocab_size))
    running = np.concatenate(([0], np.cumsum(~given, dtype=np.int64)))
    other_ends = running[flat["exact_ids"].offsets]
    steps = steps_of_draws(common.number_of[draws], drawn.astype(np.int32))
    parts = [(common.number_of[others], other_ends), (steps, flat["draw_ids"].offsets)]
    [exact_codes, draw_codes], bits, begins = encode_values(parts)
    columns["exact_codes"], columns["entry_bits"] = _lists(exact_codes, other_ends), _lists(bits, begins)
    columns["draw_codes"] = flat["draw_ids"].lists(draw_codes)
    return pa.table(columns, schema=schema), common.to_bytes()


def _code_of(name: str, values: np.ndarray) -> np.ndarray:
    return _FLOATS[name].encode(values) if name in _FLOATS else coded.encode_whole(values)


@compiled()
def _find_actual(
    input_ids_T: np.ndarray, rank_T: np.ndarray, num_exact_T: np.ndarray, exact_ids_N: np.ndarray,
    rank_codes_T: np.ndarray, given_N: np.ndarray,
) -> None:  # fmt: skip
    """Mark the exact entries that rank and actual token give; where the rank names another one it becomes FAR, in place."""
    n = 0
    for t in range(len(num_exact_T)):
        given_N[n : n + num_exact_T[t]] = False
        if 1 <= rank_T[t] <= num_exact_T[t] and rank_codes_T[t] <= 253:
            place = n + rank_T[t] - 1
            if exact_ids_N[place] == input_ids_T[t]:
                given_N[place] = True
            else:
                rank_codes_T[t] = 255
        n += num_exact_T[t]


def _far_lists(flat: dict[str, _Flat], codes: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    """The lists of numbers without a code: in each row column by column, each in the order of positions."""
    rows, which, bits = [], [], []
    for number, name in enumerate(FAR_COLUMNS):
        places = np.flatnonzero(codes[name] == coded.FAR)
        values = flat[name].values[places]
        rows.append(np.searchsorted(flat[name].offsets, places, side="right") - 1)
        which.append(np.full(len(places), number, np.uint8))
        bits.append(values.astype(np.float32).view(np.int32) if name in _FLOATS else values.astype(np.int32))
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    num_rows = len(flat["rank"].offsets) - 1
    ends = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=num_rows))))
    return {
        "far_columns": _lists(np.concatenate(which)[order], ends),
        "far_values": _lists(np.concatenate(bits)[order], ends),
    }


# ---------------------------------------------------------------------------------------------------------- reading


def from_stored(batch: pa.RecordBatch, columns: Iterable[str], common: CommonIds | None) -> pa.RecordBatch:
    """Readable columns of a stored record batch. Nothing in it is trusted.

    Args:
        batch: holds the stored columns that `columns` are made of (`stored_names`), those that are null throughout aside.
        common: the shard's order of ids; None where no id of an entry is among `columns`.
    Raises:
        ShapeError: codes, bits and lists disagree, or an id is outside the vocabulary.
        KeyError: a column is missing.
    """
    decoder = _Decoder(batch, common)
    made = {name: decoder.make(name) for name in columns}
    return pa.record_batch(list(made.values()), names=list(made))


class _Decoder:
    """The readable columns of one stored record batch, each decoded once."""

    def __init__(self, batch: pa.RecordBatch, common: CommonIds | None) -> None:
        self._batch, self._order = batch, common

    @property
    def _common(self) -> CommonIds:
        assert self._order is not None, "ids of entries are decoded with their order alone"
        return self._order

    def make(self, name: str) -> pa.Array:
        """One readable column."""
        if name in FAR_COLUMNS:
            flat, values = self._number(name)
            return flat.lists(values)
        if name == "log_tail":
            flat = self._flat("tail_codes")
            return flat.lists(coded.decode_tail(flat.values))
        if name == "exact_ids":
            return self._exact_ids()
        if name == "draw_ids":
            return self._draw_ids()
        return self._batch.column(name)

    def _flat(self, name: str) -> _Flat:
        return _Flat.of(self._batch.column(name))

    def _number(self, name: str) -> tuple[_Flat, np.ndarray]:
        """A column that may have numbers without a code."""
        flat = self._flat(f"{name}_codes")
        codes = flat.values
        if name in _FLOATS:
            values = _FLOATS[name].values[codes]
        else:
            values = codes.astype(_TYPES[name].to_pandas_dtype())
            if (codes == coded.UNKNOWN).any():
                raise ShapeError(f"a {name} has a code that stands for nothing")
        places = np.flatnonzero(codes == coded.FAR)
        listed, rows = self._far_of(FAR_COLUMNS.index(name))
        if not np.array_equal(np.searchsorted(flat.offsets, places, side="right") - 1, rows):
            raise ShapeError(f"the numbers of {name} without a code are not those that are listed")
        if name in _FLOATS:
            listed = listed.view(np.float32)
        elif len(listed) and (listed.min() < 0 or listed.max() > np.iinfo(values.dtype).max):
            raise ShapeError(f"a {name} is out of range")
        values[places] = listed
        return flat, values

    def _far_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Bits int32 of the listed numbers of one column, and the row of each."""
        which, bits = self._flat("far_columns"), self._flat("far_values")
        if not np.array_equal(which.offsets, bits.offsets) or which.values.max(initial=0) >= len(FAR_COLUMNS):
            raise ShapeError("the list of numbers without a code is damaged")
        places = np.flatnonzero(which.values == number)
        return bits.values[places], np.searchsorted(which.offsets, places, side="right") - 1

    def _counts(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Entries of one kind at each position, int32 [T], and where those of each row begin, int64 [S+1]."""
        flat, values = self._number(name)
        counts_T = values.astype(np.int32)
        return counts_T, np.concatenate(([0], np.cumsum(counts_T, dtype=np.int64)))[flat.offsets]

    @cached_property
    def _entry_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the exact entries that have an id of their own, and steps of the draws."""
        exact, bits = self._flat("exact_codes"), self._flat("entry_bits")
        parts = [(exact.values, exact.offsets)]
        if "draw_codes" in self._batch.schema.names and not self._batch.column("draw_codes").null_count:
            draws = self._flat("draw_codes")
            parts.append((draws.values, draws.offsets))
        numbers = decode_values(parts, bits.values, bits.offsets)
        return numbers[0], numbers[1] if len(numbers) > 1 else np.zeros(0, np.int32)

    def _exact_ids(self) -> pa.Array:
        counts_T, ends = self._counts("num_exact")
        numbers, ranks, inputs = self._entry_numbers[0], self._flat("rank_codes"), self._flat("input_ids")
        if len(numbers) and numbers.max() >= self._common.vocab_size:
            raise ShapeError("an id is outside the vocabulary")
        if not len(ranks.values) == len(inputs.values) == len(counts_T):
            raise ShapeError("ranks, tokens and counts differ in number")
        codes_T = ranks.values.astype(np.int32)
        has_actual_T = (codes_T >= 1) & (codes_T <= np.minimum(counts_T, coded.MOST))
        before = np.concatenate(([0], np.cumsum(counts_T - has_actual_T, dtype=np.int64)))
        if not np.array_equal(before[inputs.offsets], self._flat("exact_codes").offsets):
            raise ShapeError("there are more or fewer ids of exact entries than counts and ranks say")
        ids_N = np.empty(ends[-1], np.int32)
        place_T = np.where(has_actual_T, codes_T - 1, -1).astype(np.int32)
        _with_actual(inputs.values, place_T, counts_T, self._common.id_of[numbers], ids_N)
        return _lists(ids_N, ends)

    def _draw_ids(self) -> pa.Array:
        codes = self._batch.column("draw_codes")
        if codes.null_count == len(codes) > 0:
            return pa.nulls(len(codes), pa.list_(pa.field("item", pa.int32(), nullable=False)))
        counts_T, ends = self._counts("num_drawn")
        if not np.array_equal(ends, self._flat("draw_codes").offsets):
            raise ShapeError("there are more or fewer draws than their counts say")
        return _lists(ids_of_draws(self._entry_numbers[1], counts_T, self._common.id_of), ends)


@compiled()
def _with_actual(
    input_ids_T: np.ndarray, place_T: np.ndarray, num_exact_T: np.ndarray, others: np.ndarray, ids_N: np.ndarray
) -> None:
    """Lay out the ids of exact entries: the actual token at its place (-1: none), the others in order. Counts are checked."""
    n, taken = 0, 0
    for t in range(len(num_exact_T)):
        for place in range(num_exact_T[t]):
            if place == place_T[t]:
                ids_N[n] = input_ids_T[t]
            else:
                ids_N[n] = others[taken]
                taken += 1
            n += 1


def as_earlier(table: pa.Table, codec: CodecInfo) -> pa.Table:
    """A readable payload of version 3 with the columns of an earlier version of the same codec.

    Entries, tails and ranks stay what they are; log-probabilities of actual tokens and entropies get float16's precision.
    """
    exact, draws = _Flat.of(table["exact_ids"]), _Flat.of(table["draw_ids"])
    id_bytes = codec.parameters["id_bytes"]
    flat = {name: (exact, values) for name, values in packed.planes("exact_id", exact.values, id_bytes).items()}
    if draws.null is None:
        steps = packed.steps_up(draws.values, _Flat.of(table["num_drawn"]).values.astype(np.int32))
        flat |= {name: (draws, values) for name, values in packed.planes("draw_id", steps, id_bytes).items()}
    columns = {name: own.lists(values) for name, (own, values) in flat.items()}
    schema = payload_schema(codec.id, codec.version)
    for field in schema:
        if field.name not in columns:
            there = field.name in table.schema.names
            columns[field.name] = table[field.name] if there else pa.nulls(table.num_rows, field.type)
    for name in _FLOATS:
        own = _Flat.of(table[name])
        columns[name] = own.lists(own.values.astype(np.float16))
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


# ------------------------------------------------------------------------------------------------------ list columns


@dataclass(frozen=True)
class _Flat:
    """A list column: values of all rows, int64 offsets [S+1] of the rows, and which rows are null (None: none)."""

    values: np.ndarray
    offsets: np.ndarray
    null: np.ndarray | None

    @classmethod
    def of(cls, column: pa.Array | pa.ChunkedArray) -> _Flat:
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if array.values.null_count:
            raise ShapeError("a list has an item that is null")
        if not array.null_count:
            offsets = array.offsets.to_numpy().astype(np.int64)
            values = array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
            return cls(values, offsets - offsets[0], None)
        values = array.flatten().to_numpy(zero_copy_only=False)
        null = array.is_null().to_numpy(zero_copy_only=False)
        sizes = np.where(null, 0, np.diff(array.offsets.to_numpy().astype(np.int64)))
        return cls(values, np.concatenate(([0], np.cumsum(sizes))), null)

    def lists(self, values: np.ndarray) -> pa.Array:
        """Other values with the rows of this column."""
        return _lists(values, self.offsets, self.null)


def _lists(values: np.ndarray, offsets: np.ndarray, null: np.ndarray | None = None) -> pa.Array:
    kind = pa.list_(pa.field("item", pa.from_numpy_dtype(values.dtype), nullable=False))
    mask = None if null is None else pa.array(null)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values), type=kind, mask=mask)

"""Version 3 of the codec packed: what its codes stand for, how far off, and that nothing hostile gets past them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdata.errors import ShapeError
from kdata.format import coded
from kdata.format.common_ids import (
    LARGEST,
    LEAST_VALUE,
    NUM_BITS,
    CommonIds,
    decode_values,
    encode_values,
    ids_of_draws,
    steps_of_draws,
)
from kdata.format.schema import payload_schema
from kdata.format.stored import MADE_OF, from_stored, readable_schema, stored_names, to_stored

VERSION = 3
SCHEMA = payload_schema("packed", VERSION)
READABLE = readable_schema("packed", VERSION)


# ------------------------------------------------------------------------------------------------------ numbers


@given(st.lists(st.floats(0, 62, width=32), min_size=1))
def test_log_probabilities_are_off_by_at_most_what_is_said(sizes: list[float]) -> None:
    nats = np.array(sizes, np.float32)
    read = coded.LOGPROB.values[coded.LOGPROB.encode(-nats)].astype(np.float64)
    assert (np.abs(read + nats) <= np.sqrt(nats.astype(np.float64)) / 32 + 1 / 4096 + 1e-6).all()


@given(st.lists(st.floats(0, 15.5, width=32), min_size=1))
def test_entropies_are_off_by_at_most_what_is_said(sizes: list[float]) -> None:
    nats = np.array(sizes, np.float32)
    read = coded.ENTROPY.values[coded.ENTROPY.encode(nats)].astype(np.float64)
    assert (np.abs(read - nats) <= np.sqrt(nats.astype(np.float64)) / 64 + 1 / 16384 + 1e-6).all()


@given(st.lists(st.floats(-1000, 0) | st.floats(-16, 0) | st.floats(-1e-3, 0), min_size=1), st.booleans())
def test_tails_are_off_by_at_most_what_is_said(logs: list[float], exact: bool) -> None:
    tail = np.array(logs, np.float32)
    counts = np.full(len(tail), int(exact))
    read = np.exp(coded.round_tail(tail, counts).astype(np.float64))
    mass = np.exp(tail.astype(np.float64))
    off = np.abs(read - mass)
    assert (off <= 0.0048).all()
    small = (mass < 0.0101) & (mass > 2.0**-24)
    assert (off[small] <= 0.0911 * mass[small]).all()
    assert (off[mass <= 2.0**-24] <= 2.0**-24).all()
    assert (read > 0).all(), "only a mass of 0 is read as 0"
    if exact:
        kept = -np.expm1(tail.astype(np.float64))  # the exact entries
        some = (kept < 0.0101) & (kept > 2.0**-16)
        assert (np.abs((1 - read) - kept)[some] <= 0.0911 * kept[some] + 1e-12).all()
        assert (1 - read >= 2.0**-16 - 1e-12).all()


def test_a_tail_that_is_off_costs_little_wherever_it_is() -> None:
    """The bound in the module: KL between the two masses, over a fine grid of angles."""
    mass = np.sin(np.linspace(1e-4, np.pi / 2 - 1e-4, 200_001)) ** 2
    read = np.exp(coded.round_tail(np.log(mass), np.ones(len(mass), int)).astype(np.float64))
    kl = mass * np.log(mass / read) + (1 - mass) * np.log((1 - mass) / (1 - read))
    assert kl.max() < 5e-5
    assert kl.mean() < 1.6e-5


def test_what_is_special_stays_special() -> None:
    special = np.array([np.nan, 0.0, -np.inf, -63.0, -1e4, 1e-7], np.float32)
    assert coded.LOGPROB.encode(special).tolist() == [254, 0, 255, 255, 255, 0]
    assert coded.LOGPROB.encode(np.array([0.5], np.float32)).tolist() == [255]
    none, one = np.zeros(3, int), np.ones(3, int)
    tail = np.array([np.nan, 0.0, -np.inf], np.float32)
    assert coded.encode_tail(tail, none).tolist() == [254, 253, 0]
    assert coded.encode_tail(tail, one).tolist() == [254, 252, 0], "exact entries have a mass"
    np.testing.assert_array_equal(coded.round_tail(tail, none), tail)
    assert coded.encode_whole(np.array([0, 253, 254, 70_000, -1])).tolist() == [0, 253, 255, 255, 255]


def test_coding_what_was_decoded_changes_nothing() -> None:
    codes = np.arange(254, dtype=np.uint8)
    for grid in (coded.LOGPROB, coded.ENTROPY):
        np.testing.assert_array_equal(grid.encode(grid.values[codes]), codes)
    nothing = np.zeros(254, int)
    np.testing.assert_array_equal(coded.encode_tail(coded.decode_tail(codes), nothing), codes)


# ----------------------------------------------------------------------------------------------------------- ids


def test_the_codes_cover_every_value_once() -> None:
    ends = LEAST_VALUE.astype(np.int64) + (1 << NUM_BITS.astype(np.int64))
    np.testing.assert_array_equal(LEAST_VALUE[1:], ends[:-1])
    assert ends[-1] == LARGEST + 1


@given(
    st.lists(st.lists(st.integers(0, LARGEST), max_size=9), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 300), max_size=9), min_size=1, max_size=5),
)
def test_values_come_back(first: list[list[int]], second: list[list[int]]) -> None:
    rows = min(len(first), len(second))
    parts = []
    for lists in (first[:rows], second[:rows]):
        ends = np.concatenate(([0], np.cumsum([len(row) for row in lists])))
        parts.append((np.array([value for row in lists for value in row], np.int32), ends))
    codes, bits, begins = encode_values(parts)
    coded_parts = [(own, ends) for own, (_, ends) in zip(codes, parts, strict=True)]
    back = decode_values(coded_parts, bits, begins)
    for (values, _), got in zip(parts, back, strict=True):
        np.testing.assert_array_equal(got, values)
    if len(bits):
        with pytest.raises(ShapeError, match="bits"):
            decode_values(coded_parts, bits[:-1], np.minimum(begins, len(bits) - 1))
        with pytest.raises(ShapeError, match="bits"):
            decode_values(coded_parts, np.append(bits, np.uint8(0)), np.append(begins[:-1], len(bits) + 1))


def test_a_value_beyond_the_codes_is_refused() -> None:
    with pytest.raises(ShapeError, match="no code"):
        encode_values([(np.array([LARGEST + 1]), np.array([0, 1]))])


@given(st.data())
def test_the_order_of_ids_comes_back_from_the_metadata(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(2, 3000))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = rng.zipf(1.3, vocab).clip(0, 10_000) - 1
    order = CommonIds.of(counts)
    back = CommonIds.from_bytes(order.to_bytes(), vocab)
    np.testing.assert_array_equal(back.common, order.common)
    np.testing.assert_array_equal(np.sort(back.id_of), np.arange(vocab))
    np.testing.assert_array_equal(back.id_of[back.number_of], np.arange(vocab))
    seen = counts[order.id_of[:128]]
    common = seen[seen >= 4]
    assert (np.diff(common) <= 0).all()  # the first 128 by falling frequency


@pytest.mark.parametrize(
    "content",
    [b"", b"3", b"x:AAAA", b"-1:AAAA", b"99999999999:AAAA", b"3:AAAA", b"3:\xff", b"301:AAAA", b"2:" + b"A" * 40],
)
def test_a_damaged_table_is_refused(content: bytes) -> None:
    with pytest.raises(ShapeError, match="common ids"):
        CommonIds.from_bytes(content, 300)


@pytest.mark.parametrize("ids", [[5, 5], [300], [-1]])
def test_a_table_of_wrong_ids_is_refused(ids: list[int]) -> None:
    with pytest.raises(ShapeError, match="common ids"):
        CommonIds.from_bytes(CommonIds(np.array(ids, np.int32), 300).to_bytes(), 300)


@given(st.data())
def test_draws_come_back_as_a_set_that_rises(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = np.array(data.draw(st.lists(st.integers(0, 40), max_size=6)), np.int32)
    order = CommonIds.of(rng.zipf(1.5, 200).clip(0, 1000))
    ids = np.concatenate([np.zeros(0, int), *(np.sort(rng.choice(200, n, replace=False)) for n in counts)])
    steps = steps_of_draws(order.number_of[ids.astype(int)], counts)
    np.testing.assert_array_equal(ids_of_draws(steps, counts, order.id_of), ids)
    if len(steps):
        with pytest.raises(ShapeError, match="outside"):
            ids_of_draws(steps + 200, counts, order.id_of)
        with pytest.raises(ShapeError, match="counts say"):
            ids_of_draws(steps[1:], counts, order.id_of)


# -------------------------------------------------------------------------------------------------------- tables


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, int]:
    """A readable payload of a few rows, with numbers of every kind, and the size of its vocabulary."""
    vocab = draw(st.sampled_from([60, 700, 40_000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(0, 12), max_size=5))
    has_draws, has_bytes = draw(st.booleans()), draw(st.booleans())
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = int(offsets[-1])
    rare = rng.random(tokens) < draw(st.sampled_from([0.0, 0.3]))
    num_exact = rng.integers(0, 9, tokens)
    num_drawn = rng.integers(0, 9, tokens) * has_draws
    inputs = rng.integers(0, vocab, tokens)
    rank = np.where(rare, rng.integers(0, vocab, tokens), rng.integers(0, 12, tokens))
    exact, draws = [np.zeros(0, int)], [np.zeros(0, int)]
    for t in range(tokens):
        ids = rng.choice(vocab, num_exact[t] + num_drawn[t], replace=False)
        own = ids[: num_exact[t]]
        if 1 <= rank[t] <= num_exact[t] and rng.random() < 0.8:  # else the rank names another id: ties, other teachers
            own[own == inputs[t]] = own[rank[t] - 1]
            own[rank[t] - 1] = inputs[t]
        exact.append(own)
        draws.append(np.sort(ids[num_exact[t] :]))
    logprob = coded.LOGPROB.values[rng.integers(0, 255, tokens)]
    logprob[rare] = rng.choice([-np.inf, -100.0, 3.0, np.nan], int(rare.sum()))
    entropy = coded.ENTROPY.values[rng.integers(0, 255, tokens)]
    entropy[rare] = 1234.5
    tail_codes = rng.integers(0, 255, tokens)
    tail_codes = np.where((num_exact > 0) & (tail_codes == 253), 252, tail_codes)
    values: dict[str, Any] = {
        "input_ids": inputs,
        "target_mask": rng.random(tokens) < 0.8,
        "logprob": logprob,
        "rank": rank,
        "log_tail": coded.decode_tail(tail_codes.astype(np.uint8)),
        "entropy": entropy,
        "num_exact": num_exact,
        "num_drawn": num_drawn,
        "token_bytes": np.where(rare, 1000, rng.integers(0, 20, tokens)),
    }
    exact_ends = np.concatenate(([0], np.cumsum(num_exact)))[offsets]
    draw_ends = np.concatenate(([0], np.cumsum(num_drawn)))[offsets]
    entries = {"exact_ids": np.concatenate(exact), "exact_gaps": rng.integers(0, 256, int(num_exact.sum()))}
    drawn = {"draw_ids": np.concatenate(draws), "draw_counts": rng.integers(1, 256, int(num_drawn.sum()))}
    columns: dict[str, pa.Array] = {"id": pa.array([f"row {n}" for n in range(len(lengths))], pa.string())}
    for group, ends in ((values, offsets), (entries, exact_ends), (drawn, draw_ends)):
        for name, numbers in group.items():
            kind = READABLE.field(name).type
            flat = pa.array(numbers.astype(kind.value_type.to_pandas_dtype()))
            columns[name] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, type=kind)
    if not has_draws:
        columns |= {name: pa.nulls(len(lengths), columns[name].type) for name in drawn}
    if not has_bytes and lengths:  # null in some rows
        where = pa.array([n % 2 == 0 for n in range(len(lengths))])
        columns["token_bytes"] = pa.array(
            [
                None if null.as_py() else row
                for null, row in zip(where, columns["token_bytes"].to_pylist(), strict=True)
            ],
            columns["token_bytes"].type,
        )
    for name in set(READABLE.names) - columns.keys():
        columns[name] = pa.nulls(len(lengths), READABLE.field(name).type)
    return pa.table(columns, schema=READABLE), vocab


def equal(ours: pa.Table, theirs: pa.Table) -> None:
    """Compare column by column: NaN equals NaN, and floats to the bit."""
    assert ours.num_rows == theirs.num_rows
    for name in READABLE.names:
        a, b = ours[name].combine_chunks(), theirs[name].combine_chunks()
        assert a.type == b.type, name
        assert a.is_null().to_pylist() == b.is_null().to_pylist(), name
        if pa.types.is_list(a.type):
            assert [None if x is None else len(x) for x in a.to_pylist()] == [
                None if x is None else len(x) for x in b.to_pylist()
            ]
            a, b = a.flatten().to_numpy(zero_copy_only=False), b.flatten().to_numpy(zero_copy_only=False)
            np.testing.assert_array_equal(a, b, name)
        else:
            assert a.equals(b), name


def read_back(stored: pa.Table, ids: bytes, vocab: int, columns: list[str] | None = None) -> pa.Table:
    """Every readable column of a stored table, cut into record batches of two rows."""
    common, names = CommonIds.from_bytes(ids, vocab), columns or READABLE.names
    batches = [
        pa.record_batch(
            from_stored(batch, names, common).columns, schema=pa.schema([READABLE.field(name) for name in names])
        )
        for batch in stored.to_batches(max_chunksize=2)
    ]
    return pa.Table.from_batches(batches, schema=pa.schema([READABLE.field(name) for name in names]))


@settings(max_examples=150)
@given(tables())
def test_a_table_comes_back_and_is_stored_the_same_again(given_table: tuple[pa.Table, int]) -> None:
    table, vocab = given_table
    stored, ids = to_stored(table, vocab, SCHEMA)
    stored.validate(full=True)
    back = read_back(stored, ids, vocab)
    equal(table, back)
    again, same_ids = to_stored(back, vocab, SCHEMA)
    assert again.equals(stored)
    assert same_ids == ids
    for name in READABLE.names:  # each alone, from only the columns that it is made of
        part = read_back(stored.select(stored_names([name])), ids, vocab, [name])
        equal_column = part[name].combine_chunks(), back[name].combine_chunks()
        assert equal_column[0].to_pylist().__repr__() == equal_column[1].to_pylist().__repr__()


@settings(max_examples=300)
@given(tables(), st.data())
def test_a_changed_payload_is_refused_or_read_within_bounds(
    given_table: tuple[pa.Table, int], data: st.DataObject
) -> None:
    """Values and lengths of one stored column are replaced by others. What comes back has ids of the vocabulary only."""
    table, vocab = given_table
    if not table.num_rows:
        return
    stored, ids = to_stored(table, vocab, SCHEMA)
    name = data.draw(st.sampled_from([n for n in SCHEMA.names if n not in ("id", "log_z")]))
    place = SCHEMA.get_field_index(name)
    rows = stored[name].to_pylist()
    row = data.draw(st.integers(0, len(rows) - 1))
    item = SCHEMA.field(name).type.value_type
    limit = {"uint8": 255, "bool": 1, "int32": 2**31 - 1}.get(str(item), 1)
    value: Any = st.booleans() if str(item) == "bool" else st.integers(0, limit)
    rows[row] = data.draw(st.lists(value, max_size=20))
    changed = stored.set_column(place, SCHEMA.field(name), pa.array(rows, SCHEMA.field(name).type))
    common = CommonIds.from_bytes(ids, vocab)
    for batch in changed.to_batches():
        for column in MADE_OF:
            try:
                made = from_stored(batch, [column], common).column(0)
            except ShapeError:
                continue
            made.validate(full=True)
            values = made.flatten().to_numpy(zero_copy_only=False)
            if column in ("exact_ids", "draw_ids") and len(values) and name != "input_ids":
                assert values.min() >= 0
                assert values.max() < vocab

"""Plans that choose positions: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.format.positions import ChosenPositions, position_problem
from kdata.loader.batches import Batches, BatchesConfig
from kdata.selection.plan import PLAN_SCHEMA, Plan, PlanInfo, make_plan, open_plan, write_plan_info
from kdata.selection.ranked import All
from kdata.selection.select import select
from tests.kdata.selection.plans import Row, dataset_of

OF = {"method": "mine", "parameters": {}}


@pytest.fixture
def dataset(tmp_path: Path) -> kdata.Dataset:
    """Rows r0 to r4 of 5 tokens each in two shards; r3 has no target."""
    return dataset_of(tmp_path / "d", [Row(f"r{n}", "ab"[n % 2], 5, None if n == 3 else 1.0) for n in range(5)])


def saved(dataset: kdata.Dataset, ids: list[str], **lists: Any) -> Path:
    return make_plan(dataset, "mine", ids, **OF, **lists).save(dataset.path / "plans")


def replaced(dataset: kdata.Dataset, path: Path, table: pa.Table) -> Plan:
    """The plan with another table, and a JSON that has the digest of that table."""
    pq.write_table(table, path)
    write_plan_info(path, info_beside(path))
    return open_plan(dataset, "mine")


def info_beside(path: Path) -> PlanInfo:
    content = json.loads(path.with_suffix(".json").read_text())
    return PlanInfo.model_validate({**content, "table": None, "digest": ""})


def test_a_plan_comes_back_with_its_positions_and_weights(dataset: kdata.Dataset) -> None:
    path = saved(dataset, ["r4", "r0"], positions=[[1, 4], [2]], weights=[[0.5, 2], [1]], repeats=np.array([1, 2]))
    plan = open_plan(dataset, "mine")
    rows, chosen = plan.choice(dataset)
    assert rows.tolist() == [4, 0, 0] and chosen is not None and chosen.weights is not None
    assert chosen.rows.tolist() == [0, 4] and chosen.offsets.tolist() == [0, 1, 3]
    assert chosen.positions.tolist() == [2, 1, 4] and chosen.weights.tolist() == [1, 0.5, 2]
    assert pq.read_schema(path).names == ["id", "repeats", "positions", "weights"]
    info = plan.info.positions
    assert info is not None and (info.positions, info.targets, info.weighted) == (3, 8, True)
    assert info.domains["a"].positions == 3 and plan.info.num_tokens == 15


def test_a_plan_without_positions_is_as_before(dataset: kdata.Dataset) -> None:
    path = saved(dataset, ["r4", "r0"])
    assert pq.read_schema(path).names == ["id", "repeats"]
    assert "positions" not in json.loads(path.with_suffix(".json").read_text())
    assert open_plan(dataset, "mine").choice(dataset)[1] is None
    assert open_plan(dataset, "mine").rows(dataset).tolist() == [4, 0]


def test_a_reader_of_two_columns_refuses_positions(dataset: kdata.Dataset) -> None:
    """This is how every kdata before positions reads a plan."""
    path = saved(dataset, ["r0"], positions=[[1]])
    with pytest.raises(ValueError, match="names"):
        pq.read_table(path).cast(PLAN_SCHEMA)


def test_whole_rows_of_a_plan_with_positions_are_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    saved(dataset, ["r0"], positions=[[1]])
    plan = open_plan(dataset, "mine")
    with pytest.raises(ConfigError, match=r"'mine' chooses positions .*Plan\.choice"):
        plan.rows(dataset)
    with pytest.raises(ConfigError, match="'mine' chooses positions"):
        kdata.split(dataset, tmp_path / "parts", by="plan", plan=plan)
    with pytest.raises(ConfigError, match="'mine' chooses positions, and a plan of rows from it would lose them"):
        select(dataset, All(parent="mine"))


def lists(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


INT, FLOAT = pa.int32(), pa.float32()
DAMAGE: dict[str, tuple[list[Any], list[Any], str]] = {
    "unsorted": ([[4, 1], [2]], [[1, 1], [1]], "row 'r4': position 1 comes after 4"),
    "repeated": ([[1, 1], [2]], [[1, 1], [1]], "row 'r4': position 1 is there twice"),
    "first token": ([[1, 2], [0]], [[1, 1], [1]], "row 'r0': position 0 is not in 1 to 4"),
    "behind the end": ([[1, 5], [2]], [[1, 1], [1]], "row 'r4': position 5 is not in 1 to 4"),
    "negative": ([[-3, 1], [2]], [[1, 1], [1]], "row 'r4': position -3 is not in"),
    "none": ([[], [1, 2, 3]], [[], [1, 1, 1]], "row 'r4': it has no position"),
    "another length": ([[1, 2], [2]], [[1, 1], [1, 1]], "row 'r0': it has another number of weights"),
    "not a number": ([[1, 2], [2]], [[1, float("nan")], [1]], "row 'r4': the weight of position 2 is nan"),
    "infinite": ([[1, 2], [2]], [[1, 1], [float("inf")]], "row 'r0': the weight of position 2 is inf"),
    "no weight": ([[1, 2], [2]], [[0, 1], [1]], r"row 'r4': the weight of position 1 is 0\.0"),
    "null": ([[1, None], [2]], [[1, 1], [1]], "position or a weight that is null"),
    "null list": ([None, [2]], [[1, 1], [1]], "'positions' with null values"),
    "another number": ([[1], [2]], [[1], [1]], "2 positions and its JSON says 3"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_positions_that_cannot_be_right_are_refused_by_row(dataset: kdata.Dataset, damage: str) -> None:
    path = saved(dataset, ["r4", "r0"], positions=[[1, 2], [2]], weights=[[1, 1], [1]])
    positions, weights, message = DAMAGE[damage]
    table = pq.read_table(path)
    table = table.set_column(2, "positions", lists(positions, INT)).set_column(3, "weights", lists(weights, FLOAT))
    plan = replaced(dataset, path, table)
    with pytest.raises(CorruptError, match=message):
        plan.choice(dataset)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["positions"]),
        lambda table: table.append_column("more", table["repeats"]),
        lambda table: table.set_column(2, "positions", lists([[1.5, 2], [2]], pa.float64())),
        lambda table: table.set_column(2, "positions", lists([[1, 2**40], [2]], pa.int64())),
        lambda table: table.set_column(2, "positions", table["repeats"]),
    ],
    ids=["missing", "another column", "fractions", "too large", "no list"],
)
def test_other_columns_are_refused(dataset: kdata.Dataset, change: Any) -> None:
    path = saved(dataset, ["r4", "r0"], positions=[[1, 2], [2]])
    plan = replaced(dataset, path, change(pq.read_table(path)))
    with pytest.raises(CorruptError, match="is not a plan"):
        plan.choice(dataset)


def test_positions_without_their_description_are_refused(dataset: kdata.Dataset) -> None:
    """A JSON without `positions` beside a table with them, with digests that fit."""
    path = saved(dataset, ["r0"], positions=[[1]])
    write_plan_info(path, info_beside(path).model_copy(update={"positions": None}))
    with pytest.raises(CorruptError, match="is not a plan"):
        open_plan(dataset, "mine").choice(dataset)


def test_a_position_that_is_no_target_is_refused_where_the_row_is_read(dataset: kdata.Dataset) -> None:
    saved(dataset, ["r4", "r3"], positions=[[1], [2]])
    rows, positions = open_plan(dataset, "mine").choice(dataset)
    batches = Batches(dataset, rows, BatchesConfig(context_tokens=8, batch_rows=8), positions=positions)
    with pytest.raises(CorruptError, match=r"row 'r3': the plan chooses position 2, which is no target"):
        list(batches.epoch())


def test_more_positions_than_tokens_are_refused_before_they_are_read(dataset: kdata.Dataset) -> None:
    """Ten million equal numbers are a few hundred bytes of Parquet."""
    path = saved(dataset, ["r0"], positions=[[1]])
    many = pa.ListArray.from_arrays(pa.array([0, 10_000_000], pa.int32()), pa.array(np.ones(10_000_000, np.int32)))
    plan = replaced(dataset, path, pq.read_table(path).set_column(2, "positions", many))
    assert path.stat().st_size < 10_000
    with pytest.raises(CorruptError, match="10,000,000 values in a column, more than the dataset's 25 tokens"):
        plan.choice(dataset)


def test_a_plan_of_another_state_of_the_dataset_is_refused(dataset: kdata.Dataset) -> None:
    saved(dataset, ["r0"], positions=[[1]])
    grown = dataset_of(dataset.path, [Row("new")], source="more")
    with pytest.raises(MismatchError, match="belongs to another state"):
        open_plan(grown, "mine")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"positions": [[2, 1]]}, "row 'r0': position 1 comes after 2"),
        ({"positions": [[]]}, "it has no position"),
        ({"positions": [[1], [2]]}, "one list of positions for each id"),
        ({"positions": [[1]], "weights": [[1, 2]]}, "as many weights as positions"),
        ({"positions": [[1]], "weights": [[-1]]}, "must lie in 1e-30 to 1e30"),
        ({"weights": [[1]]}, "give the positions, too"),
    ],
)
def test_a_plan_of_invalid_positions_is_not_made(dataset: kdata.Dataset, lists: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_plan(dataset, "mine", ["r0"], **OF, **lists)


ROWS = st.lists(st.lists(st.tuples(st.integers(-1, 6), st.sampled_from([1.0, 0.0, np.nan])), max_size=4), max_size=5)


@given(ROWS, st.booleans())
def test_the_first_wrong_row_is_the_one_that_is_named(rows: list[list[tuple[int, float]]], weighted: bool) -> None:
    positions = [[position for position, _ in row] for row in rows]
    weights = [[weight for _, weight in row] for row in rows]

    def is_wrong(own: list[int], heavy: list[float]) -> bool:
        out = not own or any(not 1 <= p < 6 for p in own) or own != sorted(set(own))
        return out or (weighted and any(not w > 0 for w in heavy))

    wrong = [n for n, (own, heavy) in enumerate(zip(positions, weights, strict=True)) if is_wrong(own, heavy)]
    offsets = np.concatenate([[0], np.cumsum([len(own) for own in positions], dtype=np.int64)])
    flat = np.array([p for own in positions for p in own], np.int64)
    heavy = np.array([w for own in weights for w in own], np.float32) if weighted else None
    problem = position_problem(offsets, flat, np.full(len(rows), 6), heavy)
    assert (None if problem is None else problem[0]) == (wrong[0] if wrong else None)


def in_whole_arrays(
    offsets: np.ndarray, positions: np.ndarray, num_tokens: np.ndarray, weights: np.ndarray | None
) -> tuple[int, str] | None:
    """`position_problem` as array operations: the same answer, in 34 bytes a position."""
    counts = np.diff(offsets)
    row_P = np.repeat(np.arange(len(counts)), counts)
    first_P = np.zeros(len(positions), bool)
    first_P[offsets[:-1][counts > 0]] = True
    outside_P = (positions < 1) | (positions >= num_tokens[row_P])
    step_P = np.diff(positions.astype(np.int64), prepend=0)
    wrong_P = outside_P | (~first_P & (step_P <= 0))
    if weights is not None:
        wrong_P = wrong_P | ~((weights >= 1e-30) & (weights <= 1e30))
    rows = np.concatenate([np.flatnonzero(counts == 0)[:1], row_P[np.flatnonzero(wrong_P)[:1]]])
    if not len(rows):
        return None
    row = int(rows.min())
    if not counts[row]:
        return row, "it has no position"
    at = int(np.flatnonzero(wrong_P)[0])
    if outside_P[at]:
        return row, f"position {positions[at]} is not in 1 to {num_tokens[row] - 1}"
    if not first_P[at] and step_P[at] <= 0:
        again = "is there twice" if not step_P[at] else f"comes after {positions[at - 1]}"
        return row, f"position {positions[at]} {again}"
    assert weights is not None
    return row, f"the weight of position {positions[at]} is {weights[at]}; it must lie in 1e-30 to 1e30"


WEIGHTS = st.sampled_from([1.0, 1e-30, 1e30, 1.0, 2.5, 1e-31, 1e31, 0.0, -1.0, np.nan, np.inf])


@given(
    rows=st.lists(
        st.tuples(
            st.one_of(
                st.sets(st.integers(1, 9), min_size=1).map(sorted),  # right, unless the row is shorter
                st.lists(st.integers(-2, 12), max_size=5),
            ),
            st.integers(0, 12),
        ),
        max_size=6,
    ),
    weighted=st.sampled_from([None, np.float32, np.float64]),
    kind=st.sampled_from([np.int32, np.int64]),
    data=st.data(),
)
def test_positions_are_judged_as_in_whole_arrays(
    rows: list[tuple[list[int], int]], weighted: Any, kind: Any, data: st.DataObject
) -> None:
    offsets = np.cumsum([0, *(len(own) for own, _ in rows)])
    flat = np.array([position for own, _ in rows for position in own], kind)
    num_tokens = np.array([tokens for _, tokens in rows], np.int32)
    heavy = data.draw(st.lists(WEIGHTS, min_size=len(flat), max_size=len(flat)))
    weights = None if weighted is None else np.array(heavy, weighted)
    assert position_problem(offsets, flat, num_tokens, weights) == in_whole_arrays(offsets, flat, num_tokens, weights)


def test_positions_are_judged_in_no_memory_of_their_own() -> None:
    offsets = np.arange(0, 400_001, 4)
    positions, weights = np.tile(np.arange(1, 5, dtype=np.int32), 100_000), np.ones(400_000, np.float32)
    num_tokens = np.full(100_000, 5)
    position_problem(offsets[:2], positions[:4], num_tokens, weights[:4])  # compiles
    tracemalloc.start()
    assert position_problem(offsets, positions, num_tokens, weights) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, peak


def test_tokens_of_documents_in_any_order_with_repeats() -> None:
    chosen = ChosenPositions.of(
        np.array([7, 2]), np.array([0, 2, 3]), np.array([1, 3, 4], np.int32), np.array([1, 2, 3], np.float32)
    )
    assert chosen.rows.tolist() == [2, 7] and chosen.missing(np.array([2, 5])).tolist() == [5]
    token_N, weights_N = chosen.tokens(np.array([7, 2, 7]), np.array([0, 10, 20, 30]))
    assert token_N.tolist() == [1, 3, 14, 21, 23] and weights_N is not None
    assert weights_N.tolist() == [1, 2, 3, 1, 2]
    other = ChosenPositions(chosen.rows, chosen.offsets, chosen.positions)
    assert len({chosen.digest, other.digest}) == 2

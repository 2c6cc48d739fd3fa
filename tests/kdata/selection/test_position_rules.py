"""Rules that choose positions, against brute force over all positions of small datasets."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError, DataError, KdataError, MissingError, QueryError
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TokenizerInfo
from kdata.pipelines.cli.main import app
from kdata.selection import choose_positions as driver
from kdata.selection.plan import Plan, open_plan
from kdata.selection.position_base import PositionRule, rising_keys
from kdata.selection.position_rules import RULES, RandomPositions
from kdata.selection.query import Sql
from kdata.selection.ranked import All, Random
from kdata.selection.select import parse_step, select
from kdata.selection.show import CountedTokens, compare, comparison_table
from kdata.selection.sidecar import score_digest
from kdata.selection.spans import spans_of
from kdata.store.row import Row as StoredRow
from kdata.store.writer import Writer
from tests.fakes import VOCAB, StandInTeacher, run_capture
from tests.kdata.selection.plans import Row, dataset_of, score_tokens_with, score_with
from tests.kdata.store.test_url_dataset import Files
from tests.trainer.datasets import make_dataset

LENGTHS = [1 + (i * 7) % 29 for i in range(40)]
Candidates = list[tuple[float, int, int]]  # (number, row, position); the smallest numbers are chosen


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS, mask_every=4)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS, tail="draws", exact=3)


def rule(name: str, **settings: Any) -> PositionRule:
    return parse_config(RULES[name], {"rule": name, **settings}, "rule")


def chosen(dataset: kdata.Dataset, plan: Plan) -> dict[str, list[int]]:
    """Positions by id, of the plan as it is on disk."""
    table = open_plan(dataset, plan.info.name).table
    return dict(zip(table["id"].to_pylist(), table["positions"].to_pylist(), strict=True))


def margin(row: StoredRow, position: int) -> float:
    one, two = row.kept(position).logprobs[:2]
    return float(np.float32(np.exp(one) - np.exp(two)))


NUMBERS: dict[str, Callable[[StoredRow, int], float]] = {
    "entropy": lambda row, position: -float(row.entropy[position]),
    "surprise": lambda row, position: float(row.logprob[position]),
    "margin": margin,
}


def candidates(dataset: kdata.Dataset, name: str, rows: list[int] | None = None) -> Candidates:
    numbers = range(len(dataset)) if rows is None else rows
    return [
        (NUMBERS[name](row, position), row.number, position)
        for row in (dataset[number] for number in numbers)
        for position in np.flatnonzero(row.target_mask).tolist()
        if position > 0
    ]


def by_id(dataset: kdata.Dataset, taken: Candidates) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for _, row, position in sorted(taken, key=lambda candidate: candidate[1:]):
        positions.setdefault(f"doc-{row}", []).append(position)
    return positions


@pytest.mark.parametrize("share", [1.0, 0.3, 0.011, 1e-9])
@pytest.mark.parametrize("name", list(NUMBERS))
def test_a_share_of_the_dataset_is_exact(dataset: kdata.Dataset, name: str, share: float) -> None:
    plan = select(dataset, All(positions=rule(name, share=share)))
    every = candidates(dataset, name)
    taken = sorted(every)[: math.ceil(share * len(every))]
    assert chosen(dataset, plan) == by_id(dataset, taken)
    info = plan.info.positions
    assert info is not None and (info.positions, info.targets) == (len(taken), len(every))
    assert abs(info.parameters["threshold"]) == pytest.approx(abs(taken[-1][0]))
    assert plan.info.num_rows == len({row for _, row, _ in taken})
    assert info.rows_left_out == sum(n > 1 for n in LENGTHS) - plan.info.num_rows


@pytest.mark.parametrize("name", list(NUMBERS))
def test_a_share_of_each_row_is_exact(dataset: kdata.Dataset, name: str) -> None:
    plan = select(dataset, All(positions=rule(name, share=0.3, per="row")))
    taken: Candidates = []
    for number in range(len(dataset)):
        own = candidates(dataset, name, [number])
        taken += sorted(own)[: math.ceil(0.3 * len(own))]
    assert chosen(dataset, plan) == by_id(dataset, taken)
    assert plan.info.positions is not None and plan.info.positions.rows_left_out == 0


def test_the_margin_of_a_hybrid_is_that_of_its_exact_entries(hybrid: kdata.Dataset) -> None:
    every = candidates(hybrid, "margin")
    taken = sorted(every)[: math.ceil(0.2 * len(every))]
    assert chosen(hybrid, select(hybrid, All(positions=rule("margin", share=0.2)))) == by_id(hybrid, taken)


def test_the_margin_of_draws_by_need_knows_that_the_second_is_below_the_threshold(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, kind="threshold", threshold=0.15)

    def smallest(row: StoredRow, position: int) -> float:
        if row.num_exact[position] > 1:
            return margin(row, position)
        one = np.exp(row.kept(position).logprobs[0])
        return float(one - min(np.exp(row.log_tail[position]), one, np.float32(0.15)))

    every = [(smallest(row, int(t)), row.number, int(t)) for row in dataset for t in np.flatnonzero(row.target_mask)]
    taken = sorted(every)[: math.ceil(0.6 * len(every))]
    assert any(dataset[row].num_exact[position] == 1 for _, row, position in taken)
    positions = chosen(dataset, select(dataset, All(positions=rule("margin", share=0.6))))
    assert {(row_id, t) for row_id, own in positions.items() for t in own} == {
        (dataset[row].id, t) for _, row, t in taken
    }


def test_the_margin_of_one_exact_entry_is_the_smallest_that_it_can_be(tmp_path: Path) -> None:
    """p1 = 1/2 and the rest 1/2: the margin may be 0, and is taken as 0."""
    dataset = dataset_of(tmp_path / "d", [Row("a", tokens=3)])
    plan = select(dataset, All(positions=rule("margin", share=0.5)))
    assert plan.info.positions is not None and plan.info.positions.parameters["threshold"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("per", ["dataset", "row"])
def test_equal_numbers_are_chosen_in_the_order_of_rows_and_positions(
    tmp_path: Path, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a piece or of a block of the file of keys."""
    monkeypatch.setattr(driver, "BLOCK_KEYS", 3)
    dataset = dataset_of(
        tmp_path / "d", [Row("b", tokens=5), Row("a", tokens=5, nll=2.0), Row("c", tokens=5)], shard_rows=1
    )
    plan = select(dataset, All(positions=rule("surprise", share=0.5, per=per)))
    expected = {"a": [1, 2, 3, 4], "b": [1, 2]} if per == "dataset" else {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
    assert chosen(dataset, plan) == expected


def test_a_random_share_follows_from_the_seed_and_the_ids(tmp_path: Path) -> None:
    rows = [Row(f"r{n}", tokens=40) for n in range(30)]
    one, other = (
        dataset_of(tmp_path / name, r, shard_rows=n) for name, r, n in (("d", rows, 7), ("e", rows[::-1], 30))
    )

    def choice(dataset: kdata.Dataset, share: float, seed: int = 0, **more: Any) -> dict[str, set[int]]:
        plan = select(dataset, All(positions=rule("random", share=share, seed=seed, **more)))
        assert plan.info.positions is not None and "threshold" not in plan.info.parameters
        return {row: set(positions) for row, positions in chosen(dataset, plan).items()}

    half, fifth = choice(one, 0.5), choice(one, 0.2)
    assert half == choice(other, 0.5) != choice(one, 0.5, seed=1)
    assert sum(map(len, half.values())) == 585 and sum(map(len, fifth.values())) == 234
    assert all(positions <= half[row] for row, positions in fifth.items())
    assert {len(positions) for positions in choice(one, 0.5, per="row").values()} == {20}
    early = sum(position <= 20 for positions in half.values() for position in positions)
    assert 250 < early < 350  # of 585, about half


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2))
def test_keys_rise_with_the_numbers(values: list[float]) -> None:
    numbers = np.array(values, np.float32)
    keys = rising_keys(numbers).astype(np.int64)
    assert np.array_equal(
        np.sign(keys[:, None] - keys), np.sign((numbers[:, None] > numbers) * 1 - (numbers[:, None] < numbers))
    )
    assert all(
        rule("entropy", share=1).number_of(int(key)) == number for key, number in zip(keys, numbers, strict=True)
    )


def test_positions_are_chosen_on_top_of_any_rows(dataset: kdata.Dataset) -> None:
    """The method's rows, or those of a parent plan; of its positions, where it has any."""
    half = select(dataset, Random(share=0.5, name="half"))
    rows = half.rows(dataset).tolist()
    plan = select(dataset, All(name="sure", parent="half", positions=rule("entropy", share=0.4)))
    every = candidates(dataset, "entropy", rows)
    taken = sorted(every)[: math.ceil(0.4 * len(every))]
    assert chosen(dataset, plan) == by_id(dataset, taken)
    assert plan.info.parents == {"half": half.plan_digest} and plan.info.method == "all"
    again = select(dataset, All(name="again", parent="sure", positions=rule("surprise", share=0.5)))
    inner = [c for c in candidates(dataset, "surprise", rows) if c[1:] in {c[1:] for c in taken}]
    assert chosen(dataset, again) == by_id(dataset, sorted(inner)[: math.ceil(0.5 * len(inner))])
    one_step = select(dataset, Random(share=0.5, name="one", positions=rule("entropy", share=0.4)))
    assert chosen(dataset, one_step) == chosen(dataset, plan)
    assert one_step.info.requested == half.info.requested


def test_the_order_and_the_repeats_of_the_rows_stay(dataset: kdata.Dataset) -> None:
    query = "select id, 3 as repeats from rows where num_tokens > 20 order by num_tokens desc, id"
    plan = select(dataset, Sql(sql=query, positions=rule("random", share=0.5, per="row")))
    expected = dataset.sql(query)
    assert plan.table["id"].to_pylist() == expected["id"].to_pylist()
    assert set(plan.repeats.tolist()) == {3}
    assert plan.info.num_tokens == 3 * sum(len(dataset[row]) for row in set(plan.choice(dataset)[0].tolist()))


# -------------------------------------------------------------------------------------------------------------- excess loss


def scored(dataset: kdata.Dataset, root: Path) -> tuple[kdata.Dataset, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A copy with scores of tokens `student` and `ref`, and their numbers by id, in float64 before rounding."""
    copy = kdata.open(shutil.copytree(dataset.path, root / "scored"))
    return copy, score_tokens_with(copy, "student"), score_tokens_with(copy, "ref", seed=1)


def excess(
    dataset: kdata.Dataset, student: dict[str, np.ndarray], reference: dict[str, np.ndarray] | None
) -> Candidates:
    """L(token; student) - L(token; reference) of every target, float64; the reference is the teacher where there is none."""
    return [
        (float(lower[position] - student[row.id][position]), row.number, position)
        for row in dataset
        for lower in [-row.logprob.astype(np.float64) if reference is None else reference[row.id]]
        for position in np.flatnonzero(row.target_mask).tolist()
    ]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.011])
@pytest.mark.parametrize("against", [None, "ref"])
def test_a_share_of_the_excess_loss_is_exact(
    dataset: kdata.Dataset, tmp_path: Path, against: str | None, share: float
) -> None:
    """Against numbers before rounding; only at the edge may rounding decide."""
    copy, student, reference = scored(dataset, tmp_path)
    every = sorted(excess(copy, student, None if against is None else reference))
    settings = {} if against is None else {"reference": against}
    plan = select(copy, All(positions=rule("excess", share=share, score="student", **settings)))
    count = math.ceil(share * len(every))
    rows = {row.id: row.number for row in copy}
    got = {(rows[row_id], position) for row_id, positions in chosen(copy, plan).items() for position in positions}
    info = plan.info.positions
    assert info is not None and (len(got), info.positions) == (count, count)
    edge = every[count - 1][0]
    largest = max(np.nanmax(nll) for numbers in (student, reference) for nll in numbers.values() if len(nll) > 1)
    rounding = 2 * (2**-11 * largest + 2**-25)
    sure = {tuple(key) for number, *key in every if number < edge - 2 * rounding}
    possible = {tuple(key) for number, *key in every if number <= edge + 2 * rounding}
    assert sure <= got <= possible
    assert info.parameters["threshold"] == pytest.approx(-edge, abs=rounding)
    names = ["student", "ref"][: 1 if against is None else 2]
    assert plan.info.scores == {name: score_digest(copy, name) for name in names}
    assert info.parameters["score"] == "student" and info.parameters["reference"] == against


def test_the_excess_loss_is_the_difference_of_what_is_stored(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """The same plan as by SQL; of each row, of a parent's positions, and with the teacher's own NLL nothing is in excess."""
    copy, _, _ = scored(dataset, tmp_path)
    for settings, number in (({}, "nll_student + logprob"), ({"reference": "ref"}, "nll_student - nll_ref")):
        plan = select(copy, All(name="asked", positions=rule("excess", share=0.3, score="student", **settings)))
        best = f"from tokens where target order by {number} desc, global_row, position"
        want = copy.sql(f"select id, position {best} limit {plan.info.positions.positions}")  # type: ignore[union-attr]
        pairs = {(row_id, place) for row_id, places in chosen(copy, plan).items() for place in places}
        assert pairs == set(zip(want["id"].to_pylist(), want["position"].to_pylist(), strict=True))
        each = select(copy, All(positions=rule("excess", share=0.3, per="row", score="student", **settings)))
        ranked = (
            f"select id, position, row_number() over (partition by id order by {number} desc, position) as place, "
            "count(*) over (partition by id) as n from tokens where target"
        )
        best = (
            f"select id, list(position order by position) as p from ({ranked}) where place <= ceil(n * 0.3) group by 1"
        )
        per_row = copy.sql(best)
        assert chosen(copy, each) == dict(zip(per_row["id"].to_pylist(), per_row["p"].to_pylist(), strict=True))
    child = select(copy, All(name="child", parent="asked", positions=rule("excess", share=0.5, score="ref")))
    inner = chosen(copy, open_plan(copy, "asked"))
    assert all(set(positions) <= set(inner[row_id]) for row_id, positions in chosen(copy, child).items())


def test_an_excess_loss_needs_scores_of_tokens(dataset: kdata.Dataset, tmp_path: Path) -> None:
    copy, _, _ = scored(dataset, tmp_path)
    score_with(copy, {row.id: 1.0 for row in copy}, "rows")
    before = sorted(copy.path.glob("plans/*"))
    for settings, message in (
        ({"score": "nobody"}, "there is no score 'nobody'"),
        ({"score": "student", "reference": "nobody"}, "there is no score 'nobody'"),
        ({"score": "rows"}, "score 'rows' has a number for each row and none for each token"),
    ):
        with pytest.raises(MissingError, match=message):
            select(copy, All(positions=rule("excess", share=0.5, **settings)))
    assert sorted(copy.path.glob("plans/*")) == before
    with pytest.raises(ConfigError, match="'score' is missing"):
        rule("excess", share=0.5)
    with pytest.raises(ConfigError, match="both 'student', so no token has an excess"):
        rule("excess", share=0.5, score="student", reference="student")


def test_an_excess_over_a_teacher_that_is_not_known_is_refused(tmp_path: Path) -> None:
    data = dataset_of(tmp_path / "d", [Row("a", tokens=3)])
    score_tokens_with(data, "student")

    def broken(columns: dict[str, list[Any]]) -> None:
        columns["token_nll"][0][2] = np.nan

    score_tokens_with(data, "broken", change=broken)
    with pytest.raises(DataError, match="'excess' needs a number that is not known at position 2 of row 'a'"):
        select(data, All(positions=rule("excess", share=0.5, score="student", reference="broken")))


# ----------------------------------------------------------------------------------------------------------------- queries


def by_query(dataset: kdata.Dataset, sql: str, **step: Any) -> Plan:
    return select(dataset, All(name="asked", positions=rule("sql", sql=sql), **step))


def test_a_query_names_positions_and_weights(dataset: kdata.Dataset) -> None:
    plan = by_query(
        dataset,
        "select * from (values ('doc-2', 5, 0.5::double), ('doc-2', 3, 2), ('doc-1', 1, 1)) as v(id, position, weight)",
    )
    rows, positions = plan.choice(dataset)
    assert chosen(dataset, plan) == {"doc-1": [1], "doc-2": [3, 5]} and positions is not None
    assert rows.tolist() == [1, 2] and positions.weights is not None and positions.weights.tolist() == [1, 2, 0.5]
    info = plan.info.positions
    assert info is not None and info.weighted and info.sql is not None and info.sql.startswith("select * from (values")
    assert info.rows_left_out == sum(n > 1 for n in LENGTHS) - 2


def test_a_query_reads_rows_scores_and_plans(dataset: kdata.Dataset) -> None:
    half = select(dataset, Random(share=0.5, name="half"))
    every = "select id, unnest(range(1, num_tokens::bigint)) as position from rows join plans.half using (id)"
    plan = by_query(
        dataset, f"from ({every}) join rows using (id) select id, position where position % 4 <> 0 and domain = 'code';"
    )
    code = [row for row in half.rows(dataset).tolist() if row % 2 == 0 and LENGTHS[row] > 1]
    assert set(chosen(dataset, plan)) == {f"doc-{row}" for row in code}
    assert plan.info.parents == {"half": half.plan_digest}
    assert (
        plan.info.positions is not None
        and plan.info.positions.domains["code"].positions == plan.info.positions.positions
    )


@pytest.mark.parametrize(
    ("sql", "error", "message"),
    [
        (
            "select id, 4 as position from rows where id = 'doc-3'",
            DataError,
            r"position 4 of row 'doc-3', which is no target",
        ),
        ("select 'doc-3' as id, 40 as position", DataError, r"row 'doc-3': position 40 is not in 1 to 21"),
        ("select 'doc-3' as id, 0 as position", DataError, r"row 'doc-3': position 0 is not in 1 to 21"),
        ("select 'doc-3' as id, unnest([1, 1]) as position", DataError, "position 1 is there twice"),
        ("select 'doc-3' as id, unnest([1, null]) as position", DataError, "returns position null for row 'doc-3'"),
        ("select 'doc-3' as id, 1 as position, -1 as weight", DataError, r"weight of position 1 is -1\.0"),
        ("select 'doc-3' as id, 1 as position, 'nan'::float as weight", DataError, "weight of position 1 is nan"),
        ("select 'doc-3' as id, 1 as position, 1e-60 as weight", DataError, r"weight of position 1 is 0\.0"),
        (
            "select 'doc-3' as id, 1 as position, null::float as weight",
            DataError,
            "returns weight null for row 'doc-3'",
        ),
        ("select null::varchar as id, 1 as position", DataError, "an id that is null"),
        ("select 'nobody' as id, 1 as position", MissingError, "no row with id 'nobody'"),
        ("select id, 1 as position from rows where false", DataError, "returns no row"),
        ("select id from rows", ConfigError, "must return `id` as text and `position` as a whole number"),
        ("select id, 1.5 as position from rows", ConfigError, "as a whole number"),
        ("select row as id, 1 as position from rows", ConfigError, "`id` as text"),
        ("select id, 1 as position, 'x' as weight from rows", ConfigError, "column `weight` .* is string"),
        ("select nonsense", QueryError, "nonsense"),
        ("select * from read_csv('x.csv')", QueryError, "cannot record what read_csv"),
    ],
)
def test_a_query_that_cannot_be_right_is_refused(
    dataset: kdata.Dataset, sql: str, error: type[KdataError], message: str
) -> None:
    with pytest.raises(error, match=message):
        by_query(dataset, sql)


# ------------------------------------------------------------------------------------------------------------------- spans


def with_text(root: Path, texts: list[tuple[str, list[int]] | None]) -> kdata.Dataset:
    """Rows of these texts, each with the bytes of its tokens; None: a row without text."""
    info = new_info(
        format_version="1.0", vocab_size=VOCAB, teacher=StandInTeacher().info,
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id="plain", version=1, kind="topk", parameters={"k": 1}), tail="ghost",
    )  # fmt: skip
    records = []
    for number, content in enumerate(texts):
        text, num_bytes = content or (None, [0, 1, 1])
        counts = np.ones(len(num_bytes), np.int32)
        counts[0] = 0
        values = np.where(counts > 0, np.log(0.5), np.nan).astype(np.float32)
        half = np.full(int(counts.sum()), np.log(0.5), np.float32)
        records.append(
            Record(
                id=f"t{number}", domain="a", token_ids=np.arange(len(num_bytes), dtype=np.int32), target_mask=counts > 0,
                logprob=values, rank=counts, log_tail=values, entropy=values, text=text,
                kept=Kept(counts, np.zeros_like(counts), np.zeros(len(half), np.int32), half),
                token_bytes=None if content is None else np.array(num_bytes, np.uint16),
            )
        )  # fmt: skip
    with Writer(root, info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(UnitResult(0, records))
    return kdata.open(root)


THINK = {"begin": "<think>", "end": "</think>"}


def test_tokens_between_two_markers_are_chosen(tmp_path: Path) -> None:
    """By the bytes of the text: an umlaut has two, a special token none; a token that reaches into a span counts."""
    dataset = with_text(
        tmp_path / "d",
        [
            ("a<think>öx</think>b<think>c</think>", [0, 1, 7, 2, 1, 8, 1, 7, 1, 8]),
            ("<think>ab</think>", [0, 8, 9, 0]),  # "<think>a" and "b</think>"
            ("<think>never ends", [0, 7, 10]),
            ("nothing", [0, 7]),
        ],
    )
    plan = select(dataset, All(positions=rule("span", **THINK)))
    assert chosen(dataset, plan) == {"t0": [3, 4, 8], "t1": [1, 2]}
    assert plan.info.positions is not None and plan.info.positions.rows_left_out == 2
    open_ended = select(dataset, All(positions=rule("span", begin="<think>", end=r"</think>|\z")))
    assert chosen(dataset, open_ended) == {"t0": [3, 4, 8], "t1": [1, 2], "t2": [2]}


def test_markers_are_patterns_and_need_time_in_proportion_to_the_text() -> None:
    pattern = r"(?s)(?P<whole>(?:\[+)(?P<span>.*?)(?:\]+))"
    assert spans_of("x[[é]]y[z]".encode(), pattern) == [(3, 5), (9, 10)]
    assert spans_of("äö".encode(), r"(?s)(?P<whole>(?:)(?P<span>.*?)(?:))") == [(0, 0), (2, 2)]
    evil = r"(?s)(?P<whole>(?:(?:a+)+b)(?P<span>.*?)(?:c))"
    assert spans_of(b"a" * 100_000, evil) == []


@pytest.mark.parametrize("pattern", ["(", "(group)", "(?P<whole>x)(", r"(?=x)", "", "x" * 1001])
def test_patterns_that_are_not_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="begin"):
        rule("span", begin=pattern, end="x")


def test_spans_of_rows_without_text_are_refused(tmp_path: Path) -> None:
    dataset = with_text(tmp_path / "d", [("<think>a</think>", [0, 7, 1, 8]), None])
    with pytest.raises(DataError, match="row 't1' lacks its text"):
        select(dataset, All(positions=rule("span", **THINK)))
    some = Sql(sql="select id from rows where text is not null", positions=rule("span", **THINK))
    assert chosen(dataset, select(dataset, some)) == {"t0": [2]}


# --------------------------------------------------------------------------------------------------------------- bad input


def test_entropy_of_data_without_entropy_is_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [Row("a", tokens=3), Row("b", tokens=3)])
    for per in ("dataset", "row"):
        with pytest.raises(DataError, match="'entropy' needs a number that is not known at position 1 of row 'a'"):
            select(dataset, All(positions=rule("entropy", share=0.5, per=per)))
    assert not list(dataset.path.glob("plans/*"))


def test_the_margin_of_draws_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", [5, 6], tail="draws")
    with pytest.raises(DataError, match="'margin' needs a number that is not known at position 1 of row 'doc-0'"):
        select(dataset, All(positions=rule("margin", share=0.5)))


def test_a_rule_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    dataset = with_text(tmp_path / "d", [("nothing", [0, 7])])
    with pytest.raises(DataError, match="the rule 'span' chooses no position"):
        select(dataset, All(positions=rule("span", **THINK)))
    assert not list(dataset.path.glob("plans/*"))


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), None])
def test_a_share_is_above_0_and_at_most_1(share: Any) -> None:
    with pytest.raises(ConfigError, match="share"):
        parse_step({"method": "all", "positions": {"rule": "entropy", "share": share}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "entropie", "share": 1}, "entropie"),
        ({"rule": "entropy"}, "'positions.share' is missing"),
        ({"rule": "entropy", "share": 0.1, "sed": 1}, "unknown key 'positions.sed'"),
        ({"rule": "random", "share": 0.1, "sed": 1}, "did you mean 'seed'"),
        ({"rule": "entropy", "share": 0.1, "per": "domain"}, "per"),
        ({"rule": "sql"}, "'positions.sql' is missing"),
        ({"share": 0.5}, "'positions.rule' is missing"),
        ({"rule": "entropi", "share": 0.5}, "'entropi' is none of .*did you mean 'entropy'"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_step({"method": "all", "positions": values})


def test_the_command_line_chooses_positions(dataset: kdata.Dataset) -> None:
    runner = CliRunner(env={"COLUMNS": "140"})

    def run(*arguments: str) -> str:
        result = runner.invoke(app, ["select", str(dataset.path), *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    run("--name", "one", "--positions", "entropy", "--positions-share", "0.2")
    expected = select(dataset, All(name="two", positions=rule("entropy", share=0.2)))
    assert chosen(dataset, open_plan(dataset, "one")) == chosen(dataset, expected)
    run("--name", "three", "--positions", "random", "--set", "positions.share=0.2", "--set", "positions.seed=4")
    assert open_plan(dataset, "three").info.positions.parameters == {"share": 0.2, "per": "dataset", "seed": 4}  # type: ignore[union-attr]
    run("--name", "four", "--positions-sql", "select 'doc-3' as id, 2 as position")
    assert chosen(dataset, open_plan(dataset, "four")) == {"doc-3": [2]}
    bad = runner.invoke(app, ["select", str(dataset.path), "--positions", "nothing"])
    assert bad.exit_code != 0
    for alone in (["--positions-share", "0.2"], ["--set", "positions.per=row"]):
        bad = runner.invoke(app, ["select", str(dataset.path), *alone])
        assert isinstance(bad.exception, ConfigError)
        assert "without a rule that chooses positions: add --positions RULE" in str(bad.exception)
    run("--name", "five", "--positions-share", "0.2", "--set", "positions.rule=entropy")
    assert chosen(dataset, open_plan(dataset, "five")) == chosen(dataset, expected)


def test_the_command_line_chooses_by_excess_loss(dataset: kdata.Dataset, tmp_path: Path) -> None:
    copy, _, _ = scored(dataset, tmp_path)
    rule_flags = ["--positions", "excess", "--positions-share", "0.3", "--positions-score", "student"]
    arguments = ["select", str(copy.path), *rule_flags, "--positions-reference", "ref", "--name", "one"]
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "positions by rule excess: share 0.3" in result.output
    expected = select(copy, All(positions=rule("excess", share=0.3, score="student", reference="ref")))
    assert chosen(copy, open_plan(copy, "one")) == chosen(copy, expected)


def test_plans_are_compared_by_the_tokens_that_count(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """By sets of (row, position). In a plan without positions every target counts; repeats do not matter."""
    plans = [
        select(dataset, All(name="sure", positions=rule("entropy", share=0.3))),
        select(dataset, All(name="loud", positions=rule("surprise", share=0.4))),
        select(dataset, Sql(name="part", sql="select id, 2 as repeats from rows where num_tokens > 12")),
        select(dataset, All(name="every")),
    ]

    def counted(plan: Plan) -> set[tuple[str, int]]:
        if plan.info.positions is not None:
            return {(row_id, place) for row_id, places in chosen(dataset, plan).items() for place in places}
        rows = [dataset[int(row)] for row in dataset.rows_of(plan.ids)]
        return {(row.id, place) for row in rows for place in np.flatnonzero(row.target_mask).tolist()}

    for first in plans:
        for second in plans:
            a, b = counted(first), counted(second)
            got = compare(dataset, first.info.name, second.info.name)
            if first.info.positions is None and second.info.positions is None:
                assert got.positions is None
                continue
            assert got.positions == CountedTokens(len(a - b), len(a & b), len(b - a), len(a & b) / len(a | b))
            assert f"{len(a & b):,} tokens count in both" in comparison_table(got).notes[-1]


def test_positions_are_chosen_at_a_url(dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a column, from kept entries, from scores, by a query: the plans are those of a folder."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    here, _, _ = scored(dataset, tmp_path)
    query = "select id, position from tokens where target and nll_student > 3"
    served = Files(here.path.parent)
    try:
        there = kdata.open(f"{served.url}/scored")
        for one in (
            rule("entropy", share=0.2),
            rule("margin", share=0.2, per="row"),
            rule("excess", share=0.2, score="student", reference="ref"),
            rule("sql", sql=query),
        ):
            plans = [select(data, All(name=one.rule, positions=one)) for data in (here, there)]
            assert plans[0].table == plans[1].table and plans[0].info == plans[1].info, one.rule
            rows, positions = open_plan(there, one.rule).choice(there)
            assert positions is not None and positions.digest == open_plan(here, one.rule).choice(here)[1].digest  # type: ignore[union-attr]
            assert set(rows.tolist()) == set(positions.rows.tolist())
    finally:
        served.close()


def test_a_query_that_takes_rows_of_a_plan_with_positions_is_refused(dataset: kdata.Dataset) -> None:
    """Which of their tokens count is not said. Rows that the plan lacks may be taken, and a rule may say what counts."""
    plan = select(dataset, All(name="few", positions=rule("entropy", share=0.02)))
    for query in (
        "select id from plans.few",
        "select id from rows where num_tokens > 5 or id in (from plans.FEW select id)",
    ):
        with pytest.raises(ConfigError, match=r"plan 'few' chooses positions, and the query takes whole rows of it"):
            select(dataset, Sql(name="lost", sql=query))
    rest = select(dataset, Sql(name="rest", sql="select id from rows anti join plans.few using (id)"))
    assert not set(rest.ids) & set(plan.ids) and rest.info.parents == {"few": plan.plan_digest}
    query = "select id from plans.few"
    whole = select(dataset, Sql(name="whole", sql=query, positions=rule("random", share=1)))
    assert set(whole.ids) == set(plan.ids)
    assert all(
        len(p) == dataset[int(dataset.rows_of([i])[0])].target_mask.sum() for i, p in chosen(dataset, whole).items()
    )


def test_a_query_over_tokens_chooses_positions(dataset: kdata.Dataset) -> None:
    long = "select id from rows where num_tokens > 9"
    query = f"select id, position from tokens where target and logprob < -2 and id in ({long})"
    plan = select(dataset, All(name="unlikely", positions=rule("sql", sql=query)))
    expected = {
        row.id: found
        for row in dataset
        if len(row.token_ids) > 9 and (found := np.flatnonzero(row.target_mask & (row.logprob < -2)).tolist())
    }
    assert expected and chosen(dataset, plan) == expected


def test_names_of_columns_are_those_of_sql_in_any_case(dataset: kdata.Dataset) -> None:
    plan = select(
        dataset, All(name="cased", positions=rule("sql", sql="select 'doc-3' as ID, 2 as Position, 2.5 as WEIGHT"))
    )
    assert chosen(dataset, plan) == {"doc-3": [2]} and plan.table["weights"].to_pylist() == [[2.5]]


def test_rows_that_are_not_chosen_do_not_matter_to_a_query(dataset: kdata.Dataset) -> None:
    masked = next(row for row in dataset if len(row.token_ids) > 2 and not row.target_mask[1:].all())
    position = int(np.flatnonzero(~row_mask(masked))[-1])
    query = f"select 'doc-3' as id, 2 as position union all select '{masked.id}', {position}"
    select(dataset, Sql(name="third", sql="select 'doc-3' as id"))
    plan = select(dataset, All(name="one_row", parent="third", positions=rule("sql", sql=query)))
    assert chosen(dataset, plan) == {"doc-3": [2]}
    with pytest.raises(DataError, match="which is no target"):
        select(dataset, All(name="all_rows", positions=rule("sql", sql=query)))


def row_mask(row: StoredRow) -> np.ndarray:
    mask = row.target_mask.copy()
    mask[0] = True
    return mask


def test_a_rule_keeps_the_weights_of_its_parent(dataset: kdata.Dataset) -> None:
    query = "select id, position, 1 + position as weight from tokens where target"
    select(dataset, All(name="weighted_parent", positions=rule("sql", sql=query)))
    plan = select(dataset, All(name="half", parent="weighted_parent", positions=rule("random", share=0.5)))
    assert plan.info.positions is not None and plan.info.positions.weighted
    table = open_plan(dataset, "half").table
    for positions, weights in zip(table["positions"].to_pylist(), table["weights"].to_pylist(), strict=True):
        assert weights == [1 + position for position in positions]


@pytest.mark.parametrize(
    ("text", "begin", "end", "expected"),
    [
        ("head\n\nbody\n\nrest\n\n", r"\A", r"\n\n", ["head"]),
        ("say XENDsay YEND", r"\bsay ", "END", ["X"]),
        ("ö<a>x</a>é<a>ü</a>", "<a>", "</a>", ["x", "ü"]),
        ("<t>a</t><t>b", "<t>", r"</t>|\z", ["a", "b"]),
    ],
)
def test_anchors_of_a_span_are_those_of_the_whole_text(text: str, begin: str, end: str, expected: list[str]) -> None:
    spans = spans_of(text.encode(), f"(?s)(?P<whole>(?:{begin})(?P<span>.*?)(?:{end}))")
    assert [text.encode()[a:b].decode() for a, b in spans] == expected


@pytest.mark.parametrize("pattern", ["(?P<whole>x)", "(?P<q>x)", "a)|(?:b", "a)|(?P<q>b", "(?i"])
def test_a_pattern_cannot_leave_its_group(pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern of RE2"):
        rule("span", begin=pattern, end="y")


def test_every_rule_has_its_name() -> None:
    assert all(model.model_fields["rule"].default == name for name, model in RULES.items())
    assert isinstance(rule("random", share=0.5), RandomPositions)

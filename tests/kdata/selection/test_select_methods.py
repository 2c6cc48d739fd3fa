"""Methods of selection, on numbers worked out by hand and against a simple oracle: sort, add up, stop."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.errors import ConfigError, DataError, MismatchError, MissingError, QueryError, StorageError
from kdata.format.files import lock_of
from kdata.selection import rank, session
from kdata.selection.apportion import as_written
from kdata.selection.ddk import Ddk, first_weights
from kdata.selection.mixtures import Cap, Proportional, Static, Temperature, Uniform
from kdata.selection.plan import Plan, open_plan
from kdata.selection.query import Sql
from kdata.selection.ranked import All, Difference, Random, Ranked
from kdata.selection.select import METHODS, parse_step, select
from kdata.selection.step import Step
from kdata.store.sql import Room
from tests.fakes import write_jsonl
from tests.kdata.selection.plans import Row, dataset_of, score_with
from tests.kdata.share.test_interchange import imported, plain_row

LENGTHS = (2, 3, 5, 7)
# 24 rows: domain a has 12, b 8, c 4; ids in another order than rows.
ROWS = [
    Row(f"r{(n * 7) % 24:02}", "aaabbaaabbac"[n % 12] if n % 6 else "c", LENGTHS[n % 4], 1.0 + n % 3) for n in range(24)
]
OF = {row.id: row for row in ROWS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """ROWS in eight shards."""
    return dataset_of(tmp_path_factory.mktemp("methods") / "d", ROWS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 5 rows, histograms of 3 bins, one row in the last bin: what 100 million rows would do."""
    _small(monkeypatch)


def _small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "PIECE_ROWS", 5)
    patch.setattr(rank, "BINS", 3)
    patch.setattr(rank, "EDGE_ROWS", 1)


def repeats_of(plan: Plan) -> dict[str, int]:
    """Id to repeats, in the order of the plan."""
    return dict(zip(plan.ids, plan.repeats.tolist(), strict=True))


def draw(row_id: str, seed: int = 0) -> Fraction:
    """The random value of a row, exactly: see RANDOM."""
    return Fraction(int.from_bytes(hashlib.md5(f"{seed}:{row_id}".encode()).digest(), "little"), 2**128)


def oracle(
    values: Mapping[str, Any],
    requests: Mapping[str, int],
    *,
    count_by: str,
    by_domain: bool,
    repeats: Mapping[str, int],
) -> dict[str, int]:
    """Sort, add up, stop: whole passes first, then copy after copy for as long as the next one fits."""
    order = sorted(values, key=lambda i: (-values[i], i))
    parts: dict[str, list[str]] = defaultdict(list)
    for row_id in order:
        parts[OF[row_id].domain if by_domain else ""].append(row_id)
    copies_of: dict[str, int] = {}
    for part, ids in parts.items():
        weight = {i: OF[i].tokens if count_by == "tokens" else 1 for i in ids}
        passes, rest = divmod(requests[part], sum(weight[i] * repeats[i] for i in ids))
        for row_id in ids:
            copies = min(repeats[row_id], max(rest, 0) // weight[row_id])
            rest = rest - copies * weight[row_id] if copies == repeats[row_id] else -1
            copies_of[row_id] = passes * repeats[row_id] + copies
    return {row_id: copies_of[row_id] for row_id in order if copies_of[row_id]}


# ------------------------------------------------------------------------------------------- against the oracle

NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, 1.5, -3.0, 1e-300, 1e200, -1e200]), st.floats(-50, 50, width=32))


@settings(max_examples=30)
@given(
    scores=st.lists(NUMBERS, min_size=24, max_size=24),
    share=st.sampled_from([0.001, 0.1, 1 / 3, 0.5, 0.77, 1.0]),
    count_by=st.sampled_from(["sequences", "tokens"]),
    by_domain=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_difference_equals_the_oracle(
    dataset: kdata.Dataset, scores: list[float], share: float, count_by: Literal["sequences", "tokens"], by_domain: bool,
    threads: int,
) -> None:  # fmt: skip
    reference = {row.id: score for row, score in zip(ROWS, scores, strict=True)}
    score_with(dataset, reference)
    values = {row.id: reference[row.id] - row.nll for row in ROWS if row.nll is not None}
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        step = Difference(share=share, count_by=count_by, by_domain=by_domain)
        try:
            plan = select(dataset, step, Room(threads=threads))
        except DataError as error:  # the first sequence has more tokens than the share
            assert "selects no row" in str(error) and count_by == "tokens" and share < 0.1
            return
    weight = {row.id: row.tokens if count_by == "tokens" else 1 for row in ROWS}
    total = math.ceil(as_written(share) * sum(weight.values()))
    info = plan.info
    if by_domain:
        requests = {name: domain.requested or 0 for name, domain in info.domains.items()}
        assert sum(requests.values()) == total
    else:
        requests = {"": total}
    expected = oracle(values, requests, count_by=count_by, by_domain=by_domain, repeats=dict.fromkeys(OF, 1))
    assert repeats_of(plan) == expected and list(repeats_of(plan)) == list(expected)
    assert info.requested == total and info.count_by == count_by
    assert info.num_tokens == sum(OF[i].tokens for i in expected)
    assert {name: domain.rows for name, domain in info.domains.items()} == {
        name: sum(OF[i].domain == name for i in expected) for name in "abc"
    }
    assert as_recorded(dataset, plan) == expected


def as_recorded(dataset: kdata.Dataset, plan: Plan) -> dict[str, int]:
    """What the SQL that a plan records gives, run by whoever reads it."""
    assert plan.info.sql is not None
    table = dataset.sql(plan.info.sql)
    return dict(zip(table["id"].to_pylist(), table["repeats"].to_pylist(), strict=True))


@settings(max_examples=25)
@given(
    weights=st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
    size=st.none() | st.integers(1, 300),
    count_by=st.sampled_from(["sequences", "tokens"]),
    take=st.sampled_from(["random", "first"]),
    repeats=st.lists(st.integers(0, 3), min_size=24, max_size=24).filter(lambda r: sum(r) > 4),
    seed=st.integers(0, 3),
)
def test_mixtures_of_a_plan_with_repeats_equal_the_oracle(
    dataset: kdata.Dataset, weights: list[int], size: int | None, count_by: Literal["sequences", "tokens"],
    take: Literal["random", "first"], repeats: list[int], seed: int,
) -> None:  # fmt: skip
    times = {row.id: n for row, n in zip(ROWS, repeats, strict=True) if n}
    cases = " ".join(f"when '{i}' then {n}" for i, n in times.items())
    listed = ", ".join(f"'{i}'" for i in times)
    query = f"select id, case id {cases} end as repeats from rows where id in ({listed}) order by md5(id)"
    parent = select(dataset, Sql(sql=query, name="parent"))
    assert repeats_of(parent) == {i: times[i] for i in sorted(times, key=lambda i: hashlib.md5(i.encode()).hexdigest())}
    step = Static(
        parent="parent", weights=dict(zip("abc", weights, strict=True)), size=size, count_by=count_by, take=take, seed=seed,
        max_repeats=3, name="mixed",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        try:
            plan = select(dataset, step)
        except DataError as error:
            assert any(
                words in str(error) for words in ("are requested, but it holds", "set its share to 0", "selects no row")
            )
            return
    requests = {name: domain.requested or 0 for name, domain in plan.info.domains.items()}
    assert sum(requests.values()) == plan.info.requested == (size or plan.info.requested)
    place = {row_id: -n for n, row_id in enumerate(parent.ids)}
    values = place if take == "first" else {i: draw(i, seed) for i in times}
    expected = oracle(values, requests, count_by=count_by, by_domain=True, repeats=times)
    assert repeats_of(plan) == expected and list(repeats_of(plan)) == list(expected)
    for name, domain in plan.info.domains.items():
        chosen = domain.tokens if count_by == "tokens" else domain.sequences
        longest = max((OF[i].tokens for i in times if OF[i].domain == name), default=0)
        assert chosen <= requests[name] and requests[name] - chosen < (longest if count_by == "tokens" else 1) + (
            not requests[name]
        )
    assert plan.info.parents == {"parent": parent.plan_digest} and as_recorded(dataset, plan) == expected


def test_a_plan_s_bytes_do_not_depend_on_threads_pieces_or_memory(dataset: kdata.Dataset, small: None) -> None:
    contents = set()
    for threads, memory in ((1, None), (2, "200MB")):
        select(dataset, Uniform(name="same", max_repeats=2), Room(memory, threads))
        contents.add((dataset.path / "plans/same.parquet").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "PIECE_ROWS", 1000)
        patch.setattr(rank, "BINS", 4096)
        select(dataset, Uniform(name="same", max_repeats=2))
        contents.add((dataset.path / "plans/same.parquet").read_bytes())
    assert len(contents) == 1


# ---------------------------------------------------------------------------------------------------- by hand

FOUR = [Row("w", "code", 4, 1.0), Row("x", "code", 2, 2.0), Row("y", "prose", 6, 1.0), Row("z", "prose", 8, 3.0)]


@pytest.fixture
def four(tmp_path: Path) -> kdata.Dataset:
    """w, x in code (4 and 2 tokens), y, z in prose (6 and 8); differences to `ref`: w 0.5, x 3, y 2, z 1."""
    dataset = dataset_of(tmp_path / "four", FOUR, shard_rows=2)
    score_with(dataset, {"w": 1.5, "x": 5.0, "y": 3.0, "z": 4.0})
    return dataset


def test_difference_global_and_per_domain(four: kdata.Dataset) -> None:
    assert select(four, Difference(share=0.5)).ids == ["x", "y"]
    each = select(four, Difference(share=0.5, by_domain=True))
    assert each.ids == ["x", "y"] and each.info.parameters["thresholds"] == {"code": 3.0, "prose": 2.0}
    assert "threshold" not in each.info.parameters
    assert select(four, Difference(share=0.25)).ids == ["x"]
    assert select(four, Difference(share=0.25, by_domain=True)).ids == ["x"]  # one in all: equal remainders go by name
    # 10 of 20 tokens: x 2, y 6, and z's 8 no longer fit; per domain 3 and 7: x; y
    by_tokens = select(four, Difference(share=0.5, count_by="tokens"))
    assert by_tokens.ids == ["x", "y"] and by_tokens.info.requested == 10 and by_tokens.info.num_tokens == 8
    assert select(four, Difference(share=0.5, count_by="tokens", by_domain=True)).info.domains["prose"].requested == 7
    assert select(four, Difference(share=1.0)).ids == ["x", "y", "z", "w"]


def test_random_chooses_the_largest_draws(four: kdata.Dataset) -> None:
    for seed in range(4):
        order = sorted("wxyz", key=lambda i: -draw(i, seed))
        assert select(four, Random(share=0.5, seed=seed)).ids == order[:2]
        assert select(four, Random(share=0.75, seed=seed)).ids == order[:3]


def test_methods_that_need_no_nll_choose_rows_without_one(tmp_path: Path) -> None:
    """Imported rows have targets, and no log-probability of the actual token."""
    rows = [
        plain_row(id="x", domain="a"),
        plain_row(id="y", domain="b"),
        plain_row(id="z", domain="a", target_mask=[False, False, False]),
    ]
    dataset, _ = imported(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "d", "plain", vocab_size=10)
    assert dataset.sql("select count(nll) as n from rows")["n"].to_pylist() == [0]
    for step in (All(), Random(share=1.0), Proportional(), Uniform(), Cap(size=100), Static(weights={"a": 1, "b": 1})):
        assert sorted(select(dataset, step).ids) == ["x", "y"], step
    score_with(dataset, {"x": 1.0, "y": 2.0})
    for needs in (Difference(share=1.0), Ddk(losses={"a": 1.0, "b": 1.0})):
        with pytest.raises(DataError, match="the teacher's"):
            select(dataset, needs)


def test_names_that_differ_only_in_case_are_refused(four: kdata.Dataset) -> None:
    select(four, Sql(sql="select id from rows where domain = 'code'", name="A"))
    with pytest.raises(ConfigError, match="there is a plan 'A' already, and SQL does not distinguish it from 'a'"):
        select(four, Sql(sql="select id from rows where domain = 'prose'", name="a"))
    assert select(four, Cap(parent="A", size=100)).ids in (["w", "x"], ["x", "w"])
    with pytest.raises(ConfigError, match="there is a score 'ref' already"):
        score_with(four, {"w": 1.0}, "Ref")
    for ending in (".parquet", ".json"):
        (four.path / f"plans/a{ending}").write_bytes((four.path / f"plans/A{ending}").read_bytes())
    with pytest.raises(ConfigError, match="plans/A and plans/a are the same name in SQL"):
        four.sql("select 1 as one from rows")


def test_a_mixture_of_a_selection_that_lost_a_domain(four: kdata.Dataset) -> None:
    select(four, Sql(sql="select id from rows where domain = 'code'", name="code"))
    for step in (Uniform(parent="code"), Proportional(parent="code"), Temperature(temperature=2.0, parent="code"),
                 Ddk(losses={"code": 1.0}, parent="code")):  # fmt: skip
        plan = select(four, step)
        assert sorted(plan.ids) == ["w", "x"]
        assert plan.info.parameters["weights"] == {"code": 1.0, "prose": 0.0}
        assert plan.info.parameters["nothing_to_take"] == ["prose"]
    with pytest.raises(DataError, match=r"'prose' has a share of 50\.00% but holds no tokens; set its share to 0"):
        select(four, Static(weights={"code": 1, "prose": 1}, parent="code"))


def test_shares_count_only_rows_with_a_target(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [Row("a1", "a", 4), Row("b1", "b", 4), Row("b2", "b", 40, None)])
    for step in (Proportional(), Temperature(temperature=1.0)):
        plan = select(dataset, step)
        assert plan.info.parameters["weights"] == {"a": 0.5, "b": 0.5} and sorted(plan.ids) == ["a1", "b1"]


def test_infinite_settings_are_refused() -> None:
    for values in ({"method": "uniform", "max_repeats": math.inf}, {"method": "uniform", "max_repeats": 1e12},
                   {"method": "ddk", "score": "ref", "exponent_limit": math.inf},
                   {"method": "ddk", "losses": {"a": math.nan}}):  # fmt: skip
        with pytest.raises(ConfigError, match=r"max_repeats|exponent_limit|losses"):
            parse_step(values)


def test_ddk_refuses_rows_that_lack_the_students_loss(four: kdata.Dataset) -> None:
    score_with(four, {"w": 1.0, "y": 2.0}, "part")
    with pytest.raises(DataError, match="1 rows of domain 'code' lack the student's loss"):
        select(four, Ddk(score="part"))


def test_columns_of_a_query_in_any_case_and_of_any_name(four: kdata.Dataset) -> None:
    assert repeats_of(select(four, Sql(sql="select id as ID, 3 as Repeats from rows order by id"))) == dict.fromkeys(
        "wxyz", 3
    )
    text = "select id, row_number() over (order by id desc) as rowid, 7 as _place from rows order by id"
    assert list(repeats_of(select(four, Sql(sql=text)))) == ["w", "x", "y", "z"]


@pytest.mark.parametrize(
    "text",
    [
        "select id from query_table('scores.ref')",
        "select id from query('select id from scores.ref')",
        "select id from (select * from read_parquet('{root}/scores/ref/*.parquet'))",
        "select id from '{root}/scores/ref/capture-00000.parquet'",
        "with a as (select * from query_table('scores.ref')) select id from a",
    ],
)
def test_a_query_whose_sources_a_plan_could_not_record_is_refused(four: kdata.Dataset, text: str) -> None:
    with pytest.raises(QueryError, match="kdata score --from"):
        select(four, Sql(sql=text.format(root=four.path)))
    plain = "with a as (select id, unnest(range(1)) from scores.ref) select distinct id from a order by id"
    assert list(select(four, Sql(sql=plain)).info.scores) == ["ref"]


def test_a_domain_with_an_empty_name_is_a_domain(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [Row("a", ""), Row("b", ""), Row("c", "c")])
    assert {d: t.requested for d, t in select(dataset, Random(share=0.5)).info.domains.items()} == {"": None, "c": None}
    assert select(dataset, Uniform(count_by="sequences")).info.domains[""].requested == 1


def test_a_row_without_a_target_is_never_chosen(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [Row("a"), Row("b", nll=None), Row("c")])
    score_with(dataset, {"a": 2.0, "c": 3.0})
    for step in (All(), Difference(share=1.0), Random(share=1.0), Proportional(), Cap(size=100)):
        assert sorted(select(dataset, step).ids) == ["a", "c"], step


def test_static_shares(four: kdata.Dataset) -> None:
    shares = {"code": 1, "prose": 3}
    plan = select(four, Static(weights=shares, count_by="sequences", size=4, max_repeats=2))
    assert repeats_of(plan) == {("w" if draw("w") > draw("x") else "x"): 1, "y": 2, "z": 1}
    assert plan.info.parameters["weights"] == {"code": 0.25, "prose": 0.75}
    assert [plan.info.domains[d].requested for d in ("code", "prose")] == [1, 3]
    most = select(four, Static(weights={"code": 0, "prose": 1}, count_by="tokens"))
    assert most.info.requested == 14 and sorted(most.ids) == ["y", "z"]
    with pytest.raises(DataError, match=r"'prose': 3 sequences are requested, but it holds 2\. Request at most 2 "):
        select(four, Static(weights=shares, count_by="sequences", size=4))
    with pytest.raises(ConfigError, match=r"'pros' \(did you mean 'prose'\?\); the dataset has the domains"):
        select(four, Static(weights={"code": 1, "pros": 1}))
    with pytest.raises(ConfigError, match=r"does not name the domain 'prose'"):
        select(four, Static(weights={"code": 1}))


def test_whole_passes_come_before_parts_of_one(four: kdata.Dataset) -> None:
    """5 sequences of code, which has two: both twice, and the one with the larger draw once more."""
    plan = select(four, Static(weights={"code": 1, "prose": 0}, count_by="sequences", size=5, max_repeats=3))
    first, second = sorted("wx", key=lambda i: -draw(i))
    assert repeats_of(plan) == {first: 3, second: 2}
    # 15 tokens of code, which has 6 (4 + 2): twice all, and of the 3 that are left w (4) does not fit
    plan = select(four, Static(weights={"code": 1, "prose": 0}, count_by="tokens", size=15, max_repeats=3))
    assert repeats_of(plan) == {"w": 2, "x": 2 if draw("w") > draw("x") else 3}


def test_proportional_uniform_and_temperature(four: kdata.Dataset) -> None:
    # tokens: code 6, prose 14
    assert select(four, Proportional()).info.num_tokens == 20
    plan = select(four, Proportional(size=10))
    assert [plan.info.domains[d].requested for d in ("code", "prose")] == [3, 7]
    plan = select(four, Uniform(size=8, max_repeats=2, count_by="sequences"))
    assert repeats_of(plan) == dict.fromkeys(plan.ids, 2) and len(plan.ids) == 4
    assert select(four, Uniform()).info.requested == 12  # code has 6 tokens: 6 + 6
    weights = select(four, Temperature(temperature=2.0)).info.parameters["weights"]
    assert weights["code"] == pytest.approx(math.sqrt(6) / (math.sqrt(6) + math.sqrt(14)), rel=1e-12)
    one = select(four, Temperature(temperature=1.0, size=10))
    assert [one.info.domains[d].requested for d in ("code", "prose")] == [3, 7]
    flat = select(four, Temperature(temperature=1e9)).info.parameters["weights"]
    assert flat["code"] == pytest.approx(0.5, abs=1e-6)


def test_ddk_weighs_by_how_far_the_student_is_behind(four: kdata.Dataset) -> None:
    # Teacher, by target token (length - 1): code (3 * 1 + 1 * 2) / 4 = 1.25; prose (5 * 1 + 7 * 3) / 12 = 2.1667
    # `ref` as the student: code (3 * 1.5 + 1 * 5) / 4 = 2.375; prose (5 * 3 + 7 * 4) / 12 = 3.5833
    teacher, student = {"code": 1.25, "prose": 26 / 12}, {"code": 2.375, "prose": 43 / 12}
    ratios = {d: math.exp(student[d]) / math.exp(teacher[d]) for d in teacher}
    scores = {d: math.exp(ratio) for d, ratio in ratios.items()}
    expected = {d: score / sum(scores.values()) for d, score in scores.items()}
    parameters = select(four, Ddk(score="ref")).info.parameters
    assert parameters["weights"] == pytest.approx(expected, rel=1e-6) and parameters["teacher_losses"] == pytest.approx(
        teacher
    )
    assert parameters["losses"] == pytest.approx(student)
    by_hand = select(four, Ddk(losses=student)).info
    assert by_hand.parameters["weights"] == pytest.approx(expected, rel=1e-6) and by_hand.scores == {}
    assert first_weights({"a": 9.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, 10.0) == pytest.approx(
        {"a": 1 / (1 + math.exp(1 - 10)), "b": 1 / (1 + math.exp(10 - 1))}
    )
    assert first_weights({"a": 5000.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, 1e4)["a"] == 1.0  # nothing overflows
    with pytest.raises(ConfigError, match=r"losses names \['code'\], but the domains"):
        select(four, Ddk(losses={"code": 1.0}))
    with pytest.raises(ConfigError, match=r"either score .* or losses"):
        parse_step({"method": "ddk"})


def test_a_step_chooses_from_a_plan(four: kdata.Dataset) -> None:
    """Select, then mix, then cap: every plan names its parent, and the cap keeps the shares."""
    picked = select(four, Difference(share=0.75))  # x y z: code 2 tokens, prose 14
    mixed = select(
        four, Static(parent="difference", weights={"code": 1, "prose": 1}, size=16, max_repeats=4, name="mixed")
    )
    assert repeats_of(mixed) == {"x": 4, "y": 1} and mixed.info.parents == {"difference": picked.plan_digest}
    capped = select(four, Cap(parent="mixed", size=3, count_by="sequences"))
    assert repeats_of(capped) == {"x": 2, "y": 1}  # of 4 and 1: quotas 2.4, 0.6
    assert capped.info.parents == {"mixed": mixed.plan_digest} and len(mixed.plan_digest) == 64
    assert repeats_of(select(four, Cap(parent="mixed", size=1000, name="whole"))) == repeats_of(mixed)
    first = select(four, Cap(parent="difference", size=2, count_by="sequences", take="first"))
    assert first.ids == ["x", "y"]  # the best of each, in the parent's order
    again = select(four, Difference(parent="mixed", share=0.5, name="again"))
    assert repeats_of(again) == {"x": 3}  # 3 of 5 sequences, a repeat at a time


def test_a_query_may_read_the_plan_and_other_plans(four: kdata.Dataset) -> None:
    doubled = select(four, Sql(sql="select id, 2 as repeats from rows order by id", name="doubled"))
    kept = select(four, Sql(sql="select id from rows where place < 2 order by place", parent="doubled", name="kept"))
    assert repeats_of(kept) == {"w": 2, "x": 2} and kept.info.parents == {"doubled": doubled.plan_digest}
    query = "select p.id from plans.Doubled p join scores.REF r using (id) where r.nll > 2 order by r.nll desc;"
    named = select(four, Sql(sql=query, name="named"))
    assert named.ids == ["x", "z", "y"]
    assert named.info.parents == {"doubled": doubled.plan_digest} and named.info.scores.keys() == {"ref"}
    both = select(four, Sql(sql="select id, repeats from rows join plans.doubled using (id) order by id", name="both"))
    assert repeats_of(both) == repeats_of(doubled)
    with pytest.raises(MissingError, match=r"plan 'kept', has no row with id 'y'"):
        select(four, Sql(sql="select 'y' as id", parent="kept", name="outside"))


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_is_refused(four: kdata.Dataset, tmp_path: Path) -> None:
    cases: list[tuple[Step, type[Exception], str]] = [
        (Random(parent="nowhere", name="r"), MissingError, "write the plan with `kdata select`"),
        (Random(parent="random"), ConfigError, "cannot be its own parent"),
        (Cap(size=3, take="first"), ConfigError, "--parent PLAN"),
        (Difference(score="nobody"), MissingError, "no score 'nobody'"),
        (Sql(sql="select id from rows; select id from rows"), QueryError, "run one query at a time"),
        (Sql(sql="copy (select 1) to 'x'"), QueryError, "reads, it does not change"),
        (Sql(sql="select id from read_parquet('/tmp/*.parquet')"), QueryError, "cannot record what read_parquet"),
        (Sql(sql="select id, 'x' as repeats from rows"), QueryError, "Could not convert"),
        (Uniform(size=1), DataError, "selects no row"),
    ]
    for step, error, words in cases:
        with pytest.raises(error, match=words):
            select(four, step)
    assert not (four.path / "plans").exists() and not list(tmp_path.glob(".four.*/"))
    with pytest.raises(ConfigError, match="finite and >= 0"):
        Static(weights={"code": -1, "prose": 2})
    with pytest.raises(ConfigError, match=r"not an amount of memory"):
        select(four, All(), Room(memory_limit="much"))
    with pytest.raises(StorageError, match="being written by another process"), lock_of(four.path):
        select(four, All())
    empty = dataset_of(tmp_path / "empty", [])
    with pytest.raises(DataError, match="has no rows"):
        select(empty, Proportional())


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [Row("a"), Row("b")])
    score_with(dataset, {"a": 1.0, "b": math.nan})
    with pytest.raises(DataError, match="1 rows have a value that is not a finite number"):
        select(dataset, Difference())
    score_with(dataset, {"a": 1.0, "b": -math.inf}, "other")
    with pytest.raises(DataError, match="not a finite number"):
        select(dataset, Difference(score="other"))


def test_a_changed_dataset_or_index_is_refused(four: kdata.Dataset, tmp_path: Path) -> None:
    select(four, All())
    grown = dataset_of(four.path, [Row("new")], source="more")
    with pytest.raises(MismatchError, match=r"plan 'all' belongs to another state of .* Run `kdata select` again"):
        open_plan(grown, "all")
    with pytest.raises(MismatchError, match="rows were added"):
        select(grown, Cap(parent="all", size=2))
    part = four.path / "index/capture-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match=r"damaged"):
        select(kdata.open(four.path), All())


def test_a_damaged_sidecar_is_refused(four: kdata.Dataset) -> None:
    part = four.path / "scores/ref/capture-00001.parquet"
    content = bytearray(part.read_bytes())
    content[8] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match="is not what was committed"):
        select(four, Difference())


# ---------------------------------------------------------------------------------------------- adding a method


class Shortest(Ranked):
    """A method as a user would add it: the shortest sequences."""

    method: Literal["shortest"] = "shortest"

    def values(self) -> str:
        """See `Ranked.values`."""
        return "select rows.*, -num_tokens as value from rows where nll is not null"


def test_a_method_is_one_class_and_one_line(four: kdata.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shortest", Shortest)
    plan = select(four, parse_step({"method": "shortest", "share": 0.5}))
    assert plan.ids == ["x", "w"] and plan.info.method == "shortest" and plan.info.parameters["share"] == 0.5
    assert [plan.info.name, (four.path / "plans/shortest.json").exists()] == ["shortest", True]


def test_every_method_has_its_name_and_says_what_its_settings_mean() -> None:
    for name, method in METHODS.items():
        assert get_args(method.model_fields["method"].annotation) == (name,) and method.__doc__
        for field, about in method.model_fields.items():
            assert about.description or field == "method", f"{name}.{field}"
    with pytest.raises(ConfigError, match=r"did you mean 'temperature'\?\) \(got 'temperatur'\)"):
        parse_step({"method": "temperatur"})
    with pytest.raises(ConfigError, match=r"unknown key 'sed' \(did you mean 'seed'\?\)"):
        parse_step({"method": "random", "sed": 1})


def test_names_that_would_be_sql_are_refused() -> None:
    for values in ({"name": "a;b"}, {"parent": "a/../b"}, {"score": 'x" as y, secret'}):
        with pytest.raises(ConfigError, match="should match pattern"):
            parse_step({"method": "difference", **values})


@pytest.fixture
def odd_names(tmp_path: Path) -> Iterator[kdata.Dataset]:
    """Domains and folder whose names have quotes, brackets and more in them."""
    names = ["it's", 'a "b"', "$seed", "ü 日本", "{x}", "-- c"]
    yield dataset_of(tmp_path / "d[1] it's*", [Row(f"r{n}", name, 2, 1.0) for n, name in enumerate(names)])


def test_domains_and_folders_may_have_any_name(odd_names: kdata.Dataset) -> None:
    plan = select(odd_names, Uniform(size=12, count_by="sequences", max_repeats=2))
    assert repeats_of(plan) == {f"r{n}": 2 for n in np.argsort([-float(draw(f"r{n}")) for n in range(6)])}
    assert as_recorded(odd_names, plan) == repeats_of(plan)

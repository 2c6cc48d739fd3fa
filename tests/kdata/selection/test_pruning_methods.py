"""Methods that prune: prune, band, confidence, margin, robust, table and regmix, against brute force in NumPy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError, KdataError, MissingError
from kdata.format.records import UnitResult
from kdata.format.schema import SourceInfo
from kdata.selection import session
from kdata.selection.apportion import as_written
from kdata.selection.band import Band
from kdata.selection.confidence import Confidence, Margin
from kdata.selection.margins import score_margins
from kdata.selection.plan import Plan
from kdata.selection.prune import Prune, distillation_weight
from kdata.selection.ranked import Random
from kdata.selection.robust import Robust
from kdata.selection.score_file import bring
from kdata.selection.select import parse_step, select
from kdata.selection.tables import RegMix, Table, regression_weights
from kdata.store.sql import Room
from kdata.store.writer import Writer
from tests.kdata.selection.plans import Row, dataset_of, score_with
from tests.trainer.datasets import make_dataset

# Ids in another order than rows; ties; domain c is small; the last row has no target, so nothing may choose it.
NLLS = [1.0, 3.0, 2.0, 2.0, 5.0, 0.5, 2.0, 4.0, 1.5, 2.5, 3.5, 0.25]
ROWS = [Row(f"r{(n * 5) % 12:02}", "aabbabaabbac"[n], 2 + n % 3, nll) for n, nll in enumerate(NLLS)]
ROWS.append(Row("none", "c", 2, None))
OF = {row.id: row for row in ROWS if row.nll is not None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return dataset_of(tmp_path_factory.mktemp("pruning") / "d", ROWS)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of four rows, as 100 million rows would have several."""
    monkeypatch.setattr(session, "PIECE_ROWS", 4)


def bring_numbers(
    dataset: kdata.Dataset, folder: Path, name: str, column: str, numbers: Mapping[str, float | None]
) -> None:
    file = folder / f"{name}.parquet"
    pq.write_table(pa.table({"id": list(numbers), column: pa.array(list(numbers.values()), pa.float64())}), file)
    bring(dataset, file, name)


def as_recorded(dataset: kdata.Dataset, plan: Plan) -> list[str]:
    """Ids that the plan's own SQL gives."""
    assert plan.info.sql is not None
    ids: list[str] = dataset.sql(plan.info.sql)["id"].to_pylist()
    return ids


# ----------------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("keep", ["easy", "hard"])
def test_prune_keeps_the_easiest_or_the_hardest(dataset: kdata.Dataset, keep: str, share: float) -> None:
    sign = 1 if keep == "easy" else -1
    order = sorted(OF, key=lambda i: (sign * (OF[i].nll or 0), i))
    plan = select(dataset, parse_step({"method": "prune", "keep": keep, "share": share}))
    assert plan.ids == order[: math.ceil(as_written(share) * len(order))] == as_recorded(dataset, plan)
    assert plan.info.parameters["distillation_weight"] == max(0.5, 1 - share / 2)


def test_prune_at_random_is_the_method_random(dataset: kdata.Dataset) -> None:
    assert select(dataset, Prune(seed=3)).ids == select(dataset, Random(seed=3)).ids


def test_prune_reads_a_column_of_a_sidecar(dataset: kdata.Dataset, tmp_path: Path) -> None:
    marks = {row_id: float(number) for number, row_id in enumerate(OF)}
    bring_numbers(dataset, tmp_path, "judge", "mark", marks)
    plan = select(dataset, Prune(keep="hard", score="judge", column="mark", share=0.25))
    assert plan.ids == list(OF)[:-4:-1]
    with pytest.raises(ConfigError, match="no_such"):
        select(dataset, Prune(keep="hard", score="judge", column="no_such"))


def test_the_weight_of_distillation_falls_with_the_share() -> None:
    assert [distillation_weight(share) for share in (0.1, 0.5, 1.0)] == [0.95, 0.75, 0.5]


# ------------------------------------------------------------------------------------------------------------ band


@settings(max_examples=25)
@given(
    bounds=st.lists(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.75, 1.0]), min_size=2, max_size=2, unique=True),
    by_domain=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_a_band_equals_brute_force(dataset: kdata.Dataset, bounds: list[float], by_domain: bool, threads: int) -> None:
    low, high = sorted(bounds)
    expected: set[str] = set()
    for part in "abc" if by_domain else [""]:
        ids = sorted((i for i in OF if not part or OF[i].domain == part), key=lambda i: (OF[i].nll or 0, i))
        held = len(ids)
        places = [place for place in range(held) if as_written(low) * held <= place < as_written(high) * held]
        expected |= {ids[place] for place in places}
    step = Band(low=low, high=high, by_domain=by_domain)
    if not expected:
        with pytest.raises(DataError, match="selects no row: no row is between low and high"):
            select(dataset, step, Room(threads=threads))
        return
    plan = select(dataset, step, Room(threads=threads))
    assert set(plan.ids) == expected and plan.ids == as_recorded(dataset, plan)
    assert plan.info.num_tokens == sum(OF[i].tokens for i in expected)
    assert {d: c.rows for d, c in plan.info.domains.items()} == {
        d: sum(OF[i].domain == d for i in expected) for d in "abc"
    }


def test_a_band_may_begin_at_a_quantile_of_many_digits(dataset: kdata.Dataset) -> None:
    assert set(select(dataset, Band(low=1e-60, high=1 - 1e-16)).ids) <= set(select(dataset, Band(low=0, high=1)).ids)


def test_bands_side_by_side_cover_every_row_once(dataset: kdata.Dataset) -> None:
    bands = [select(dataset, Band(low=n / 7, high=(n + 1) / 7)).ids for n in range(7)]
    assert sorted(row_id for ids in bands for row_id in ids) == sorted(OF)


def test_a_band_of_a_plan_keeps_its_repeats(dataset: kdata.Dataset) -> None:
    select(
        dataset,
        parse_step({"method": "sql", "name": "twice", "sql": "select id, 2 as repeats from rows where nll < 3"}),
    )
    plan = select(dataset, Band(low=0.0, high=0.5, parent="twice"))
    assert set(plan.repeats.tolist()) == {2} and max(OF[i].nll or 0 for i in plan.ids) <= 2.0


# ------------------------------------------------------------------------------------------------------ confidence


@pytest.mark.parametrize("by_domain", [True, False])
def test_confidence_keeps_what_both_models_predict_well(dataset: kdata.Dataset, by_domain: bool) -> None:
    student = {row_id: float((3 * n) % 7) for n, row_id in enumerate(OF)}
    score_with(dataset, student, "student")
    plan = select(dataset, Confidence(share=0.5, by_domain=by_domain))
    joint = {i: math.exp(-(OF[i].nll or 0)) * math.exp(-student[i]) for i in OF}
    expected: set[str] = set()
    for part in "abc" if by_domain else [""]:
        ids = sorted((i for i in OF if not part or OF[i].domain == part), key=lambda i: (-joint[i], i))
        rows = (plan.info.domains[part].requested if by_domain else math.ceil(len(ids) / 2)) or 0
        expected |= set(ids[:rows])
    assert set(plan.ids) == expected and plan.ids == as_recorded(dataset, plan)


def test_margins_are_means_over_target_positions(tmp_path: Path) -> None:
    lengths = [1 + (i * 7) % 29 for i in range(20)]
    data = make_dataset(tmp_path / "set", lengths, mask_every=4)
    score_margins(data)
    stored = dict(zip(*data.sql("select id, margin from scores.margin").to_pydict().values(), strict=True))
    for row in (data[n] for n in range(len(data))):
        margins = [
            math.exp(row.kept(t).logprobs[0]) - math.exp(row.kept(t).logprobs[1])
            for t in np.flatnonzero(row.target_mask).tolist()
            if t > 0
        ]
        value = stored[f"doc-{row.number}"]
        assert value is None if not margins else value == pytest.approx(np.mean(margins), abs=1e-6)
    targets = set(data.sql("select id from rows where num_target_tokens > 0")["id"].to_pylist())
    surest = max(targets, key=lambda row_id: stored[row_id])
    assert select(data, Margin(share=0.01, by_domain=False)).ids == [surest]


def test_margins_of_a_shard_of_rejects_alone_are_a_part_without_rows(tmp_path: Path) -> None:
    first = dataset_of(tmp_path / "set", [Row("a", tokens=3)])
    with Writer(first.path, first.info, "empty", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(UnitResult(0, []))
    data = dataset_of(first.path, [Row("b", tokens=4)], source="more")
    assert [entry.rows for entry in data.manifest] == [1, 0, 1]
    assert score_margins(data).covered == {"margin": 2}
    assert data.sql("select count(*) as n from scores.margin")["n"].to_pylist() == [2]
    assert not verify(data, deep=True)


def test_margin_keeps_the_surest_of_each_domain(dataset: kdata.Dataset, tmp_path: Path) -> None:
    margins = {row_id: (n % 5) / 5 for n, row_id in enumerate(OF)}
    bring_numbers(dataset, tmp_path, "sure", "margin", margins)
    plan = select(dataset, Margin(score="sure", share=0.5, by_domain=False))
    assert plan.ids == sorted(OF, key=lambda i: (-margins[i], i))[:6]


# ---------------------------------------------------------------------------------------------------------- robust


def game(gains: Mapping[str, float], wrong: float) -> tuple[list[str], np.ndarray]:
    """Rows up to j*, and their probabilities, by trying every j."""
    order = sorted(gains, key=lambda i: (-gains[i], i))
    inverse = np.cumsum([1 / gains[i] for i in order])
    spoiled = wrong * len(order)
    values = [(j - spoiled) / inverse[j - 1] if j > spoiled else -math.inf for j in range(1, len(order) + 1)]
    end = int(np.argmax(values)) + 1
    return order[:end], np.array([1 / gains[i] for i in order[:end]]) / inverse[end - 1]


def worst_case(gains: np.ndarray, chances: np.ndarray, spoiled: int) -> float:
    """What is left where the adversary spoils the best rows."""
    return float(np.sort(gains * chances)[: len(gains) - spoiled].sum())


def start_of(seed: int, part: str = "") -> Fraction:
    return Fraction(int.from_bytes(hashlib.md5(f"{seed}:{part}".encode()).digest(), "little"), 2**128)


@settings(max_examples=30)
@given(
    margins=st.lists(st.integers(0, 19).map(lambda n: n / 20), min_size=12, max_size=12),
    wrong=st.sampled_from([0.05, 0.1, 0.25, 0.5]),
    share=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 3),
    threads=st.sampled_from([1, 2]),
)
def test_robust_equals_brute_force(
    dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory, margins: list[float], wrong: float, share: float,
    seed: int, threads: int,
) -> None:  # fmt: skip
    gains = {row_id: 1 - margin for row_id, margin in zip(OF, margins, strict=True)}
    name = "m" + hashlib.md5(repr(margins).encode()).hexdigest()
    bring_numbers(dataset, tmp_path_factory.mktemp("m"), name, "margin", dict(zip(OF, margins, strict=True)))
    step = Robust(score=name, share=share, wrong=wrong, seed=seed)
    ids, chances = game(gains, wrong)
    mass = np.minimum(1.0, math.ceil(as_written(share) * len(OF)) * chances)
    reached = np.cumsum(mass) + float(start_of(seed))
    drawn = np.floor(reached) > np.floor(reached - mass)
    # A sum within a billionth of a whole number may be rounded to either side.
    sure = (
        np.abs(reached - np.round(reached)).min() > 1e-8
        and np.abs(reached - mass - np.round(reached - mass)).min() > 1e-8
    )
    if sure and not drawn.any():
        with pytest.raises(DataError, match="fewer than one row is drawn"):
            select(dataset, step, Room(threads=threads))
    elif sure:
        plan = select(dataset, step, Room(threads=threads))
        assert plan.ids == [i for i, one in zip(ids, drawn, strict=True) if one] == as_recorded(dataset, plan)


def test_no_other_chances_do_better_against_the_adversary() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers = rng.uniform(0.05, 1.0, 8)
        ids, chances = game({str(n): float(g) for n, g in enumerate(numbers)}, wrong=0.25)
        ours = np.zeros(8)
        ours[[int(i) for i in ids]] = chances
        best = worst_case(numbers, ours, 2)
        others = rng.dirichlet(np.full(8, 0.5), 2000)
        assert max(worst_case(numbers, other, 2) for other in others) <= best + 1e-9


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_a_table_gives_the_shares(dataset: kdata.Dataset, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"weights{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"domain": ["a", "b"], "weight": [1.0, 1.0]}), file)
    else:
        lines = {
            ".csv": "domain,weight\na,1\nb,1\n",
            ".jsonl": '{"domain":"a","weight":1}\n{"domain":"b","weight":1}\n',
        }
        file.write_text(lines[ending])
    plan = select(dataset, Table(file=str(file), size=6, count_by="sequences"))
    static = select(dataset, parse_step({
        "method": "static", "weights": {"a": 1, "b": 1, "c": 0}, "size": 6, "count_by": "sequences",
    }))  # fmt: skip
    assert plan.ids == static.ids and plan.info.parameters["weights"] == {"a": 0.5, "b": 0.5, "c": 0.0}


def test_regmix_prefers_the_domain_that_lowers_the_loss(dataset: kdata.Dataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(3), 20)
    slopes = np.array([3.0, 1.0, 2.0])
    file = tmp_path / "runs.csv"
    table = np.column_stack([weights, weights @ slopes])
    np.savetxt(file, table, delimiter=",", header="a,b,c,loss", comments="")
    plan = select(dataset, RegMix(runs=str(file), size=4, max_repeats=8, count_by="sequences", candidates=5000))
    assert plan.info.parameters["slopes"] == pytest.approx(dict(zip("abc", slopes, strict=True)), abs=1e-6)
    chosen = plan.info.parameters["weights"]
    assert chosen["b"] > 0.6 and chosen["a"] < 0.2
    # The same by hand: the mean of the best candidates of the same draw.
    share = np.array([sum(row.domain == d for row in OF.values()) for d in "abc"]) / len(OF)
    draw = np.random.default_rng(0).dirichlet(share * 10, 5000)
    best = draw[np.argsort(draw @ slopes, kind="stable")[:100]].mean(0)
    assert list(chosen.values()) == pytest.approx(best.tolist(), abs=1e-6)


def test_runs_that_do_not_tell_domains_apart_are_refused() -> None:
    same = np.tile([0.5, 0.25, 0.25], (9, 1))
    with pytest.raises(DataError, match="do not tell the domains apart"):
        regression_weights(same, np.ones(9), np.ones(3), 10, 1, 0)


BAD_TABLES: list[tuple[dict[str, Any], str, str]] = [
    ({"domain": ["a", "x"], "weight": [1.0, 1.0]}, "weights.parquet", "names the domain 'x'"),
    ({"domain": ["a", "a"], "weight": [1.0, 1.0]}, "weights.parquet", "names the domain 'a' twice"),
    ({"domain": ["a", None], "weight": [1.0, 1.0]}, "weights.parquet", "names no domain in line 2"),
    ({"domain": ["a"], "weight": [math.nan]}, "weights.parquet", "every line needs a finite number"),
    ({"domain": ["a"], "weight": [None]}, "weights.parquet", "every line needs a finite number"),
    ({"domain": ["a"], "weight": [-1.0]}, "weights.parquet", "must be finite and >= 0"),
    ({"domain": ["a"], "weight": [0.0]}, "weights.parquet", "are all 0"),
    ({"domain": ["a"], "share": [1.0]}, "weights.parquet", "has no column 'weight'"),
    ({"domane": ["a"], "weight": [1.0]}, "weights.parquet", "has no column 'domain'"),
    ({"a": [1.0] * 5, "b": [0.0] * 5, "loss": [1.0] * 5}, "runs.parquet", "has no column 'c'"),
    ({"a": [1.0] * 4, "b": [1.0] * 4, "c": [1.0] * 4, "loss": [1.0] * 4}, "runs.parquet", "has 4 runs for 3 domains"),
    ({"a": [1.0] * 5, "b": [1.0] * 5, "c": [-1.0] * 5, "loss": [1.0] * 5}, "runs.parquet", "weights must be >= 0"),
    ({"a": [1.0] * 5, "b": [1.0] * 5, "c": [1.0] * 5, "d": [1.0] * 5, "loss": [1.0] * 5}, "runs.parquet", "column 'd'"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "name", "message"), BAD_TABLES)
def test_a_bad_table_is_one_error(
    dataset: kdata.Dataset, tmp_path: Path, columns: dict[str, Any], name: str, message: str
) -> None:
    file = tmp_path / name
    pq.write_table(pa.table(columns), file)
    step = Table(file=str(file)) if name.startswith("weights") else RegMix(runs=str(file))
    with pytest.raises((DataError, ConfigError), match=message):
        select(dataset, step)


@pytest.mark.parametrize(
    ("name", "text", "domains"),
    [
        ("w.csv", "domain,weight\n007,0.5\n2024-01-01,1.5\n", ["007", "2024-01-01", "7"]),
        ("w.csv", "domain,weight\n7,1\n8,3\n", ["7", "8"]),
        ("w.jsonl", '{"domain": 7, "weight": 1}\n{"domain": 8, "weight": 3}\n', ["7", "8"]),
        ("w.parquet", None, ["7", "8"]),
    ],
)
def test_a_domain_may_look_like_a_number_or_a_date(
    tmp_path: Path, name: str, text: str | None, domains: list[str]
) -> None:
    data = dataset_of(tmp_path / "d", [Row(f"r{n}", domains[n % len(domains)]) for n in range(12)])
    if text is None:
        decimals = pa.array([Decimal("0.25"), Decimal("0.75")])
        pq.write_table(pa.table({"domain": pa.array([7, 8]), "weight": decimals}), tmp_path / name)
    else:
        (tmp_path / name).write_text(text)
    plan = select(data, Table(file=str(tmp_path / name), size=4, count_by="sequences"))
    assert [plan.info.domains[domain].sequences for domain in domains[:2]] == [1, 3]


@pytest.mark.parametrize("method", ["table", "regmix"])
def test_a_table_with_a_column_twice_is_one_error(dataset: kdata.Dataset, tmp_path: Path, method: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text("domain,weight,weight\na,1,2\n" if method == "table" else "a,a,c,loss\n" + "1,2,3,4\n" * 5)
    step = Table(file=str(file)) if method == "table" else RegMix(runs=str(file))
    with pytest.raises(DataError, match=r"has the column .(weight|a). twice"):
        select(dataset, step)


def test_a_domain_named_as_the_column_of_losses_is_refused(tmp_path: Path) -> None:
    """Its column would be taken for both."""
    data = dataset_of(tmp_path / "d", [Row(f"r{n}", ("a", "loss")[n % 2]) for n in range(8)])
    (tmp_path / "r.csv").write_text("a,loss\n.1,.9\n.2,.8\n.4,.6\n.7,.3\n")
    with pytest.raises(ConfigError, match="is called 'loss'"):
        select(data, RegMix(runs=str(tmp_path / "r.csv")))


def test_a_table_that_is_none_is_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        select(dataset, Table(file=str(tmp_path / "none.csv")))
    (tmp_path / "weights.txt").write_text("a 1")
    with pytest.raises(DataError, match=r"is none of \.parquet"):
        select(dataset, Table(file=str(tmp_path / "weights.txt")))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read"):
        select(dataset, Table(file=str(tmp_path / "broken.parquet")))


# ------------------------------------------------------------------------------------------------------- bad input

STEPS: dict[str, dict[str, Any]] = {
    "prune": {"keep": "easy", "score": "bad"}, "band": {"score": "bad"}, "confidence": {"score": "bad"},
    "margin": {"score": "bad"}, "robust": {"score": "bad"},
}  # fmt: skip


@pytest.fixture(params=list(STEPS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_scores(folder: Path, method: str, numbers: Mapping[str, float | None]) -> kdata.Dataset:
    data = dataset_of(folder / "d", ROWS)
    if method in ("margin", "robust"):
        bring_numbers(data, folder, "bad", "margin", numbers)
    else:
        score_with(data, {row_id: number for row_id, number in numbers.items() if number is not None}, "bad")
    return data


def test_a_row_without_a_number_is_refused(method: str, tmp_path: Path) -> None:
    data = with_scores(tmp_path, method, {row_id: None if n == 3 else 0.5 for n, row_id in enumerate(OF)})
    with pytest.raises(DataError, match="1 rows have no value: score 'bad' lacks them"):
        select(data, parse_step({"method": method, **STEPS[method]}))
    assert not (data.path / "plans" / f"{method}.json").exists()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(method: str, tmp_path: Path, number: float) -> None:
    numbers = {row_id: number if n == 3 else 0.5 for n, row_id in enumerate(OF)}
    with pytest.raises(DataError, match=r"not a finite number|NaN or infinite"):
        select(with_scores(tmp_path, method, numbers), parse_step({"method": method, **STEPS[method]}))


def test_a_number_that_is_no_margin_is_refused(tmp_path: Path) -> None:
    numbers = {row_id: 1.5 if n == 3 else 0.5 for n, row_id in enumerate(OF)}
    with pytest.raises(DataError, match="1 rows have a value that is not a finite number"):
        select(with_scores(tmp_path, "robust", numbers), Robust(score="bad"))


def test_ties_are_broken_by_id(method: str, tmp_path: Path) -> None:
    rows = [Row(i, "a", 2, 1.0) for i in ("d", "b", "a", "c")]
    data = dataset_of(tmp_path / "d", rows)
    numbers = dict.fromkeys(("a", "b", "c", "d"), 0.5)
    if method in ("margin", "robust"):
        bring_numbers(data, tmp_path, "bad", "margin", numbers)
    else:
        score_with(data, numbers, "bad")
    plan = select(data, parse_step({"method": method, **STEPS[method]}))
    expected = {"band": ["b", "c"], "robust": plan.ids}.get(method, ["a", "b"])
    assert plan.ids == expected and len(plan.ids) == 2


def test_nothing_to_choose_from_is_refused(method: str, tmp_path: Path) -> None:
    data = dataset_of(tmp_path / "d", [Row("a", "a", 2, None), Row("b", "b", 2, None)])
    if method in ("margin", "robust"):
        bring_numbers(data, tmp_path, "bad", "margin", {"a": None, "b": None})
    else:
        score_with(data, {}, "bad")
    with pytest.raises(DataError, match="selects no row"):
        select(data, parse_step({"method": method, **STEPS[method]}))


def test_a_missing_score_is_named(method: str, dataset: kdata.Dataset) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        select(dataset, parse_step({"method": method, **STEPS[method], "score": "nowhere"}))


@pytest.mark.parametrize(
    "values",
    [
        {"method": "band", "low": 0.5, "high": 0.5}, {"method": "robust", "wrong": 0.0}, {"method": "prune", "keep": "best"},
        {"method": "prune", "score": "s", "column": 'x"; drop'}, {"method": "prune", "share": 0.0},
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(KdataError):
        parse_step(values)

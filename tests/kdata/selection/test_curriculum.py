"""The methods `curriculum` (TAPIR) and `olmix` (weights reused), on numbers worked out by hand."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.errors import ConfigError, DataError, KdataError
from kdata.selection import session
from kdata.selection.curriculum import TASK_RATIOS, Curriculum
from kdata.selection.score_file import bring
from kdata.selection.select import parse_step, select
from kdata.selection.tables import Olmix
from tests.kdata.selection.plans import Row, dataset_of

# Domain math: gaps 0 to 7; code: 0 to 3; law: one row without a mark.
GAPS: dict[str, float | None] = {
    **{f"m{n}": float(n) for n in range(8)},
    **{f"c{n}": float(n) for n in range(4)},
    "l0": None,
}
DOMAIN = {"m": "math", "c": "code", "l": "law"}
ROWS = [Row(name, DOMAIN[name[0]], 3, 1.0) for name in GAPS]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kdata.Dataset:
    monkeypatch.setattr(session, "PIECE_ROWS", 4)
    data = dataset_of(tmp_path / "d", ROWS, shard_rows=3)
    file = tmp_path / "marks.parquet"
    pq.write_table(pa.table({"id": list(GAPS), "gap": pa.array(list(GAPS.values()), pa.float64())}), file)
    bring(data, file, "marks")
    return data


def draw(row_id: str, seed: int) -> int:
    return int.from_bytes(hashlib.md5(f"{seed}:{row_id}".encode()).digest(), "little")


@pytest.mark.parametrize("hard_share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 3])
def test_hard_and_easy_rows_in_the_share_and_tasks_in_the_ratios(
    dataset: kdata.Dataset, hard_share: float, seed: int
) -> None:
    """size 8, math : code = 3 : 1, hard from gap 2 on: of each part the rows with the largest draws."""
    ratios = {"math": 3.0, "code": 1.0, "law": 0.0}
    step = Curriculum(
        hard_above=2, hard_share=hard_share, ratios=ratios, size=8, max_repeats=4, seed=seed, name=f"p{seed}"
    )
    plan = select(dataset, step)
    expected: Counter[str] = Counter()
    for domain, of_domain in (("math", 6), ("code", 2)):
        hard = of_domain * hard_share
        for wanted, is_hard in ((hard, True), (of_domain - hard, False)):
            names = [
                n for n, gap in GAPS.items() if gap is not None and DOMAIN[n[0]] == domain and (gap >= 2) == is_hard
            ]
            names.sort(key=lambda name: -draw(name, seed))
            if wanted == int(wanted):
                expected.update(names[k % len(names)] for k in range(int(wanted)))
    taken = Counter(dict(zip(plan.ids, plan.repeats, strict=True)))
    if hard_share != 0.25:  # there quotas are fractions, 4.5 + 1.5 and 1.5 + 0.5: only the sums are said by hand
        assert taken == expected
    assert sum(taken.values()) == 8 and plan.info.parameters["without_mark"] == 1
    hard_taken = sum(n for name, n in taken.items() if (GAPS[name] or 0) >= 2)
    assert abs(hard_taken - 8 * hard_share) <= 1
    assert plan.info.sql is not None
    answer = dataset.sql(plan.info.sql).to_pydict()
    assert dict(zip(answer["id"], answer["repeats"], strict=True)) == dict(taken)


def test_without_a_size_the_plan_is_the_largest_that_share_and_ratios_allow(dataset: kdata.Dataset) -> None:
    plan = select(dataset, Curriculum(hard_above=2, hard_share=0.5, ratios={"math": 1, "code": 1, "law": 0}))
    assert plan.info.num_rows == 8, "code has two easy and two hard rows"
    assert {d: c.sequences for d, c in plan.info.domains.items()} == {"code": 4, "law": 0, "math": 4}
    own = select(dataset, Curriculum(hard_above=2, hard_share=0.5, name="own"))
    assert own.info.parameters["weights"] == pytest.approx({"math": 2 / 3, "code": 1 / 3, "law": 0})


def test_the_ratios_of_the_tasks_sum_to_one() -> None:
    assert len(TASK_RATIOS) == 32 and sum(TASK_RATIOS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard_above": 99}, "domain 'code' has no hard row"),
        ({"hard_above": 4, "ratios": {"math": 1, "code": 1, "law": 0}}, "domain 'code' has no hard row"),
        ({"ratios": {"math": 1, "code": 1, "law": 1}}, "domain 'law' has no easy row"),
        ({"ratios": {"math": 1, "code": 1}}, "does not name the domain 'law'"),
        ({"ratios": {"math": 1, "code": 1, "law": 0, "maths": 1}}, "ratios names 'maths'"),
        ({"ratios": {"math": 0, "code": 0, "law": 0}}, "are all 0"),
        ({"ratios": {"math": -1, "code": 1, "law": 0}}, "must be finite and >= 0"),
        ({"ratios": "tasks"}, "is no task of the table"),
        ({"size": 500}, "are requested, but it holds"),
        ({"score": "other"}, "other"),
        ({"column": "gapp"}, "gapp"),
        ({"where": ["domain = 'law'"]}, "none of 1 rows has a number in scores.marks.gap"),
        ({"hard_share": 2}, "hard_share"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(dataset: kdata.Dataset, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KdataError, match=message):
        select(dataset, parse_step({"method": "curriculum", **settings}))
    assert not (dataset.path / "plans/curriculum.parquet").exists()


@pytest.mark.parametrize("ratios", [{"math": -1, "code": 1}, {"math": 0, "code": 0}, {"math": float("nan")}])
def test_ratios_that_no_dataset_could_have_are_refused_as_settings(ratios: dict[str, float]) -> None:
    """A recipe with rounds chooses after hours of a teacher's work, so it must not learn of them then."""
    for values in ({"method": "curriculum", "ratios": ratios}, {"method": "static", "weights": ratios}):
        with pytest.raises(ConfigError, match=r"must be finite and >= 0|are all 0|finite number"):
            parse_step(values)


# ------------------------------------------------------------------------------------------------------------ olmix


def weights_file(folder: Path, weights: dict[str, float]) -> str:
    file = folder / "former.parquet"
    pq.write_table(pa.table({"domain": list(weights), "weight": list(weights.values())}), file)
    return str(file)


def test_ratios_of_unchanged_domains_stay(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """math and code were 3 : 1; law is new; of `old`, which is gone, nothing is left."""
    former = weights_file(tmp_path, {"math": 0.3, "code": 0.1, "old": 0.6})
    rng, runs = np.random.default_rng(0), tmp_path / "runs.csv"
    weights = rng.dirichlet(np.ones(2), 12)
    np.savetxt(
        runs, np.column_stack([weights, weights @ [1.0, 2.0]]), delimiter=",", header="reused,law,loss", comments=""
    )
    step = Olmix(former=former, runs=str(runs), size=4, max_repeats=16, count_by="sequences", candidates=2000)
    plan = select(dataset, step)
    chosen = plan.info.parameters["weights"]
    assert chosen["math"] / chosen["code"] == pytest.approx(3.0)
    assert sum(chosen.values()) == pytest.approx(1.0)
    # The rest by hand: the mean of the best candidates of the same draw, columns in the order law, reused.
    share = np.array([1, 12]) / 13
    candidates = np.random.default_rng(0).dirichlet(share * 10, 2000)
    best = candidates[np.argsort(candidates @ [2.0, 1.0], kind="stable")[:100]].mean(0)
    assert [chosen["law"], chosen["math"] + chosen["code"]] == pytest.approx(best.tolist(), abs=1e-6)
    assert plan.info.parameters["fitted"] == ["law"]


def test_a_domain_that_is_gone_needs_no_runs(dataset: kdata.Dataset, tmp_path: Path) -> None:
    former = weights_file(tmp_path, {"math": 0.5, "code": 0.25, "law": 0.0, "old": 0.25})
    plan = select(dataset, Olmix(former=former, size=3, count_by="sequences"))
    assert plan.info.parameters["weights"] == pytest.approx({"math": 2 / 3, "code": 1 / 3, "law": 0})


def test_a_reuse_that_does_not_fit_is_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"
    runs.write_text("reused,law,loss\n" + "1,0,1\n0,1,2\n" * 3)
    cases: list[tuple[dict[str, float], dict[str, Any], type[KdataError], str]] = [
        ({"math": 1, "code": 1}, {}, ConfigError, r"domains \['law'\] have no former weight"),
        ({"math": 1, "code": 1, "law": 1}, {"runs": str(runs)}, ConfigError, "runs would be ignored"),
        ({"math": 1, "code": 1}, {"changed": ["law"]}, ConfigError, "'law', which is not among the former table"),
        ({"math": 1, "old": 1}, {"changed": ["old"]}, ConfigError, "'old', which is not among the domains"),
        ({"old": 1}, {"runs": str(runs)}, DataError, "use the method regmix"),
        ({"math": -1, "code": 1, "law": 1}, {}, ConfigError, "must be finite and >= 0"),
        ({"math": 1}, {"runs": str(runs)}, DataError, "has no column 'code'"),
    ]
    for former, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            select(dataset, Olmix(former=weights_file(tmp_path, former), **settings))
    assert not (dataset.path / "plans/olmix.parquet").exists()

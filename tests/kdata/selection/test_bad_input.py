"""Every method of `kdata select` on input that cannot be used, through the command line: one error, and no plan."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import kdata
from kdata.config import apply_settings
from kdata.errors import ConfigError, DataError, KdataError, MissingError
from kdata.pipelines.cli.main import app
from kdata.selection.plan import open_plan
from kdata.selection.score_file import bring
from kdata.selection.select import METHODS, parse_step
from kdata.selection.step import Step
from tests.kdata.selection.plans import Row, dataset_of

# Two domains of equal rows, and one whose only row has no target.
ROWS = [Row(f"r{n}", "ab"[n % 2], 3, 1.0) for n in range(8)] + [Row("none", "empty", 2, None)]
IDS = [row.id for row in ROWS]
COLUMNS = {"ref": "nll", "student": "nll", "margin": "margin", "marks": "gap"}
SCORED = {name: str(field.default) for name, method in METHODS.items()
          if (field := method.model_fields.get("score")) is not None and field.default is not None}  # fmt: skip
SCORED["ddk"] = "student"
LEFT_OUT = {"curriculum"}  # by its stated rule, rows without a mark are left out and counted
MIXTURES = [name for name, method in METHODS.items() if "max_repeats" in method.model_fields]


@pytest.fixture
def own(tmp_path: Path) -> dict[str, list[str]]:
    """What each method needs beside its name."""
    weights, runs = tmp_path / "weights.csv", tmp_path / "runs.csv"
    weights.write_text("domain,weight\na,1\nb,1\n")
    runs.write_text("a,b,loss\n" + "1,0,1\n0,1,2\n.5,.5,1.5\n" * 2)
    return {
        "sql": ["--sql", "select id from rows where num_target_tokens > 0"],
        "static": ["--weights", "a=1,b=1,empty=0"],
        "temperature": ["--temperature", "2"],
        "table": ["--set", f"file={weights}"],
        "ddk": ["--score", "student"],
        "regmix": ["--set", f"runs={runs}"],
        "olmix": ["--set", f"former={weights}"],
        "cap": ["--size", "12"],
        "curriculum": ["--set", "hard_share=1"],
    }


def dataset(folder: Path, *, nulls: bool = False, scores: bool = True) -> kdata.Dataset:
    """Equal scores for all rows; with `nulls` r0 and r5 have none."""
    folder.mkdir(exist_ok=True)
    data = dataset_of(folder / "d", ROWS, shard_rows=4)
    for name, column in COLUMNS.items() if scores else ():
        numbers = [None if nulls and row_id in ("r0", "r5") else 0.5 if name == "margin" else 1.5 for row_id in IDS]
        file = folder / f"{name}.parquet"
        pq.write_table(pa.table({"id": IDS, column: pa.array(numbers, pa.float64())}), file)
        bring(data, file, name)
    return data


def select(data: kdata.Dataset, method: str, *arguments: str) -> KdataError | None:
    """The error of a command, which left no plan; None where there is one."""
    words = ["select", str(data.path), "--method", method, "--name", "p", *arguments]
    error = CliRunner().invoke(app, words).exception
    assert error is None or isinstance(error, KdataError), repr(error)
    files = sorted(path.name for path in (data.path / "plans").glob("*"))
    assert files == ([] if error else ["p.json", "p.parquet"])
    return error


@pytest.mark.parametrize("method", METHODS)
def test_a_filter_that_leaves_nothing(own: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    error = select(dataset(tmp_path), method, *own.get(method, []), "--where", "nll > 99")
    assert isinstance(error, DataError) and "'nll > 99' leaves out 9. Loosen" in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_ties_and_a_domain_without_a_target(own: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    """Equal numbers are taken in the order of ids, and the row without a target by none but a query."""
    data = dataset(tmp_path)
    assert select(data, method, *own.get(method, [])) is None
    plan = open_plan(data, "p")
    assert "none" not in plan.ids and plan.info.domains["empty"].rows == 0
    if method in ("difference", "confidence", "margin"):
        assert plan.ids == sorted(plan.ids) == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("method", SCORED)
def test_scores_that_lack_rows_or_do_not_exist(own: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    missing = select(dataset(tmp_path / "a", scores=False), method, *own.get(method, []))
    assert isinstance(missing, MissingError) and SCORED[method] in str(missing)
    data = dataset(tmp_path / "b", nulls=True)
    error = select(data, method, *own.get(method, []))
    if method in LEFT_OUT:
        plan = open_plan(data, "p")
        assert error is None and {"r0", "r5"}.isdisjoint(plan.ids) and plan.info.parameters["without_mark"] == 2
    else:
        assert isinstance(error, DataError) and (
            "rows have no value" in str(error) or "lack the student's" in str(error)
        )


@pytest.mark.parametrize("method", [*SCORED, "prune", "band"])
def test_a_score_without_the_column_of_the_method(own: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    data, file = dataset(tmp_path, scores=False), tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": IDS, "other": [1.0] * 9}), file)
    bring(data, file, "mine")
    needs = [*own.get(method, []), *(["--set", "keep=hard"] if method == "prune" else [])]
    error = select(data, method, *needs, "--score", "mine")
    column = COLUMNS.get(SCORED.get(method, "ref"), "nll")
    assert isinstance(error, ConfigError)
    assert f"{method} needs the column '{column}' of the score 'mine', which has other" in str(error)
    if method in ("prune", "band"):
        assert select(data, method, *needs, "--score", "mine", "--set", "column=other") is None


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("prune", ["score=ref"], "keep 'random' reads no numbers"),
        ("prune", ["column=other"], "keep 'random' reads no numbers"),
        ("prune", ["keep=hard", "column=other"], "column 'other' is of a score"),
        ("band", ["column=other"], "column 'other' is of a score"),
    ],
)
def test_settings_that_nothing_would_read(tmp_path: Path, method: str, settings: list[str], message: str) -> None:
    error = select(dataset(tmp_path), method, *(word for one in settings for word in ("--set", one)))
    assert isinstance(error, ConfigError) and message in str(error)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (name, key)
        for name, method in METHODS.items()
        for key, field in method.model_fields.items()
        if field.is_required()
    ],
)
def test_a_missing_setting_says_method_meaning_and_an_example_that_is_valid(
    tmp_path: Path, method: str, key: str
) -> None:
    error = str(select(dataset(tmp_path), method))
    meaning = str(METHODS[method].model_fields[key].description).rstrip(".")
    begin, found, example = error.partition(f"method {method}: {key!r} is missing. {meaning}. For instance: --set ")
    assert begin == "select settings, " and found
    [setting] = shlex.split(example)
    step = parse_step(apply_settings({"method": method}, [setting]))
    assert getattr(step, key) is not None


def test_a_missing_score_of_margins_names_the_option(tmp_path: Path) -> None:
    data = dataset(tmp_path, scores=False)
    for words in (["margin"], ["robust"], ["all", "--where", "margin.margin > 0"]):
        error = select(data, *words)
        assert isinstance(error, MissingError) and "write it with `kdata score DATASET --margins`" in str(error)
    assert "--margins" not in str(select(data, "difference"))


@pytest.mark.parametrize("method", MIXTURES)
def test_weights_that_cannot_be_met(own: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    error = select(dataset(tmp_path), method, *own.get(method, []), "--size", "9999")
    assert isinstance(error, DataError) and "Request at most" in str(error) and "max_repeats=" in str(error)


@pytest.mark.parametrize("method", ["cap", "uniform"])
def test_fewer_tokens_than_one_sequence_has(own: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    error = select(dataset(tmp_path), method, "--size", "3")
    assert isinstance(error, DataError) and "3 tokens are requested" in str(error) and "longer" in str(error)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_scores_that_are_no_numbers(tmp_path: Path, value: str) -> None:
    data, file = dataset(tmp_path, scores=False), tmp_path / "bad.parquet"
    pq.write_table(pa.table({"id": IDS, "nll": [float(value), *[1.0] * 8]}), file)
    words = ["score", str(data.path), "--from", str(file), "--name", "ref"]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, DataError) and "NaN or infinite" in str(error)
    assert not list((data.path / "scores").glob("*"))


@pytest.mark.parametrize(("method", "model"), METHODS.items())
def test_settings_that_are_no_numbers(
    own: dict[str, list[str]], tmp_path: Path, method: str, model: type[Step]
) -> None:
    data = dataset(tmp_path)
    for name, field in model.model_fields.items():
        if field.annotation in (float, "float"):
            error = select(data, method, *own.get(method, []), "--set", f"{name}=.nan")
            assert error is not None and name in str(error)


def test_a_plan_that_no_reader_takes_is_refused_before_it_is_written(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    query = "select id, 200_000_000 as repeats from rows where num_target_tokens > 0"
    error = select(data, "sql", "--sql", query)
    assert isinstance(error, DataError) and "would choose 1,600,000,000 sequences" in str(error)
    with pytest.raises(DataError, match="at most 1,000,000,000; repeat rows less often"):
        kdata.make_plan(data, "p", IDS[:8], repeats=np.full(8, 200_000_000), method="own", parameters={})

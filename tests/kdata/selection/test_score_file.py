"""Scores from a file become a sidecar: joined by id, and refused where an id or a number is invalid."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError, KdataError, MismatchError, MissingError, StorageError
from kdata.format.files import lock_of
from kdata.pipelines.cli.main import app
from kdata.selection.query import Sql
from kdata.selection.ranked import Difference
from kdata.selection.score_file import bring
from kdata.selection.select import select
from kdata.selection.sidecar import load_score_info
from tests.kdata.selection.plans import Row, dataset_of, score_with

RUNNER = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def dataset(tmp_path: Path) -> kdata.Dataset:
    """Seven rows in three shards."""
    return dataset_of(tmp_path / "d", [Row(f"r{n}", "ab"[n % 2], 2, 1.0) for n in range(7)])


def write(path: Path, **columns: object) -> Path:
    """A Parquet file of these columns."""
    pq.write_table(pa.table(columns), path)
    return path


def test_numbers_are_joined_by_id_whatever_their_order(dataset: kdata.Dataset, tmp_path: Path) -> None:
    file = write(
        tmp_path / "marks.parquet",
        id=["r6", "r0", "r3", "r1"],
        mark=pa.array([9, 1, None, 4], pa.uint8()),
        nll=pa.array([5.5, 1.5, 2.5, 0.5], pa.float32()),
    )
    imported = bring(dataset, file, "judge", unit="marks from 0 to 9")
    assert imported.covered == {"mark": 3, "nll": 4} and imported.info.columns == ["mark", "nll"]
    table = dataset.sql("select rows.id, mark, judge.nll from rows join scores.judge as judge using (id) order by id")
    assert table.to_pydict() == {
        "id": [f"r{n}" for n in range(7)],
        "mark": [1, 4, None, None, None, None, 9],
        "nll": [1.5, 0.5, None, 2.5, None, None, 5.5],
    }
    assert [str(t) for t in table.schema.types] == ["string", "int64", "double"]
    info = load_score_info(dataset, "judge")
    assert info.model is None and info.origin is not None and info.unit == "marks from 0 to 9"
    for entry in dataset.manifest:  # a part per shard, in the shard's order
        part = pq.read_table(dataset.path / f"scores/judge/{entry.name}.parquet")["id"].to_pylist()
        assert part == pq.read_table(dataset.path / f"index/{entry.name}.parquet")["id"].to_pylist()
    assert verify(dataset) == []
    query = "select id from rows join scores.judge using (id) where mark > 3 order by mark desc"
    plan = select(dataset, Sql(sql=query))
    assert plan.ids == ["r6", "r1"] and plan.info.scores.keys() == {"judge"}
    with pytest.raises(DataError, match=r"3 rows have no value: score 'judge' lacks them"):
        select(dataset, Difference(score="judge"))


def test_the_same_file_again_changes_nothing_and_another_file_is_refused(
    dataset: kdata.Dataset, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.parquet", id=["r0"], nll=[1.0])
    first = bring(dataset, file, "mine").info
    assert bring(dataset, file, "mine").info == first
    with pytest.raises(MismatchError, match=r"scores.mine exists with other settings"):
        bring(dataset, write(tmp_path / "b.parquet", id=["r0"], nll=[2.0]), "mine")


def test_a_reference_from_a_file_gives_the_same_plan_as_a_scored_one(dataset: kdata.Dataset, tmp_path: Path) -> None:
    numbers = {f"r{n}": 1.0 + (n * 5 % 7) / 3 for n in range(7)}
    score_with(dataset, numbers)
    bring(dataset, write(tmp_path / "ref.parquet", id=list(numbers), nll=list(numbers.values())), "from_file")
    ours, theirs = (select(dataset, Difference(score=name, name=name)) for name in ("ref", "from_file"))
    assert ours.ids == theirs.ids and ours.info.parameters["threshold"] == theirs.info.parameters["threshold"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["r0", "r9", "zz"], "nll": [1.0, 2.0, 3.0]}, "has ids that .* does not have: 'r9', 'zz'"),
        ({"id": ["r0", "r0"], "nll": [1.0, 2.0]}, "id 'r0' is repeated"),
        ({"id": ["r0", None], "nll": [1.0, 2.0]}, "rows whose id is null"),
        ({"id": [1, 2], "nll": [1.0, 2.0]}, "needs a column `id` of text; its columns are id BIGINT, nll DOUBLE"),
        ({"row": ["r0"], "nll": [1.0]}, "needs a column `id` of text"),
        ({"id": ["r0"]}, "no column beside `id`"),
        ({"id": ["r0"], "nll": ["1.0"]}, "column 'nll' is VARCHAR, not a number"),
        ({"id": ["r0"], "good": [True]}, "column 'good' is BOOLEAN, not a number"),
        ({"id": ["r0"], "a b": [1.0]}, "column 'a b' has a name that SQL needs quoted"),
        ({"id": ["r0"], "nll": [math.nan]}, "column 'nll' has 1 NaN or infinite values"),
        ({"id": ["r0"], "nll": [-math.inf]}, "column 'nll' has 1 NaN or infinite values"),
    ],
)
def test_what_is_refused(dataset: kdata.Dataset, tmp_path: Path, columns: dict[str, list], message: str) -> None:
    with pytest.raises(DataError, match=message):
        bring(dataset, write(tmp_path / "f.parquet", **columns), "mine")
    assert not (dataset.path / "scores").exists()


def test_invalid_files_and_names_are_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        bring(dataset, tmp_path / "none.parquet", "mine")
    for name in ("text.parquet", "marks.jsonl", "marks.csv"):
        (tmp_path / name).write_text("id,nll\nr0,1\n")
        with pytest.raises(DataError, match=f"{name} is no Parquet file; write your numbers as one"):
            bring(dataset, tmp_path / name, "mine")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read as scores"):
        bring(dataset, tmp_path / "broken.parquet", "mine")
    file = write(tmp_path / "f.parquet", id=["r0"], nll=[1.0])
    for name in ("a/b", "mine\n"):
        with pytest.raises(ConfigError, match="is not a valid score name"):
            bring(dataset, file, name)
    with pytest.raises(StorageError, match="being written by another process"), lock_of(dataset.path):
        bring(dataset, file, "mine")


def test_the_command(dataset: kdata.Dataset, tmp_path: Path) -> None:
    file = write(tmp_path / "f.parquet", id=["r0", "r4"], mark=[1.0, 2.0])
    done = RUNNER.invoke(app, ["score", str(dataset.path), "--from", str(file), "--name", "judge"])
    assert done.exit_code == 0 and "scores.judge.mark covers 2 of 7 rows" in done.output
    for arguments in ([], ["--from", str(file), "--model", "x"]):
        done = RUNNER.invoke(app, ["score", str(dataset.path), *arguments])
        assert isinstance(done.exception, KdataError) and "give one of --model" in str(done.exception)

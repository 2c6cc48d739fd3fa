"""SQL over a dataset: documented queries work as written, and nothing but the dataset's folder is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import kdata
from kdata.errors import QueryError
from tests.fakes import digests


def test_the_documented_query_works_as_written(captured: Path) -> None:
    table = kdata.open(captured).sql("select domain, count(*), avg(nll) from rows group by 1")
    assert sorted(row["domain"] for row in table.to_pylist()) == ["code", "prose"]
    assert sum(row["count_star()"] for row in table.to_pylist()) == 25


def test_parameters_are_bound(captured: Path) -> None:
    dataset = kdata.open(captured)
    assert dataset.sql("select id from rows where id = ?", ["doc-001"])["id"].to_pylist() == ["doc-001"]
    assert dataset.sql("select id from rows where id = $name", {"name": "doc-001"}).num_rows == 1


def test_the_manifest_is_a_view(captured: Path) -> None:
    dataset = kdata.open(captured)
    [row] = dataset.sql(
        "select sum(rows)::int as r, sum(tokens)::int as t, sum(payload_bytes)::int as b from manifest"
    ).to_pylist()
    assert row["r"] == 25 and row["t"] == dataset.num_tokens
    assert row["b"] == sum(p.stat().st_size for p in (captured / "data").iterdir())


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('/etc/passwd')",
        "select * from read_text('/etc/hostname')",
        "select * from read_parquet('{root}/../outside.parquet')",
        "select * from glob('/etc/*')",
        "attach '/tmp/other.db' as other",
        "install httpfs",
        "set enable_external_access = true",
    ],
)
def test_nothing_outside_the_dataset_can_be_read(copied: Path, query: str) -> None:
    shutil.copyfile(next((copied / "index").iterdir()), copied.parent / "outside.parquet")
    with pytest.raises(QueryError):
        kdata.open(copied).sql(query.format(root=copied))


@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1) to '{root}/manifest.jsonl'",
        "copy (select 1) to '{root}/data/new.csv'",
        "select 1; copy (select 1) to '{root}/data/new.csv'",
        "explain analyze copy (select 1) to '{root}/data/new.csv'",
        "create table t as select 1",
        "drop view rows",
        # DuckDB calls these several statements, as it does a pivot.
        "copy (pivot rows on domain using count(*)) to '{root}/manifest.jsonl'",
        "copy (from (pivot rows on domain using count(*))) to '{root}/data/new.csv'",
        "explain analyze copy (pivot rows on domain using count(*)) to '{root}/data/new.csv'",
        "create table t as pivot rows on domain using count(*)",
        "(pivot rows on domain using count(*))) from rows; copy (select 1) to '{root}/data/new.csv'; from ((select 1)",
        "",
    ],
)
def test_a_dataset_cannot_be_changed(copied: Path, query: str) -> None:
    before = digests(copied)
    with pytest.raises(QueryError, match=r"kdata sql reads|outside|disabled|statements in one query|syntax error"):
        kdata.open(copied).sql(query.format(root=copied))
    assert digests(copied) == before


def test_one_query_at_a_time(captured: Path) -> None:
    for query in (
        "select 1; select 2",
        "pivot rows on domain using count(*); select 2",
        "select 1; select 2; select 3;",
    ):
        with pytest.raises(QueryError, match=r"there are [23] statements in one query; run one query at a time"):
            kdata.open(captured).sql(query)
    pivot = kdata.open(captured).sql("pivot (select domain, 1 as one from rows) on domain using count(*)")
    assert [name for name in pivot.column_names if name != "one"] == ["code", "prose"]


def test_an_error_gives_duckdb_s_reason_and_the_views(captured: Path) -> None:
    with pytest.raises(QueryError, match=r"rowz[\s\S]*Views: entries, manifest, rejects, rows, tokens$"):
        kdata.open(captured).sql("select * from rowz")
    with pytest.raises(QueryError, match="syntax error"):
        kdata.open(captured).sql("selec 1")


@pytest.mark.parametrize(
    "query",
    [
        "describe rows",
        "describe select 1",
        "summarize rows",
        "show tables",
        "from rows limit 1",
        "with a as (from rows) from a",
        "values (1), (2)",
        "pivot rows on domain using count(*)",
        "pivot rows on domain using count(*) order by id; -- a comment; /* and */ ;",
        "pivot rows on domain in ('code') using count(*)",
        "with a as (pivot rows on domain using sum(nll)) from a",
        "unpivot (select num_tokens, nll from rows) on num_tokens, nll",
        "select ';' as \"ü;\"; -- done;",
    ],
)
def test_ways_of_asking(captured: Path, query: str) -> None:
    assert kdata.open(captured).sql(query).num_rows > 0


@pytest.mark.parametrize("name", ["it's", "a[1]", "what?", "star*", "ünï 日本"])
def test_a_folder_may_have_any_name(captured: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(captured, tmp_path / name))
    assert kdata.open(root).sql("select count(*) as n from rows")["n"][0].as_py() == 25

"""Sorted queries over texts at a URL: the same answers as of a folder, and the texts of few shards fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.format.files import file_info
from kdata.format.manifest import write_manifest
from kdata.selection.score_file import bring
from tests.kdata.selection.plans import Row, dataset_of
from tests.web import Files

SHARDS, ROWS, TEXT = 12, 20, 4000  # characters of a text, in hexadecimal digits of chance


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """12 shards of 20 rows, and a score that some rows lack."""
    root, chance = tmp_path_factory.mktemp("home"), Random(0)
    rows = [
        Row(f"row-{n * 89 % 240:03}", "ab"[n % 2], 4, float(n * 37 % 241), chance.randbytes(TEXT // 2).hex())
        for n in range(SHARDS * ROWS)
    ]
    dataset = dataset_of(root / "d", rows, shard_rows=ROWS)
    ids = dataset.index(["id"])["id"]
    numbers = np.random.default_rng(1).permutation(len(ids)).astype(float)
    pq.write_table(pa.table({"id": ids, "nll": numbers}), root / "ref.parquet")
    bring(dataset, root / "ref.parquet", "ref")
    return dataset


@pytest.fixture
def served(home: kdata.Dataset, serve: Callable[[Path], Files]) -> Files:
    return serve(home.path.parent)


LATE = [
    "select id, text from rows join scores.ref using (id) order by ref.nll desc limit 2",
    "select r.text, s.nll from rows as r join scores.ref as s on r.id = s.id where domain = 'a' order by s.nll limit 2",
    'select "Big R".* from scores.ref join rows as "Big R" using (id) order by ref.nll - "Big R".nll limit 1 offset 1',
    "select text, ref.nll as other from rows left join scores.ref using (id) order by 2 nulls last limit 2",
    "from rows semi join scores.ref using (id) order by rows.nll desc limit 2",
    "select left(text, 80) || '...' as t, length(text), rows.nll * ? as more, try_cast(domain as int) from rows "
    "join scores.ref using (id) order by ref.nll limit 2",
]
WHOLE = [
    "select text from rows right join scores.ref using (id) order by ref.nll desc limit 3",
    "select text from scores.ref left join rows on rows.id = ref.id and rows.domain = 'b' order by ref.nll desc limit 3",
    "select distinct domain, text from rows order by text limit 3",
    "select domain, max(text) as t from rows group by 1 order by 1 limit 1",
    "select max(text) from rows order by 1 limit 1",
    "select domain, text from rows group by all order by text limit 3",
    "select distinct on (domain) domain, text from rows order by domain, nll limit 2",
    "select text, row_number() over (order by nll) as n from rows order by n desc limit 3",
    "select text from rows order by (select max(nll) from rows as o where o.domain = rows.domain), nll limit 3",
    "select text from rows join scores.ref using (id) order by all limit 3",
    "select a.text from rows as a join rows as b on a.nll = b.nll + 1 order by a.nll limit 3",
    "select text from rows positional join scores.ref order by ref.nll limit 3",
    "select unnest([text, domain]) as t, nll from rows order by nll, t limit 3",
    "with best as (select * from rows order by nll limit 5) select text from best order by nll desc limit 2",
    "select text from rows join scores.ref using (id) order by ref.nll desc",
    "select text from rows join scores.ref using (id) order by ref.nll limit 5 %",
    "select text from rows join scores.ref using (id) where domain = 'none' order by ref.nll limit 3",
    "select text from rows join scores.ref using (id) order by ref.nll limit 0",
    "select text from rows using sample 5 rows order by nll limit 0",
    "select text, 'x' as _kdata_shard from rows join scores.ref using (id) order by ref.nll limit 3",
    "select text, cast(text as blob) as b from rows join scores.ref using (id) order by ref.nll limit 3",
    "select * replace (rows.nll::int as id) from rows join scores.ref using (id) order by ref.nll limit 3",
    "select text, null as _KDATA_shard from rows join scores.ref using (id) order by ref.nll limit 3",
]


@pytest.mark.parametrize("query", [*LATE, *WHOLE])
def test_a_query_at_a_url_answers_as_in_a_folder(home: kdata.Dataset, served: Files, query: str) -> None:
    own = [2.0] * query.count("?")
    assert kdata.open(f"{served.url}/d").sql(query, own).equals(home.sql(query, own))


@pytest.mark.parametrize("query", LATE)
def test_texts_of_the_shown_rows_alone_are_fetched(home: kdata.Dataset, served: Files, query: str) -> None:
    opened = kdata.open(f"{served.url}/d")
    opened.sql("select count(*) from rows join scores.ref using (id)")  # footers
    before = served.bytes_sent()
    opened.sql(query, [2.0] * query.count("?"))
    of_texts = ROWS * TEXT / 2  # bytes of a shard's, at least: four bits a digit
    assert served.bytes_sent() - before < 2 * 1.5 * of_texts < SHARDS * of_texts / 3


def test_an_index_that_names_no_shard_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger wrote it, and its digest is right."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "d"
    written = dataset_of(root, [Row(f"r{n}", "a", 4, float(n), f"t{n}") for n in range(6)], shard_rows=3)
    entries = []
    for entry in written.manifest:
        name = f"index/{entry.name}.parquet"
        table = pq.read_table(root / name)
        place = table.schema.get_field_index("shard")
        pq.write_table(table.set_column(place, "shard", pa.nulls(len(table), pa.string())), root / name)
        entries.append(entry.model_copy(update={"files": {**entry.files, name: file_info(root / name)}}))
    write_manifest(root, entries)
    query, files = "select id, text from rows order by nll limit 4", Files(tmp_path)
    try:
        assert kdata.open(f"{files.url}/d").sql(query)["text"].to_pylist() == ["t0", "t1", "t2", "t3"]
    finally:
        files.close()


def test_parameters_are_bound_in_both_queries(home: kdata.Dataset, served: Files) -> None:
    query = "select id, text from rows join scores.ref using (id) where rows.domain = ? order by ref.nll limit 3"
    assert kdata.open(f"{served.url}/d").sql(query, ["b"]).equals(home.sql(query, ["b"]))


@pytest.mark.parametrize(
    "selected",
    [
        "text, cast(case rows.id when '{last}' then 'x' else '1' end as int)",  # by a column that is no text
        "cast(case rows.id when '{last}' then text else '1' end as int)",
        "text, (case rows.id when '{last}' then 200 else 1 end)::int8::tinyint as t, t + 1::tinyint",
        "* replace (cast(case rows.id when '{last}' then 'x' else '1' end as int) as domain)",
    ],
)
def test_what_fails_for_a_row_that_is_not_shown_is_an_error_as_in_a_folder(
    home: kdata.Dataset, served: Files, selected: str
) -> None:
    last = home.sql("select id from scores.ref order by nll desc limit 1")["id"][0]
    query = f"select {selected.format(last=last)} from rows join scores.ref using (id) order by ref.nll limit 2"
    with pytest.raises(kdata.QueryError, match="Conversion Error") as here:
        home.sql(query)
    with pytest.raises(kdata.QueryError) as there:
        kdata.open(f"{served.url}/d").sql(query)
    assert str(there.value) == str(here.value)


def test_a_wrong_name_is_said_as_ever(home: kdata.Dataset, served: Files) -> None:
    query = "select id, text from rows join scores.ref using (id) order by ref.nul limit 3"
    with pytest.raises(kdata.QueryError) as here:
        home.sql(query)
    with pytest.raises(kdata.QueryError) as there:
        kdata.open(f"{served.url}/d").sql(query)
    assert str(there.value) == str(here.value)

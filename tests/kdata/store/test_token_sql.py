"""SQL over tokens and kept entries: the numbers of the rows, only what a query needs, and every error is kdata's own."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.errors import ConfigError, CorruptError, DataError, OutOfRangeError, QueryError, ShapeError
from kdata.format.files import file_info
from kdata.format.manifest import digest_of, new_info
from kdata.format.schema import CodecInfo, SourceInfo, TokenizerInfo, canonical_json
from kdata.selection.query import Sql
from kdata.selection.ranked import Random
from kdata.selection.select import select
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.store.dataset import Dataset
from kdata.store.payload import PayloadReader
from kdata.store.sql import connect
from kdata.store.sql_tree import nodes
from kdata.store.token_table import ENTRIES, TOKENS
from kdata.store.token_views import token_views
from kdata.store.writer import Writer
from tests.benchmarks.loader import build_dataset
from tests.fakes import VOCAB, StandInTeacher, run_capture, run_generate, write_jsonl
from tests.kdata.selection.plans import Row, dataset_of, score_tokens_with, score_with

GOLDEN = sorted(path.with_suffix("") for path in (Path(__file__).resolve().parents[2] / "golden").glob("v*/*.json"))
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 6},
    "adaptive": {"kind": "adaptive", "k": 8, "mass": 0.7, "min_k": 2},
    "sampled": {"kind": "sampled", "num_draws": 7},
    "tau": {"kind": "sampled", "num_draws": 7, "tau": 0.5},
    "hybrid": {"kind": "hybrid", "k": 3, "num_draws": 5},
    "temperatures": {"kind": "hybrid", "k": 3, "num_draws": 5, "temperatures": [2.0]},
    "threshold": {"kind": "threshold", "threshold": 0.1},
}


# The oracle: what rows say.


def unless_nan(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def tokens_of(dataset: Dataset, text: Callable[[list[int]], list[str | None]]) -> list[dict[str, Any]]:
    """What the view `tokens` must hold, by `dataset[row]`."""
    expected = []
    for number in range(len(dataset)):
        row = dataset[number]
        texts = text(row.token_ids.tolist())
        for t in range(len(row)):
            span = slice(row.entry_offsets[t], row.entry_offsets[t] + row.num_exact[t])
            mass = float(np.exp(row.entry_logprobs[span].astype(np.float64)).sum())
            expected.append(
                {
                    "id": row.id,
                    "global_row": number,
                    "position": t,
                    "token_id": int(row.token_ids[t]),
                    "token": texts[t],
                    "logprob": unless_nan(row.logprob[t]),
                    "rank": int(row.rank[t]) or None,
                    "entropy": unless_nan(row.entropy[t]),
                    "log_tail": unless_nan(row.log_tail[t]),
                    "kept_mass": pytest.approx(mass, rel=1e-12) if row.num_kept[t] else None,
                    "target": bool(row.target_mask[t]),
                    "num_exact": int(row.num_exact[t]),
                    "num_drawn": int(row.num_kept[t] - row.num_exact[t]),
                }
            )
    return expected


def entries_of(dataset: Dataset, text: Callable[[list[int]], list[str | None]]) -> list[dict[str, Any]]:
    """What the view `entries` must hold, by `Row.kept`."""
    expected = []
    for number in range(len(dataset)):
        row = dataset[number]
        for t in range(len(row)):
            kept, begin = row.kept(t), int(row.entry_offsets[t])
            for place, (token_id, is_draw, token) in enumerate(
                zip(kept.ids.tolist(), kept.is_draw.tolist(), text(kept.ids.tolist()), strict=True)
            ):
                own = None if row.draw_logprobs is None else float(row.draw_logprobs[begin + place])
                logprob = float(kept.logprobs[place])
                expected.append(
                    {
                        "id": row.id,
                        "global_row": number,
                        "position": t,
                        "entry": place,
                        "token_id": token_id,
                        "token": token,
                        "logprob": own if is_draw else logprob,
                        "is_draw": is_draw,
                        "weight": pytest.approx(np.exp(logprob), rel=1e-6),
                    }
                )
    return expected


def text_of(dataset: Dataset) -> Callable[[list[int]], list[str | None]]:
    if dataset.tokenizer_dir is None:
        return lambda ids: [None] * len(ids)
    return lambda ids: list(dataset.token_text.of_ids(np.array(ids, np.int32)))


def check_views(dataset: Dataset) -> None:
    """Both views hold what the rows say, in SQL and as streams, of all columns and of each alone."""
    text = text_of(dataset)
    for view, columns, expected in (
        ("tokens", TOKENS, tokens_of(dataset, text)),
        ("entries", ENTRIES, entries_of(dataset, text)),
    ):
        assert dataset.sql(f"from {view}").to_pylist() == expected
        stream = dataset.tokens() if view == "tokens" else dataset.entries()
        assert stream.read_all().to_pylist() == expected
        assert stream.schema.names == list(columns)
        for name in columns:
            alone = dataset.tokens([name]) if view == "tokens" else dataset.entries([name])
            assert alone.read_all()[name].to_pylist() == [row[name] for row in expected], name
        assert dataset.sql(f"select count(*) as n from {view}")["n"].to_pylist() == [len(expected)]


@pytest.fixture(scope="module", params=sorted(KINDS))
def of_a_kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> Dataset:
    """Written and read rows, several shards."""
    root = tmp_path_factory.mktemp(request.param) / "d"
    run_generate(root, corpus_file, tokenizer_dir, **KINDS[request.param])
    return run_capture(root, corpus_file, tokenizer_dir, **KINDS[request.param])


def test_every_kind_reads_as_its_rows(of_a_kind: Dataset) -> None:
    assert len(of_a_kind.manifest) > 3
    check_views(of_a_kind)


def test_the_mean_of_a_row_is_that_of_the_index(of_a_kind: Dataset) -> None:
    means = of_a_kind.sql(
        "select any_value(rows.kept_mass) as stored, avg(t.kept_mass) as mass, any_value(rows.nll) as nll, "
        "-avg(t.logprob) as mean from tokens t join rows using (id) where target group by id"
    )
    assert means.num_rows == sum(n > 0 for n in of_a_kind.index(["num_target_tokens"])["num_target_tokens"].to_pylist())
    np.testing.assert_allclose(means["mass"].to_numpy(), means["stored"].to_numpy(), rtol=1e-9)
    coded = of_a_kind.info.codec.is_coded
    np.testing.assert_allclose(means["mean"].to_numpy(), means["nll"].to_numpy(), rtol=0.02 if coded else 2**-10)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_datasets_read_as_their_rows(path: Path) -> None:
    dataset = kdata.open(path)
    check_views(dataset)
    assert dataset.sql("select count(token) as n from tokens")["n"].to_pylist() == [0], "they carry no tokenizer"


def test_imported_rows_have_numbers_that_nobody_knows(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"r{n}",
            "input_ids": [1, 2, 3],
            "topk_ids": [[], [7, 8], [9]],
            "topk_logprobs": [[], [-1.0, -2.0], [-0.5]],
        }
        for n in range(3)
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset, _ = import_dataset(source, tmp_path / "d", ImportConfig(format="plain", vocab_size=VOCAB))
    check_views(dataset)
    known = dataset.sql("select count(logprob) + count(rank) + count(entropy) + count(log_tail) as n from tokens")
    assert known["n"].to_pylist() == [0]


def empty_dataset(root: Path) -> Dataset:
    info = new_info(
        format_version="1.0",
        vocab_size=VOCAB,
        teacher=StandInTeacher().info,
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id="plain", version=1, kind="topk", parameters={"k": 1}),
        tail="ghost",
    )
    with Writer(root, info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)):
        pass
    return kdata.open(root)


def test_an_empty_dataset_has_empty_views(tmp_path: Path) -> None:
    dataset = empty_dataset(tmp_path / "d")
    check_views(dataset)
    assert dataset.sql("from tokens join rows using (id) where domain = 'a'").num_rows == 0
    assert dataset.tokens(rows=[]).read_all().num_rows == 0


# Streams of some columns and rows.


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Dataset:
    """Several shards, a score and a plan."""
    root = tmp_path_factory.mktemp("hybrid") / "d"
    dataset = run_capture(root, corpus_file, tokenizer_dir, kind="hybrid", k=3, num_draws=5)
    ids = dataset.index(["id"])["id"].to_pylist()
    score_with(dataset, {id: float(n % 7) for n, id in enumerate(ids) if n % 5})
    select(kdata.open(root), Random(name="half", share=0.5))
    return kdata.open(root)


def test_a_stream_of_some_rows_and_columns(hybrid: Dataset) -> None:
    rows = [11, 3, 3, len(hybrid) - 1]
    whole = hybrid.tokens(["global_row", "token_id"]).read_all().to_pylist()
    some = hybrid.tokens(["global_row", "token_id"], rows=rows).read_all().to_pylist()
    assert some == [token for token in whole if token["global_row"] in rows]
    assert hybrid.entries(["weight", "position"], rows=np.array(rows)).schema.names == ["weight", "position"]


def test_a_stream_refuses_what_is_not_there(hybrid: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"tokens has no column 'logprobs' \(did you mean 'logprob'\?\); it has id, "):
        hybrid.tokens(["logprobs"])
    with pytest.raises(ConfigError, match="no column of entries is named; it has id"):
        hybrid.entries([])
    with pytest.raises(OutOfRangeError, match=rf"rows must lie in \[0, {len(hybrid)}\), got -1 to 2"):
        hybrid.tokens(rows=[2, -1])


# Queries against the same queries over plain tables.


def plain_tables(dataset: Dataset) -> duckdb.DuckDBPyConnection:
    """The views as tables in memory."""
    connection = duckdb.connect()
    connection.execute("create schema scores")
    connection.execute("create schema plans")
    for name in ("rows", "tokens", "entries", "scores.ref", "plans.half"):
        table = dataset.sql(f"from {name}")
        connection.register("_table", table)
        connection.execute(f"create table {name} as from _table")
        connection.unregister("_table")
    return connection


FROMS = [
    "tokens t",
    "entries t",
    "tokens t join rows r using (id)",
    "rows r join tokens t using (id)",
    "tokens t join rows r on t.id = r.id",
    "tokens t, rows r where t.id = r.id",
    "tokens t join rows r using (id) join scores.ref s using (id)",
    "tokens t join scores.ref s on s.id = t.id join rows r on r.id = s.id",
    "tokens t join rows r using (id) join plans.half p using (id)",
    "entries t join rows r using (id) join plans.half p on p.id = r.id",
    "tokens t left join rows r on t.id = r.id and r.domain = 'code'",
    "rows r left join tokens t on t.id = r.id and t.position = 2",
    "tokens t join (select * from rows where nll > 5) r using (id)",
    "tokens t join (select * from rows order by nll limit 3) r on t.id = r.id",
    "tokens t join entries e using (id, position) join rows r using (id)",
    "tokens t join tokens u on t.id = u.id and t.position = u.position + 1 join rows r on r.id = u.id",
    "tokens t semi join plans.half p using (id)",
    "tokens t anti join plans.half p using (id)",
    "(from tokens where rank < 20) t join rows r using (id)",
    "tokens t cross join (select 3 as nll, 'code' as domain) r",
]
CONDITIONS = [
    "domain = 'code'",
    "r.domain <> 'code'",
    "t.id in ('doc-003', 'doc-004', 'doc-011')",
    "t.id = 'doc-007'",
    "t.global_row between 3 and 9",
    "global_row % 3 = 0",
    "t.position < 4",
    "t.position > 1 and t.logprob < -3",
    "not t.target",
    "t.is_draw",
    "t.logprob is null",
    "t.token = ' the'",
    "t.rank > 40 or domain = 'code'",
    "t.id = 'doc-007' or r.nll < 4",
    "r.nll > 4.5",
    "nll is not null",
    "s.nll > 3",
    "s.nll is null",
    "p.repeats = 1",
    "t.id in (select id from plans.half)",
    "t.id not in (select id from rows where domain = 'code')",
    "exists (select 1 from scores.ref x where x.id = t.id and x.nll > 2)",
    "exists (select 1 from tokens x where x.id = t.id and x.rank > 100)",
    "(select count(*) from plans.half x where x.id = t.id) = 0",
    "r.nll > (select avg(nll) from rows)",
    "length(r.text) > 20",
    "case when domain = 'code' then t.position > 2 else t.position < 2 end",
    "t.id > 'doc-010'",
    "lower(domain) like 'c%'",
    "surprise > 4",
    "d = 'code'",
    "t is not null",
    "hash(t) % 2 = 0",
    "cast(case when r.domain = 'code' then '5' else r.domain end as integer) > 3 and r.domain = 'code'",
    "r.num_tokens < 12 and not (domain = 'code' and r.nll < 5)",
    "t.entropy > r.mean_entropy",
]
SELECTED = [
    "count(*) as n, sum(hash(t.id, t.position, t.token_id)) as h",
    "t.id, count(*) as n, min(t.position) as first, -sum(t.logprob) as surprise",
    "t.id, t.position, t.token_id, t.token, -t.logprob as surprise",
    "count(distinct t.id) as d, max(t.token) as token",
    "domain as d, count(*) as n",
]


def answer(run: Callable[[], pa.Table]) -> Any:
    """The rows of an answer in one order, reals rounded; or that DuckDB refused."""
    try:
        table = run()
    except (QueryError, duckdb.Error):
        return "refused"

    def value(cell: Any) -> str:
        return f"{cell:.5g}" if isinstance(cell, float) else repr(cell)

    return sorted([value(cell) for cell in row.values()] for row in table.to_pylist())


@pytest.fixture(scope="module")
def plain(hybrid: Dataset) -> duckdb.DuckDBPyConnection:
    return plain_tables(hybrid)


def query_of(source: str, conditions: list[str], selected: str) -> str:
    grouped = " group by all" if "count(" in selected else ""
    where = "".join(f" and ({c})" for c in conditions)
    where = where if " where " in source.split("(")[0] else f" where true{where}"
    return f"select {selected} from {source}{where}{grouped}"


@settings(max_examples=60)
@given(
    source=st.sampled_from(FROMS),
    conditions=st.lists(st.sampled_from(CONDITIONS), max_size=3),
    selected=st.sampled_from(SELECTED),
)
def test_queries_answer_as_over_plain_tables(
    hybrid: Dataset, plain: duckdb.DuckDBPyConnection, source: str, conditions: list[str], selected: str
) -> None:
    query = query_of(source, conditions, selected)
    expected = answer(lambda: plain.sql(query).to_arrow_table())
    assert answer(lambda: hybrid.sql(query)) == expected, query


@pytest.mark.slow
@pytest.mark.parametrize("source", FROMS)
def test_every_condition_on_every_from(hybrid: Dataset, plain: duckdb.DuckDBPyConnection, source: str) -> None:
    for condition in CONDITIONS:
        query = query_of(source, [condition], SELECTED[0])
        assert answer(lambda q=query: hybrid.sql(q)) == answer(lambda q=query: plain.sql(q).to_arrow_table()), query


# Rows that a CTE, a subquery of the FROM, or a semi join chooses.


WITHS = [
    "chosen as (select id, domain, nll from rows where domain = 'code')",
    "chosen as (from rows where nll > 5)",
    "chosen as materialized (select distinct id, domain from rows where nll < 6 order by id)",
    "chosen(id, domain) as (select id, 'code' from scores.ref where nll > 2)",
    "chosen(domain, id) as (select id, domain from rows)",
    "chosen as (select id, domain, nll from rows order by nll, id limit 3)",
    "chosen as (select id, nll from rows where domain = 'code' union select id, nll from scores.ref where nll < 2)",
    "chosen as (select id from rows except select id from plans.half)",
    "first as (from plans.half), chosen as (select id, domain from rows where id in (select id from first))",
    "chosen as (select null as id, 'code' as domain union all select id, domain from rows where nll > 4)",
    "chosen as (select case when nll > 4 then id end as id, nll from rows)",
    "chosen as (select upper(id) as id, domain from rows)",
    "chosen as (select id, domain from rows where nll > 100)",
    "chosen as (from (values ('doc-003', 'code'), ('doc-009', 'prose')) v(id, domain))",
    "chosen(id) as (values ('doc-003'), ('doc-003'), ('doc-009'))",
    "chosen as (select id, count(*) as n from rows join scores.ref using (id) group by all having count(*) > 0)",
    "chosen as (select id, count(*) as n from tokens where rank > 30 group by id)",
    "recursive chosen(id, n) as (select 'doc-003', 1 union all select id, n + 1 from chosen where n < 3)",
    "chosen as (with chosen as (select id from rows where domain = 'code') from chosen)",
    "chosen as (with inner_one as (select id from rows where domain = 'code') from inner_one)",
    "rows as (select id, nll from scores.ref where nll > 3), chosen as (from rows)",
    "tokens as (select id, 0 as position, 1 as token_id, 1.0 as logprob from rows), chosen as (from plans.half)",
    "t as (select id from rows where domain = 'code'), chosen as (select id from t)",
]
CHOSEN = [
    "tokens t join chosen using (id)",
    "tokens t join chosen c using (id)",
    "chosen c join tokens t using (id)",
    "entries t join chosen c on c.id = t.id",
    "tokens t join chosen c on lower(c.id) = t.id",
    "tokens t, chosen c where t.id = c.id",
    "tokens t join chosen as c(x) on c.x = t.id",
    "tokens t join rows r using (id) join chosen c using (id)",
    "tokens t join rows r using (id) semi join chosen using (id)",
    "tokens t semi join chosen using (id)",
    "entries t semi join chosen c on c.id = t.id",
    "tokens t semi join chosen c on c.id = t.id and t.position > 2",
    "tokens t semi join chosen c on id is not null and c.id = t.id",
    "tokens t anti join chosen using (id)",
    "tokens t anti join chosen c on c.id = t.id and t.position > 2",
    "tokens t anti join (from chosen where id > 'doc-005') c on c.id = t.id",
    "tokens t left join chosen c using (id)",
    "tokens t right join chosen c using (id)",
    "chosen c left join tokens t using (id)",
    "tokens t full join chosen c using (id)",
    "chosen c semi join tokens t using (id)",
    "tokens t semi join (rows r join chosen c using (id)) on r.id = t.id",
    "tokens t semi join (select id from chosen) using (id)",
    "tokens t where t.id in (from (select id from chosen))",
    "tokens t where t.id not in (select id from chosen)",
    "tokens t where t.id not in (select id from chosen where id is not null)",
    "tokens t where t.id in (select id from chosen) or t.position = 1",
    "tokens t where exists (from chosen c where c.id = t.id)",
    "tokens t where exists (from chosen c where c.id = t.id and t.position > 3)",
    "tokens t where not exists (from chosen c where c.id = t.id)",
    "tokens t where t.id = any (select id from chosen)",
    "tokens t where exists (with own as (from rows r where r.id = t.id and r.domain = 'code') from own)",
    "tokens t where exists (with own as (from rows r where r.id = t.id) from chosen t join own using (id))",
    "tokens t join (select id, domain from rows where domain = 'code') using (id)",
    "tokens t join (select id, domain from rows where nll < 5) on true where t.id = unnamed_subquery.id",
    "tokens t join (select id from rows) using (id) join (select id as i from rows where nll < 5) u on u.i = t.id",
    "tokens t join (from rows r where r.id = t.id and r.domain = 'code') c on c.id = t.id",
    "tokens t join (from rows r where hash(t) % 2 = 0) c on c.id = t.id",
    "tokens t join (select t.*, nll from rows where domain = 'code') c on c.id = t.id",
    "tokens t join (select id from rows r where r.num_tokens > t.rank) c on c.id = t.id",
    "tokens chosen join rows r using (id)",
    "chosen t join tokens u on u.id = t.id",
    "tokens t semi join rows r on r.id = t.id and r.domain = 'code'",
    "tokens t semi join rows t on true",
    "entries t semi join (select global_row from tokens where position = 3 and rank < 9) using (global_row)",
    "(select id, position, token_id, logprob from tokens join chosen using (id)) t",
    # A name alone means something in a part of the FROM, and would mean another thing in the whole.
    "tokens t join scores.ref s on s.id = t.id and kept_mass < 0.5 join rows r on r.id = t.id",
    "tokens t join (select id, domain from rows order by id limit 9) v on v.id = t.id and domain = 'code' "
    "join (select id, 'prose' as domain from rows) r on r.id = t.id",
    "tokens t semi join scores.ref s on s.id = t.id and position > 2 join (select id, 0 as position from rows) v "
    "on v.id = t.id",
    "(rows r semi join chosen p using (id)) join tokens t on t.position = r.num_tokens - 1",
    "(rows r semi join chosen p on p.id = r.id) join tokens t on t.position = r.num_tokens - 1",
    "(select id as id from rows where false union all select upper(id) collate nocase from rows limit 99) u "
    "join tokens t using (id) join chosen c using (id)",
    "rows r join ((select id, domain from rows order by id limit 9) u join (select id from rows where domain = 'code') v "
    "on u.id = v.id) on r.id = v.id join tokens t on t.id = v.id",
]
AND = [
    "t.position < 9",
    "t.id > 'doc-006'",
    "id < 'doc-013'",
    "c.domain = 'code'",
    "domain = 'code'",
    "nll > 3",
    "t.rank > 2",
]


def with_query(common: str, sources: list[str], conditions: list[str], selected: str, union: str) -> str:
    return f"with {common} " + f" {union} ".join(query_of(source, conditions, selected) for source in sources)


@settings(max_examples=80)
@given(
    common=st.sampled_from(WITHS),
    sources=st.lists(st.sampled_from(CHOSEN), min_size=1, max_size=2),
    conditions=st.lists(st.sampled_from(AND), max_size=2),
    selected=st.sampled_from([SELECTED[0], "t.id, t.position", "count(*) as n"]),
    union=st.sampled_from(["union all", "union", "except"]),
)
def test_chosen_rows_answer_as_over_plain_tables(
    hybrid: Dataset,
    plain: duckdb.DuckDBPyConnection,
    common: str,
    sources: list[str],
    conditions: list[str],
    selected: str,
    union: str,
) -> None:
    query = with_query(common, sources, conditions, selected, union)
    expected = answer(lambda: plain.sql(query).to_arrow_table())
    assert answer(lambda: hybrid.sql(query)) == expected, query


@pytest.mark.slow
@pytest.mark.parametrize("common", WITHS)
def test_every_choice_of_rows(hybrid: Dataset, plain: duckdb.DuckDBPyConnection, common: str) -> None:
    answers = []
    for source in CHOSEN:
        query = with_query(common, [source], [], SELECTED[0], "union all")
        answers.append(answer(lambda q=query: hybrid.sql(q)))
        assert answers[-1] == answer(lambda q=query: plain.sql(q).to_arrow_table()), query
    assert len([a for a in answers if a != "refused"]) > len(CHOSEN) / 2


# Only what a query needs is read.


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """72 rows in two shards of two record batches each; the first batch of each is of domain a. A score and a plan."""
    rows = [Row(f"r{n:02}", "a" if n % 36 < 32 else "b", 3 + n % 4, 1.0 + n % 36) for n in range(72)]
    dataset = dataset_of(tmp_path_factory.mktemp("sharded") / "d", rows, shard_rows=36)
    score_with(dataset, {row.id: float(n) for n, row in enumerate(rows)})
    select(dataset, Sql(name="last", sql="select id from rows where id >= 'r70'"))
    return kdata.open(dataset.path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The columns of each record batch that is decompressed for the views."""
    seen: list[tuple[str, ...]] = []

    read = PayloadReader.batch

    def counted(reader: PayloadReader, number: int) -> pa.RecordBatch:
        batch = read(reader, number)
        if batch.schema.names != ["id", "input_ids"]:  # those are read when a shard is opened
            seen.append(tuple(batch.schema.names))
        return batch

    monkeypatch.setattr(PayloadReader, "batch", counted)
    return seen


@pytest.mark.parametrize(
    ("query", "batches"),
    [
        ("select max(token_id) from tokens", 4),
        ("select count(*) from tokens", 0),
        ("select max(position), min(id), max(global_row) from tokens where global_row > 3", 0),
        ("select max(t.token_id) from tokens t join rows using (id) where domain = 'b'", 2),
        ("select max(t.token_id) from rows join tokens t using (id) where rows.domain = 'b'", 2),
        ("select max(t.token_id) from tokens t, rows r where t.id = r.id and r.domain = 'b' and t.position > 1", 2),
        ("select max(t.token_id) from tokens t join rows r on r.id = t.id and r.domain = 'b'", 2),
        ("select max(token_id) from tokens where id = 'r05'", 1),
        ("select max(token_id) from tokens t where t.id in ('r05', 'r40')", 2),
        ("select max(token_id) from tokens where global_row >= 70", 1),
        ("select max(token_id) from tokens join plans.last using (id)", 1),
        ("select max(token_id) from tokens where id in (select id from plans.last)", 1),
        ("select max(token_id) from tokens where id in (select id from rows where domain = 'b')", 2),
        ("select max(token_id) from tokens join scores.ref s using (id) where s.nll < 10", 1),
        ("select max(token_id) from tokens t join rows using (id) join scores.ref s using (id) where s.nll + 1 > 71", 1),
        ("select sum(weight) from entries join rows using (id) where domain = 'b'", 2),
        ("select max(weight + rank) from entries e join tokens t using (id, position) where e.id = 'r05' and t.id = e.id", 2),
        ("with b as (select max(token_id) as m from tokens where id = 'r05') select m from b", 1),
        ("select (select max(token_id) from tokens where id = 'r05') + (select max(rank) from tokens where id = 'r06')", 2),
        # CTEs, subqueries in FROM, semi and anti joins.
        ("with c as (select id from rows where domain = 'b') select max(token_id) from tokens join c using (id)", 2),
        ("with c(i) as (from plans.last), d as (select i from c) select max(token_id) from tokens t join d on d.i = t.id", 1),
        ("with c as (from scores.ref where nll < 10) select sum(weight) from entries where id in (select id from c)", 1),
        ("with c as materialized (select distinct id from rows where domain = 'b' union from (values ('r70')) order by 1) "
         "select max(token_id) from c join tokens using (id)", 2),
        ("select max(token_id) from (with c as (from rows where domain = 'b') from tokens join c using (id))", 2),
        ("with c as (from plans.last) select max(a.token_id) from tokens a join c using (id) join rows using (id)", 1),
        ("with c as (from plans.last), t as (select token_id from tokens join c using (id)) select max(token_id) from t", 1),
        ("select max(token_id) from tokens join (select id from rows where domain = 'b') using (id)", 2),
        ("select max(token_id) from tokens t, (select * from scores.ref where nll < 10) s where s.id = t.id", 1),
        ("select max(token_id) from tokens t join rows r on r.id = t.id and r.domain = 'b' join scores.ref s on s.id = t.id",
         2),
        ("select max(token_id) from tokens t semi join plans.last using (id)", 1),
        ("select max(token_id) from tokens t semi join scores.ref s on s.id = t.id and s.nll < 10", 1),
        ("select max(token_id) from tokens t join rows using (id) semi join (from rows where domain = 'b') using (id)", 2),
        ("select max(token_id) from tokens t where exists (from rows r where r.id = t.id and r.domain = 'b')", 2),
        ("select max(token_id) from tokens t anti join (from rows where domain = 'a') r using (id)", 2),
        ("select max(token_id) from tokens where id not in (select id from rows where domain = 'a')", 2),
        # What could not be safe reads everything.
        ("with c as (from rows order by nll limit 1) select max(token_id) from tokens join c using (id)", 4),
        ("with c as (from rows where random() < 2) select max(token_id) from tokens join c using (id)", 4),
        ("with rows as (from plans.last) select max(token_id) from tokens join rows using (id)", 4),
        ("select max(token_id) from tokens t anti join plans.last p on p.id = t.id and t.position > 1", 4),
        ("select max(token_id) from tokens t semi join rows r on r.id = t.id and r.num_tokens > t.position + 3", 4),
        ("with c as (from plans.last) select max(token_id) from tokens left join c using (id)", 4),
        ("select max(token_id) from tokens t join rows r on r.id = t.id and domain = 'b' join scores.ref s on s.id = t.id",
         4),
        ("select max(token_id) from tokens left join rows using (id) where domain = 'b'", 4),
        ("select max(token_id) from tokens t join rows using (id) where domain = 'b' or t.position = 1", 4),
        ("select max(token_id) from tokens t join (from rows order by nll limit 1) r using (id)", 4),
        ("select max(token_id) from tokens using sample 5 rows", 4),
        ("select max(token_id) from tokens where token_id >= 0 and random() < 2", 4),
        ("select max(a.token_id + b.token_id) from tokens a, tokens b where a.id = 'r05'", 8),
        ("with tokens as (select 1 as token_id, 'r05' as id) select max(token_id) from tokens where id = 'r05'", 0),
    ],
)  # fmt: skip
def test_record_batches_without_a_wanted_row_are_not_read(
    sharded: Dataset, reads: list[tuple[str, ...]], query: str, batches: int
) -> None:
    assert sharded.sql(query).num_rows == 1
    assert len(reads) == batches


def test_parameters_choose_rows_too(sharded: Dataset, reads: list[tuple[str, ...]]) -> None:
    query = "select max(token_id) as m from tokens t join rows r using (id) where t.position > {} and r.id = {}"
    assert sharded.sql(query.format("?", "?"), [1, "r05"])["m"].to_pylist() == [3]
    assert sharded.sql(query.format("$least", "$id"), {"least": 1, "id": "r05"})["m"].to_pylist() == [3]
    assert len(reads) == 2
    query = "with c as (select id from rows where id = $id) select max(token_id) as m from tokens t join c using (id)"
    assert sharded.sql(query, {"id": "r05"})["m"].to_pylist() == [3]
    assert sharded.sql(query.replace("$id", "?"), ["r05"])["m"].to_pylist() == [3]
    assert len(reads) == 4


@pytest.mark.parametrize(
    ("query", "columns"),
    [
        ("select avg(logprob) from tokens", {"logprob"}),
        ("select count(*) from tokens where target", {"target_mask"}),
        ("select max(rank) from tokens where position > 2 and id <> 'x'", {"rank"}),
        ("select max(num_exact) from tokens", {"num_exact", "num_drawn"}),
        ("select count(*), max(position), max(is_draw) from entries", {"num_exact", "num_drawn"}),
        ("select max(t.logprob) from tokens t where t.entropy is null", {"logprob", "entropy"}),
        ("select sum(kept_mass) from tokens",
         {"num_exact", "num_drawn", "log_tail", "entry_ids", "entry_logprobs"}),
    ],
)  # fmt: skip
def test_only_the_columns_of_a_query_are_read(
    sharded: Dataset, reads: list[tuple[str, ...]], query: str, columns: set[str]
) -> None:
    sharded.sql(query)
    assert len(reads) == 4 and {name for names in reads for name in names} == columns


def test_draws_are_not_read_for_the_mass_of_exact_entries(hybrid: Dataset, reads: list[tuple[str, ...]]) -> None:
    assert hybrid.sql("select avg(kept_mass) as m from tokens")["m"][0].as_py() > 0
    assert not [name for name in reads[0] if name.startswith("draw_")]


def test_a_query_that_stops_early_reads_no_further_shard(sharded: Dataset, reads: list[tuple[str, ...]]) -> None:
    assert sharded.sql("select token_id from tokens limit 3").num_rows == 3
    assert len(reads) <= 2


def test_a_condition_that_only_some_rows_can_answer_is_not_an_error(sharded: Dataset) -> None:
    """The row query would evaluate the cast for every row; the query itself does so for some."""
    query = (
        "select count(*) as n from tokens t join rows r using (id) where t.id = 'r05' and "
        "case when t.position = 0 then true else cast(t.id as integer) > 0 end and t.position = 0"
    )
    assert sharded.sql(query)["n"].to_pylist() == [1]


@pytest.mark.parametrize("source", ["tokens join rows using (id)", "rows join tokens using (id)"])
def test_a_join_streams_tokens_past_a_table_of_rows(sharded: Dataset, source: str) -> None:
    """The second side of a hash join is held in memory. DuckDB chooses it by the lengths that it expects."""
    with connect(sharded, None) as connection, token_views(connection, sharded, None, ""):
        plan = connection.sql(f"explain (format json) select domain, max(rank) from {source} group by 1").fetchall()
    [join] = [node for node in nodes(json.loads(plan[0][1])) if "HASH_JOIN" in str(node.get("name"))]
    streamed, held = (json.dumps(side) for side in join["children"])
    assert "ARROW" in streamed and "PARQUET" in held


# Plans.


def test_a_plan_is_made_of_tokens_and_recorded(hybrid: Dataset, tmp_path: Path) -> None:
    root = Path(shutil.copytree(hybrid.path, tmp_path / "d"))
    query = (
        "select id from tokens join rows using (id) where domain = 'code' and target "
        "group by id order by avg(entropy) desc, id limit 4"
    )
    plan = select(kdata.open(root), Sql(name="unsure", sql=query))
    assert plan.ids == hybrid.sql(query)["id"].to_pylist() and plan.info.sql == query
    inner = "select id from entries where is_draw group by id having max(weight) > 0.1 order by id"
    child = select(
        kdata.open(root), Sql(name="child", parent="unsure", sql=f"select id from rows where id in ({inner})")
    )
    assert set(child.ids) == set(plan.ids) & set(hybrid.sql(inner)["id"].to_pylist())
    with pytest.raises(DataError, match="plan 'none' selects no row; loosen the query's condition"):
        select(kdata.open(root), Sql(name="none", sql="select id from tokens where logprob > 1"))


# What goes wrong.


def test_an_unknown_column_gives_the_nearest(hybrid: Dataset) -> None:
    with pytest.raises(QueryError, match=r'"logprobs" not found[\s\S]*Candidate bindings: [^\n]*"logprob"'):
        hybrid.sql("select logprobs from tokens")


def test_a_query_that_keeps_nothing_has_no_rows(hybrid: Dataset) -> None:
    assert hybrid.sql("from tokens join rows using (id) where domain = 'nothing'").num_rows == 0
    assert hybrid.sql("select token from tokens where logprob > 1").num_rows == 0
    assert hybrid.sql("from entries where id = 'nothing'").schema.names == list(ENTRIES)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("check", ["first", "later"])
@pytest.mark.parametrize("folder", ["data", "index"])
def test_a_damaged_file_is_one_error_of_kdata(copied: Path, folder: str, check: Any) -> None:
    damaged = sorted((copied / folder).iterdir())[-1]
    flip(damaged, 100)
    opened = kdata.open(copied, check=check)
    for query in ("select sum(logprob) from tokens", "select sum(weight) from entries", "from tokens order by logprob"):
        with pytest.raises(CorruptError, match=rf"{damaged.name} is damaged: its SHA-256"):
            opened.sql(query)
    with pytest.raises(CorruptError, match=damaged.name), opened.sql_stream("from entries") as batches:
        batches.read_all()
    with pytest.raises(CorruptError, match=damaged.name):
        opened.tokens(["rank"]).read_all()
    with pytest.raises(CorruptError, match=damaged.name):
        select(opened, Sql(sql="select id from tokens group by id having count(token_id) > 1"))


def test_a_damaged_shard_that_a_query_does_not_need_is_not_read(copied: Path) -> None:
    last = sorted((copied / "data").iterdir())[-1]
    flip(last, 100)
    opened = kdata.open(copied)
    first = opened.manifest[0].name
    query = f"select count(token_id) as n from tokens join rows using (id) where shard = '{first}'"
    assert opened.sql(query)["n"].to_pylist() == [opened.manifest[0].tokens]


def rewritten(root: Path, change: Callable[[pa.Table], pa.Table]) -> Dataset:
    """A dataset whose first payload holds something else, with a digest that fits."""
    lines = [json.loads(line) for line in (root / "manifest.jsonl").read_bytes().splitlines()]
    path = root / f"data/{lines[0]['name']}.arrow"
    with pa.ipc.open_file(path) as file:
        table, footer = file.read_all(), file.metadata
    changed = change(table)
    with pa.ipc.new_file(path, table.schema, metadata=footer) as writer:
        writer.write_table(changed.cast(table.schema))
    lines[0]["files"][f"data/{path.name}"] = file_info(path).model_dump()
    lines[0]["digest"] = digest_of(lines[0])
    (root / "manifest.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    return kdata.open(root)


def with_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        return table.set_column(place, table.schema.field(name), values)

    return changed


@pytest.mark.parametrize(
    ("column", "change", "query"),
    [
        ("logprob_codes", lambda rows: [rows[0][:-1], *rows[1:]], "select sum(logprob) from tokens"),
        ("rank_codes", lambda rows: [[*rows[0], 1], *rows[1:]], "select sum(rank) from tokens"),
        ("target_mask", lambda rows: rows[1:] + rows[:1], "select count(*) from tokens where target"),
        ("num_exact_codes", lambda rows: [[v + 1 for v in row] for row in rows], "select sum(weight) from entries"),
        ("num_exact_codes", lambda rows: [[v + 1 for v in row] for row in rows], "select avg(kept_mass) from tokens"),
        ("exact_codes", lambda rows: [[255] * len(row) for row in rows], "select max(token_id) from entries"),
        ("tail_codes", lambda rows: [[254] * len(row) for row in rows], "select max(weight) from entries"),
    ],
)
def test_columns_that_do_not_fit_together_are_one_error(
    copied: Path, column: str, change: Callable[[list[Any]], list[Any]], query: str
) -> None:
    dataset = rewritten(copied, with_column(column, change))
    with pytest.raises(CorruptError, match=rf"{dataset.manifest[0].name}\.arrow is damaged"):
        dataset.sql(query)


# Memory.


READ = """
import re, sys
from pathlib import Path
import kdata
data = kdata.open(sys.argv[1])
data.sql("select sum(weight), count(*) from entries e join rows using (id)")
data.sql("select domain, avg(logprob), max(token_id) from tokens join rows using (id) group by 1")
with data.sql_stream("from entries", values="text") as batches:
    assert sum(batch.num_rows for batch in batches) > 0
for batch in data.tokens():
    pass
# Not ru_maxrss: a child begins with what its parent had.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    """Four times the tokens: 5 million, 20 million entries, which would take 700 MB as one table."""
    peaks = []
    for tokens in (1_250_000, 5_000_000):
        root = build_dataset(tmp_path / str(tokens), tokens, 1000, k=4).path
        answer = subprocess.run([sys.executable, "-c", READ, str(root)], capture_output=True, text=True, check=True)
        peaks.append(float(answer.stdout))
    assert peaks[1] < peaks[0] + 100 and peaks[1] < 1000, peaks


# Polars.


def test_polars_frames_hold_what_sql_holds(hybrid: Dataset) -> None:
    for name in ("tokens", "entries"):
        frame = hybrid.to_polars(name)  # type: ignore[arg-type]
        assert frame.collect().to_dicts() == hybrid.sql(f"from {name}").to_pylist()
        assert frame.collect_schema() == frame.collect().schema
    with pytest.raises(ConfigError, match=r"table is 'token'.*one of 'rows', 'tokens', 'entries'"):
        hybrid.to_polars("token")  # type: ignore[arg-type]


def test_polars_asks_for_columns_and_rows(sharded: Dataset, reads: list[tuple[str, ...]]) -> None:
    import polars as pl

    frame = sharded.to_polars("tokens")
    assert frame.filter(pl.col("id") == "r05", pl.col("position") > 0).select("rank").collect()["rank"].to_list() == [
        1, 1, 1,
    ]  # fmt: skip
    assert reads == [("rank",)]
    reads.clear()
    assert frame.select("token_id").head(3).collect()["token_id"].to_list() == [0, 1, 2]
    assert len(reads) <= 2
    reads.clear()
    assert frame.filter(pl.col("global_row").is_in([3, 71]) | (pl.col("position") == 5)).collect().height > 10
    assert len(reads) == 4


def test_polars_sorts_and_cuts(hybrid: Dataset) -> None:
    """Here Polars adds a part of its own to the filter."""
    import polars as pl

    query = "select id, position, rank from tokens where rank > 3 order by rank desc, id, position limit 4"
    frame = hybrid.to_polars("tokens").filter(pl.col("rank") > 3).select("id", "position", "rank")
    for engine in ("in-memory", "streaming"):
        top = frame.sort("rank", "id", "position", descending=[True, False, False]).head(4).collect(engine=engine)  # type: ignore[call-overload]
        assert top.to_dicts() == hybrid.sql(query).to_pylist()


# The page about tokens.


PAGE = Path(kdata.__file__).parent / "store/README.md"


@pytest.mark.parametrize(
    "ask",
    [
        lambda frame, pl: frame.head(100).filter(pl.col("global_row") > 0),
        lambda frame, pl: frame.slice(0, 40).filter(pl.col("position") == 0),
        lambda frame, pl: frame.filter(pl.col("position") == 0).head(3),
        lambda frame, pl: frame.filter(pl.col("log_tail") > float("-inf")),
        lambda frame, pl: frame.filter((pl.col("global_row") == 1) & (pl.col("logprob") < float("inf"))),
        lambda frame, pl: frame.head(60).filter(pl.col("id") == "no such row"),
    ],
)
def test_polars_answers_as_over_a_frame_in_memory(hybrid: Dataset, ask: Callable[[Any, Any], Any]) -> None:
    pl = pytest.importorskip("polars")
    lazy, whole = hybrid.to_polars("tokens"), hybrid.to_polars("tokens").collect()
    assert ask(lazy, pl).collect().rows() == ask(whole, pl).rows()


def test_a_name_that_using_merges_is_not_that_of_another_table(hybrid: Dataset) -> None:
    shouted = "(select upper(id) collate nocase as id from rows)"
    query = f"select count(*) as n from {shouted} v join tokens using (id) where id like '{hybrid[0].id.upper()}'"
    assert hybrid.sql(query)["n"].to_pylist() == [len(hybrid[0])]


@pytest.mark.parametrize("rows", [[True, False], [1.7], slice(0, 3), [[1]], "12"])
def test_rows_of_a_stream_are_numbers(hybrid: Dataset, rows: Any) -> None:
    with pytest.raises(
        (ShapeError, ConfigError), match=r"global row numbers|rows.* takes a list \(a whole number each\)"
    ):
        list(hybrid.tokens(rows=rows))


def test_parameters_may_be_a_tuple(hybrid: Dataset) -> None:
    query = "select count(*) as n from tokens join rows using (id) where id = ?"
    assert hybrid.sql(query, (hybrid[1].id,))["n"].to_pylist() == [len(hybrid[1])]  # type: ignore[arg-type]


def test_an_unknown_view_gives_the_nearest(hybrid: Dataset) -> None:
    with pytest.raises(QueryError, match=r"token does not exist.*did you mean 'tokens'") as caught:
        hybrid.sql("select * from token")
    assert "pg_" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("select t.logprobs from tokens t join rows using (id)", "logprob"),
        ("select logprobs from tokens join rows using (id)", "logprob"),
        ("select r.domian from tokens t join rows r on t.id = r.id", "domain"),
        ("select max(rank) from tokens join entries using (id, positon)", "position"),
        ("select max(nll) from rows join plans.half using (idd)", "id"),
        ("select max(nll) from rows join scores.ref using (iid)", "id"),
        ("select t.id from tokens t join rows r on t.id = r.idd", "id"),
    ],
)
def test_a_column_that_a_join_lacks_is_answered_with_the_nearest(hybrid: Dataset, query: str, name: str) -> None:
    with pytest.raises(QueryError, match=rf"(Candidate bindings: [^\n]*\"{name}\"|did you mean '{name}'\?)"):
        hybrid.sql(query)


def test_a_column_of_rows_is_said_to_be_one(hybrid: Dataset) -> None:
    with pytest.raises(QueryError, match="domain is a column of rows: write `tokens join rows using"):
        hybrid.sql("select domain from tokens")


def test_damage_behind_the_first_batch_is_an_error_of_kdata_inside_the_block(copied: Path) -> None:
    opened = kdata.open(copied)
    flip(opened.shard_file(opened.manifest[-1], "data"), 100)
    with opened.sql_stream("from tokens") as batches, pytest.raises(CorruptError, match="SHA-256"):
        for _ in batches:
            pass


@pytest.fixture(scope="module")
def judged(hybrid: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """With a second score, and one of tokens."""
    root = Path(shutil.copytree(hybrid.path, tmp_path_factory.mktemp("judged") / "d"))
    score_with(kdata.open(root), dict.fromkeys(hybrid.index(["id"])["id"].to_pylist(), 1.0), "judge")
    score_tokens_with(kdata.open(root), "student")
    return kdata.open(root)


@pytest.mark.parametrize("query", re.findall(r"```sql\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
def test_the_queries_of_the_page_have_an_answer(judged: Dataset, query: str) -> None:
    answer = judged.sql(query)
    assert answer.num_rows > 0
    assert all(answer[name].null_count < answer.num_rows for name in answer.column_names)


def query_below(heading: str) -> str:
    """The first query of a section of the page."""
    found = re.search(rf"## {re.escape(heading)}\n.*?```sql\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_distinct_n_grams_are_those_counted_one_by_one(corpus_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    written = run_generate(tmp_path / "d", corpus_file, tokenizer_dir)
    grams: dict[str, tuple[list[Any], list[Any]]] = {}
    for row, domain in enumerate(written.index(["domain"])["domain"].to_pylist()):
        ids = written[row].token_ids[np.flatnonzero(written[row].target_mask)].tolist()
        ones, twos = grams.setdefault(domain, ([], []))
        ones += ids
        twos += itertools.pairwise(ids)
    answer = written.sql(query_below("How varied is what the teacher wrote?")).to_pylist()
    assert len(answer) == len(grams) > 1
    for line in answer:
        ones, twos = grams[line["domain"]]
        assert line["tokens"] == len(ones)
        assert line["distinct_1"] == len(set(ones)) / len(ones) < 1
        assert line["distinct_2"] == len(set(twos)) / len(twos)


def test_rows_unusual_for_a_student_are_the_last_twentieth_of_their_domain(judged: Dataset) -> None:
    index = judged.index(["id", "domain", "nll"]).to_pandas()
    score = judged.sql("select id, nll as student from scores.student").to_pandas()
    table = index.merge(score, on="id")
    gap = table["student"] - table["nll"]
    limit = gap.groupby(table["domain"]).transform(lambda values: np.quantile(values, 0.95))
    expected = table[gap >= limit - 1e-12].assign(gap=gap)
    answer = judged.sql(query_below("Which rows are unusual for a student?")).to_pandas()
    assert 0 < len(answer) < len(table) / 5 and set(answer["id"]) == set(expected["id"])
    assert answer["gap"].is_monotonic_decreasing and answer["gap"].max() == pytest.approx(gap.max())

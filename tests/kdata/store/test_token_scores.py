"""Scores with a number for each token: how they are stored, and what they are in SQL, in Polars and as a stream."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.check.repair import repair
from kdata.check.verify import outdated, verify
from kdata.errors import ConfigError, CorruptError, KdataError, MissingError, QueryError, TeacherError
from kdata.selection.position_rules import SqlPositions
from kdata.selection.query import Sql
from kdata.selection.ranked import All
from kdata.selection.select import select
from kdata.selection.sidecar import TOKEN_SCORE_SCHEMA, score_digest, write_part
from kdata.share.arrange import head
from kdata.share.push import push
from kdata.store import token_table
from kdata.store.dataset import Dataset
from kdata.store.payload import PayloadReader
from kdata.store.sql import mentions
from kdata.store.token_scores import TokenScore, stored_nll
from tests.fakes import digests, run_capture, run_generate, write_jsonl
from tests.kdata.selection.plans import score_tokens_with, score_with
from tests.kdata.store.test_url_dataset import Files

Numbers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> tuple[Path, Numbers, Numbers]:
    """Written and read rows, so that some tokens are no targets; scores `student` and `Ref`, and `judge` of rows."""
    root = tmp_path_factory.mktemp("scored") / "d"
    run_generate(root, corpus_file, tokenizer_dir)
    dataset = run_capture(root, corpus_file, tokenizer_dir)
    numbers = score_tokens_with(dataset, "student"), score_tokens_with(dataset, "Ref", seed=1)
    score_with(dataset, {row.id: 1.0 for row in dataset}, "judge")
    return root, *numbers


@pytest.fixture
def scored(home: tuple[Path, Numbers, Numbers]) -> Dataset:
    """Read only; a test that changes it takes `changed`."""
    return kdata.open(home[0])


@pytest.fixture
def changed(home: tuple[Path, Numbers, Numbers], tmp_path: Path) -> Dataset:
    return kdata.open(Path(shutil.copytree(home[0], tmp_path / "d")))


def off_by(value: float) -> float:
    """Most that a stored value may be off."""
    return max(abs(value) * 2**-11, 2**-25)


# What is stored.


@given(st.lists(st.floats(0, 65504, width=32), max_size=40))
def test_a_stored_number_is_off_by_what_the_format_says(values: list[float]) -> None:
    logprobs = np.array([np.nan, *(-value for value in values)], np.float32)
    stored = stored_nll(logprobs)
    assert stored.dtype == np.float16 and np.isnan(stored[0])
    for value, half in zip(values, stored[1:].astype(np.float64).tolist(), strict=True):
        assert abs(half - value) <= off_by(value)


def test_the_stated_error_is_reached() -> None:
    values = np.array([1 + 2**-11, 2**-14 + 2**-25, 3 * 2**-25])
    error = np.abs(stored_nll(np.array([0, *-values], np.float32))[1:] - values)
    assert error.tolist() == [2**-11, 2**-25, 2**-25]


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf, -70_000.0])
def test_a_number_that_cannot_be_stored_is_refused(bad: float) -> None:
    with pytest.raises(TeacherError, match=r"at position 2 the log-probability .*not finite or below -65,504 nats"):
        stored_nll(np.array([np.nan, -1.0, bad], np.float32))


def test_a_token_takes_less_than_two_bytes(tmp_path: Path, changed: Dataset) -> None:
    """Of 200,000 numbers; those of a real model have no more entropy than these."""
    nll = np.random.default_rng(0).gamma(0.4, 4, (2000, 100)).astype(np.float32)
    lists = [stored_nll(-row) for row in nll]
    table = pa.table({"id": [str(n) for n in range(2000)], "nll": [1.0] * 2000, "num_target_tokens": [99] * 2000,
                      "token_nll": lists}, schema=TOKEN_SCORE_SCHEMA)  # fmt: skip
    write_part(changed, "student", changed.manifest[0], table)
    group = pq.read_metadata(changed.path / f"scores/student/{changed.manifest[0].name}.parquet").row_group(0)
    assert 1.5 < group.column(3).total_compressed_size / 200_000 < 1.9


def test_a_part_is_parquet_that_others_read(scored: Dataset, home: tuple[Path, Numbers, Numbers]) -> None:
    import polars as pl

    frame = pl.concat([pl.read_parquet(path) for path in sorted(scored.path.glob("scores/student/*.parquet"))])
    lists = scored.sql("select id, token_nll from scores.student")
    assert dict(zip(frame["id"].to_list(), frame["token_nll"].list.len().to_list(), strict=True)) == {
        row_id: len(nll) for row_id, nll in home[1].items()
    }
    assert str(lists["token_nll"].type) == "list<l: float>"


# SQL.


def expected(dataset: Dataset, numbers: Numbers) -> dict[tuple[str, int], float | None]:
    """The stored NLL by id and position."""
    return {
        (row.id, position): None if position == 0 else float(np.float16(np.float32(numbers[row.id][position])))
        for row in dataset
        for position in range(len(row))
    }


def by_token(table: pa.Table, column: str) -> dict[tuple[str, int], float | None]:
    keys = zip(table["id"].to_pylist(), table["position"].to_pylist(), strict=True)
    return dict(zip(keys, table[column].to_pylist(), strict=True))


def test_a_score_is_a_column_of_tokens(scored: Dataset, home: tuple[Path, Numbers, Numbers]) -> None:
    table = scored.sql("select id, position, nll_student, NLL_REF as ref from tokens")
    assert by_token(table, "nll_student") == expected(scored, home[1])
    assert by_token(table, "ref") == expected(scored, home[2])
    for row_id, nll in home[1].items():
        own = [value for (other, _), value in by_token(table, "nll_student").items() if other == row_id]
        assert all(abs(a - b) <= off_by(b) + 1e-7 * b for a, b in zip(own[1:], nll[1:], strict=True))  # type: ignore[operator]


def test_a_score_is_there_for_queries_that_name_it(scored: Dataset) -> None:
    assert scored.sql("from tokens").schema.names == list(token_table.TOKENS)
    assert scored.sql("select *, nll_Ref from tokens limit 1").schema.names[-2:] == ["nll_Ref"] * 2
    assert scored.sql('select max("nll_student") as m, -avg(logprob) as nll_judge from tokens')["m"][0].as_py() > 0


def test_the_mean_of_a_row_is_that_of_its_tokens(scored: Dataset) -> None:
    table = scored.sql(
        "select s.nll, avg(nll_student) as mean, count(*) as n, any_value(s.num_target_tokens) as m from tokens "
        "join scores.student s using (id) where target group by s.id, s.nll"
    )
    np.testing.assert_allclose(table["mean"].to_numpy(), table["nll"].to_numpy(), rtol=2**-11)
    assert table["n"].to_pylist() == table["m"].to_pylist()


def test_tokens_of_a_score_join_with_rows_entries_and_plans(
    scored: Dataset, home: tuple[Path, Numbers, Numbers]
) -> None:
    """Against sums in float64 of what is stored."""
    stored = expected(scored, home[1])
    domains = dict(
        zip(*(scored.sql("select id, domain from rows")[c].to_pylist() for c in ("id", "domain")), strict=True)
    )
    got = scored.sql(
        "select domain, sum(nll_student::double) as s from tokens join rows using (id) where nll_student > 2 group by 1"
    )
    for domain, total in zip(*(got[c].to_pylist() for c in ("domain", "s")), strict=True):
        assert total == pytest.approx(sum(v for (i, _), v in stored.items() if v and v > 2 and domains[i] == domain))
    joined = scored.sql(
        "select sum(nll_student * (entry = 0)::int) as s from entries join tokens using (id, position) where is_draw = false"
    )
    kept = scored.sql("select sum(nll_student) as s from tokens where num_exact > 0")
    assert joined["s"][0].as_py() == pytest.approx(kept["s"][0].as_py())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Record batches of the payload, and parts of scores, that are read."""
    seen = {"batches": 0, "parts": 0}

    read = PayloadReader.batch

    def counted(reader: PayloadReader, number: int) -> pa.RecordBatch:
        batch = read(reader, number)
        seen["batches"] += batch.schema.names != ["id", "input_ids"]  # those are read when a shard is opened
        return batch

    whole = TokenScore.part

    def part(self: TokenScore, shard: int, schema: pa.Schema) -> tuple[Path, pa.Table]:
        seen["parts"] += 1
        assert schema.names == ["token_nll"]
        return whole(self, shard, schema)

    monkeypatch.setattr(PayloadReader, "batch", counted)
    monkeypatch.setattr(TokenScore, "part", part)
    return seen


def test_only_what_a_query_needs_is_read(scored: Dataset, reads: dict[str, int]) -> None:
    num_shards, first = len(scored.manifest), scored.manifest[0].name
    for query, batches, parts in (
        ("select sum(nll_student), max(position) from tokens", 0, num_shards),
        ("select sum(nll_student - nll_ref) from tokens", 0, 2 * num_shards),
        ("select count(nll_student) from tokens where false", 0, 0),
        (f"select sum(nll_student) from tokens join rows using (id) where shard = '{first}'", 0, 1),
        (f"select sum(nll_student + logprob) from tokens join rows using (id) where shard = '{first}'", 1, 1),
        ("select count(*) from tokens where position = 1 and id <> 'nll_student'", 0, 0),
    ):
        reads.update(batches=0, parts=0)
        scored.sql(query)
        assert reads == {"batches": batches, "parts": parts}, query


def test_the_stream_and_polars_have_the_column(scored: Dataset, home: tuple[Path, Numbers, Numbers]) -> None:
    import polars as pl

    stream = scored.tokens(["nll_student", "position", "id"], rows=[3, 1]).read_all()
    assert stream.schema.names == ["nll_student", "position", "id"]
    whole = expected(scored, home[1])
    assert by_token(stream, "nll_student") == {
        key: v for key, v in whole.items() if key[0] in (scored[1].id, scored[3].id)
    }
    frame = scored.to_polars("tokens", scores=["student", "Ref"])
    assert frame.collect_schema().names() == [*token_table.TOKENS, "nll_student", "nll_Ref"]
    apart = (pl.col("nll_student") - pl.col("nll_Ref")).alias("apart")
    top = frame.filter(pl.col("target")).select("id", "position", apart).sort("apart", "id", descending=True).head(5)
    query = (
        "select id, position, nll_student - nll_Ref as apart from tokens where target "
        "order by apart desc, id desc limit 5"
    )
    assert top.collect().to_dicts() == scored.sql(query).to_pylist()


def test_a_plan_records_the_score_that_its_query_reads(changed: Dataset) -> None:
    query = "select id from tokens where target group by id having avg(nll_student + logprob) > 0 order by id"
    plan = select(changed, Sql(name="behind", sql=query))
    assert plan.ids == changed.sql(query)["id"].to_pylist()
    assert plan.info.scores == {"student": score_digest(changed, "student")}
    each = "select id, position from tokens where target and nll_ref > 3"
    tokens = select(changed, All(name="hard", positions=SqlPositions(sql=each)))
    assert tokens.info.scores == {"Ref": score_digest(changed, "Ref")}
    assert tokens.info.positions is not None and tokens.info.positions.positions == changed.sql(each).num_rows


OWN_NAMES = [
    "select count(*) as n, sum(-logprob) as nll_student from tokens where target",
    "select id, position, -logprob as nll_student from tokens where nll_student > 2 order by nll_student desc, id, position",
    "select id, sum(-logprob) as nll_student from tokens group by id having nll_student > 9 order by nll_student, id",
    "select floor(entropy) as nll_student, count(*) as n from tokens group by nll_student order by nll_student",
    "with t as (select id, position, entropy as nll_student from tokens) select max(nll_student) from t",
    "with t(id, nll_student) as (select id, position from tokens) select max(t.nll_student), max(NLL_STUDENT) from t",
    "select max(nll_student) from (select entropy as nll_student from tokens)",
    "select max(nll_student) from tokens join (select id, nll as nll_student from rows) using (id)",
    "select max(nll_student) from tokens join rows as r(nll_student) on r.nll_student = tokens.id",
    "select max(t.nll_student) from tokens as t(nll_student)",
    "select 'nll_student' as name, max(rank) from tokens -- nll_student",
]


@pytest.mark.parametrize("query", OWN_NAMES)
def test_a_name_of_the_query_s_own_is_no_score(
    scored: Dataset, tmp_path: Path, reads: dict[str, int], query: str
) -> None:
    """The same query where there is no such score; a plan of it does not depend on the score."""
    bare = Path(shutil.copytree(scored.path, tmp_path / "bare", ignore=shutil.ignore_patterns("scores")))
    assert scored.sql(query).to_pylist() == kdata.open(bare).sql(query).to_pylist()
    assert reads["parts"] == 0
    assert mentions(scored, query)["scores"] == [] and SqlPositions(sql=query).named_scores() == []


@pytest.mark.parametrize(
    "query",
    [
        "select avg(nll_student) as nll_student from tokens",
        "select avg(t.NLL_student) as nll_Ref from tokens t join rows using (id) where t.target having nll_ref > 0",
        "with t as (select -logprob as nll_ref, nll_student as s from tokens) select avg(s) filter (nll_ref > 0) from t",
        "select avg(own) from (select nll_student as own, entropy as nll_ref from tokens where nll_ref >= 0)",
        "select sum(weight) from entries join tokens using (id, position) where nll_student > 1",
        "from tokens select max(nll_student) where id in (select id from scores.ref where nll > $least)",
    ],
)
def test_a_name_that_means_nothing_else_is_a_score(scored: Dataset, tmp_path: Path, query: str) -> None:
    values = {"least": 0} if "$least" in query else None
    assert scored.sql(query, values).to_pylist()[0]
    bare = Path(shutil.copytree(scored.path, tmp_path / "bare", ignore=shutil.ignore_patterns("student*")))
    with pytest.raises(QueryError, match="there is no score 'student'"):
        kdata.open(bare).sql(query, values)
    if values is None:
        assert mentions(scored, query)["scores"] == ["student"]
        assert [name.lower() for name in SqlPositions(sql=query).named_scores()] == ["student"]


def test_a_column_that_is_not_there_is_explained(scored: Dataset) -> None:
    with pytest.raises(
        QueryError, match=r"score 'judge' has a number for each row and none for each token; .*--tokens"
    ):
        scored.sql("select nll_judge from tokens")
    with pytest.raises(QueryError, match=r"there is no score 'studnt': .*\(scores: Ref, judge, student\)"):
        scored.sql("select t.nll_studnt from tokens t join rows using (id)")
    with pytest.raises(MissingError, match="score 'judge' has a number for each row"):
        scored.to_polars("tokens", scores=["judge"])
    with pytest.raises(MissingError, match="there is no score 'nobody'"):
        scored.tokens(["nll_nobody"])
    with pytest.raises(ConfigError, match=r"tokens has no column 'nll_../x'"):
        scored.tokens(["nll_../x"])
    with pytest.raises(ConfigError, match="scores are columns of the table tokens"):
        scored.to_polars("rows", scores=["student"])


# What goes wrong.


def test_scores_of_another_state_are_not_read(
    changed: Dataset, corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    rows = [{"id": "new", "domain": "prose", "text": "the dog sat on the log"}]
    grown = run_capture(changed.path, write_jsonl(tmp_path / "new.jsonl", rows), tokenizer_dir, name="more")
    assert outdated(grown) == ["scores.Ref", "scores.judge", "scores.student"]
    with pytest.raises(QueryError, match="'student' does not cover the dataset as it is now; run `kdata score` again"):
        grown.sql("select sum(nll_student) from tokens")
    with pytest.raises(MissingError, match="does not cover the dataset as it is now"):
        grown.tokens(["nll_student"])
    assert verify(grown, deep=True) == []


def test_a_damaged_part_is_one_error(changed: Dataset) -> None:
    path = changed.path / f"scores/student/{changed.manifest[1].name}.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [problem.path for problem in verify(changed)] == [path.relative_to(changed.path).as_posix()]
    for check in ("first", "later"):
        with pytest.raises(CorruptError, match=f"{path.name} is not what was committed"):
            kdata.open(changed.path, check=check).sql("select sum(nll_student) from tokens")
    with pytest.raises(CorruptError, match=path.name):
        changed.tokens(["nll_student"]).read_all()
    assert repair(changed.path).commands and not (changed.path / "scores/student").exists()


def cut(columns: dict[str, list[Any]]) -> None:
    columns["token_nll"][0] = columns["token_nll"][0][:-1]


def stretched(columns: dict[str, list[Any]]) -> None:
    columns["token_nll"][0] = np.concatenate([columns["token_nll"][0], np.ones(100_000, np.float16)])


def infinite(columns: dict[str, list[Any]]) -> None:
    columns["token_nll"][0][1] = np.inf


def unknown(columns: dict[str, list[Any]]) -> None:
    columns["token_nll"][0][-1] = np.nan


def predicted(columns: dict[str, list[Any]]) -> None:
    columns["token_nll"][0][0] = 1.0


def renamed(columns: dict[str, list[Any]]) -> None:
    columns["id"][:2] = columns["id"][1::-1]


def another_mean(columns: dict[str, list[Any]]) -> None:
    columns["nll"] = [None if nll is None else nll * 1.002 for nll in columns["nll"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"has \d+ values and \d+ tokens"),
        (stretched, r"it holds 1\d\d,\d\d\d values, the shard has \d+ tokens"),
        (infinite, "a value that is not finite"),
        (unknown, "a value that is not finite"),
        (predicted, "or one at position 0"),
        (renamed, "its ids are not those of the shard's rows"),
        (another_mean, "that of its tokens is"),
    ],
)
def test_numbers_that_do_not_fit_the_tokens_are_seen_by_a_deep_check(
    changed: Dataset, change: Callable[[dict[str, list[Any]]], None], message: str
) -> None:
    """The digests are right: whoever wrote the score was wrong."""
    score_tokens_with(changed, "wrong", change=change)
    assert verify(changed) == []
    problems = verify(changed, deep=True)
    assert [problem.path for problem in problems] == [
        f"scores/wrong/{entry.name}.parquet" for entry in changed.manifest
    ]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems[0].what)
    if change in (cut, stretched):
        with pytest.raises(CorruptError, match=message):
            changed.sql("select sum(nll_wrong) from tokens")


# Shared.


def test_a_copy_has_the_score_and_a_part_of_a_dataset_has_none(changed: Dataset, tmp_path: Path) -> None:
    """As with scores of rows: their digests are of the whole dataset."""
    query = "select id, position, nll_student from tokens"
    pushed = kdata.open(push(changed, tmp_path / "copy"))
    assert pushed.sql(query) == changed.sql(query) and verify(pushed, deep=True) == []
    assert digests(pushed.path / "scores") == digests(changed.path / "scores")
    assert not list((head(changed, tmp_path / "head", 3).path).glob("scores/*"))


def test_at_a_url_the_parts_of_needed_shards_are_copied(changed: Dataset, serve: Callable[[Path], Files]) -> None:
    served = serve(changed.path.parent)
    opened = kdata.open(f"{served.url}/d")
    first = changed.manifest[0].name
    query = f"select sum(nll_student) as s from tokens join rows using (id) where shard = '{first}'"
    assert opened.sql(query) == changed.sql(query)
    parts = [path for path, _, _ in served.sent if path.startswith("d/scores/student/")]
    assert parts == [f"d/scores/student/{first}.parquet"]
    assert not [path for path, _, _ in served.sent if path.startswith("d/data/")]
    names = ["id", "position", "nll_Ref"]
    assert opened.tokens(names).read_all() == changed.tokens(names).read_all()
    with pytest.raises(QueryError, match="there is no score 'nobody'"):
        opened.sql("select nll_nobody from tokens")
    plan = select(
        opened,
        All(name="asked", positions=SqlPositions(sql="select id, position from tokens where target and nll_Ref > 3")),
    )
    assert plan.info.scores == {"Ref": score_digest(changed, "Ref")}


def test_a_score_at_a_url_that_was_made_again_is_read_as_it_is_now(
    changed: Dataset, serve: Callable[[Path], Files]
) -> None:
    """After a part of the former one was copied, in the same process and in a later one."""
    served = serve(changed.path.parent)
    opened = kdata.open(f"{served.url}/d")
    first = changed.manifest[0].name
    part = f"select max(nll_student) as s from tokens join rows using (id) where shard = '{first}'"
    before = opened.sql(part)
    shutil.rmtree(changed.path / "scores/student")
    (changed.path / "scores/student.json").unlink()
    score_tokens_with(changed, "student", seed=7)
    assert changed.sql(part) != before
    for reader in (opened, kdata.open(f"{served.url}/d")):
        for query in (part, "select max(nll) from scores.student", "select id, position, nll_student from tokens"):
            assert reader.sql(query) == changed.sql(query)


def test_a_score_that_was_made_in_the_copy_of_a_url_stays(changed: Dataset, serve: Callable[[Path], Files]) -> None:
    served = serve(changed.path.parent)
    opened = kdata.open(f"{served.url}/d")
    score_tokens_with(opened, "mine", seed=3)
    own = opened.sql("select id, position, nll_mine from tokens")
    assert kdata.open(f"{served.url}/d").sql("select id, position, nll_mine from tokens") == own


def test_errors_are_kdata_s(scored: Dataset) -> None:
    with pytest.raises(KdataError):
        scored.sql("select nll_student from entries")

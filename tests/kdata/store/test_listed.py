"""Index, scores and plans: only what manifest and JSON list counts, and its bytes are compared before any answer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.repair import repair
from kdata.check.verify import verify
from kdata.errors import CorruptError, KdataError, MissingError, QueryError
from kdata.format import files
from kdata.format.manifest import write_json
from kdata.pipelines.cli.main import app
from kdata.selection.query import Sql
from kdata.selection.ranked import All, Difference
from kdata.selection.select import select
from kdata.selection.sidecar import begin_sidecar, has_part, load_score_info
from kdata.share.push import push
from kdata.store.sql import reads_of
from tests.fakes import digests
from tests.kdata.selection.plans import score_with

FLIPS = 48  # for each way to read


@pytest.fixture(scope="module")
def furnished(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with two scores and two plans."""
    root = Path(shutil.copytree(captured, tmp_path_factory.mktemp("furnished") / "d"))
    dataset = kdata.open(root)
    ids = dataset.index(["id"])["id"].to_pylist()
    score_with(dataset, {row: 9.5 + n for n, row in enumerate(ids)})
    score_with(dataset, dict.fromkeys(ids, 1.5), "judge")
    select(dataset, Difference(share=0.5))
    select(dataset, All())
    return root


@pytest.fixture
def root(furnished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(furnished, tmp_path / "dataset"))


# Every way to numbers of index, scores and plans, and the files that it reads.
READS: dict[str, tuple[str, Callable[[kdata.Dataset], Any]]] = {
    "sql rows": ("index/", lambda d: d.sql("select * from rows order by id").to_pylist()),
    "sql quoted": ("index/", lambda d: d.sql('select count(*), max(nll) from main."ROWS"').to_pylist()),
    "sql subquery": ("index/", lambda d: d.sql("select (select max(nll) from rows) as n").to_pylist()),
    "sql pivot": ("index/", lambda d: sorted(map(repr, d.sql("pivot rows on domain using max(nll)").to_pylist()))),
    "sql describe": ("index/", lambda d: d.sql("describe rows").to_pylist()),
    "sql by name": ("index/", lambda d: d.sql("select max(nll) as n from query_table('rows')").to_pylist()),
    "sql scores": ("scores/ref/", lambda d: d.sql("select * from scores.ref order by id").to_pylist()),
    "sql plan": ("plans/difference.parquet", lambda d: d.sql("select * from plans.difference").to_pylist()),
    "index": ("index/", lambda d: d.index().to_pylist()),
    "row": ("index/", lambda d: [(row.id, row.text) for row in d]),
    "plan": ("plans/difference.parquet", lambda d: kdata.Plan.load(d.path / "plans/difference").rows(d).tolist()),
    "select": ("scores/ref/", lambda d: select(d, Difference(share=0.3, name="again")).ids),
    "select index": ("index/", lambda d: select(d, Difference(share=0.3, name="again")).ids),
    "select sql": ("scores/ref/", lambda d: select(d, Sql(sql="select id from scores.ref where nll > 12", name="x")).ids),
    "select parent": ("plans/difference.parquet", lambda d: select(d, All(parent="difference", name="again")).ids),
    "rejects": ("rejects/", lambda d: (d.sql("select * from rejects").to_pylist(), d.rejected())),
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_a_flipped_bit_gives_no_wrong_value(root: Path, read: str) -> None:
    """In one process, which has compared the undamaged file before."""
    prefix, call = READS[read]
    right = call(kdata.open(root))
    rng = np.random.default_rng(5)
    names = [name for name in digests(root) if name.startswith(prefix)]
    assert names
    for name in names:
        original = (root / name).read_bytes()
        for place in rng.integers(0, len(original), -(-FLIPS // len(names))):
            flipped = bytearray(original)
            flipped[place] ^= 1 << int(rng.integers(8))
            (root / name).write_bytes(flipped)
            with pytest.raises(CorruptError, match=Path(name).name):
                call(kdata.open(root))
        (root / name).write_bytes(original)
    assert call(kdata.open(root)) == right


# Of these, those that read parts of files where the dataset is at a URL, and the views that they read.
IN_PARTS = {
    **{
        read: "rows" for read, (prefix, _) in READS.items() if read.startswith(("sql", "select")) and prefix == "index/"
    },
    "select parent": "rows",
    "sql scores": "scores.ref",
    "select": "scores.ref",
    "select sql": "scores.ref",
    "rejects": "rejects",
}


@pytest.mark.parametrize(
    "read", [read for read in READS if read != "plan"]
)  # which opens a file of the copy by its path
def test_what_is_not_compared_at_a_url_is_named_and_all_of_it_can_be_compared(
    root: Path, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With check="whole" every way is an error. Otherwise what reads parts names its view in `unchecked`."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    prefix, call = READS[read]
    url = f"file://{root}"
    for check in ("first", "whole"):
        opened = kdata.open(url, check=check)  # type: ignore[arg-type]
        assert call(opened) == call(kdata.open(root))
        compares = check == "whole" or read not in IN_PARTS
        assert opened.unchecked == set() if compares else IN_PARTS[read] in opened.unchecked
        shutil.rmtree(tmp_path / "cache")
    rng = np.random.default_rng(5)
    names = [name for name in digests(root) if name.startswith(prefix)]
    for name in names:
        original = (root / name).read_bytes()
        for place in rng.integers(0, len(original), -(-8 // len(names))):
            flipped = bytearray(original)
            flipped[place] ^= 1 << int(rng.integers(8))
            (root / name).write_bytes(flipped)
            with pytest.raises(CorruptError, match=Path(name).name):
                call(kdata.open(url, check="whole"))
            shutil.rmtree(tmp_path / "cache")
        (root / name).write_bytes(original)


def test_a_column_whose_damaged_name_is_no_text_is_one_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    path = next((root / "index").iterdir())
    content = path.read_bytes()
    assert b"license" in content
    path.write_bytes(content.replace(b"license", b"lic\xffnse"))
    with pytest.raises(CorruptError, match=path.name):
        kdata.open(root, check="later").sql("select * from rows")
    with pytest.raises(QueryError, match="a name in a file that it reads is no UTF-8"):
        kdata.open(f"file://{root}").sql("select * from rows")


def test_commands_at_a_url_say_what_was_not_compared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    url = f"file://{root}"
    for command in (["sql", url, "select max(nll) from rows"], ["select", url, "--method", "all", "--name", "a"]):
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0
        assert f"(parts were read from {url}; `kdata sql` and `select` copy and compare with" in shown.stderr
        shown = CliRunner().invoke(app, [*command, "--check", "whole"])
        assert shown.exit_code == 0 and "not compared" not in shown.stderr
        shutil.rmtree(tmp_path / "cache")
    for command in (["info", url], ["info", url, "--format", "json"]):
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0 and "not compared with their digests" in shown.stderr
    shutil.rmtree(tmp_path / "cache")
    numbers = tmp_path / "numbers.parquet"
    ids = kdata.open(root).index(["id"])["id"]
    pq.write_table(pa.table({"id": ids, "x": np.arange(len(ids))}), numbers)
    shown = CliRunner().invoke(app, ["score", url, "--from", str(numbers), "--name", "x"])
    assert shown.exit_code == 0 and "not compared" not in shown.stderr
    assert kdata.open(url).sql("select x from scores.x join rows using (id)").num_rows == len(ids)


def test_a_file_is_compared_once_per_process_and_again_when_it_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    real = files.file_info
    monkeypatch.setattr(files, "file_info", lambda path: compared.append(path.name) or real(path))
    monkeypatch.setattr(files, "SETTLED_SEC", -1.0)
    names = [path.name for path in sorted((root / "index").iterdir())]
    for _ in range(3):
        kdata.open(root).sql("select count(*) from rows")
    assert compared == names
    path = root / "index" / names[0]
    os.utime(path, ns=(1, 1))
    kdata.open(root).sql("select count(*) from rows")
    assert compared == [*names, names[0]]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    kdata.open(root).sql("select count(*) from rows")
    assert compared == [*names, names[0], names[0]], "another file of the same size and time"
    kdata.open(root).sql("select 1 as one")
    kdata.open(root).sql("select * from manifest")
    assert len(compared) == len(names) + 2, "what a query does not name is not read"


def test_a_file_that_was_just_written_is_compared_every_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes within a tick of the file system's clock look the same from outside."""
    compared: list[str] = []
    real = files.file_info
    monkeypatch.setattr(files, "file_info", lambda path: compared.append(path.name) or real(path))
    for path in (root / "index").iterdir():
        path.write_bytes(path.read_bytes())
    kdata.open(root).sql("select count(*) from rows")
    first = len(compared)
    kdata.open(root).sql("select count(*) from rows")
    assert first and len(compared) == 2 * first


def test_the_comparison_can_be_put_off_and_is_never_put_off_silently(root: Path) -> None:
    dataset = kdata.open(root, check="later")
    assert "check='later'" in repr(dataset) and not dataset.unchecked
    dataset.sql("select * from rows join scores.ref using (id)")
    assert dataset.unchecked == {"rows", "scores.ref"}
    part = next((root / "scores/ref").iterdir())
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 4
    part.write_bytes(content)
    shown = CliRunner().invoke(app, ["sql", str(root), "select count(*) as n from scores.ref", "--check", "later"])
    assert shown.exit_code == 0 and "not compared with their digests (--check later): scores.ref" in shown.stderr
    shown = CliRunner().invoke(app, ["sql", str(root), "select count(*) as n from scores.ref"])
    assert shown.exit_code != 0
    with pytest.raises(CorruptError, match=part.name):  # a plan is never made of what was not compared
        select(kdata.open(root, check="later"), Difference(share=0.5, name="again"))
    with pytest.raises(QueryError, match="Nothing was compared with its digest"):
        dataset.sql("select nothing from rows")
    index = next((root / "index").iterdir())
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match=index.name):
        kdata.open(root, check="later").index()


# ---------------------------------------------------------------------------------------------------- what is not listed


STRAYS = [
    "scores/ref/copy.parquet", "scores/ref/capture-00099.parquet", "scores/other/capture-00000.parquet", "scores/notes.txt",
    "plans/mine.parquet", "plans/all.json.tmp", "index/capture-00099.parquet", "index/capture-00000.parquet.tmp",
    "data/deep/er/file.arrow", "rejects/x.parquet", "tokenizer/added_tokens.json", "tokenizer/tokenizer.json.tmp",
    "dataset.json.tmp", "notes.txt", "README.md.tmp", "tokenizer.tmp/tokenizer.json", "units-00ff.tmp/0/x", "photos/a.png",
]  # fmt: skip


def leave(root: Path, name: str) -> str:
    """Leave a stray file: a copy of one like it, where there is one. Returns the path by which verify names it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    like = sorted(
        p for p in root.rglob(f"*{path.suffix}") if p.is_file() and p.parent.name in ("ref", path.parent.name)
    )
    path.write_bytes(like[0].read_bytes() if like else b"{}")
    top = name.split("/")[0]
    return name if top in ("data", "index", "rejects", "scores", "plans", "tokenizer") or "/" not in name else f"{top}/"


def answers(root: Path) -> list[Any]:
    """What a dataset answers, in every way."""
    dataset = kdata.open(root)
    queries = ("rows", "rejects", "scores.ref", "scores.judge", "plans.difference", '"plans"."all"')
    return [
        dataset.content_digest,
        [dataset.sql(f"select * from {view} order by all").to_pylist() for view in queries],
        dataset.sql("show tables").to_pylist(),
        dataset.index().to_pylist(),
        kdata.Plan.load(root / "plans/difference").ids,
        select(dataset, Difference(share=0.3, name="again")).ids,
    ]


def test_stray_files_change_no_answer_are_named_and_are_not_shared(root: Path, tmp_path: Path) -> None:
    before, clean = answers(root), digests(root)
    shown = {leave(root, name) for name in STRAYS}
    assert answers(root) == before
    problems = verify(kdata.open(root), deep=True)
    assert {problem.path for problem in problems} == shown and len(problems) == len(shown)
    assert all(problem.stray and "belongs to nothing" in problem.what for problem in problems)
    push(kdata.open(root), str(tmp_path / "shared"))
    assert set(digests(tmp_path / "shared")) == {*clean, "README.md", "audit.json", "croissant.json"}
    result = CliRunner().invoke(app, ["verify", str(root)])
    assert result.exit_code == 1 and all(name in str(result.exception) for name in shown)
    assert "is whole, but holds what is no part of it" in str(result.exception)
    done = repair(root)
    persons = {"notes.txt", "photos/"}
    assert not done.remaining and not done.units and set(done.moved) == shown - persons
    assert {problem.path for problem in verify(kdata.open(root))} == persons and answers(root) == before


def test_a_stray_file_of_the_tokenizer_is_not_handed_to_a_library(root: Path) -> None:
    (root / "tokenizer/tokenizer_config.json").write_text("{}") if not (
        root / "tokenizer/tokenizer_config.json"
    ).exists() else (root / "tokenizer/special_tokens_map.json").write_text("{}")
    with pytest.raises(CorruptError, match="is no file of this dataset's tokenizer; remove it"):
        _ = kdata.open(root).tokenizer_dir


def test_a_damaged_file_of_the_tokenizer_is_refused_at_first_use(root: Path) -> None:
    path = root / "tokenizer/tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"the", b"eht", 1))
    with pytest.raises(CorruptError, match=r"tokenizer.json is damaged"):
        _ = kdata.open(root)[0].tokens


def test_a_score_that_is_not_complete_is_no_view(root: Path) -> None:
    dataset = kdata.open(root)
    begin_sidecar(dataset, load_score_info(dataset, "ref").model_copy(update={"files": {}}))
    with pytest.raises(MissingError, match="score 'ref' does not cover the dataset as it is now; run `kdata score`"):
        dataset.sql("select * from scores.ref")
    with pytest.raises(MissingError, match="score 'ref' does not cover"):
        dataset.sql("pivot scores.ref on id using count(*)")
    assert dataset.sql("pivot rows on domain using count(*)").num_rows and verify(dataset) == []


def test_parts_of_an_older_kdata_are_kept_where_their_json_has_their_digests(root: Path) -> None:
    """Scoring a large dataset takes hours: what a complete score has is not computed again."""
    dataset, about = kdata.open(root), load_score_info(kdata.open(root), "ref")
    kept, changed = dataset.manifest[:2]
    listed = dict(about.files)
    for entry in (kept, changed):
        path = root / f"scores/ref/{entry.name}.parquet"
        table = pq.read_table(path)
        shard = {b"kdata.shard": table.schema.metadata[b"kdata.shard"]}
        pq.write_table(table.replace_schema_metadata(shard), path)
        listed[f"scores/ref/{entry.name}.parquet"] = files.file_info(path)
    write_json(root / "scores/ref.json", about.model_copy(update={"files": listed}).model_dump())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = pq.read_table(root / f"scores/ref/{kept.name}.parquet").to_pydict()
    begin_sidecar(dataset, about.model_copy(update={"files": {}}))
    assert has_part(dataset, "ref", kept) and not has_part(dataset, "ref", changed)
    assert pq.read_table(root / f"scores/ref/{kept.name}.parquet").to_pydict() == before


def test_a_run_that_goes_on_keeps_its_own_parts_and_no_others(root: Path) -> None:
    """The numbers of another score, and damaged ones, would otherwise get this score's digests."""
    dataset = kdata.open(root)
    begin_sidecar(dataset, load_score_info(dataset, "ref").model_copy(update={"files": {}}))
    first = dataset.manifest[0]
    assert all(has_part(dataset, "ref", entry) for entry in dataset.manifest)
    path = root / f"scores/ref/{first.name}.parquet"
    own = path.read_bytes()
    shutil.copyfile(root / f"scores/judge/{first.name}.parquet", path)
    assert not has_part(dataset, "ref", first)
    rng = np.random.default_rng(2)
    for place in rng.integers(0, len(own), 60):
        flipped = bytearray(own)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        if has_part(dataset, "ref", first):  # a flip in what nobody reads, such as statistics
            kept = pq.read_table(path)
            path.write_bytes(own)
            assert kept.to_pydict() == pq.read_table(path).to_pydict()
    path.write_bytes(own)
    assert has_part(dataset, "ref", first)


@pytest.mark.parametrize(
    ("text", "views"),
    [
        ("select 1", set()),
        ("select * from Rows", {"rows"}),
        ("from scores.Ref join rows using (id)", {"scores.ref", "rows"}),
        ("with x as (from plans.\"all\") from x", {"plans.all", "x"}),
        ("select (select max(nll) from memory.scores.ref)", {"scores.ref"}),
        ("describe rows", {"rows"}),
        ("from range(3)", set()),
        ("pivot rows on id", None),
        ("show tables", None),
        ("from query('select 1')", None),
        ("from query_table('ro' || 'ws')", None),
        ("from 'index/x.parquet'", None),
        ("from memory.rows", None),
        ("from information_schema.tables", None),
        ("no query", None),
    ],
)  # fmt: skip
def test_which_views_a_query_reads(root: Path, text: str, views: set[str] | None) -> None:
    reads = reads_of(kdata.open(root), text)
    assert reads == (None if views is None else frozenset(views))


def test_a_damaged_score_does_not_hinder_queries_that_do_not_read_it(root: Path) -> None:
    for path in (root / "scores/ref").iterdir():
        path.write_bytes(b"")
    (root / "scores/judge.json").write_text("{")
    dataset = kdata.open(root)
    assert dataset.sql("select count(*) as n from rows")["n"].to_pylist() == [dataset.num_rows]
    for text in ("from scores.judge", "from scores.ref", "pivot scores.ref on id using count(*)"):
        with pytest.raises(KdataError, match=r"scores/"):
            dataset.sql(text)

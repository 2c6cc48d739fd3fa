"""`kdata hygiene` on datasets and corpora: scores, files, a kill, conditions of plans and of captures, bad input."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.check.verify import verify
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.errors import ConfigError, DataError, DependencyError, MismatchError, MissingError, QueryError, StorageError
from kdata.hygiene import checks
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.inspect import SETTINGS, inspect_corpus, inspect_dataset
from kdata.selection.mixtures import Uniform
from kdata.selection.query import Sql
from kdata.selection.ranked import All, Random
from kdata.selection.select import select
from kdata.selection.show import left_out_texts, table_of
from kdata.selection.sidecar import finish_sidecar, load_score_info, write_part
from kdata.store.conditions import check_condition
from tests.benchmarks.planted import Planted
from tests.fakes import digests, run_capture, write_jsonl
from tests.kdata.selection.plans import Row, dataset_of

ENGLISH = (
    "The people of the small village walked home along the river before the night came and the rain began to fall."
)
GERMAN = "Die Leute aus dem kleinen Dorf gingen am Fluss entlang nach Hause, bevor die Nacht kam und der Regen begann."
ROWS = [
    Row("a1", "a", text=ENGLISH),
    Row("a2", "a", text=ENGLISH.upper()),
    Row("a3", "a", text=GERMAN),
    Row("b1", "b", text="Write to jane.roe@acme-mail.org today, said the old man to the child who was with him."),
    Row("b2", "b", text=""),
    Row("b3", "b", text="Another text about the mountains of that country and the people who have lived there."),
    Row("b4", "b", text=ENGLISH + " It stopped."),
]
CONFIG = HygieneConfig(workers=1)


@pytest.fixture
def dataset(tmp_path: Path) -> kdata.Dataset:
    return dataset_of(tmp_path / "data", ROWS, shard_rows=2)


def test_scores_join_in_sql(dataset: kdata.Dataset) -> None:
    report = inspect_dataset(dataset, CONFIG)
    assert report.written == ["duplicates", "language", "quality", "personal"]
    rows = dataset.sql(
        "select rows.id, d.exact_id, d.near_id, l.code, q.chars, p.spans from rows join scores.duplicates d using (id) join "
        "scores.language l using (id) join scores.quality q using (id) join scores.personal p using (id) order by rows.id"
    ).to_pylist()
    assert [row["exact_id"] for row in rows] == ["a1", "a1", "a3", "b1", "b2", "b3", "b4"]
    assert [row["near_id"] for row in rows] == ["b4", "b4", "a3", "b1", "b2", "b3", "b4"]
    assert [row["code"] for row in rows] == ["en", "en", "de", "en", None, "en", "en"]
    assert rows[3]["spans"] == [{"kind": "email", "start": 9, "end": 31}]
    assert rows[0]["chars"] == len(ENGLISH)
    assert not verify(kdata.open(dataset.path))
    assert [path.name for path in dataset.path.parent.iterdir() if path.name.startswith(".")] == []


def test_rows_without_a_text_are_no_duplicates(tmp_path: Path) -> None:
    """And nobody's: a row with an empty text, whose digest they share, is its own."""
    rows = [Row("a", text=None), Row("b", text=None), Row("c", text=""), Row("d", text=ENGLISH), Row("e", text=None)]
    data = dataset_of(tmp_path / "data", rows)
    inspect_dataset(data, HygieneConfig(checks=["duplicates", "quality"], workers=1))
    found = {row.pop("id"): row for row in data.sql("from scores.duplicates").to_pylist()}
    for name in "abe":
        assert set(found[name].values()) == {None}, name
    for name in "cd":
        assert [found[name][f"exact_{column}"] for column in ("id", "rows", "keep")] == [name, 1, True]
        assert [found[name][f"near_{column}"] for column in ("id", "rows", "keep")] == [name, 1, True]
    assert select(data, All(where=["duplicates.near_keep"])).ids == ["c", "d"]


def test_shards_change_nothing(dataset: kdata.Dataset, tmp_path: Path) -> None:
    other = dataset_of(tmp_path / "other", ROWS, shard_rows=7)
    for one in (dataset, other):
        inspect_dataset(one, CONFIG)
    for check in CONFIG.chosen:
        query = f"from scores.{check} order by id"
        assert dataset.sql(query).equals(other.sql(query)), check


def test_complete_scores_stay(dataset: kdata.Dataset) -> None:
    inspect_dataset(dataset, CONFIG)
    before = digests(dataset.path)
    again = inspect_dataset(kdata.open(dataset.path), CONFIG)
    assert again.written == [] and again.kept == ["duplicates", "language", "quality", "personal"]
    assert digests(dataset.path) == before


def test_rows_that_were_added_are_looked_at(dataset: kdata.Dataset) -> None:
    inspect_dataset(dataset, CONFIG)
    grown = dataset_of(dataset.path, [Row("c1", "a", text=GERMAN)], source="more")
    with pytest.raises(MissingError, match="as it is now; run `kdata hygiene` again"):
        grown.sql("select * from scores.duplicates")
    inspect_dataset(grown, CONFIG)
    found = grown.sql("select id, exact_rows from scores.duplicates where exact_id = 'a3' order by id").to_pylist()
    assert found == [{"id": "a3", "exact_rows": 2}, {"id": "c1", "exact_rows": 2}]


def test_other_settings_are_another_score(dataset: kdata.Dataset) -> None:
    inspect_dataset(dataset, HygieneConfig(checks=["duplicates"], workers=1))
    other = HygieneConfig(checks=["duplicates"], jaccard=0.9, workers=1)
    with pytest.raises(MismatchError, match=r"jaccard: 0\.8 -> 0\.9"):
        inspect_dataset(dataset, other)
    inspect_dataset(dataset, other.model_copy(update={"prefix": "strict_"}))
    kept = dataset.sql("select id from scores.strict_duplicates where near_keep order by id")["id"].to_pylist()
    assert kept == ["a1", "a3", "b1", "b2", "b3", "b4"]


def test_a_plan_says_what_conditions_left_out(dataset: kdata.Dataset) -> None:
    inspect_dataset(dataset, CONFIG)
    where = ["duplicates.near_keep", "language.code = 'en'", "personal.total = 0 or nll is null"]
    plan = select(dataset, All(name="clean", where=where))
    assert plan.ids == ["b3", "b4"]
    info = kdata.Plan.load(dataset.path / "plans" / "clean").info.where
    assert info is not None
    assert (info.rows, info.passed) == (7, 2)
    numbers = [(one.left_out, one.unknown, one.alone) for one in info.conditions]
    assert numbers == [(2, 0, 2), (2, 1, 2), (1, 0, 1)]
    assert [sorted(one.examples) for one in info.conditions] == [["a1", "a2"], ["a3", "b2"], ["b1"]]
    shown = {(condition, name): text for condition, name, text in left_out_texts(dataset, plan)}
    assert shown[where[1], "a3"] == GERMAN
    assert (
        "  language.code = 'en': leaves out 2 (2 that no other does, 1 of them because it is not known)"
        in table_of(plan).notes
    )
    # The recorded query gives the same rows without the command.
    assert dataset.sql(str(plan.info.sql))["id"].to_pylist() == plan.ids
    assert set(plan.info.scores) == {"duplicates", "language", "personal"}


@pytest.mark.parametrize(
    "step",
    [
        Random(share=0.5, name="x", where=["duplicates.near_keep"]),
        Uniform(name="x", where=["duplicates.near_keep"]),
        Sql(name="x", sql="select id from rows", where=["duplicates.near_keep"]),
        All(name="x", where=["duplicates.near_keep"], parent="some"),
    ],
)
def test_every_method_chooses_among_what_passes(dataset: kdata.Dataset, step: All) -> None:
    inspect_dataset(dataset, CONFIG)
    select(dataset, Sql(name="some", sql="select id from rows where id <> 'b4'"))
    ids = select(dataset, step).ids
    assert ids and not {"a1", "a2"} & set(ids)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        ("duplicates.near_kept", QueryError, "near_kept"),
        ("duplicate.near_keep", MissingError, "duplicates"),
        ("nosuchcolumn > 1", QueryError, "nosuchcolumn"),
        ("nll >", ConfigError, "is not SQL"),
        ("true, false", ConfigError, None),
        ("1) or (1", ConfigError, "is not SQL"),
        ("id in (select id from rows)", ConfigError, "a subquery"),
        ("row_number() over () > 1", ConfigError, "a window function"),
        ("random() < 0.5", ConfigError, "calls random"),
        ("uuid() > id", ConfigError, "calls uuid"),
        ("now() > '2020-01-01'::timestamp", ConfigError, "calls now"),
        ("current_date > '2020-01-01'::date", ConfigError, "calls current_date"),
        ("age('2020-01-01'::timestamp) > interval 1 day", ConfigError, "calls age"),
        ("ago(interval 1 day) > '2020-01-01'", ConfigError, "calls ago"),
        ("list_sum(list_transform([1], x -> random())) > 0", ConfigError, "calls random"),
        ("unnest([true, false])", ConfigError, "calls unnest"),
        ("scores.duplicates.near_keep", ConfigError, "write duplicates.near_keep"),
        ("num_tokens > 1000", DataError, r"no row of 7 meets the conditions.*leaves out 7"),
        ("true from range(3)", ConfigError, None),
        ("text", QueryError, "Could not convert"),
    ],
)
def test_a_condition_that_is_none_is_one_error(
    dataset: kdata.Dataset, condition: str, error: type[Exception], message: str | None
) -> None:
    inspect_dataset(dataset, HygieneConfig(checks=["duplicates"], workers=1))
    with pytest.raises(error, match=message):
        select(dataset, All(where=[condition]))
    assert not list((dataset.path / "plans").glob("*"))


@pytest.mark.parametrize(
    "condition",
    [
        "len(text) > 3 and lower(text) like '%village%' and regexp_matches(text, 'river')",
        "nullif(num_tokens, 0) * 2 + 1 > 3 and split_part(text, ' ', 1) = 'The'",
        "list_sum([num_tokens, 1]) > 1 and list_contains(['en', 'de'], language.code)",
        "year('2020-01-01'::date) = 2020 and contains(text, 'village') and text[:3] = 'The' and nll::int = 1",
    ],
)
def test_a_function_with_one_answer_is_no_obstacle(dataset: kdata.Dataset, condition: str) -> None:
    inspect_dataset(dataset, HygieneConfig(checks=["language"], workers=1))
    assert "a1" in select(dataset, All(where=[condition])).ids


def test_a_damaged_score_is_refused(dataset: kdata.Dataset) -> None:
    inspect_dataset(dataset, CONFIG)
    part = next((dataset.path / "scores" / "language").glob("*.parquet"))
    table = pq.read_table(part)
    codes = pa.array(["en"] * table.num_rows)
    pq.write_table(table.set_column(table.schema.get_field_index("code"), "code", codes), part)
    with pytest.raises(kdata.CorruptError, match="not what was committed"):
        select(kdata.open(dataset.path), All(where=["language.code = 'en'"]))


@pytest.mark.parametrize(
    ("old", "new"), [('"confidence"', '"confidenze"'), ('"unit":', '"unti":'), ('"language"', '"other"')]
)
def test_a_damaged_json_names_the_command_that_wrote_it(dataset: kdata.Dataset, old: str, new: str) -> None:
    inspect_dataset(dataset, HygieneConfig(checks=["language"], workers=1))
    path = dataset.path / "scores" / "language.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(kdata.CorruptError, match="run `kdata hygiene` again"):
        load_score_info(kdata.open(dataset.path), "language")


def test_a_score_with_an_id_twice_is_refused(dataset: kdata.Dataset) -> None:
    """As a stranger could write it, digests and all: its row would be in the plan twice."""
    inspect_dataset(dataset, CONFIG)
    entry = dataset.manifest[0]
    part = pq.read_table(dataset.path / "scores" / "language" / f"{entry.name}.parquet")
    write_part(dataset, "language", entry, pa.concat_tables([part.slice(0, len(part) - 1), part.slice(0, 1)]))
    finish_sidecar(dataset, load_score_info(dataset, "language"))
    with pytest.raises(kdata.CorruptError, match="an id twice"):
        select(kdata.open(dataset.path), All(where=["language.confidence > 0"]))


# --------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [{"id": r.id, "domain": r.domain, "text": r.text} for r in ROWS])


def test_a_corpus_is_read_where_a_condition_is_true(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "columns.parquet"
    report = inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, file)
    assert report.rows == 7
    chosen = CorpusConfig(path=str(corpus), hygiene=str(file), where="duplicates.near_keep and language.code = 'en'")
    opened = Corpus(chosen)
    assert opened.num_rows == 3
    assert [document.id for document in opened.documents() if isinstance(document, Document)] == ["b1", "b3", "b4"]
    assert opened.settings()["where"] == chosen.where
    assert set(opened.settings()) - set(Corpus(CorpusConfig(path=str(corpus))).settings()) == {"where", "hygiene"}
    first = Corpus(chosen.model_copy(update={"limit": 2, "domains": ["b"]}))
    assert [document.id for document in first.documents()] == ["b1", "b3"]


def test_a_check_of_the_rows_that_another_check_left(tmp_path: Path) -> None:
    """The longest row of a group of duplicates is kept, and has an address: so duplicates are looked for in what is left."""
    rows = [
        {"id": "plain", "domain": "d", "text": ENGLISH},
        {"id": "copy", "domain": "d", "text": ENGLISH.upper()},
        {"id": "mail", "domain": "d", "text": " ".join([ENGLISH, "They wrote to jane.roe@acme-mail.org."])},
    ]
    path = str(write_jsonl(tmp_path / "corpus.jsonl", rows))
    config = HygieneConfig(workers=1, jaccard=0.5)
    at_once, first, second = (tmp_path / f"{name}.parquet" for name in ("at_once", "first", "second"))
    inspect_corpus(CorpusConfig(path=path), config, at_once)
    both = "duplicates.near_keep and personal.total = 0"
    with pytest.raises(DataError, match="leaves no row"):
        Corpus(CorpusConfig(path=path, hygiene=str(at_once), where=both))

    inspect_corpus(CorpusConfig(path=path), config.model_copy(update={"checks": ["personal"]}), first)
    passed = CorpusConfig(path=path, hygiene=str(first), where="personal.total = 0")
    only_duplicates = config.model_copy(update={"checks": ["duplicates"]})
    assert inspect_corpus(passed, only_duplicates, second).rows == 2
    opened = Corpus(CorpusConfig(path=path, hygiene=str(second), where="duplicates.near_keep"))
    assert [document.id for document in opened.documents() if isinstance(document, Document)] == ["copy"]
    assert opened.num_rows == 1 and "2 rows are left out" in opened.note_lines()[0]

    for some in ({"limit": 1}, {"domains": ["d"]}):  # nobody knows why a row is not in such a file
        second.unlink()
        inspect_corpus(passed.model_copy(update=some), only_duplicates, second)
        with pytest.raises(DataError, match="made with a limit, or of some domains"):
            list(Corpus(CorpusConfig(path=path, hygiene=str(second), where="duplicates.near_keep")).documents())


def test_the_columns_of_a_corpus_are_those_of_a_dataset(corpus: Path, dataset: kdata.Dataset, tmp_path: Path) -> None:
    inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, tmp_path / "columns.parquet")
    inspect_dataset(dataset, CONFIG)
    table = pq.read_table(tmp_path / "columns.parquet").sort_by("id")
    for check in CONFIG.chosen:
        own = dataset.sql(f"select * exclude (id) from scores.{check} order by id").to_pylist()
        expected = [
            {**row, "spans": row["spans"] or []} if check == "personal" else row for row in table[check].to_pylist()
        ]
        if check != "duplicates":  # an empty text is none in a corpus' eyes and in a dataset's alike
            assert own == expected, check


def test_a_file_of_all_rows_is_not_written_over_by_one_of_some(corpus: Path, tmp_path: Path) -> None:
    """Of another state of the corpus it is: a new row may be a duplicate of any."""
    file, every = tmp_path / "columns.parquet", CorpusConfig(path=str(corpus))
    rows = inspect_corpus(every, CONFIG, file).rows
    before = file.read_bytes()
    for some in ({"limit": 1}, {"domains": ["b"]}):
        with pytest.raises(MismatchError, match="other rows of the same corpus"):
            inspect_corpus(every.model_copy(update=some), CONFIG, file)
    assert file.read_bytes() == before
    with corpus.open("a") as handle:
        handle.write('{"id": "new", "domain": "a", "text": "one more row"}\n')
    assert inspect_corpus(every, CONFIG, file).rows == rows + 1


def test_columns_of_another_corpus_are_refused(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "columns.parquet"
    inspect_corpus(CorpusConfig(path=str(corpus), limit=3), CONFIG, file)
    own = {"path": str(corpus), "hygiene": str(file), "where": "duplicates.exact_keep"}
    with pytest.raises(DataError, match="has no row 'b1'"):
        list(Corpus(CorpusConfig(**own)).documents())
    with corpus.open("a") as handle:
        handle.write('{"id": "new", "domain": "a", "text": "x"}\n')
    with pytest.raises(MismatchError, match="another state"):
        Corpus(CorpusConfig(**own))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"where": "true"}, ConfigError, "go together"),
        ({"hygiene": "nowhere.parquet", "where": "true"}, MissingError, "kdata hygiene"),
        ({"hygiene": "CORPUS", "where": "true"}, DataError, "is not a file that"),
        ({"hygiene": "PLAIN", "where": "true"}, DataError, "does not say of which corpus"),
        ({"hygiene": "FILE", "where": "language.code = 'xx'"}, DataError, "leaves no row"),
        ({"hygiene": "FILE", "where": "random() < 0.5"}, ConfigError, "calls random"),
        ({"hygiene": "FILE", "where": "nothing.code = 'en'"}, ConfigError, "nothing"),
    ],
)
def test_bad_columns_of_a_corpus_are_one_error(
    corpus: Path, tmp_path: Path, values: dict[str, str], error: type[Exception], message: str
) -> None:
    file = tmp_path / "columns.parquet"
    inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, file)
    pq.write_table(pa.table({"id": ["a1"]}), tmp_path / "plain.parquet")
    places = {"FILE": str(file), "CORPUS": str(corpus), "PLAIN": str(tmp_path / "plain.parquet")}
    from kdata.config import parse_config

    with pytest.raises(error, match=message):
        Corpus(
            parse_config(
                CorpusConfig, {"path": str(corpus), **{k: places.get(v, v) for k, v in values.items()}}, "corpus"
            )
        )


KILLED = """
import sys, time
from pathlib import Path
from kdata.corpus.corpus import CorpusConfig
from kdata.hygiene import texts
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.inspect import inspect_corpus
texts.UNIT_ROWS = 100
inspect_corpus(CorpusConfig(path=sys.argv[1]), HygieneConfig(workers=1), Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", list(Planted(words=60).documents(1_000)))
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    work = tmp_path / ".killed.parquet.hygiene"

    def start(file: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(corpus), str(file)], stderr=subprocess.DEVNULL)

    assert start(whole).wait() == 0
    stops = 0
    for units in (1, 4):
        process = start(killed)
        while process.poll() is None and len(list(work.glob("unit-*.parquet"))) <= units:
            time.sleep(0.001)
        process.kill()
        stops += process.wait() != 0
    assert stops == 2 and not killed.exists()
    with (work / "shingles.bin").open("ab") as file:  # what a unit wrote that did not come to count
        file.write(b"torn")
    assert list(work.glob("unit-*.parquet"))
    damaged = shutil.copytree(work, tmp_path / ".damaged.parquet.hygiene")
    assert start(killed).wait() == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert not work.exists()

    with (damaged / "signatures.bin").open("r+b") as file:  # then nothing of it is used
        file.truncate(480)
    assert start(tmp_path / "damaged.parquet").wait() == 0
    assert (tmp_path / "damaged.parquet").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("left", ["own", "half removed", "of other settings"])
def test_work_that_a_kill_left_after_the_result_goes_and_other_work_stays(tmp_path: Path, left: str) -> None:
    corpus = CorpusConfig(path=str(write_jsonl(tmp_path / "corpus.jsonl", list(Planted(words=40).documents(60)))))
    config, file, work = HygieneConfig(checks=["quality"]), tmp_path / "out.parquet", tmp_path / ".out.parquet.hygiene"
    kept: dict[str, bytes] = {}

    def keep(folder: Path, **_: Any) -> None:
        if folder == work and folder.exists():
            kept[SETTINGS] = (folder / SETTINGS).read_bytes()
        shutil.rmtree(folder, ignore_errors=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdata.hygiene.inspect.shutil", SimpleNamespace(rmtree=keep))
        inspect_corpus(corpus, config, file)
    work.mkdir()
    (work / "unit-000000.parquet").touch()
    if left != "half removed":
        (work / SETTINGS).write_bytes(kept[SETTINGS] if left == "own" else b"of other settings")
    inspect_corpus(corpus, config, file)
    assert work.exists() == (left == "of other settings")


def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdata.hygiene import inspect, texts

    monkeypatch.setattr(texts, "UNIT_ROWS", 50)
    monkeypatch.setattr(inspect, "FEW_ROWS", 0)
    corpus = CorpusConfig(path=str(write_jsonl(tmp_path / "corpus.jsonl", list(Planted(words=40).documents(200)))))
    for workers in (1, 2):
        inspect_corpus(corpus, HygieneConfig(workers=workers), tmp_path / f"{workers}.parquet")
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def killed_worker(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_error_with_the_remedy(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdata.hygiene import inspect

    own, file = CorpusConfig(path=str(corpus)), tmp_path / "columns.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "FEW_ROWS", 0)
        patch.setattr(inspect, "check_texts", killed_worker)
        with pytest.raises(StorageError, match=r"memory runs out; .* --set workers=1 \(now 2\)"):
            inspect_corpus(own, HygieneConfig(workers=2), file)
    assert not file.exists()
    assert inspect_corpus(own, HygieneConfig(workers=1), file).rows == 7


def test_a_missing_package_is_named_first(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.PACKAGES, "language", ("no-such-package",))
    with pytest.raises(DependencyError, match=r"kdata\[hygiene\]"):
        inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, tmp_path / "columns.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_capture_reads_what_passes_and_says_what_does_not(
    corpus: Path, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, condition = tmp_path / "columns.parquet", "duplicates.near_keep and language.code = 'en'"
    inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, file)
    reading = {"hygiene": str(file), "where": condition}
    captured = run_capture(tmp_path / "data", corpus, tokenizer_dir, reading=reading)
    pieces = captured.index(["id"])["id"].to_pylist()  # of texts longer than the teacher's context
    assert sorted({name.partition("#")[0] for name in pieces}) == ["b1", "b3", "b4"]
    # The empty text is known by then for one that has no language.
    assert f"corpus.where: 4 rows are left out by {condition}" in " ".join(capsys.readouterr().err.split())
    settings = captured.info.sources["capture"].settings
    assert settings["corpus"]["where"] == condition
    with pytest.raises(MismatchError, match="where"):
        run_capture(tmp_path / "data", corpus, tokenizer_dir)


def test_columns_with_an_id_twice_are_refused(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "columns.parquet"
    inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, file)
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), file)
    with pytest.raises(DataError, match="an id twice"):
        Corpus(CorpusConfig(path=str(corpus), hygiene=str(file), where="duplicates.exact_keep"))


def test_no_file_of_another_program_is_written_over(corpus: Path, tmp_path: Path) -> None:
    inside, file = tmp_path / "texts", tmp_path / "texts" / "c.parquet"
    inside.mkdir()
    pq.write_table(pa.table({"id": ["a"], "domain": ["d"], "text": [ENGLISH]}), file)
    (tmp_path / "link.parquet").symlink_to(file)
    before = file.read_bytes()
    for source, out, message in (
        (file, file, "is read as the corpus"),
        (file, tmp_path / "link.parquet", "is read as the corpus"),
        (inside, inside / "h.parquet", "lies in the folder of the corpus"),
        (corpus, file, "did not write it"),
    ):
        with pytest.raises(ConfigError, match=message):
            inspect_corpus(CorpusConfig(path=str(source)), CONFIG, out)
    assert file.read_bytes() == before
    assert [path.name for path in inside.iterdir()] == ["c.parquet"]


def test_the_file_that_a_corpus_is_read_by_is_not_written_over(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "h.parquet"
    inspect_corpus(CorpusConfig(path=str(corpus)), CONFIG, file)
    before = file.read_bytes()
    chosen = CorpusConfig(path=str(corpus), hygiene=str(file), where="duplicates.near_keep")
    with pytest.raises(ConfigError, match="is read as the corpus"):
        inspect_corpus(chosen, CONFIG, file)
    assert file.read_bytes() == before


def test_columns_of_other_checks_stay_in_a_file(corpus: Path, tmp_path: Path) -> None:
    file, own = tmp_path / "h.parquet", CorpusConfig(path=str(corpus))
    both = HygieneConfig(checks=["language", "quality"], workers=1)
    inspect_corpus(own, both, file)
    before = file.read_bytes()
    assert inspect_corpus(own, HygieneConfig(checks=["quality"], workers=1), file).kept == [str(file.resolve())]
    with pytest.raises(MismatchError, match="language"):
        inspect_corpus(own, HygieneConfig(checks=["personal"], workers=1), file)
    with corpus.open("a") as handle:
        handle.write('{"id": "new", "domain": "a", "text": "x"}\n')
    with pytest.raises(MismatchError, match="language"):
        inspect_corpus(own, HygieneConfig(checks=["quality"], workers=1), file)
    assert file.read_bytes() == before
    assert inspect_corpus(own, both, file).rows == 8
    assert inspect_corpus(own, HygieneConfig(checks=["language", "quality", "personal"], workers=1), file).written
    with pytest.raises(MismatchError, match="phone_region"):
        inspect_corpus(own, HygieneConfig(workers=1, phone_region="DE"), file)


@pytest.mark.parametrize(
    "condition",
    [
        "list_filter(personal.spans, lambda x: x.kind = 'email') = []",
        "len(list_transform(personal.spans, lambda s, n: s.start + n)) > 0",
    ],
)
def test_what_a_lambda_names_is_no_score(condition: str) -> None:
    assert check_condition(condition) == ["personal"]

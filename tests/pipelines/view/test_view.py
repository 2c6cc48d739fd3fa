"""What the page is given: values against the dataset itself; who else gets nothing; the folder."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, DataError, MissingError, OutOfRangeError, QueryError, StorageError
from kdata.pipelines.cli.main import app
from kdata.pipelines.view import values
from kdata.pipelines.view.export import export
from kdata.pipelines.view.overview import BINS, histogram_of, overview_query
from kdata.pipelines.view.server import ViewServer
from kdata.pipelines.view.values import View
from kdata.selection.query import Sql
from kdata.selection.ranked import Random
from kdata.selection.score_file import bring
from kdata.share.interchange.importer import ImportConfig, import_dataset
from tests.fakes import LINES, StandInTeacher, run_capture, write_jsonl
from tests.kdata.selection.plans import Row, dataset_of
from tests.web import Files


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> kdata.Dataset:
    folder = tmp_path_factory.mktemp("view")
    rows = [{"id": f"r{n:02}", "domain": "it's"[n % 2 :], "text": text} for n, text in enumerate([*LINES, *LINES])]
    data = run_capture(folder / "data", write_jsonl(folder / "texts.jsonl", rows), tokenizer_dir)
    kdata.select(data, Random(name="half", share=0.5))
    ids = data.index(["id"])["id"]
    pq.write_table(pa.table({"id": ids, "odd": np.arange(len(ids)) % 2.0}), folder / "odd.parquet")
    bring(data, folder / "odd.parquet", "mine")
    return kdata.open(folder / "data")


@pytest.fixture(scope="module")
def view(dataset: kdata.Dataset) -> View:
    return View(dataset)


@pytest.fixture(scope="module")
def server(view: View) -> Iterator[ViewServer]:
    with ViewServer(view) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def asked(server: ViewServer, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{server.server_address[1]}", "X-Kdata": "1", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(content) if is_json else content.decode(), dict(answer.headers)


def test_about(view: View, dataset: kdata.Dataset) -> None:
    about = view.about()
    assert about["rows"] == dataset.num_rows and about["tokens"] == dataset.num_tokens
    assert {d["domain"]: d["n"] for d in about["domains"]} == {
        one["domain"]: one["n"] for one in dataset.sql("select domain, count(*) as n from rows group by 1").to_pylist()
    }
    [taken] = dataset.sql("select count(*) as n from plans.half")["n"].to_pylist()
    assert about["plans"] == [{"name": "half", "rows": taken}]
    assert "mine.odd" in about["numbers"] and about["left_out"] == [] and about["token_scores"] == []
    json.dumps(about, allow_nan=False)


def test_rows_are_in_order_and_numbered(view: View, dataset: kdata.Dataset) -> None:
    got = view.rows(order="nll", descending=True, limit=values.MOST_ROWS)
    expected = dataset.sql("select id, nll from rows order by nll desc nulls last, shard, row")
    assert [row["id"] for row in got["rows"]] == expected["id"].to_pylist() and got["total"] == dataset.num_rows
    for row in got["rows"]:
        assert dataset[row["number"]].id == row["id"] and row["value"] == pytest.approx(row["nll"])
    page = view.rows(order="nll", descending=True, offset=2, limit=3)
    assert page["rows"] == got["rows"][2:5] and page["total"] == got["total"]
    assert {row["id"] for row in view.rows(where="mine.odd = 1")["rows"]} == set(
        dataset.sql("select id from scores.mine where odd = 1")["id"].to_pylist()
    )
    assert view.rows(where="domain = 'it''s' -- a comment")["total"] > 0
    taken, left = (view.rows(plan="half", outside=outside)["total"] for outside in (False, True))
    assert taken + left == dataset.num_rows and taken == view.about()["plans"][0]["rows"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, dataset: kdata.Dataset) -> kdata.Dataset:
    """The dataset with an NLL of another model, which lacks a row, and with a plan that repeats rows."""
    folder = tmp_path_factory.mktemp("scored") / "data"
    shutil.copytree(dataset.path, folder)
    data = kdata.open(folder)
    table = data.sql("select id, nll + 1 + random() as nll from rows order by id")
    pq.write_table(table, folder.parent / "ref.parquet")
    bring(data, folder.parent / "ref.parquet", "ref")
    kdata.select(data, Sql(name="twice", sql="select id, 2 as repeats from rows where domain = 't''s'"))
    return kdata.open(folder)


@pytest.mark.parametrize("choice", [{}, {"where": "nll > 5"}, {"plan": "twice"}, {"plan": "twice", "outside": True},
                                    {"plan": "half", "where": "mine.odd = 1 -- a comment"}])  # fmt: skip
def test_the_overview_is_what_sql_says(scored: kdata.Dataset, choice: dict[str, Any]) -> None:
    view = View(scored)
    got = view.overview(**choice)
    chosen = {row["id"] for row in view.rows(**choice, limit=values.MOST_ROWS)["rows"]}
    repeats = 2 if choice == {"plan": "twice"} else 1
    rows = scored.sql(
        "select rows.*, ref.nll - rows.nll as difference from rows join scores.ref as ref using (id) order by domain, id"
    ).to_pylist()
    for line in got["domains"]:
        own = [row for row in rows if row["domain"] == line["domain"]]
        taken = [row for row in own if row["id"] in chosen]
        for part, some, times in (("all", own, 1), ("chosen", taken, repeats)):
            assert line[part]["rows"] == len(some)
            assert line[part]["tokens"] == times * sum(row["num_tokens"] for row in some)
            assert line[part]["nll"] == (pytest.approx(np.mean([row["nll"] for row in some])) if some else None)
    tokens_of = {
        name: -sum(row["num_tokens"] for row in rows if row["domain"] == name)
        for name in {row["domain"] for row in rows}
    }
    assert [line["domain"] for line in got["domains"]] == sorted(tokens_of, key=lambda name: (tokens_of[name], name))
    assert [one["column"] for one in got["histograms"]] == ["num_tokens", "nll", "ref.nll - nll"]
    for one, key in zip(got["histograms"], ("num_tokens", "nll", "difference"), strict=True):
        assert {name: one[name] for name in one if name != "column"} == view.histogram(one["column"], **choice)
        counted, _ = np.histogram([row[key] for row in rows if row["id"] in chosen], np.array(one["edges"]))
        assert np.abs(np.cumsum(one["chosen"]) - np.cumsum(counted)).max() <= 1  # a value at an edge
    json.dumps(got, allow_nan=False)


@given(low=st.floats(-1e6, 1e6), span=st.floats(0, 1e6))
def test_the_last_bin_has_the_largest_value(low: float, span: float) -> None:
    found = {"part": 0, "bin": 0, "every": 1, "chosen": 0, "low": low, "high": low + span}
    edges = histogram_of([found], 0, whole=False)["edges"]
    assert edges[0] == low and edges[-1] >= low + span


@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_bins_of_whole_numbers_hold_as_many_numbers_each(lengths: list[int]) -> None:
    """Bins of other widths would have gaps and peaks where the lengths have none."""
    values_of = ", ".join(f"('a', {length}, 0.0, true, 1)" for length in lengths)
    source = f"(values {values_of}) as t(domain, num_tokens, nll, is_chosen, times)"
    query = overview_query(source, ["num_tokens"], [True], by_domain=False)
    got = histogram_of(duckdb.sql(query).to_arrow_table().to_pylist(), 0, whole=True)
    widths = np.diff(got["edges"])
    assert len(set(widths[:-1])) <= 1 and all(width == int(width) >= 1 for width in widths) and len(widths) <= BINS
    assert got["edges"][0] == min(lengths) and got["edges"][-1] == max(lengths) + 1
    counted = [sum(low <= length < high for length in lengths) for low, high in pairwise(got["edges"])]
    assert got["all"] == got["chosen"] == counted
    if max(lengths) - min(lengths) < BINS:
        assert set(widths) == {1}


def test_rows_of_a_bin_of_differences_in_random_order(scored: kdata.Dataset) -> None:
    view = View(scored)
    shown = view.histogram("ref.nll - nll")
    low, high = shown["edges"][20], shown["edges"][-1]
    got = view.rows(where=f"(ref.nll - nll)::double >= {low} and (ref.nll - nll)::double <= {high}", order="random")
    assert got["total"] == sum(shown["all"][20:])
    ids = [row["id"] for row in view.rows(order="random")["rows"]]
    assert ids == sorted(ids, key=lambda one: hashlib.md5(one.encode()).hexdigest()) and len(ids) == scored.num_rows
    largest = view.rows(order="ref.nll - nll", descending=True)["rows"][0]
    assert largest["value"] == pytest.approx(shown["edges"][-1], rel=1e-4)


@pytest.mark.parametrize("column", ["nll", "num_tokens", "mine.odd"])
def test_a_histogram_counts_every_row_once(view: View, dataset: kdata.Dataset, column: str) -> None:
    got = view.histogram(column, where="nll > 0", plan="half")
    source = "rows join scores.mine using (id)"
    all_rows = dataset.sql(f"select {column} as x from {source}")["x"].to_numpy().astype(float)
    inside = f"{source} where rows.nll > 0 and id in (select id from plans.half)"
    chosen = dataset.sql(f"select {column} as x from {inside}")["x"].to_numpy().astype(float)
    for counts, numbers in ((got["all"], all_rows), (got["chosen"], chosen)):
        assert sum(counts) == len(numbers)
        expected, _ = np.histogram(numbers, np.array(got["edges"]))
        assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 1  # a value at an edge


def test_a_row_is_what_the_dataset_says(view: View, dataset: kdata.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MOST_TOKENS", 4)
    for number in range(dataset.num_rows):
        row, begin = dataset[number], 0
        while begin < len(row):
            got = view.row(number, begin=begin)
            assert got["tokens"] == row.tokens[begin : begin + 4] and got["num_tokens"] == len(row)
            first = 0
            for place, count in enumerate(got["num_kept"]):
                position = begin + place
                kept = row.kept(position)
                span = slice(first, first + count)
                assert [got["names"][n] for n in got["entry"][span]] == kept.tokens
                assert got["probability"][span] == pytest.approx(np.exp(kept.logprobs.astype(float)), rel=1e-4)
                assert got["num_exact"][place] == int((~kept.is_draw).sum())
                logprob = float(row.logprob[position])
                assert got["logprob"][place] == (None if math.isnan(logprob) else pytest.approx(logprob, rel=1e-4))
                first += count
            begin += 4
        assert got["plans"].keys() == {"half"} and got["columns"]["domain"] == row.domain
        json.dumps(got, allow_nan=False)


def test_scores_and_plans_at_a_url_are_there_to_choose(
    scored: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    here, there = View(scored), View(kdata.open(f"file://{scored.path}"))
    assert there.about() == here.about() and {"mine.odd", "ref.nll", "ref.nll - nll"} <= set(there.about()["numbers"])
    for choice in ({"order": "ref.nll - nll", "descending": True}, {"plan": "twice", "where": "mine.odd = 1"}):
        assert there.rows(**choice) == here.rows(**choice)  # type: ignore[arg-type]


def test_the_list_reads_the_texts_of_its_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a URL: of 40 shards, one for a page in order, and those with the rows of a page in another order."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = [Row(f"r{n:04}", "ab"[n % 2], 8, 1.0 + n * 7 % 31 / 7, rng.bytes(800).hex()) for n in range(1200)]
    home = dataset_of(tmp_path / "home/d", rows, shard_rows=30)
    files = Files(tmp_path / "home")
    view, local = View(kdata.open(f"{files.url}/d")), View(home)
    view.rows(where="nll > 0", order="nll", limit=1)  # footers and short columns
    index = sum(path.stat().st_size for path in (home.path / "index").iterdir())
    for choice in (
        {"offset": 612},
        {"offset": 312, "where": "nll > 0"},
        {"order": "nll", "descending": True, "limit": 3},
    ):
        files.sent.clear()
        assert view.rows(**choice) == local.rows(**choice)  # type: ignore[arg-type]
        assert 0 < len({path for path, _, _ in files.sent}) <= 3 and files.bytes_sent() < index / 10
    assert view.rows(offset=1199) == local.rows(offset=1199) and view.rows(offset=1200) == {"total": 1200, "rows": []}
    files.close()


def test_another_teacher_beside(dataset: kdata.Dataset, tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [{"id": f"r{n:02}", "domain": "d", "text": text} for n, text in enumerate(LINES)]
    corpus = write_jsonl(tmp_path / "texts.jsonl", rows)
    other = run_capture(tmp_path / "other", corpus, tokenizer_dir, teacher=StandInTeacher("another"))
    both = View(dataset, other)
    assert both.about()["beside"]["name"] == "other"
    number = dataset.rows_of([other[0].id])[0]
    got = both.row(int(number))["beside"]
    assert got["same_tokens"] and got["logprob"] != both.row(int(number))["logprob"]
    lacking = next(
        n for n in range(dataset.num_rows) if dataset[n].id not in set(other.index(["id"])["id"].to_pylist())
    )
    assert both.row(lacking)["beside"] == {"missing": True}


def test_what_cannot_be_asked(view: View) -> None:
    for error, call in (
        (ConfigError, lambda: view.rows(limit=0)), (ConfigError, lambda: view.rows(offset=-1)),
        (ConfigError, lambda: view.rows(order="nll; drop table rows")), (ConfigError, lambda: view.histogram("text")),
        (MissingError, lambda: view.rows(plan="none")), (ConfigError, lambda: view.rows(where="nll >")),
        (ConfigError, lambda: view.rows(where="1 = 1); select 1; --")), (QueryError, lambda: view.rows(where="nosuch > 1")),
        (ConfigError, lambda: view.rows(plan="half", where="1=1) or (1=1")), (OutOfRangeError, lambda: view.row(10**6)),
        (ConfigError, lambda: view.rows(where="id in (select content from read_text('/etc/hostname'))")),
        (ConfigError, lambda: view.row(0, begin=10**6)),
    ):  # fmt: skip
        with pytest.raises(error):
            call()  # type: ignore[no-untyped-call]


def test_a_damaged_plan_or_score_leaves_the_rest(dataset: kdata.Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    (copy / "plans" / "half.parquet").write_bytes(b"PAR1")
    part = next((copy / "scores" / "mine").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    damaged = View(kdata.open(copy))
    about = damaged.about()
    assert about["plans"] == [] and any("half" in why for why in about["left_out"])
    assert damaged.rows()["total"] == dataset.num_rows and damaged.row(0)["id"] == dataset[0].id


def test_entries_of_imported_data_are_shown_without_a_known_probability(tmp_path: Path) -> None:
    """An import may lack the log-probability of the actual token, and has entries all the same."""
    row = {"id": "a", "domain": "x", "text": "hello", "input_ids": [3, 4, 5], "topk_ids": [[], [7, 8], [9]]}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"topk_logprobs": [[], [-0.5, -2.0], [-0.25]]}])
    data, _ = import_dataset(rows, tmp_path / "imported", ImportConfig(format="plain", vocab_size=10))
    got = View(data).row(0)
    assert got["logprob"] == [None, None, None] and got["num_kept"] == [0, 2, 1] and not got["has_tokenizer"]
    assert got["names"] == ["[7]", "[8]", "[9]"] and got["tokens"] == ["[3]", "[4]", "[5]"]


def test_the_server_answers_its_own_page_alone(server: ViewServer) -> None:
    port = server.server_address[1]
    for path, kind in (("/", "html"), ("/view.js", "javascript"), ("/view.css", "css")):
        status, _, headers = asked(server, path)
        assert status == 200 and kind in headers["Content-Type"]
        assert (
            "script-src 'self'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
        )
    assert asked(server, "/api/about")[0] == 200
    assert asked(server, "/api/about", Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", ""):
        status, content, _ = asked(server, "/api/about", Host=host)
        assert status == 403 and "name alone" in content
    assert asked(server, "/api/about", **{"X-Kdata": ""})[0] == 404  # what another site can make a browser ask
    for path in ("/api/nothing", "/../view.js", "/page/view.js", "/etc/passwd", "/%2e%2e/x"):
        assert asked(server, path)[0] == 404
    for path in ("/api/row?number=-1", "/api/row?number=1e9", "/api/row?number=%FF", "/api/rows?limit=1000"):
        status, content, _ = asked(server, path)
        assert status == 400 and content["error"]
    assert asked(server, f"/api/row?{urlencode({'number': 10**6})}")[0] == 404
    assert asked(server, f"/api/rows?{urlencode({'where': 'x' * 20_000})}")[0] == 400
    with pytest.raises(StorageError, match="--port"):
        ViewServer(server.view, port)


def test_head_is_get_without_the_content(server: ViewServer) -> None:
    port = server.server_address[1]
    for path in ("/", "/api/about", "/nothing"):
        answers = []
        for method in ("GET", "HEAD"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, path, headers={"X-Kdata": "1"})
            answer = connection.getresponse()
            content = answer.read()
            connection.request(method, path, headers={"X-Kdata": "1"})  # the connection is still in order
            assert connection.getresponse().status == answer.status
            connection.close()
            headers = {name: value for name, value in answer.headers.items() if name != "Date"}
            answers.append((answer.status, headers))
            assert bool(content) == (method == "GET")
        assert answers[0] == answers[1]


def test_questions_at_once(server: ViewServer, dataset: kdata.Dataset) -> None:
    answers: list[Any] = []

    def ask(number: int) -> None:
        answers.append(
            (number, asked(server, f"/api/row?number={number}")[1]["id"], asked(server, "/api/rows")[1]["total"])
        )

    threads = [threading.Thread(target=ask, args=(n % dataset.num_rows,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(
        (n % dataset.num_rows, dataset[n % dataset.num_rows].id, dataset.num_rows) for n in range(12)
    )


def test_the_folder_holds_its_rows_and_no_markup(dataset: kdata.Dataset, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["view", str(dataset.path), "--export", str(tmp_path / "page"), "--plan", "half"])
    assert result.exit_code == 0, result.output
    taken = View(dataset).rows(plan="half", limit=values.MOST_ROWS)["rows"]
    assert f"{len(taken)} rows" in result.output
    page = tmp_path / "page"
    assert {path.name for path in page.iterdir()} == {"index.html", "view.js", "view.css", "data"}
    assert 'data-mode="folder"' in (page / "index.html").read_text("utf-8")
    for path in (page / "data").iterdir():
        content = path.read_text("ascii")
        assert "<" not in content and re.fullmatch(rf'kdataLoaded\("{path.stem}", .*\);\n', content)
    shown = json.loads((page / "data" / "rows.js").read_text("ascii").partition(", ")[2].rpartition(");")[0])
    assert [row["id"] for row in shown["rows"]] == [row["id"] for row in taken]


def test_bad_calls_write_nothing(dataset: kdata.Dataset, view: View, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export(view, tmp_path / "full")
    with pytest.raises(DataError, match="no row is left"):
        export(view, tmp_path / "none", where="false")
    for arguments in (["--rows", "5"], ["--where", "true"], ["--export", str(tmp_path / "p"), "--open"]):
        result = CliRunner().invoke(app, ["view", str(dataset.path), *arguments])
        assert isinstance(result.exception, ConfigError)
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_ctrl_c_ends_the_server_while_a_query_runs(dataset: kdata.Dataset, interruptible: None) -> None:
    command = [sys.executable, "-c", "from kdata.pipelines.cli.main import main; main()", "view", str(dataset.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        url = urlsplit(next(match[0] for line in process.stdout if (match := re.search(r"http://\S+", line))))
        connection = http.client.HTTPConnection(url.netloc)
        where = "(select count(*) from range(1000000000000) t(a) where a % 7 = 3) > 0"  # hours
        connection.request("GET", f"/api/rows?{urlencode({'where': where})}", headers={"X-Kdata": "1"})
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in output
    finally:
        process.kill()


def test_a_relative_folder_stays_the_same(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset.path.parent)
    here = View(kdata.open(dataset.path.name), kdata.open(dataset.path.name))
    monkeypatch.chdir(tmp_path)
    assert here.newest() is here
    assert here.row(0)["id"] == dataset[0].id and len(here.rows(limit=3)["rows"]) == 3

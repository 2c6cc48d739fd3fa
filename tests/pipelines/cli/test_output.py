"""What commands print: every type of DuckDB has its value in every format, and no text from data is obeyed."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdata
from kdata.errors import QueryError
from kdata.observe.terminal import PlainConsole
from kdata.pipelines.cli import common
from kdata.pipelines.cli.main import app, call
from kdata.pipelines.cli.train import FIGURES, print_evaluation
from kdata.selection.ranked import All
from kdata.selection.select import select
from kdata.store import sql
from tests.kdata.selection.plans import Row, dataset_of

RUNNER = CliRunner(env={"COLUMNS": "400"})
HOSTILE = "a\x1b[31m]0;b\x07\u202ec\x9b2J\rd[bold]e[/]:smile:"
SHOWN = "a\\x1b[31m]0;b\\x07\\u202ec\\x9b2J\\rd[bold]e[/]:smile:"


def printed(dataset: Path, query: str, format: str) -> str:
    """What `kdata sql` prints."""
    result = RUNNER.invoke(app, ["sql", str(dataset), query, "--format", format])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def strict(text: str) -> Any:
    """Parsed JSON; NaN and Infinity, which Python reads, are refused."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# Expression, value in JSON, text in CSV and in a table.
VALUES: list[tuple[str, Any, str, str]] = [
    ("sum(x) from (values (4000), (431)) t(x)", 4431, "4431", "4,431"),
    ("(-170141183460469231731687303715884105728)::hugeint", -(2**127), str(-(2**127)), f"{-(2**127):,}"),
    ("340282366920938463463374607431768211455::uhugeint", 2**128 - 1, str(2**128 - 1), str(2**128 - 1)),
    ("18446744073709551615::ubigint", 2**64 - 1, str(2**64 - 1), f"{2**64 - 1:,}"),
    ("123456789012345678901234567890123456789012345::bignum", int("123456789" + "012345678901234567890123456789012345"),
     "123456789" + "012345678901234567890123456789012345", "123456789" + "012345678901234567890123456789012345"),
    ("1.10::decimal(5, 2)", 1.1, "1.10", "1.10"),
    ("'nan'::double", "NaN", "nan", "nan"),
    ("'-inf'::float", "-Infinity", "-inf", "-inf"),
    ("1e-9::double", 1e-9, "1e-9", "1.0000e-09"),
    ("true", True, "true", "True"),
    ("date '2024-02-29'", "2024-02-29", "2024-02-29", "2024-02-29"),
    ("'infinity'::date", "infinity", "infinity", "infinity"),
    ("date '20000-01-01'", "20000-01-01", "20000-01-01", "20000-01-01"),
    ("timestamp '0044-03-15 (BC) 12:00:00'", *["0044-03-15 (BC) 12:00:00"] * 3),
    ("timestamp_ns '2024-01-01 00:00:00.123456789'", *["2024-01-01 00:00:00.123456789"] * 3),
    ("'12:30:00+02:30'::timetz", *["12:30:00+02:30"] * 3),
    ("'24:00:00'::time", *["24:00:00"] * 3),
    ("interval '14 months 3 days'", *["1 year 2 months 3 days"] * 3),
    ("'7d9f5ba0-1111-4222-8333-123456789abc'::uuid", *["7d9f5ba0-1111-4222-8333-123456789abc"] * 3),
    (r"'\x00\xFFa'::blob", *[r"\x00\xFFa"] * 3),
    ("'0010110'::bit", *["0010110"] * 3),
    ("'b'::enum('a', 'b')", *["b"] * 3),
    ("null", None, "", ""),
    ("''", "", "", ""),
    ("[1, null, 3]", [1, None, 3], "[1,null,3]", "[1,null,3]"),
    ("[1.5, 'nan'::double]", [1.5, "NaN"], '[1.5,"NaN"]', '[1.5,"NaN"]'),
    ("['NaN', 'a\"NaN', '\\']", ["NaN", 'a"NaN', "\\"], r'["NaN","a\"NaN","\\"]', r'["NaN","a\"NaN","\\"]'),
    ("{'a': {'b': [340282366920938463463374607431768211455::uhugeint]}}", {"a": {"b": [2**128 - 1]}},
     '{"a":{"b":[340282366920938463463374607431768211455]}}', '{"a":{"b":[340282366920938463463374607431768211455]}}'),
    ("map {1: date '2024-01-01', 2: null}", {"1": "2024-01-01", "2": None},
     '{"1":"2024-01-01","2":null}', '{"1":"2024-01-01","2":null}'),
    ("union_value(age := 5::smallint)", {"age": 5}, '{"age":5}', '{"age":5}'),
    ("array_value(1, 2)", [1, 2], "[1,2]", "[1,2]"),
    ("'{\"k\": [1]}'::json", {"k": [1]}, '{"k": [1]}', '{"k": [1]}'),
    ("42::variant", 42, "42", "42"),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "value", "text", "cell"), VALUES, ids=[v[0][:40] for v in VALUES])
def test_a_value_is_right_in_every_format(captured: Path, expression: str, value: Any, text: str, cell: str) -> None:
    query = f"select {expression}" if " from " in expression else f"select {expression} as v"
    [row] = strict(printed(captured, query, "json"))
    assert list(row.values()) == [value] and type(next(iter(row.values()))) is type(value)
    header, line = csv.reader(io.StringIO(printed(captured, query, "csv")))
    assert [header, line] == [list(row), [] if value is None else [text]]
    body = printed(captured, query, "table").rpartition("─")[2]
    assert cell in body if cell else not body.strip()


def test_every_type_that_duckdb_has_can_be_printed(captured: Path) -> None:
    query = "select * exclude (medium_enum, large_enum) from test_all_types()"
    rows = strict(printed(captured, query, "json"))
    assert len(rows) == 3 and len(rows[0]) > 50 and all(value is None for value in rows[2].values())
    assert rows[1]["timestamp_ns"] == "2262-04-11 23:47:16.854775806" and rows[1]["uhugeint"] == 2**128 - 1
    lines = list(csv.DictReader(io.StringIO(printed(captured, query, "csv"))))
    assert [line["bit"] for line in lines] == ["0010001001011100010101011010111", "10101", ""]
    assert "83 years 3 months 999 days 00:16:39.999999" in printed(captured, query, "table")


@pytest.mark.parametrize(
    ("expression", "lacking"),
    [("1::uhugeint", "UHUGEINT"), ("[{'t': '12:00:00+01'::timetz}]", "TIME WITH TIME ZONE"), ("'01'::bit", "BIT"),
     ("1::variant", "VARIANT"), ("map {'a': 1::bignum}", "BIGNUM")],
)  # fmt: skip
def test_a_type_that_arrow_lacks_is_refused_in_arrow(captured: Path, expression: str, lacking: str) -> None:
    dataset = kdata.open(captured)
    with pytest.raises(QueryError, match=rf"column 'v' has the type .*, and Arrow has no {lacking}; write ::varchar"):
        dataset.sql(f"select {expression} as v")
    assert dataset.sql(f"select ({expression})::varchar as v").num_rows == 1
    assert dataset.sql(f"select {expression} as v", values="text").num_rows == 1


def test_arrow_keeps_the_types_that_it_has(captured: Path) -> None:
    table = kdata.open(captured).sql("select sum(n) as s, date '2024-01-01' as d, [1.5] as l from (values (4431)) t(n)")
    assert [int(table["s"][0].as_py()), str(table["d"][0].as_py())] == [4431, "2024-01-01"]


def test_two_columns_of_one_name_are_refused_in_json_and_shown_elsewhere(captured: Path) -> None:
    result = RUNNER.invoke(app, ["sql", str(captured), "select 1 as a, 2 as a", "--format", "json"])
    assert isinstance(result.exception, QueryError) and "--format json: two columns are named 'a'" in str(
        result.exception
    )
    assert printed(captured, "select 1 as a, 2 as a", "csv").split() == ['"a","a"', "1,2"]
    assert printed(captured, "select 1 as a, 2 as a", "table").split()[-2:] == ["1", "2"]


def test_json_of_nothing_is_an_empty_list(captured: Path) -> None:
    assert strict(printed(captured, "from rows limit 0", "json")) == []


def test_a_result_is_printed_while_it_comes(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of three rows it is what it is in one part."""
    queries = ["from tokens", "select [token] as l, weight from entries where is_draw is not null", "from range(201)"]
    whole = [printed(captured, query, format) for query in queries for format in ("csv", "json", "table")]
    monkeypatch.setattr(sql, "ROWS_AT_A_TIME", 3)
    assert [printed(captured, query, format) for query in queries for format in ("csv", "json", "table")] == whole
    assert "200 of 201 rows; --format csv prints all" in whole[-1]
    assert len(strict(whole[1])) == len(list(csv.DictReader(io.StringIO(whole[0])))) == kdata.open(captured).num_tokens


def test_an_error_behind_the_first_rows_is_kdata_s(captured: Path) -> None:
    query = "select case when range < 2000000 then 1 else cast('a' || range as integer) end as n from range(2000001)"
    result = RUNNER.invoke(app, ["sql", str(captured), query, "--format", "csv"])
    assert isinstance(result.exception, QueryError) and "Could not convert string 'a2000000'" in str(result.exception)


def hostile_query() -> str:
    """A query with hostile text as a value, inside of a list, and as a column's name."""
    literal = "'" + HOSTILE + "'"
    return f'select {literal} as "{HOSTILE}", [{literal}] as l'


def test_nothing_in_a_value_or_a_name_is_obeyed(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.out, "_width", 300)  # else the text is wrapped where the terminal ends
    shown = printed(captured, hostile_query(), "table")
    assert shown.count(SHOWN) == 2 and not set(shown) & set("\x1b\x07\u202e\x9b\r")
    text = printed(captured, hostile_query(), "json")
    assert not set(text) & set("\x1b\x07\u202e\x9b\r") and strict(text) == [{HOSTILE: HOSTILE, "l": [HOSTILE]}]
    lines = list(csv.reader(io.StringIO(printed(captured, hostile_query(), "csv"), newline="")))
    assert lines[0][0] == lines[1][0] == HOSTILE, "into a pipe CSV goes as it is"


def test_csv_on_a_terminal_shows_escapes(captured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    table = kdata.open(captured).sql(hostile_query(), values="text")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    common.print_csv(table.to_reader())
    assert capsys.readouterr().out.startswith(f'"{SHOWN}"')


@pytest.mark.parametrize("name", ["[v2] set", "[/] [bold]x", ":key: [link=a]b[/link]", "e\x1b[2J\u202e", "l\nm"])
def test_a_folder_s_name_is_printed_as_it_is(
    captured: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / name
    shutil.copytree(captured, root)
    monkeypatch.setenv("COLUMNS", "400")
    select(kdata.open(root), All())
    escaped = str(root).replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\n", "\\n")
    for command in (["info", root], ["head", root, tmp_path / f"{name} h", "--num-rows", 2], ["status", root],
                    ["plan", "show", root, "all", "--picture", tmp_path / f"{name}.svg"], ["verify", root]):  # fmt: skip
        assert call([str(part) for part in command]) == 0
        shown = capsys.readouterr()
        assert not set(shown.out + shown.err) & set("\x1b\u202e")
        if command[0] in ("info", "head", "status"):
            assert escaped in (shown.out + shown.err).replace("\n", ""), command
    shutil.rmtree(root / "data")
    assert call(["verify", str(root)]) == 1
    shown = capsys.readouterr()
    assert not set(shown.err) & set("\x1b\u202e") and (escaped in shown.err or "\n" in name)


def test_a_wrong_argument_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call([f"in{HOSTILE}"]) == 2
    assert SHOWN in capsys.readouterr().err
    assert call(["info", f"./{HOSTILE}"]) == 1
    assert SHOWN in capsys.readouterr().err


@given(
    names=st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=12),
    numbers=st.lists(st.integers(0, 10**9), min_size=1, max_size=4),
    label=st.integers(0, 40),
    width=st.integers(50, 200),
)
def test_no_number_of_a_table_is_broken_or_lost(names: list[str], numbers: list[int], label: int, width: int) -> None:
    """Columns that do not fit stand below, each table with the first column again."""
    rows = [[label * "x", *(f"{number:,} 12.3%" for _ in names)] for number in numbers]
    buffer = io.StringIO()
    with patch.object(common, "out", PlainConsole(file=buffer, width=width)):
        common.print_rows(["", *names], rows, right=[False, *(True for _ in names)], title="t", caption="c")
    lines = buffer.getvalue().splitlines()
    for number in set(numbers):
        cells = sum(re.findall(r"\S+ 12\.3%", line).count(f"{number:,} 12.3%") for line in lines)
        assert cells == len(names) * numbers.count(number)
    assert max(map(len, lines)) <= width


def test_a_student_measured_in_many_domains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures: dict[str, Any] = {**dict.fromkeys(FIGURES, 0.5), "tokens": 5}
    domains = {f"d{n:03}": {**figures, "nll": 2.0 + n, "tokens": n} for n in range(300)}
    measured = {"label": "student", "kl_is": "exact", "bounds_are": "", "domains": domains,
                "overall": {**figures, "nll": 1.25, "tokens": 44_850}}  # fmt: skip
    buffer = io.StringIO()
    monkeypatch.setattr(common, "out", PlainConsole(file=buffer, width=80))
    print_evaluation(measured)
    said = buffer.getvalue()
    assert "301.000" in said and "282.000" in said and "281.000" not in said and "1.250" in said
    assert "20 largest of 300 domains" in said
    print_evaluation({**measured, "domains": {"": figures, "all": {**figures, "nll": 7.5}}})
    said = buffer.getvalue().removeprefix(said)
    assert "(empty)" in said and "7.500" in said and "1.250" in said and "largest" not in said


def test_a_table_that_is_cut_says_how_its_command_prints_all(tmp_path: Path) -> None:
    data = dataset_of(tmp_path / "many", [Row(f"r{n}", f"d{n}", 2, 1.0) for n in range(common.MAX_ROWS + 1)])
    said = RUNNER.invoke(app, ["info", str(data.path)]).stdout
    assert "200 of 201 domains and sources; --format json prints all" in said
    whole = json.loads(RUNNER.invoke(app, ["info", str(data.path), "--format", "json"]).stdout)
    assert len(whole["domains"]) == common.MAX_ROWS + 1


def test_a_wide_table_without_rows_has_its_headings_and_one_with_rows_all_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = {f"column_{n}": pa.array([10**17 + n]) for n in range(9)}
    buffer = io.StringIO()
    monkeypatch.setattr(common, "out", PlainConsole(file=buffer, width=30))
    common.print_table(pa.table(columns).slice(0, 0))
    said = buffer.getvalue()
    assert all(name in said for name in columns)
    common.print_table(pa.table({**columns, "n" * 40: pa.array([1])}))
    records = "".join(buffer.getvalue().removeprefix(said).split())
    assert all(f"{10**17 + n:,}" in records for n in range(9)) and "…" not in records

"""JSON of strangers: limits of depth, digits, size, keys; ordinary JSON stays as it is."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.corpus.json_rows import JsonFile
from kdata.errors import DataError
from kdata.format import json_text
from kdata.format.json_text import MAX_DEPTH, parse_json, parse_object, parse_row, read_json
from kdata.format.records import RowError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(VALUES)
def test_ordinary_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_row(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "deep"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "deep"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is repeated"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": ' + "9" * 6000 + "}", "6,000 digits"),
        ('{"a": ' + "9" * 30 + "}", "30 digits"),
        ("{", "line 1"),
        ("", "line 1"),
        (b'{"a": "\xff"}', "utf-8"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_document_beyond_a_limit_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_json(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 70 + "]" * 70, "9" * 6000, "{"], ids=lambda text: text[:3])
def test_a_row_beyond_a_limit_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse_row(text)


def test_a_row_may_have_what_other_tools_write() -> None:
    row = parse_row('{"a": NaN, "b": 1, "b": 2}')
    assert row["b"] == 2 and row["a"] != row["a"]
    assert parse_row("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert parse_row("[" + "[], " * 1000 + "[]]") == [[]] * 1001  # many brackets, but not deep


def test_no_more_of_a_file_than_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text('{"a": "' + "x" * 1000 + '"}')
    with pytest.raises(DataError, match="more than 100 bytes"):
        read_json(tmp_path / "large.json", 100)
    with pytest.raises(DataError, match="object"):
        parse_object("[1]")
    assert read_json(tmp_path / "large.json") == {"a": "x" * 1000}


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("MAX_ROW_CHARACTERS", 32), ("MAX_PIECE_CHARACTERS", 8), ("MAX_LINE_CHARACTERS", 100)):
        monkeypatch.setattr(json_text, name, most)


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 34, 40, 41, 42, 49, 50, 51, 99])
def test_of_a_line_longer_than_a_row_the_beginning_is_given(length: int, end: str) -> None:
    """And the lines around it are whole, wherever the pieces in which it is passed over end."""
    content = "a\n" + "x" * length + "\nlast" + end
    lines = ["a\n", ("x" * length + "\n")[:33], "last" + end]
    assert list(json_text.row_lines(io.StringIO(content))) == lines
    assert list(json_text.row_lines(io.BytesIO(content.encode()))) == [line.encode() for line in lines]


@pytest.mark.usefixtures("short_lines")
def test_a_line_without_an_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a", "text": "b"}\n')
    os.truncate(path, 20 << 30)  # a hole: what a copy leaves that was cut off
    with pytest.raises(DataError, match="a line has more than 100 characters"):
        list(json_text.row_lines(path.open("rb")))
    with pytest.raises(DataError, match="a line has more than 100 characters"):
        JsonFile(path, "rows.jsonl")
    path.write_bytes(b'{"id": "a", "text": "b"}\n' + b"x" * 60 + b'\n{"id": "c"}\n')
    rows = list(JsonFile(path, "rows.jsonl").rows(["id"]))
    assert [isinstance(row, RowError) for row in rows] == [False, True, False], "a long line spoils its own row only"

"""JSON of strangers: limits of depth, digits, size, keys; ordinary JSON stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.errors import DataError
from kdata.format.json_text import MAX_DEPTH, parse_json, parse_object, parse_row, read_json

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

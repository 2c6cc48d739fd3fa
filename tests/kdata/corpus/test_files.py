"""Files as people have them: columns of any type, files that differ, folders of other tools, JSON in every form."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.corpus import json_rows
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.files import rows_of
from kdata.corpus.values import as_text
from kdata.errors import ConfigError, DataError
from kdata.format.records import Reject

ROWS: list[dict[str, Any]] = [
    {"id": "a", "domain": "code", "text": "x = 1\n", "source": "web", "license": "MIT"},
    {"id": "b", "domain": "prose", "text": "naïve 🙂", "source": "book", "license": "CC0"},
]


def write_arrow(path: Path, table: pa.Table, *, stream: bool = False) -> Path:
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as file:
        file.write_table(table)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the ending; a CSV has the keys of all rows as columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        write_arrow(path, pa.Table.from_pylist(rows))
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path, **settings: Any) -> list[Document]:
    parts = list(Corpus(CorpusConfig(path=str(path), **settings)).documents())
    documents = [part for part in parts if isinstance(part, Document)]
    assert len(parts) == len(documents), "no row is a reject"
    return documents


def reject_of(path: Path, **settings: Any) -> Reject:
    """The only reject among the rows of a corpus."""
    [reject] = [
        part for part in Corpus(CorpusConfig(path=str(path), **settings)).documents() if isinstance(part, Reject)
    ]
    return reject


def about(path: Path, **settings: Any) -> list[tuple[str, str, str | None, str | None]]:
    return [(d.id, d.domain, d.origin, d.license) for d in read(path, **settings)]


def identity(path: Path, **settings: Any) -> dict[str, Any]:
    return Corpus(CorpusConfig(path=str(path), **settings)).settings()


# ---------------------------------------------------------------------------------------- columns of any type

DAY = datetime.date(2024, 2, 29)
MOMENT = datetime.datetime(2024, 2, 29, 12, 30, 5, 7)
NAME = uuid.UUID(int=5)
COLUMNS: dict[str, tuple[pa.Array, str | None]] = {
    "integer": (pa.array([7]), "7"),
    "float": (pa.array([1.5]), "1.5"),
    "nan": (pa.array([float("nan")]), None),
    "null": (pa.array([None], pa.null()), None),
    "bool": (pa.array([True]), "True"),
    "decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
    "date": (pa.array([DAY]), "2024-02-29"),
    "time": (pa.array([MOMENT.time()]), "12:30:05.000007"),
    "timestamp": (pa.array([MOMENT], pa.timestamp("us")), "2024-02-29 12:30:05.000007"),
    "zoned": (pa.array([MOMENT], pa.timestamp("us", "UTC")), "2024-02-29 12:30:05.000007+00:00"),
    "nanoseconds": (pa.array([1_000_000_001], pa.timestamp("ns")), "1970-01-01 00:00:01.000000001"),
    "whole nanoseconds": (pa.array([1_000_000_000], pa.timestamp("ns")), "1970-01-01 00:00:01"),
    "nanosecond time": (pa.array([1_001], pa.time64("ns")), "00:00:00.000001001"),
    "duration": (pa.array([90_000_000_000], pa.duration("ns")), "0:01:30"),
    "year 10000": (pa.array([253402300800], pa.timestamp("s")), "10000-01-01 00:00:00"),
    "bytes": (pa.array(["é".encode()]), "é"),
    "other bytes": (pa.array([b"\xff\x00"]), "0xff00"),
    "fixed bytes": (pa.array([b"abcd"], pa.binary(4)), "abcd"),
    "dictionary": (pa.array(["x"]).dictionary_encode(), "x"),
    "large text": (pa.array(["x"], pa.large_string()), "x"),
    "text view": (pa.array(["x"], pa.string_view()), "x"),
    "list": (pa.array([["MIT", "Apache-2.0"]]), '["MIT", "Apache-2.0"]'),
    "empty list": (pa.array([[]], pa.list_(pa.string())), "[]"),
    "fixed list": (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), "[1, 2]"),
    "list of dates": (pa.array([[DAY]]), '["2024-02-29"]'),
    "nested list": (pa.array([[[1], [2, 3]]]), "[[1], [2, 3]]"),
    "object": (pa.array([{"url": "x", "at": DAY, "n": None}]), '{"at": "2024-02-29", "url": "x"}'),
    "map": (pa.array([[("b", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), '{"a": 2, "b": 1}'),
    "uuid": (pa.array([NAME.bytes], pa.uuid()), str(NAME)),
    "list of nanoseconds": (pa.array([[1_001, None]], pa.list_(pa.time64("ns"))), '["00:00:00.000001001", null]'),
    "object with nanoseconds": (
        pa.StructArray.from_arrays([pa.array([1_001], pa.time64("ns")), pa.array([NAME.bytes], pa.uuid())], ["at", "id"]),
        f'{{"at": "00:00:00.000001001", "id": "{NAME}"}}',
    ),
    "list of the year 10000": (pa.array([[253402300800, 0]], pa.list_(pa.timestamp("s"))),
                               '["10000-01-01 00:00:00", "1970-01-01 00:00:00"]'),
    "map to the year 10000": (pa.array([[("a", 2932897)]], pa.map_(pa.string(), pa.date32())), '{"a": "10000-01-01"}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_columns_of_any_type_become_text(tmp_path: Path, kind: str, ending: str) -> None:
    column, text = COLUMNS[kind]
    plain = pa.array(["a"])
    table = pa.table({"id": plain, "domain": plain, "text": plain, "source": column, "license": column})
    if text is not None:
        table = table.set_column(0, "id", column).set_column(1, "domain", column)
    path = tmp_path / f"rows.{ending}"
    pq.write_table(table, path) if ending == "parquet" else write_arrow(path, table)
    expected = text if text is not None else "a"
    assert about(path) == [(expected, expected, text, text)]


def latin(*texts: str) -> pa.Array:
    """Texts of one sign each, as bytes of Latin-1 in a column that says UTF-8."""
    offsets = pa.array(range(len(texts) + 1), pa.int32()).buffers()[1]
    return pa.Array.from_buffers(
        pa.string(), len(texts), [None, offsets, pa.py_buffer("".join(texts).encode("latin-1"))]
    )


OFFSETS = pa.array([0, 1, 2, 3], pa.int32())
OF_TEXTS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "text": lambda texts: texts,
    "list": lambda texts: pa.ListArray.from_arrays(OFFSETS, texts),
    "fixed list": lambda texts: pa.FixedSizeListArray.from_arrays(texts, 1),
    "object": lambda texts: pa.StructArray.from_arrays([texts], ["a"]),
    "object with nulls": lambda texts: pa.StructArray.from_arrays([pa.nulls(3), texts], ["a", "b"]),
    "map": lambda texts: pa.MapArray.from_arrays(OFFSETS, pa.array(["a", "b", "c"]), texts),
    "list of objects": lambda texts: pa.ListArray.from_arrays(OFFSETS, pa.StructArray.from_arrays([texts], ["a"])),
    "dictionary": lambda texts: pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), texts),
}


@pytest.mark.parametrize(
    ("kind", "ending"),  # pyarrow refuses a Parquet file whose dictionary is not UTF-8
    [(kind, end) for kind in OF_TEXTS for end in ("parquet", "arrow") if (kind, end) != ("dictionary", "parquet")],
)
def test_a_byte_that_is_not_utf8_inside_of_a_column_spoils_its_own_row_only(
    tmp_path: Path, kind: str, ending: str
) -> None:
    ids = pa.array(["a", "b", "c"])
    table = pa.table({"id": ids, "domain": ids, "text": ids, "source": OF_TEXTS[kind](latin("x", "é", "z"))})
    path = tmp_path / f"rows.{ending}"
    pq.write_table(table, path) if ending == "parquet" else write_arrow(path, table)
    first, bad, last = Corpus(CorpusConfig(path=str(path))).documents()
    assert isinstance(first, Document) and "x" in str(first.origin) and "é" not in str(first.origin)
    assert isinstance(last, Document) and "z" in str(last.origin)
    assert isinstance(bad, Reject) and (bad.id, bad.reason) == ("b", "not_text")


@pytest.mark.parametrize("letter", ["y", "é"])
@pytest.mark.parametrize("kind", ["text", "list", "object with nulls"])
def test_an_offset_that_leads_out_of_the_memory_of_a_column_is_refused(tmp_path: Path, kind: str, letter: str) -> None:
    ids = pa.array(["a", "b", "c"])
    offsets = pa.array([0, 3_000_000, 2, 3], pa.int32()).buffers()[
        1
    ]  # the last one is right, which is all that is quick to see
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, latin("x", letter, "z").buffers()[2]])
    path = tmp_path / "rows.arrow"
    write_arrow(path, pa.table({"id": ids, "domain": ids, "text": ids, "source": OF_TEXTS[kind](texts)}))
    with pytest.raises(DataError, match="cannot be read as ipc"):
        list(Corpus(CorpusConfig(path=str(path))).documents())


@pytest.mark.parametrize("size", [1, 2])
def test_rows_of_a_slice_are_its_own(size: int) -> None:
    """With nulls, empty lists and far dates in between."""
    far = 253402300800
    lists = [[far], None, [], [0, None, far]]
    objects = [{"a": far, "b": [1]}, None, {"a": None, "b": None}, {"a": 0, "b": []}]
    maps = [[("x", far)], None, [], [("y", 0), ("z", None)]]
    batch = pa.record_batch(
        {
            "lists": pa.array(lists, pa.list_(pa.timestamp("s"))),
            "objects": pa.array(objects, pa.struct([("a", pa.timestamp("s")), ("b", pa.list_(pa.int64()))])),
            "maps": pa.array(maps, pa.map_(pa.string(), pa.timestamp("s"))),
        }
    )
    whole = list(rows_of(batch))
    assert whole[0]["lists"] == ["10000-01-01 00:00:00"] and whole[1]["objects"] is None and whole[2]["maps"] == {}
    assert as_text(whole[3]["maps"]) == '{"y": "1970-01-01 00:00:00", "z": null}'
    pieces = [row for begin in range(0, 4, size) for row in rows_of(batch.slice(begin, size))]
    as_texts = [[as_text(value) for value in row.values()] for row in (*whole, *pieces)]
    assert as_texts[:4] == as_texts[4:]


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (["b", 1], '["b", 1]'), ({"b": 1, "a": None}, '{"a": null, "b": 1}'), (True, "True"), (None, None)],
)
def test_json_of_any_type_becomes_text(tmp_path: Path, value: Any, text: str | None) -> None:
    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "source": value, "license": value}])
    assert about(path) == [("a", "code", text, text)]


@pytest.mark.parametrize("column", ["id", "domain", "source", "license", "text"])
def test_half_a_surrogate_pair_in_any_column_names_row_and_column(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], column: "x\ud83d"}])
    reject = reject_of(path)
    assert reject.reason == "not_text" and f"column '{column}', character 1: '\\ud83d' is half" in reject.detail
    assert reject.id == ("x\\ud83d" if column == "id" else "a")


def test_text_that_is_stored_as_bytes_is_text(tmp_path: Path) -> None:
    """Older writers mark no column of Parquet as text."""
    table = pa.table({"id": ["a"], "domain": ["x"], "text": pa.array(["naïve".encode()])})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [d.text for d in read(tmp_path / "rows.parquet")] == ["naïve"]
    pq.write_table(table.set_column(2, "text", pa.array([b"\xff"])), tmp_path / "rows.parquet")
    reject = reject_of(tmp_path / "rows.parquet")
    assert (reject.id, reject.reason) == ("a", "not_text") and "column 'text' holds bytes that are not" in reject.detail


def test_columns_of_a_csv_are_text_even_where_they_look_otherwise(tmp_path: Path) -> None:
    row = {"id": "007", "domain": "1", "text": "5", "source": "2024-01-01", "license": "true"}
    path = write(tmp_path / "rows.csv", [row, {**row, "id": "008", "source": "x", "license": "7"}])
    assert about(path) == [("007", "1", "2024-01-01", "true"), ("008", "1", "x", "7")]
    empty = write(tmp_path / "empty.csv", [{**row, "source": "", "license": "MIT"}])
    assert about(empty) == [("007", "1", None, "MIT")]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(JSON)
def test_any_value_becomes_text_that_can_be_stored(value: Any) -> None:
    text = as_text(value)
    assert text == as_text(value) and (text is None or text.encode())
    if isinstance(value, list | dict):
        assert isinstance(json.loads(str(text)), type(value))


# ------------------------------------------------------------------------------------- files of a folder that differ


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl", "csv", "json"])
def test_a_folder_has_the_columns_of_all_its_files(tmp_path: Path, ending: str) -> None:
    bare = [{key: value for key, value in row.items() if key not in ("source", "license")} for row in ROWS]
    write(tmp_path / f"c/0.{ending}", bare)
    write(tmp_path / f"c/1.{ending}", [{**row, "id": f"second {row['id']}", "extra": "e"} for row in ROWS])
    assert about(tmp_path / "c") == [
        ("a", "code", None, None),
        ("b", "prose", None, None),
        ("second a", "code", "web", "MIT"),
        ("second b", "prose", "book", "CC0"),
    ]


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl"])
def test_the_type_of_a_column_may_differ_between_files(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"c/0.{ending}", [{**row, "id": n, "source": [n]} for n, row in enumerate(ROWS)])
    write(tmp_path / f"c/1.{ending}", [{**ROWS[0], "id": "x", "source": "web"}])
    assert [(d.id, d.origin) for d in read(tmp_path / "c")] == [("0", "[0]"), ("1", "[1]"), ("x", "web")]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_the_names_of_folders_are_columns(tmp_path: Path, ending: str) -> None:
    bare = [{key: value for key, value in row.items() if key != "domain"} for row in ROWS]
    names = {"it's prose": "0", "a%2Fb%20c%3Dd": "1", "__HIVE_DEFAULT_PARTITION__": "2"}
    for name, number in names.items():
        write(
            tmp_path / f"c/year=2024/domain={name}/part-0.{ending}", [{**row, "id": row["id"] + number} for row in bare]
        )
    domains = {d.id: d.domain for d in read(tmp_path / "c", domains=["it's prose", "a/b c=d"])}
    assert domains == {"a0": "it's prose", "b0": "it's prose", "a1": "a/b c=d", "b1": "a/b c=d"}
    assert {d.domain for d in read(tmp_path / "c", domain_column="year")} == {"2024"}
    parts = [part for part in Corpus(CorpusConfig(path=str(tmp_path / "c"))).documents() if isinstance(part, Reject)]
    assert [(reject.id, reject.reason) for reject in parts] == [("a2", "no_domain"), ("b2", "no_domain")]
    one = tmp_path / "c/year=2024/domain=it's prose"
    assert {d.domain for d in read(one)} == {"it's prose"} == {d.domain for d in read(one / f"part-0.{ending}")}


def test_a_column_of_the_file_counts_more_than_the_name_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "c/domain=other/rows.jsonl", ROWS)
    write(tmp_path / "plain/rows.jsonl", ROWS)
    assert [d.domain for d in read(tmp_path / "c")] == ["code", "prose"]
    assert identity(tmp_path / "c") == identity(tmp_path / "plain"), "the folder's name decides nothing"


def test_what_a_folder_s_name_says_is_part_of_the_identity(tmp_path: Path) -> None:
    bare = [{"id": "a", "text": "x"}]
    for name in ("one", "other"):
        write(tmp_path / name / f"domain={name}/rows.jsonl", bare)
    assert identity(tmp_path / "one")["sha256"] != identity(tmp_path / "other")["sha256"]
    unread = [identity(tmp_path / name, domain_column=None)["sha256"] for name in ("one", "other")]
    assert unread[0] == unread[1]


HIDDEN = (
    "._a.jsonl", ".DS_Store", "_SUCCESS", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/._a.jsonl",
    "_delta_log/00000.json", ".a.jsonl.crc", "_temporary/0/part-0.parquet", ".part.parquet",
)  # fmt: skip


def test_what_tools_leave_beside_the_data_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / ".home/c"  # a hidden folder above the corpus hides nothing
    write(folder / "a.jsonl", ROWS[:1])
    write(folder / "_b.jsonl", ROWS[1:])
    clean = identity(folder)
    for name in HIDDEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (folder / "d.parquet").mkdir()
    assert [d.id for d in read(folder)] == ["b", "a"] and identity(folder) == clean
    assert [d.id for d in read(write(tmp_path / ".hidden.jsonl", ROWS))] == ["a", "b"], "named, so it is meant"


def test_an_arrow_stream_is_read_as_a_file_is(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS * 1)
    write_arrow(tmp_path / "s.arrow", table, stream=True)
    write_arrow(tmp_path / "f.arrow", table)
    assert read(tmp_path / "s.arrow") == read(tmp_path / "f.arrow")
    (tmp_path / "s.arrow").write_bytes((tmp_path / "s.arrow").read_bytes()[:200])
    with pytest.raises(DataError, match=r"s\.arrow cannot be read as ipc"):
        read(tmp_path / "s.arrow")


# -------------------------------------------------------------------------------------------------- JSON in every form

FORMS = {
    "lines": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "one array": lambda rows: json.dumps(rows),
    "a printed array": lambda rows: "\n\n" + json.dumps(rows, indent=1) + "\n",
    "an array, a row a line": lambda rows: "[" + ",\n".join(json.dumps(row) for row in rows) + "]",
    "printed objects": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "lines of Windows": lambda rows: "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz"])
def test_json_is_read_in_every_form(tmp_path: Path, form: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {**ROWS[0], "id": str(n), "text": '[{]}," \\ é\n' * n, "source": {"deep": [n, None, 1.5e-7]}} for n in range(9)
    ]
    content = FORMS[form](rows).encode()
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    plain = [(d.id, d.text, d.origin) for d in read(path)]
    assert [(name, text) for name, text, _ in plain] == [(row["id"], row["text"]) for row in rows]
    for size in (1, 2, 7, 64):  # borders of the pieces fall everywhere
        monkeypatch.setattr(json_rows, "CHUNK_CHARACTERS", max(size, 3))
        assert [(d.id, d.text, d.origin) for d in read(path)] == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "a"}, {"id": "b"', r"rows\.json, line 1: "),
        ('[\n{"id": "a"}', r"line 2: the array has no end \(\]\)"),
        ('[\n{"id": "a"}\n{"id": "b"}]', "line 3: '{' where ',' or ']' belongs"),
        ('[\n{"id": "a"}\n] [', "line 3: something follows the array"),
        ('[\n{"id": "a"},\n3]', "line 3: the array's entry 1 is not an object"),
        ('[\n{"id": "a"},\n{"id": tru}]', "line 3: Expecting value"),
        ("[" * 100_000, "rows.json, line 1"),
        ('{\n"id": "a",\n}', r"rows\.json, line 3"),
        ("[]", "holds no row"),
        ('{"id": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_what_is_wrong_with_json_is_said_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "rows.json")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_an_array_is_not_held_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**ROWS[0], "id": str(n), "text": "x" * 100} for n in range(2000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(json_rows, "CHUNK_CHARACTERS", 1000)
    held = []
    more = json_rows.Values._more

    def watched(values: json_rows.Values) -> bool:
        answer = more(values)
        held.append(len(values._text))
        return answer

    monkeypatch.setattr(json_rows.Values, "_more", watched)
    assert len(read(tmp_path / "rows.json")) == 2000 and max(held) < 4000


def test_a_compressed_file_of_several_parts_is_read_whole(tmp_path: Path) -> None:
    parts = [gzip.compress((json.dumps(row) + "\n").encode()) for row in ROWS]
    (tmp_path / "rows.jsonl.gz").write_bytes(b"".join(parts))
    assert [d.id for d in read(tmp_path / "rows.jsonl.gz")] == ["a", "b"]
    parts = [pa.compress((json.dumps(row) + "\n").encode(), "zstd", asbytes=True) for row in ROWS]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(parts))
    assert [d.id for d in read(tmp_path / "rows.jsonl.zst")] == ["a", "b"]


# ----------------------------------------------------------------------------------------------- the library `datasets`


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files with class labels: one, splits, rows.parquet."""
    import datasets

    folder = tmp_path_factory.mktemp("labels")
    domain = datasets.ClassLabel(names=["code", "prose"])
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "domain": domain,
            "text": datasets.Value("string"),
            "source": datasets.List(domain),
            "license": {"name": domain, "of": datasets.Value("int8")},
            "other": domain,
        }
    )
    rows = [{**ROWS[n], "domain": n, "source": [n, 1], "license": {"name": n, "of": 1}, "other": n} for n in range(2)]
    whole = datasets.Dataset.from_list(rows, features=features)
    whole.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(folder / "splits"))
    whole.to_parquet(str(folder / "rows.parquet"))
    write_arrow(folder / "rows.arrow", whole.with_format("arrow")[:], stream=True)
    return folder


@pytest.mark.parametrize("name", ["one", "rows.parquet", "rows.arrow", "splits"])
def test_class_labels_are_read_by_name(labelled: Path, name: str) -> None:
    settings = {"split": "train"} if name == "splits" else {}
    assert about(labelled / name, **settings) == [
        ("a", "code", '["code", "prose"]', '{"name": "code", "of": 1}'),
        ("b", "prose", '["prose", "prose"]', '{"name": "prose", "of": 1}'),
    ]
    assert [d.id for d in read(labelled / name, domains=["prose"], **settings)] == ["b"]
    assert identity(labelled / name, **settings)["class_labels"] == "names"


def test_labels_that_are_not_read_do_not_change_the_identity(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "domain", "text")}
        | {"other": datasets.ClassLabel(names=["x"])}
    )
    rows = [{"id": "a", "domain": "d", "text": "t", "other": 0}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "one"))
    assert "class_labels" not in identity(tmp_path / "one")


def test_a_row_without_a_label_has_none(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["code", "prose"])
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "domain", "text")} | {"source": label}
    )
    rows = [{"id": str(n), "domain": "d", "text": "t", "source": value} for n, value in enumerate((-1, None, 1))]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "one"))
    assert [d.origin for d in read(tmp_path / "one")] == [None, None, "prose"]


def test_splits_are_named_and_so_are_saved_folders_inside_a_folder(labelled: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ConfigError, match=r"has the splits \['test', 'train'\]: name one"):
        read(labelled / "splits")
    shutil.copytree(labelled / "one", tmp_path / "c/first")
    shutil.copytree(labelled / "one", tmp_path / "c/second")
    with pytest.raises(ConfigError, match=r"holds folders that `datasets` saved \(first, second\); name one of them"):
        read(tmp_path / "c")

"""Reading text: formats, settings that do not fit, broken files, and bytes per token."""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.config import parse_config
from kdata.corpus import files, library
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.encode import TextEncoder
from kdata.errors import ConfigError, DataError, DependencyError, MissingError
from kdata.format.records import Reject
from kdata.teachers.model import load_tokenizer

ROWS = [
    {
        "id": "007",
        "domain": "code",
        "text": 'def f():\n    return "x, y"\n',
        "source": "a.py",
        "license": "MIT",
    },
    {"id": "b", "domain": "prose", "text": "naïve 🙂\n\nsecond", "source": None, "license": None},
    {"id": "c", "domain": "prose", "text": "", "source": "c", "license": "CC0"},
]


def save(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows in the format of the ending."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    return path


def read(path: Path, **settings: object) -> list[Document]:
    return list(Corpus(CorpusConfig(path=str(path), **settings)).documents())


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "arrow"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    documents = read(save(tmp_path / f"rows.{ending}", ROWS))
    assert [(d.id, d.domain, d.text) for d in documents] == [(r["id"], r["domain"], r["text"]) for r in ROWS]
    assert (documents[0].origin, documents[0].license) == ("a.py", "MIT")
    assert documents[1].origin in (None, "")  # CSV knows no null


def test_an_empty_cell_of_a_csv_is_a_missing_id_or_domain(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "id": ""}, {**ROWS[1], "id": ""}, {**ROWS[2], "domain": ""}, ROWS[0]]
    documents = list(Corpus(CorpusConfig(path=str(save(tmp_path / "rows.csv", rows)))).documents())
    reasons = [one.reason if isinstance(one, Reject) else one.id for one in documents]
    assert reasons == ["no_id", "no_id", "no_domain", "007"]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_row_of_megabytes_and_lines_inside_a_cell_are_read(tmp_path: Path, ending: str) -> None:
    """pyarrow's own defaults refuse the first, and cut the second at block borders."""
    big = [{**ROWS[0], "id": str(n), "text": 'line\n"quoted", and more\n' * 60_000} for n in range(3)]
    documents = read(save(tmp_path / f"rows.{ending}", big))
    assert [d.text for d in documents] == [row["text"] for row in big]


def test_a_row_beyond_the_block_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
    path = save(tmp_path / "rows.csv", [ROWS[0], {**ROWS[0], "id": "big", "text": "x" * 9000}, ROWS[1]])
    with pytest.raises(DataError, match="longer than 4,096 bytes; store such text as Parquet or JSONL"):
        read(path)


def test_a_folder_is_read_in_order_and_must_be_of_one_kind(tmp_path: Path) -> None:
    save(tmp_path / "c/b.jsonl", ROWS[1:])
    save(tmp_path / "c/a.jsonl", ROWS[:1])
    assert [d.id for d in read(tmp_path / "c")] == ["007", "b", "c"]
    save(tmp_path / "c/x.csv", ROWS)
    with pytest.raises(ConfigError, match="mixes formats"):
        read(tmp_path / "c")


def test_domains_and_limit_select_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", ROWS)
    corpus = Corpus(CorpusConfig(path=str(path), domains=["prose"], limit=1))
    assert corpus.num_rows == 1 and [d.id for d in corpus.documents()] == ["b"]
    assert {d.domain for d in read(path, domain_column=None, domain="all")} == {"all"}
    numbered = save(tmp_path / "n.parquet", [{**row, "domain": n} for n, row in enumerate(ROWS)])
    assert [d.domain for d in read(numbered, domains=["1"])] == ["1"]


def test_limit_across_batches(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", [{**ROWS[0], "id": str(n)} for n in range(3000)])
    assert [d.id for d in read(path, limit=2500)] == [str(n) for n in range(2500)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_column": "txet"}, r"no column 'txet' \(text_column\) \(did you mean 'text'\?\)"),
        ({"id_column": "ident"}, r"no column 'ident' \(id_column\)"),
        ({"domains": ["pross"]}, r"no domain 'pross' \(did you mean 'prose'\?\); it has \['code', 'prose'\]"),
        ({"domains": ["code"], "domain_column": None}, "domain_column is null"),
    ],
)
def test_an_unknown_column_or_domain_names_the_nearest(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(save(tmp_path / "rows.jsonl", ROWS), **settings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"nowhere.jsonl does not exist"):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.docx").write_text("")
    with pytest.raises(ConfigError, match="unknown ending"):
        read(tmp_path / "x.docx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        read(tmp_path / "empty")
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="holds no row"):
        read(tmp_path / "none.parquet")


def rejects_and_documents(path: Path, **settings: object) -> tuple[list[Reject], list[Document]]:
    parts = list(Corpus(CorpusConfig(path=str(path), **settings)).documents())
    return [p for p in parts if isinstance(p, Reject)], [p for p in parts if isinstance(p, Document)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([ROWS[1], ROWS[0], ROWS[0]], ("007", "code", "id_twice", "an earlier row has the same id")),
        ([{**ROWS[0], "id": None}, ROWS[1]], ("row-0000000", "code", "no_id", "column 'id' is empty")),
        ([{**ROWS[0], "domain": None}, ROWS[1]], ("007", None, "no_domain", "column 'domain' is empty")),
        ([{**ROWS[0], "text": 5}], ("007", "code", "not_text", "must hold text, not int")),
        ([{**ROWS[0], "text": "a\ud83d"}], ("007", "code", "not_text", "half of a surrogate pair")),
        ([{**ROWS[0], "id": "\ud83d"}], ("\\ud83d", "code", "not_text", "half of a surrogate pair")),
        ([{**ROWS[0], "license": "\ud83d"}], ("007", "code", "not_text", "half of a surrogate pair")),
    ],
)
def test_a_row_that_cannot_be_used_is_a_reject_and_the_others_are_read(
    tmp_path: Path, rows: list[dict[str, object]], expected: tuple[str, ...]
) -> None:
    [reject], others = rejects_and_documents(save(tmp_path / "rows.jsonl", rows))
    assert (reject.id, reject.domain, reject.reason) == expected[:3] and expected[3] in reject.detail
    assert len(others) == len(rows) - 1
    reject.detail.encode()


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "arrow"])
def test_a_byte_that_is_not_utf8_spoils_its_own_row_only(tmp_path: Path, ending: str) -> None:
    texts, path = [b"the cat", b"caf\xe9", "naïve".encode()], tmp_path / f"x.{ending}"
    if ending == "jsonl":
        lines = [b'{"id": "%d", "domain": "d", "text": "%s"}\n' % (n, text) for n, text in enumerate(texts)]
        path.write_bytes(b"".join(lines))
    elif ending == "csv":
        path.write_bytes(b"id,domain,text\n" + b"".join(b"%d,d,%s\n" % line for line in enumerate(texts)))
    else:
        text = pa.Array.from_buffers(pa.string(), 3, pa.array(texts, pa.binary()).buffers())
        table = pa.table({"id": ["0", "1", "2"], "domain": ["d"] * 3, "text": text})
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
    [reject], others = rejects_and_documents(path)
    assert (reject.id, reject.reason) == ("1", "not_text") and "a byte that is not UTF-8" in reject.detail
    assert [document.text for document in others] == ["the cat", "naïve"]


BROKEN = {
    "empty.jsonl": b"",
    "empty.csv": b"",
    "text.jsonl": b"this is not JSON\n",
    "lines.jsonl": b'this is not JSON\n[1, 2]\n{"id": \n',
    "ragged.csv": b"id,domain,text\na,d\n",
    "junk.parquet": b"PAR1 junk PAR1",
    "junk.arrow": b"ARROW1",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gives_one_data_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=name) as caught:
        read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


GOOD = '{"id": "a", "domain": "d", "text": "t"}\n'
SPOILED = {
    "this is not JSON": ("not_json", "is not JSON: Expecting value at character 1"),
    '{"id": "b", "domain": "d", "te': ("not_json", "is not JSON: Unterminated string starting at character 28"),
    '{"id": "b",': ("not_json", "is not JSON: "),
    '{"id": "b", "domain": {': ("not_json", "is not JSON: "),
    "{": ("not_json", "is not JSON: "),
    '{"id": "b"} {"id": "c"}': ("not_json", "is not JSON: Extra data at character 13"),
    "\x00" * 40: ("not_json", "is not JSON: Expecting value at character 1"),
    "\x1b[2J": ("not_json", "is not JSON: Expecting value at character 1"),
    '{"id": ' + "9" * 5000 + "}": ("not_json", "cannot be read as JSON: Exceeds the limit"),
    '{"a": ' * 100_000: ("not_json", "cannot be read as JSON: lists and objects lie more than 64 deep"),
    "3": ("not_json", "is not a JSON object"),
    "null": ("not_json", "is not a JSON object"),
    '"text"': ("not_json", "is not a JSON object"),
}


@pytest.mark.parametrize("line", SPOILED, ids=range(len(SPOILED)))
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_line_that_is_no_object_spoils_its_own_row_only(tmp_path: Path, line: str, place: str) -> None:
    reason, detail = SPOILED[line]
    lines = [GOOD, GOOD.replace('"a"', '"b"'), "\n"]
    number = {"first": 0, "middle": 1, "last": 3}[place]
    lines.insert(number, line if place == "last" else line + "\n")
    (tmp_path / "x.jsonl").write_text("".join(lines))
    corpus = Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl")))
    documents = list(corpus.documents())
    assert corpus.num_rows == len(documents) == 3
    [reject] = [document for document in documents if isinstance(document, Reject)]
    assert reject.id == f"row-{documents.index(reject):07d}" and reject.domain is None and reject.reason == reason
    assert reject.detail.startswith(f"x.jsonl, line {number + 1} {detail}")
    assert [document.id for document in documents if isinstance(document, Document)] == ["a", "b"]


def test_an_array_alone_on_a_line_is_such_a_row_too(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(GOOD + "\n[1, 2]\n")
    _, reject = Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl"), domain_column=None)).documents()
    assert reject == Reject("row-0000001", "text", "not_json", "x.jsonl, line 3 is not a JSON object")


def test_a_row_that_cannot_be_read_counts_in_every_choice_of_domains(tmp_path: Path) -> None:
    """Nobody knows its domain, and a row that is left out without a word would be lost."""
    (tmp_path / "x.jsonl").write_text(GOOD + "{\n" + GOOD.replace('"d"', '"e"'))
    corpus = Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl"), domains=["e"]))
    first, second = corpus.documents()
    assert corpus.num_rows == 2 and isinstance(first, Reject) and isinstance(second, Document)
    assert (first.id, second.domain) == ("row-0000001", "e")
    one = Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl"), limit=2))
    assert one.num_rows == 2 and [isinstance(part, Reject) for part in one.documents()] == [False, True]


def test_a_file_of_a_folder_without_one_object_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "a.jsonl").write_text(GOOD)
    (folder / "b.jsonl").write_text("no\n[]\n")
    with pytest.raises(DataError, match=r"not one line is an object \(b.jsonl, line 1 is not JSON: .*write one object"):
        read(folder)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "jsonl.bz2", "csv.gz"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    plain = save(tmp_path / f"rows.{ending.split('.')[0]}", ROWS)
    path = tmp_path / f"packed.{ending}"
    kind = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[ending.split(".")[1]]
    with pa.output_stream(str(path), compression=kind) as file:
        file.write(plain.read_bytes())
    assert read(path) == read(plain)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=ending):
        read(path)


def test_a_key_that_first_appears_late_is_a_column(tmp_path: Path) -> None:
    """pyarrow takes the columns of a JSON file from its first block, and leaves out what comes later."""
    rows: list[dict[str, object]] = [{**ROWS[0], "id": str(n), "text": "x" * 300} for n in range(20)]
    path = save(tmp_path / "rows.jsonl", [*({k: v for k, v in r.items() if k != "license"} for r in rows), ROWS[0]])
    assert [d.license for d in read(path)] == [None] * 20 + ["MIT"]
    assert [d.license for d in read(path, text_column="license", domain_column="domain")][-1] == "MIT"


def test_a_truncated_parquet_gives_one_data_error(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", ROWS * 1)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        DataError, match=r"rows.parquet cannot be read as parquet: .*; it begins as Parquet, and was cut off"
    ):
        read(path)


@pytest.mark.parametrize(
    ("content", "instead"),
    [
        (b"", "it is empty; copy or download it again"),
        (bytes(100), "it has no more than zeros; copy or download it again"),
        (b"\n <!DOCTYPE html><html><title>Sign in</title>", "it looks like a web page, .*download the file itself"),
        (
            gzip.compress(b'{"text": "a"}'),
            r"it looks like a file that gzip compressed; unpack it with `gunzip`, .*\.jsonl\.gz",
        ),
        (b"\x28\xb5\x2f\xfd" + bytes(9), "it looks like a file that zstd compressed; unpack it with `unzstd`"),
        (b"PK\x03\x04" + bytes(9), "it looks like a zip archive; unpack it with `unzip`"),
        (b"ARROW1\0\0" + bytes(9), r"it looks like an Arrow file; give it the ending \.arrow"),
        (b'{"text": "a"}\n', r"it looks like JSON; give it the ending \.jsonl"),
        (b"id,text\n1,a\n", r"it looks like CSV; give it the ending \.csv"),
        (b"id,text\n1," + "é".encode() * 4000, r"it looks like CSV; give it the ending \.csv"),
        (b"only words\n", "it looks like plain text; copy or download it again"),
        (b"\xef\xbb\xbf \n\n", "it is empty; copy or download it again"),
        (
            b"\x89PNG\r\n" + bytes(range(256)),
            "it looks like no kind of file that kdata reads; copy or download it again",
        ),
    ],
)
def test_what_stands_in_the_place_of_a_parquet_is_named(tmp_path: Path, content: bytes, instead: str) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.parquet cannot be read as parquet: .*; {instead}") as caught:
        read(tmp_path / "rows.parquet")
    assert "\n" not in str(caught.value) and str(caught.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "instead"),
    [
        ("rows.csv.gz", gzip.compress(random.Random(0).randbytes(9000))[:-100], "begins as a file that gzip .*cut off"),
        ("rows.csv.gz", b"id,text\n1,a\n", r"it is not compressed; take \.gz off its name"),
        ("rows.jsonl.gz", b'{"text": "a"}\n', r"it is not compressed; take \.gz off its name"),
        ("rows.csv", b"id,text\n1,a\n2,b,c\n", "Expected 2 columns, got 3: 2,b,c; mend the file, or write it again"),
        ("rows.csv", "id,text\n1,a\n".encode("utf-16"), "it looks like text in UTF-16; write it as UTF-8"),
    ],
)
def test_the_remedy_for_a_damaged_file_is_of_its_own_kind(
    tmp_path: Path, name: str, content: bytes, instead: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=instead):
        read(tmp_path / name)


def test_settings_identify_the_content_not_the_place(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one.jsonl", ROWS), save(tmp_path / "two.jsonl", ROWS)
    other = save(tmp_path / "other.jsonl", ROWS[:2])
    settings = [Corpus(CorpusConfig(path=str(p))).settings() for p in (one, two, other)]
    assert settings[0] == settings[1] != settings[2]


# -------------------------------------------------------------------------------------------------- made ids


def test_ids_without_an_id_column_depend_on_row_and_content(tmp_path: Path) -> None:
    rows = [{"text": text, "domain": d} for text, d in (("one", "a"), ("two", "b"), ("two", "a"), ("four", "b"))]
    path = save(tmp_path / "rows.parquet", rows)
    ids = [d.id for d in read(path, id_column=None)]
    assert len(set(ids)) == 4 and ids == [d.id for d in read(save(tmp_path / "rows.jsonl", rows), id_column=None)]
    assert ids[1].startswith("row-0000001-") and ids[1][-12:] == ids[2][-12:] != ids[0][-12:]
    assert [d.id for d in read(path, id_column=None, domains=["b"])] == [ids[1], ids[3]]
    assert [d.id for d in read(path, id_column=None, limit=2)] == ids[:2]
    other = save(tmp_path / "other.parquet", [rows[0], {**rows[1], "text": "2"}, *rows[2:]])
    assert [a == b for a, b in zip(ids, [d.id for d in read(other, id_column=None)], strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"no column 'id' \(id_column\).*null numbers the rows"):
        read(path)


# ------------------------------------------------------------------------------------------ chats as columns

CHAT = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"at": "Rome"}}}]},
    {"role": "tool", "name": "w", "content": "sun"},
    {"role": "assistant", "content": "Sun."},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object", "default": None}}}]


def chats(path: Path, rows: list[dict[str, object]], **settings: object) -> list[Document]:
    return read(save(path, rows), id_column=None, domain_column=None, messages_column="messages", **settings)


def test_json_that_the_library_keeps_as_json_is_read_as_such(tmp_path: Path) -> None:
    """`datasets` keeps objects with differing keys as JSON text in Arrow: nulls in it are nulls, texts are not quoted."""
    import datasets

    mixed: list[dict[str, object]] = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "w", "arguments": {"u": None}}}]},
    ]
    file = tmp_path / "hub/rows.jsonl"
    save(file, [{**ROWS[0], "messages": mixed}])
    loaded = datasets.load_dataset(str(file.parent), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(loaded.features["messages"])
    loaded.save_to_disk(str(tmp_path / "saved"))
    loaded.to_parquet(str(tmp_path / "saved.parquet"))
    for path in (file, tmp_path / "saved", tmp_path / "saved.parquet"):
        [document] = read(path, messages_column="messages")
        assert document.chat is not None and document.chat.messages == mixed


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "arrow"])
def test_messages_are_lists_or_json_text_and_mean_the_same(tmp_path: Path, ending: str) -> None:
    """In Parquet a message has every key that any has, null where it has none."""
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows: list[dict[str, object]] = [{"messages": CHAT}, {"messages": plain}]
    as_lists = chats(tmp_path / f"lists.{ending}", rows)
    as_text = chats(tmp_path / f"text.{ending}", [{"messages": json.dumps(row["messages"])} for row in rows])
    for corpus in (as_lists, as_text):
        assert corpus[0].chat is not None and corpus[1].chat is not None
        assert corpus[0].chat.messages == CHAT and corpus[1].chat.messages == plain and corpus[0].text == ""
    assert [d.id for d in as_lists] == [d.id for d in as_text]


def test_json_keeps_its_nulls_and_arguments_as_text_become_objects(tmp_path: Path) -> None:
    call = {"id": "1", "function": {"name": "w", "arguments": '{"at": "Rome", "unit": null}'}}
    messages = [{"role": "assistant", "content": "so", "tool_calls": [call], "name": None}]
    [document] = chats(tmp_path / "c.jsonl", [{"messages": messages, "tools": TOOLS}], tools_column="tools")
    assert document.chat is not None and document.chat.tools == TOOLS
    [message] = document.chat.messages
    assert message.keys() == {"role", "content", "tool_calls"}
    assert message["tool_calls"][0]["function"]["arguments"] == {"at": "Rome", "unit": None}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("{", "messages is text, but not JSON"),
        ("{}", "messages must be a list, not dict"),
        ([{"content": "x"}], "message 0 must be an object with a role"),
        ([{"role": "user"}], "message 0 has neither content nor tool calls"),
        ([{"role": "user", "content": 3}], "message 0 has int as content"),
        (json.dumps([{"role": "user", "content": "\ud83d"}]), "half of a surrogate pair"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a part that is not text"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "must be an object with a function that has a name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "arguments of f are text, but not JSON",
        ),
    ],
)
def test_invalid_messages_are_rejects(tmp_path: Path, messages: object, message: str) -> None:
    [reject] = chats(tmp_path / "c.jsonl", [{"messages": messages}])
    assert isinstance(reject, Reject) and reject.reason in ("chat", "not_text") and message in reject.detail


def test_text_and_messages_exclude_each_other() -> None:
    config = parse_config(CorpusConfig, {"path": "x", "messages_column": "m"}, "corpus")
    assert config.text_column is None and CorpusConfig(**config.model_dump()) == config
    for wrong in ({"text_column": "t", "messages_column": "m"}, {"text_column": None}):
        with pytest.raises(ConfigError, match="name one of them"):
            parse_config(CorpusConfig, {"path": "x", **wrong}, "corpus")
    with pytest.raises(ConfigError, match="tools_column is for chats"):
        parse_config(CorpusConfig, {"path": "x", "tools_column": "tools"}, "corpus")


# ------------------------------------------------------------------------------------- the library `datasets`


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `datasets` saves them: `one`, and `dict` with the splits train and test."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_list([{**row, "messages": CHAT} for row in ROWS])
    whole.save_to_disk(str(folder / "one"), num_shards=2)
    datasets.DatasetDict({"train": whole, "test": whole.select([2, 0])}).save_to_disk(str(folder / "dict"))
    return folder


def test_a_saved_folder_gives_the_same_rows_as_a_file(saved: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", ROWS)
    assert read(saved / "one") == read(path)
    assert read(saved / "dict", split="test") == [read(path)[2], read(path)[0]]
    assert [d.id for d in read(saved / "dict", split="train", domains=["prose"], limit=1)] == ["b"]
    [first, *_] = read(saved / "one", messages_column="messages")
    assert first.chat is not None and first.chat.messages == CHAT
    one, two = (Corpus(CorpusConfig(path=str(saved / "dict"), split=s)).settings() for s in ("train", "test"))
    assert one["sha256"] != two["sha256"]


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("dict", {}, r"has the splits \['test', 'train'\]: name one"),
        ("dict", {"split": "dev"}, "there is no 'dev'"),
        ("one", {"split": "train"}, "has no splits"),
        ("one", {"subset": "en"}, "subset 'en' names a configuration of a data set on the Hub"),
    ],
)
def test_an_unknown_split_is_named(saved: Path, path: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(saved / path, **settings)


def test_a_split_of_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no splits"):
        read(save(tmp_path / "rows.jsonl", ROWS), split="train")


def test_a_broken_saved_folder_gives_one_data_error(saved: Path, tmp_path: Path) -> None:
    import shutil

    for number, spoil in enumerate(("{", "{}")):
        root = Path(shutil.copytree(saved / "one", tmp_path / str(number)))
        (root / "state.json").write_text(spoil)
        with pytest.raises(DataError, match="cannot be read as a folder of `datasets`"):
            read(root)
    root = Path(shutil.copytree(saved / "one", tmp_path / "cut"))
    file = next(root.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        read(root)


def test_without_the_library_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"kdata\[hub\]"):
        read(saved / "one")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hf://datasets/o/n", ("o/n", None)),
        ("hf://o/n@v1", ("o/n", "v1")),
        ("owner/no-such.name", ("owner/no-such.name", None)),
        ("owner/rows.jsonl", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("tests/kdata", None),
        ("name", None),
    ],
)
def test_hub_names_and_paths_are_distinguished(
    path: str, name: tuple[str, str | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    assert library.hub_name(path) == name


def test_a_hub_that_cannot_be_reached_is_one_error() -> None:
    """HF_HUB_OFFLINE is set for the tests."""
    for path in ("hf://datasets/owner/name", "owner/name"):
        with pytest.raises(MissingError, match="'owner/name' is neither a local path nor available on the Hub"):
            read(Path(path)) if not path.startswith("hf") else list(Corpus(CorpusConfig(path=path)).documents())
    with pytest.raises(ConfigError, match="write hf://datasets/OWNER/NAME"):
        Corpus(CorpusConfig(path="hf://datasets/o/n/train.jsonl"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for the Hub: the library reads a folder laid out as there, and the commit is made up."""
    import datasets

    save(tmp_path / "hub/train.jsonl", [{**r, "messages": CHAT} for r in ROWS])
    save(tmp_path / "hub/test.jsonl", [{**ROWS[0], "messages": CHAT}])
    load, names = datasets.load_dataset, datasets.get_dataset_split_names

    def loaded(name: str, subset: str | None, *, revision: str, **settings: object) -> object:
        assert (name, revision) == ("owner/name", "c0ffee")
        return load(str(tmp_path / "hub"), subset, **settings)

    monkeypatch.setattr(library, "_commit", lambda name, revision: "c0ffee")
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda name, subset, revision: names(str(tmp_path / "hub"))
    )
    return "hf://datasets/owner/name"


def test_a_hub_data_set_is_streamed_with_its_commit_in_the_settings(hub: str, tmp_path: Path) -> None:
    corpus = Corpus(CorpusConfig(path=hub, split="train", domains=["prose", "none"]))
    assert corpus.num_rows is None and [d.id for d in corpus.documents()] == ["b", "c"]
    assert corpus.settings()["commit"] == "c0ffee" and corpus.settings()["hub"] == "owner/name"
    whole = Corpus(CorpusConfig(path=hub, split="train", messages_column="messages", limit=2))
    assert [d.chat.messages for d in whole.documents() if d.chat] == [CHAT, CHAT]
    with pytest.raises(DataError, match=r"holds no row of \['nowhere'\]"):
        list(Corpus(CorpusConfig(path=hub, split="train", domains=["nowhere"])).documents())
    with pytest.raises(ConfigError, match="no column 'txet'"):
        Corpus(CorpusConfig(path=hub, split="train", text_column="txet"))
    with pytest.raises(ConfigError, match=r"splits \['test', 'train'\]: name one"):
        Corpus(CorpusConfig(path=hub))


# ------------------------------------------------------------------------------------------ bytes per token


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> TextEncoder:
    return TextEncoder(load_tokenizer(tokenizer_dir))


@pytest.mark.parametrize("text", ["the cat", "naïve café", "日本語", "🙂🙃👩‍👩‍👧", "  spaces\n\ttabs ", "aé日🙂"])
def test_bytes_per_token_are_those_of_its_text(encoder: TextEncoder, tokenizer_dir: Path, text: str) -> None:
    [(piece, ids, lengths)] = encoder.pieces(text, 10_000)
    assert piece == text and lengths[0] == 0 and ids[0] == 0
    tokenizer, raw, at = load_tokenizer(tokenizer_dir), text.encode(), 0
    assert lengths.sum() == len(raw)
    for token, length in zip(ids[1:].tolist(), lengths[1:].tolist(), strict=True):
        assert raw[at : at + length].decode("utf-8", "replace") == tokenizer.decode([token])
        at += length
    assert (encoder.byte_lengths(ids) == lengths).all()


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), limit=st.integers(3, 30))
def test_pieces_join_to_the_text_and_their_bytes_add_up(encoder: TextEncoder, text: str, limit: int) -> None:
    pieces = encoder.pieces(text, limit)
    assert "".join(piece for piece, _, _ in pieces) == text
    for piece, ids, lengths in pieces:
        assert len(ids) == len(lengths) <= limit
        assert int(lengths.sum()) == len(piece.encode())
    [(_, whole, _)] = encoder.pieces(text, 10_000)
    assert np.concatenate([ids[1:] for _, ids, _ in pieces]).tolist() == whole[1:].tolist()


def test_bytes_of_a_tokenizer_that_is_not_byte_level_come_from_offsets(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"naïve": 0, "café": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"))
    [(_, ids, lengths)] = encoder.pieces("naïve café 🙂", 10)
    assert ids.tolist() == [0, 1, 2] and lengths.tolist() == [7, 6, 4]
    assert encoder.byte_lengths(ids) is None


@given(parts=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<s>", "</s>"]), max_size=5))
def test_a_text_with_special_tokens_in_it_adds_up_byte_by_byte(
    encoder: TextEncoder, tokenizer_dir: Path, parts: list[str]
) -> None:
    text = "".join(parts)
    ids, lengths = encoder.literal(text)
    raw, tokenizer = text.encode(), load_tokenizer(tokenizer_dir)
    assert int(lengths.sum()) == len(raw)
    parts = np.split(np.frombuffer(raw, np.uint8), np.cumsum(lengths)[:-1]) if len(ids) else []
    for token, part in zip(ids.tolist(), parts, strict=True):
        assert part.tobytes().decode("utf-8", "replace") == tokenizer.decode([token])
    bare = encoder.byte_lengths(ids)
    assert bare is not None and (bare == np.where(ids < 2, 0, lengths)).all()


@pytest.mark.parametrize("path", ["nothing.jsonl", "x" * 5000, "a text instead of a path " * 50])
def test_a_path_that_does_not_exist_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(MissingError, match="does not exist; name a file or folder of text rows") as caught:
        Corpus(CorpusConfig(path=path))
    assert len(str(caught.value)) < 300


def test_an_empty_file_and_an_empty_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.csv", "a.arrow"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{name}.*(holds no row|cannot be read)") as caught:
            Corpus(CorpusConfig(path=str(tmp_path / name)))
        assert "\n" not in str(caught.value) and str(caught.value).count(str(tmp_path)) == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no file that kdata reads"):
        Corpus(CorpusConfig(path=str(tmp_path / "folder")))

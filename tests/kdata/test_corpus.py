"""Reading text: formats, settings that do not fit, broken files, and bytes per token."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata import corpus as corpus_module
from kdata.corpus import Corpus, CorpusConfig, Document, TextEncoder
from kdata.errors import ConfigError, DataError, MissingError
from kdata.teachers import load_tokenizer

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


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_row_of_megabytes_and_lines_inside_a_cell_are_read(tmp_path: Path, ending: str) -> None:
    """pyarrow's own defaults refuse the first, and cut the second at block borders."""
    big = [{**ROWS[0], "id": str(n), "text": 'line\n"quoted", and more\n' * 60_000} for n in range(3)]
    documents = read(save(tmp_path / f"rows.{ending}", big))
    assert [d.text for d in documents] == [row["text"] for row in big]


def test_a_row_beyond_the_block_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 4096)
    path = save(tmp_path / "rows.jsonl", [ROWS[0], {**ROWS[0], "id": "big", "text": "x" * 9000}, ROWS[1]])
    with pytest.raises(DataError, match="longer than 4,096 bytes; store such text as Parquet"):
        read(path)


def test_a_folder_is_read_in_order_and_must_be_of_one_kind(tmp_path: Path) -> None:
    save(tmp_path / "c/b.jsonl", ROWS[1:])
    save(tmp_path / "c/a.jsonl", ROWS[:1])
    assert [d.id for d in read(tmp_path / "c")] == ["007", "b", "c"]
    save(tmp_path / "c/x.csv", ROWS)
    with pytest.raises(ConfigError, match="mixes formats"):
        read(tmp_path / "c")


def test_domains_and_limit_choose(tmp_path: Path) -> None:
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


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[0]], "'007' stands twice"),
        ([{**ROWS[0], "id": None}, ROWS[1]], "a row has no id"),
        ([{**ROWS[0], "domain": None}, ROWS[1]], "'007' has no domain"),
        ([{**ROWS[0], "text": 5}], "'007' has int as text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(save(tmp_path / "rows.jsonl", rows))


BROKEN = {
    "empty.jsonl": b"",
    "empty.csv": b"",
    "text.jsonl": b"this is not JSON\n",
    "late.jsonl": b'{"id": "a", "domain": "d", "text": "t"}\n' * 500_000 + b'{"id": \n',
    "type.jsonl": b'{"id": "a", "domain": "d", "text": "t"}\n{"id": "b", "domain": "d", "text": {"no": 1}}\n',
    "utf8.jsonl": b'{"id": "a", "domain": "d", "text": "\xff\xfe"}\n',
    "utf8.csv": b"id,domain,text\na,d,\xff\xfe\n",
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


def test_a_truncated_parquet_gives_one_data_error(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", ROWS * 1)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"rows.parquet cannot be read as parquet"):
        read(path)


def test_settings_name_content_not_place(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one.jsonl", ROWS), save(tmp_path / "two.jsonl", ROWS)
    other = save(tmp_path / "other.jsonl", ROWS[:2])
    settings = [Corpus(CorpusConfig(path=str(p))).settings() for p in (one, two, other)]
    assert settings[0] == settings[1] != settings[2]


# ------------------------------------------------------------------------------------------ bytes per token


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> TextEncoder:
    return TextEncoder(load_tokenizer(tokenizer_dir))


@pytest.mark.parametrize("text", ["the cat", "naïve café", "日本語", "🙂🙃👩‍👩‍👧", "  spaces\n\ttabs ", "aé日🙂"])
def test_bytes_per_token_are_those_that_the_token_spells(encoder: TextEncoder, tokenizer_dir: Path, text: str) -> None:
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


def test_a_tokenizer_that_is_not_byte_level_tells_bytes_by_offsets(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"naïve": 0, "café": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"))
    [(_, ids, lengths)] = encoder.pieces("naïve café 🙂", 10)
    assert ids.tolist() == [0, 1, 2] and lengths.tolist() == [7, 6, 4]
    assert encoder.byte_lengths(ids) is None

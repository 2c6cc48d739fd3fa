"""Bytes of text per token, of many rows at a time: as row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.errors import CorruptError
from kdata.store import dataset as of_store
from kdata.store.payload import read_payload
from kdata.store.token_bytes import TokenBytes

GOLDEN = sorted(path for path in (Path(__file__).resolve().parents[2] / "golden" / "v1").iterdir() if path.is_dir())
SIZES = st.none() | st.lists(st.integers(0, 65_535), max_size=6)


def stored(dataset: kdata.Dataset) -> list[tuple[list[int] | None, list[bool]]]:
    """Bytes and target mask of each row, as Python values of whole payloads."""
    rows: list[tuple[list[int] | None, list[bool]]] = []
    for entry in dataset.manifest:
        table = read_payload(dataset.shard_file(entry, "data"), dataset.info.codec)
        rows += zip(table["token_bytes"].to_pylist(), table["target_mask"].to_pylist(), strict=True)
    return rows


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_datasets_as_row_by_row(path: Path) -> None:
    dataset = kdata.open(path)
    rows = stored(dataset)
    assert any(sizes is not None for sizes, _ in rows)
    for number, (sizes, mask) in enumerate(rows):
        own = dataset.token_bytes(number)
        assert (own is None) == (sizes is None) and (own is None or own.tolist() == sizes)
        targets = np.flatnonzero(mask)
        at = dataset.bytes_of(np.arange(len(rows))).at(np.full(len(targets), number), targets)
        assert (None if at is None else at.tolist()) == (sizes and [sizes[place] for place in targets])


@given(
    columns=st.lists(st.lists(SIZES, max_size=4), max_size=4),
    first=st.integers(0, 100),
    gaps=st.lists(st.integers(1, 9), min_size=16, max_size=16),
)
def test_single_tokens_are_those_of_their_row(columns: list[list[Any]], first: int, gaps: list[int]) -> None:
    every = [row for column in columns for row in column]
    rows = first + np.cumsum(gaps)[: len(every)]
    arrays = [pa.array([[9], *column], pa.list_(pa.uint16())).slice(1) for column in columns]  # slices begin inside
    known = TokenBytes.of(rows, arrays)
    asked = [(int(row), place) for row, own in zip(rows, every, strict=True) for place in range(len(own or []))][::-1]
    at = known.at(*np.array(asked, np.int64).reshape(-1, 2).T)
    values = {int(row): own for row, own in zip(rows, every, strict=True)}
    assert at is not None and at.tolist() == [values[row][place] for row, place in asked]
    for row, own in values.items():
        if own is None:
            assert known.at(np.array([row]), np.array([0])) is None
        else:
            with pytest.raises(CorruptError, match="fewer entries of token_bytes"):
                known.at(np.array([row]), np.array([len(own)]))


def test_all_bytes_of_a_text_are_of_its_tokens_and_each_payload_is_opened_once(
    captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, opened = kdata.open(captured), list[Path]()
    reader = of_store.PayloadReader

    def counted(path: Path, columns: list[str]) -> Any:
        opened.extend([path] if "token_bytes" in columns else [])
        return reader(path, columns)

    monkeypatch.setattr(of_store, "PayloadReader", counted)
    rows = np.arange(dataset.num_rows)[::2]
    known, texts = dataset.bytes_of(rows), dataset.index(["text"])["text"].to_pylist()
    assert len(opened) == len(dataset.manifest) > 1
    for row, start, count in zip(rows, known.starts, known.counts, strict=True):
        assert int(known.sizes[start : start + count].sum(dtype=np.int64)) == len(texts[row].encode())

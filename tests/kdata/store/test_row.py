"""Rows as a person reads them, and rows as other libraries read them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdata
from kdata.corpus.encode import TextEncoder
from kdata.errors import ConfigError, CorruptError, DependencyError, MissingError, OutOfRangeError, ShapeError
from kdata.format.files import file_info
from kdata.store.dataset import Dataset
from kdata.store.tokens import TokenText
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, run_capture, run_generate, save_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Dataset:
    """Four exact entries and draws at each position, further temperatures, two sources, several shards."""
    root = tmp_path_factory.mktemp("row") / "d"
    run_generate(root, corpus_file, tokenizer_dir, kind="hybrid", k=4, num_draws=6, temperatures=[2.0])
    return run_capture(root, corpus_file, tokenizer_dir, kind="hybrid", k=4, num_draws=6, temperatures=[2.0])


def test_a_row_says_who_it_is_and_what_the_teacher_believed(hybrid: Dataset) -> None:
    index = hybrid.index().to_pylist()
    for number in (0, 3, len(hybrid) - 1):
        row, sequence = hybrid[number], hybrid.take(np.array([number]))
        assert (row.number, row.columns) == (number, index[number])
        assert (row.id, row.domain, row.text) == tuple(index[number][name] for name in ("id", "domain", "text"))
        assert row.messages is None and len(row) == len(row.token_ids) == index[number]["num_tokens"]
        for name in (
            "token_ids", "target_mask", "logprob", "rank", "log_tail", "entropy", "num_exact", "num_kept",
        ):  # fmt: skip
            np.testing.assert_array_equal(getattr(row, name), getattr(sequence, name), err_msg=name)
        np.testing.assert_array_equal(row.padded()[0], sequence.padded()[0])
        assert row.id in repr(row) and f"tokens={len(row)}" in repr(row)


def test_what_is_kept_at_a_position(hybrid: Dataset) -> None:
    row = hybrid[2]
    ids, logprobs = row.padded()
    for position in range(len(row)):
        kept = row.kept(position)
        assert len(kept) == row.num_kept[position] == len(kept.tokens)
        assert kept.ids.tolist() == [i for i in ids[position] if i >= 0]
        assert kept.logprobs.tolist() == logprobs[position][: len(kept)].tolist()
        assert kept.is_draw.tolist() == [n >= row.num_exact[position] for n in range(len(kept))]
    last = row.kept(-1)
    assert last.ids.tolist() == row.kept(len(row) - 1).ids.tolist() and 0 < last.is_draw.sum() < len(last)
    assert len(row.kept(0)) == 0  # nothing predicts the first token
    for position in (len(row), -len(row) - 1):
        with pytest.raises(OutOfRangeError, match="there is no position"):
            row.kept(position)


def test_tokens_are_the_pieces_of_the_text(hybrid: Dataset) -> None:
    for row in hybrid:
        tokens, text = row.tokens, row.text
        assert len(tokens) == len(row) and tokens[0] == "<s>"
        if text and row.columns["source"] == "capture" and text.isascii():
            assert "".join(tokens[1:]) == text
    words = next(row for row in hybrid if row.columns["source"] == "capture" and row.text and " the" in row.text)
    assert any(token.startswith(" t") for token in words.tokens)


def test_a_token_that_is_part_of_a_character_is_marked(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "a", "domain": "d", "text": "cat 語 z"}])
    row = run_capture(tmp_path / "d", corpus, tokenizer_dir)[0]
    assert row.tokens[0] == "<s>" and "�" in "".join(row.tokens) and row.tokens[-1].endswith("z")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whole_tokens_join_to_the_text(tokenizer_dir: Path, text: str) -> None:
    """By the bytes of each token in the text, and without them by the tokenizer's decoder."""
    shown = TokenText(tokenizer_dir, tokenizer_dir)
    encoder = TextEncoder(load_tokenizer(str(tokenizer_dir), None))
    [(_, ids, sizes)] = encoder.pieces(text, 1000)
    pieces = shown.whole_in_text(ids, text, sizes)
    assert "".join(pieces).removeprefix("<s>") == text
    alone = shown.in_text(ids, text, sizes)
    assert all(piece in ("", token) or "\ufffd" in token for piece, token in zip(pieces, alone, strict=True))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(shown.whole_in_text(ids, None, None)).removeprefix("<s>") == text


@pytest.mark.parametrize("text", ["今天天气很好我们去公园散步", "a\u00a0b\u00a0c é\u00e9 😀😀"])
def test_whole_tokens_of_a_text_that_is_cut_within_characters(tokenizer_dir: Path, text: str) -> None:
    shown, encoder = TokenText(tokenizer_dir, tokenizer_dir), TextEncoder(load_tokenizer(str(tokenizer_dir), None))
    cut = 0
    for limit in range(5, 12):
        for content, ids, sizes in encoder.pieces(text, limit):
            pieces = shown.whole_in_text(ids, content, sizes)
            cut += "\ufffd" in pieces[-1]
            whole = "".join(pieces).removeprefix("<s>").strip("\ufffd")  # parts of characters that are cut
            assert whole == content and (not content or pieces[1] != "")
    assert cut


def test_tokens_without_stored_bytes_are_decoded_one_by_one(tmp_path: Path, tokenizer_dir: Path) -> None:
    dataset = kdata.open(
        run_capture(
            tmp_path / "d",
            write_jsonl(tmp_path / "c.jsonl", [{"id": "a", "domain": "d", "text": "the cat"}]),
            tokenizer_dir,
        ).path
    )
    stored, text = dataset[0], dataset.token_text
    assert text.in_text(stored.token_ids, stored.text, None) == stored.tokens  # plain text: the same pieces
    assert text.in_text(stored.token_ids, None, None) == stored.tokens
    assert text.of_id(10**6) == "<1000000>"


def test_a_chat_has_messages_and_named_special_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tok", chat_template=CHATML, bos=False)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "a", "domain": "d", "messages": messages}])
    reading = {"messages_column": "messages"}
    row = run_capture(tmp_path / "d", corpus, tmp_path / "tok", reading=reading)[0]
    assert row.messages is not None and [m["content"] for m in row.messages] == ["the cat", "the dog"]
    assert row.tokens[0] == "<|im_start|>" and "".join(row.tokens) == row.text


def test_rows_are_iterated_as_they_are_indexed(hybrid: Dataset) -> None:
    rows = list(hybrid)
    assert [row.id for row in rows] == hybrid.index(["id"])["id"].to_pylist()
    for row in rows:
        same = hybrid[row.number]
        assert (same.id, same.columns) == (row.id, row.columns)
        for name, values in vars(row.sequence).items():
            np.testing.assert_array_equal(values, getattr(same.sequence, name), err_msg=name)
        assert row.padded()[0].shape == (len(row), max(row.num_kept))


def test_iteration_reads_each_record_batch_once(hybrid: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, numbers = kdata.open(hybrid.path), []
    read = Dataset.record_batch
    monkeypatch.setattr(Dataset, "record_batch", lambda self, *at: numbers.append(at) or read(self, *at))
    assert len(list(opened)) == len(opened) and len(numbers) == len(set(numbers)) < len(opened)


def test_slices_lists_and_masks_give_sequences(hybrid: Dataset) -> None:
    def numbers(rows: Any) -> list[int]:
        return [len(row) for row in (hybrid[int(n)] for n in np.arange(len(hybrid))[rows])]

    mask = np.arange(len(hybrid)) % 3 == 0
    for rows in (slice(2, 7), slice(None, None, -5), [4, 0, 4], [-1, 2], np.array([3, 1]), mask):
        assert np.diff(hybrid[rows].offsets).tolist() == numbers(rows)
    assert len(hybrid[[]]) == len(hybrid[5:5]) == len(hybrid[np.zeros(len(hybrid), bool)]) == 0
    assert len(hybrid[mask.tolist()]) == mask.sum()  # a list of bools is a mask
    assert hybrid[-1].number == len(hybrid) - 1 == hybrid[np.int64(len(hybrid) - 1)].number


@pytest.mark.parametrize("rows", [10**9, -(10**9), [0, 10**9]])
def test_a_row_that_does_not_exist_is_an_index_error(hybrid: Dataset, rows: Any) -> None:
    with pytest.raises(IndexError, match=rf"{hybrid.path} has {len(hybrid)} rows; there is no row") as caught:
        hybrid[rows]
    assert isinstance(caught.value, OutOfRangeError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", ["doc-000", 1.0, None, [[0]], np.ones(3, bool), True])
def test_other_indexes_are_refused(hybrid: Dataset, rows: Any) -> None:
    with pytest.raises(ShapeError, match="names no rows: give a row number, a slice"):
        hybrid[rows]


# ---------------------------------------------------------------------------------------------------- no tokenizer


@pytest.mark.parametrize("rows", [np.array([1.5]), np.ones(3, bool), np.zeros((2, 2), np.int64)])
def test_take_refuses_what_is_no_list_of_numbers(hybrid: Dataset, rows: Any) -> None:
    """1.5 would be row 1, and a mask rows 0 and 1."""
    with pytest.raises(ShapeError, match=r"take needs int64 \[S\]"):
        hybrid.take(rows)
    assert len(hybrid.take([])) == 0 and len(hybrid.take([1, 0])) == 2  # type: ignore[arg-type]


def test_a_wrong_choice_or_name_is_refused(hybrid: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"check is 'hole'.* takes one of 'first', 'later', 'whole'"):
        kdata.open(hybrid.path, check="hole")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"values is 'dicts'.* takes one of 'arrow', 'text', 'json'"):
        hybrid.sql("select 1", values="dicts")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"columns=\['id'\]"):
        hybrid.index("id")  # type: ignore[arg-type]


def test_without_tokenizer_files_only_tokens_fail(hybrid: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kdata.open(hybrid.path)
    monkeypatch.setattr(Dataset, "tokenizer_dir", None)
    row = opened[0]
    assert len(row.token_ids) and len(row.kept(1).ids) and row.text is not None
    for read in (lambda: row.tokens, lambda: row.kept(1).tokens):
        with pytest.raises(MissingError, match=r"has no tokenizer/tokenizer\.json"):
            read()


def test_without_the_package_only_tokens_fail(hybrid: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    row = kdata.open(hybrid.path)[0]
    assert len(row.token_ids)
    with pytest.raises(DependencyError, match="pip install tokenizers"):
        _ = row.tokens


# -------------------------------------------------------------------------------------------------- other libraries


def test_arrow_and_polars_get_every_number(hybrid: Dataset) -> None:
    chosen = hybrid[[5, 0, 3]]
    table = chosen.to_arrow()
    assert table.num_rows == 3
    for name in ("token_ids", "target_mask", "logprob", "rank", "log_tail", "entropy", "num_exact", "num_kept"):
        values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        np.testing.assert_array_equal(values, getattr(chosen, name), err_msg=name)
    for name in ("entry_ids", "entry_logprobs", "draw_logprobs"):
        values = table[name].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
        np.testing.assert_array_equal(values, getattr(chosen, name), err_msg=name)
    assert chosen.log_z is not None
    np.testing.assert_array_equal(np.array(table["log_z"][1].as_py(), np.float32), hybrid[0].sequence.log_z)
    frame = chosen.to_polars()
    assert frame["token_ids"].to_list() == table["token_ids"].to_pylist()
    assert hybrid[[]].to_arrow().num_rows == 0


def test_the_index_is_a_lazy_polars_frame(hybrid: Dataset, tmp_path: Path) -> None:
    frame = hybrid.to_polars()
    assert frame.collect().to_arrow().column_names == hybrid.to_arrow().column_names
    assert frame.select("id").collect()["id"].to_list() == hybrid.to_arrow(["id"])["id"].to_pylist()
    assert frame.select("num_tokens").sum().collect().item() == hybrid.num_tokens


def test_polars_reads_an_older_index_and_an_empty_dataset(copied: Path) -> None:
    dataset = kdata.open(copied)
    import polars as pl
    import pyarrow.parquet as pq

    for entry in dataset.manifest:  # before a column was added
        path = copied / f"index/{entry.name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["messages"]), path)
        entry.files[f"index/{entry.name}.parquet"] = file_info(path)
    assert dataset.to_polars().select(pl.col("messages").null_count()).collect().item() == len(dataset)
    assert dataset.to_polars().collect().height == len(dataset)
    dataset.manifest = []
    assert dataset.to_polars().collect().height == 0


def test_polars_gets_no_damaged_file(copied: Path) -> None:
    path = copied / "index/capture-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match="damaged"):
        kdata.open(copied).to_polars()


def test_without_polars_the_extra_is_named(hybrid: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    for convert in (hybrid.to_polars, hybrid[:2].to_polars):
        with pytest.raises(DependencyError, match=r"kdata\[polars\]"):
            convert()


def test_tensors_have_the_same_numbers_and_their_own_memory(hybrid: Dataset) -> None:
    import torch

    chosen = hybrid[[5, 0]]
    tensors = chosen.to_torch()
    for name, values in tensors.items():
        expected = dict(zip(("entry_ids", "entry_logprobs"), chosen.padded(), strict=True)).get(name)
        np.testing.assert_array_equal(values.numpy(), getattr(chosen, name) if expected is None else expected)
    assert tensors["token_ids"].dtype == tensors["entry_ids"].dtype == torch.int64
    parts = tensors["token_ids"].split(tensors["offsets"].diff().tolist())
    assert [part.tolist() for part in parts] == [hybrid[n].token_ids.tolist() for n in (5, 0)]
    tensors["token_ids"][0] = 99
    assert chosen.token_ids[0] != 99


def test_a_dataset_feeds_a_data_loader(hybrid: Dataset) -> None:
    from torch.utils.data import DataLoader

    rows = hybrid.to_torch()
    assert len(rows) == len(hybrid) and rows[-1]["token_ids"].tolist() == hybrid[-1].token_ids.tolist()
    with pytest.raises(IndexError):
        rows[len(hybrid)]
    batches = list(DataLoader(rows, batch_size=4, collate_fn=lambda items: items))  # type: ignore[arg-type]
    assert [item["token_ids"].tolist() for batch in batches for item in batch] == [r.token_ids.tolist() for r in hybrid]


def test_without_torch_the_extra_is_named(hybrid: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"kdata\[train\]"):
        hybrid[:2].to_torch()

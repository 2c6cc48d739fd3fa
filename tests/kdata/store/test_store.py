"""Writer and reader: rows read back as they were written, in any order; wrong records are refused."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.errors import ConfigError, DataError, MissingError, OutOfRangeError, ShapeError
from kdata.format.codec import CODECS
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.measures import unknown
from kdata.format.records import Record, Reject, UnitResult
from kdata.format.schema import CodecInfo, DatasetInfo, SourceInfo, TokenizerInfo, content_hash, known_codecs
from kdata.store.shard import GROUP_BYTES, row_groups
from kdata.store.writer import Writer
from tests.fakes import VOCAB, StandInTeacher, digests

TEACHER = StandInTeacher()
SOURCE = SourceInfo(kind="capture", settings={"k": 4}, num_units=None)


def identity(codec: str = "packed", k: int = 4) -> DatasetInfo:
    return new_info(
        format_version="1.0",
        vocab_size=VOCAB,
        teacher=TEACHER.info,
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id=codec, version=known_codecs()[codec], kind="topk", parameters={"k": k, "id_bytes": 2}),
        tail="ghost",
    )


def record(name: str, ids: list[int], *, k: int = 4, domain: str = "d", text: str | None = "text") -> Record:
    readout = TEACHER.readout(np.array(ids, np.int32), KeepConfig(kind="topk", k=k))
    return Record(
        id=name,
        domain=domain,
        token_ids=readout.token_ids,
        target_mask=np.arange(len(ids)) > 0,
        kept=readout.kept,
        text=text,
        **readout.measures(),
        token_bytes=np.arange(len(ids), dtype=np.uint16),
    )


def write(root: Path, units: list[list[Record]], codec: str = "packed") -> kdata.Dataset:
    with Writer(root, identity(codec), "capture", SOURCE) as writer:
        for number, records in enumerate(units):
            writer.commit(UnitResult(number, records))
        writer.finish(len(units))
    return kdata.open(root)


lengths = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=3)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=12)
@given(units=lengths, seed=st.integers(0, 1000))
def test_what_is_written_is_read(codec: str, units: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = [
        [record(f"r{u}-{n}", rng.integers(0, VOCAB, size).tolist()) for n, size in enumerate(sizes)]
        for u, sizes in enumerate(units)
    ]
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(Path(folder) / "dataset", records, codec)
        flat = [r for unit in records for r in unit]
        assert dataset.num_rows == len(flat) and dataset.num_tokens == sum(len(r.token_ids) for r in flat)
        assert dataset.index()["id"].to_pylist() == [r.id for r in flat]
        assert dataset.index()["content_hash"].to_pylist() == [content_hash(r.token_ids) for r in flat]
        for expected, got in zip(flat, dataset, strict=True):
            np.testing.assert_array_equal(got.token_ids, expected.token_ids)
            np.testing.assert_array_equal(got.target_mask, expected.target_mask)
            np.testing.assert_array_equal(got.rank, expected.rank)
            same_numbers(dataset, got, expected)
            np.testing.assert_array_equal(got.num_kept, expected.kept.num_kept)
            np.testing.assert_array_equal(got.entry_ids, expected.kept.ids)
            np.testing.assert_allclose(got.entry_logprobs, expected.kept.logprobs, atol=0.07)
        order = rng.integers(0, max(len(flat), 1), 7) if flat else np.zeros(0, np.int64)
        assert_is_one_by_one(dataset, order)


def unlikely(nats: float) -> Record:
    """A record whose only exact entry at each position has a log-probability of -nats; the tail has all the rest."""
    own = record("r", [1, 2, 3], k=1)
    kept = replace(own.kept, logprobs=np.full(2, -nats, np.float32))
    tail = np.append(np.float32(np.nan), np.full(2, np.log1p(-np.exp(-nats)), np.float32))
    return replace(own, kept=kept, log_tail=tail)


@given(st.floats(1, 490))
def test_entries_of_next_to_no_mass_have_a_finite_error_and_are_read_again(nats: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(Path(folder) / "dataset", [[unlikely(nats)]])
        error = dataset.manifest[0].codec_error
        assert error is not None and np.isfinite([error.mean_nats, error.max_nats, error.kl_nats]).all()
        assert error.kl_nats < 1e-4, "a mass of 2^-16 in place of none"
        assert np.isfinite(dataset.take(np.array([0])).entry_logprobs).all()


def test_an_older_version_refuses_entries_that_its_tail_cannot_be_told_from(tmp_path: Path) -> None:
    info = identity().model_copy(
        update={"codec": CodecInfo(id="packed", version=1, kind="topk", parameters={"k": 1, "id_bytes": 2})}
    )
    with Writer(tmp_path / "dataset", info, "capture", SOURCE) as writer:
        writer.commit(UnitResult(0, [replace(unlikely(20), id="fits")]))
        with pytest.raises(DataError, match="r: the exact entries of token 1 have too little mass"):
            writer.commit(UnitResult(1, [unlikely(90)]))


def same_numbers(dataset: kdata.Dataset, got: Any, expected: Any) -> None:
    """Compare what may be rounded, each to the bound that its codec states."""
    if not dataset.info.codec.is_coded:
        np.testing.assert_array_equal(got.log_tail, expected.log_tail)
        np.testing.assert_allclose(got.logprob, expected.logprob, rtol=2**-11)
        np.testing.assert_allclose(got.entropy, expected.entropy, rtol=2**-11)
        return
    np.testing.assert_allclose(np.exp(got.log_tail), np.exp(expected.log_tail), atol=0.0048)
    for name, per_nat in (("logprob", 32), ("entropy", 64)):
        ours, theirs = getattr(got, name).astype(np.float64), getattr(expected, name).astype(np.float64)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
        bound = np.sqrt(np.abs(theirs)) / per_nat + 1e-3
        assert (np.abs(ours - theirs) <= bound)[~np.isnan(theirs)].all()


def assert_is_one_by_one(dataset: kdata.Dataset, order: np.ndarray) -> None:
    """`take` of many rows equals `take` of each row, in that order, with repeats."""
    together = dataset.take(order)
    alone = [dataset.take(np.array([row])) for row in order]
    assert len(together) == len(order)
    for name in (
        "token_ids",
        "target_mask",
        "logprob",
        "rank",
        "log_tail",
        "entropy",
        "num_kept",
        "entry_ids",
        "entry_logprobs",
    ):
        parts = [getattr(part, name) for part in alone]
        np.testing.assert_array_equal(getattr(together, name), np.concatenate(parts) if parts else [], err_msg=name)
    for (a, b), part in zip(together.spans(), alone, strict=True):
        assert b - a == len(part.token_ids)
    assert (
        together.entry_offsets[-1] == len(together.entry_ids)
        and len(together.entry_offsets) == len(together.token_ids) + 1
    )


def test_take_across_shards_and_batches_in_any_order(captured: Path) -> None:
    dataset = kdata.open(captured)
    assert len(dataset.manifest) > 2
    assert_is_one_by_one(dataset, np.array([24, 0, 7, 7, 3, 24, 11]))
    whole = np.concatenate([part.token_ids for part in dataset.iter_sequences()])
    np.testing.assert_array_equal(whole, dataset.take(np.arange(len(dataset))).token_ids)
    np.testing.assert_array_equal(dataset[-1].token_ids, dataset[len(dataset) - 1].token_ids)


@pytest.mark.parametrize("rows", [[-1], [25], [0, 99]])
def test_a_row_outside_the_dataset_is_refused(captured: Path, rows: list[int]) -> None:
    with pytest.raises(OutOfRangeError, match=r"\[0, 25\)"):
        kdata.open(captured).take(np.array(rows))


def test_rows_of_ids_are_in_the_order_of_the_ids(captured: Path) -> None:
    dataset = kdata.open(captured)
    ids = dataset.index(["id"])["id"].to_pylist()
    assert dataset.rows_of([ids[4], ids[0], ids[4]]).tolist() == [4, 0, 4]
    with pytest.raises(MissingError, match="nobody"):
        dataset.rows_of([ids[0], "nobody"])
    with pytest.raises(ConfigError, match="'nope'"):
        dataset.index(["nope"])


def test_padded_puts_entries_on_a_grid(tmp_path: Path) -> None:
    kept = Kept(
        np.array([0, 2, 0, 1], np.int32),
        np.zeros(4, np.int32),
        np.array([9, 8, 7], np.int32),
        np.log(np.array([0.5, 0.25, 0.5], np.float32)),
    )
    tail = np.log(np.array([np.nan, 0.25, np.nan, 0.5], np.float32))
    ragged = replace(record("a", [5, 6, 7, 8]), kept=kept, log_tail=tail)
    sequences = write(tmp_path / "dataset", [[ragged]], "plain")[0]
    ids, logprobs = sequences.padded()
    assert ids.tolist() == [[-1, -1], [9, 8], [-1, -1], [7, -1]]
    np.testing.assert_allclose(np.exp(logprobs), [[0, 0], [0.5, 0.25], [0, 0], [0.5, 0]], atol=1e-3)
    assert sequences.padded(3)[0].shape == (4, 3)
    with pytest.raises(ShapeError, match="width=1"):
        sequences.padded(1)


def test_an_empty_dataset_can_be_read_and_queried(tmp_path: Path) -> None:
    dataset = write(tmp_path / "dataset", [[]])
    assert len(dataset) == 0 and list(dataset) == []
    assert dataset.index(["id"]).num_rows == 0
    assert dataset.sql("select count(*) as n from rows")["n"][0].as_py() == 0
    assert write(tmp_path / "none", []).sql("select * from rows join rejects using (id)").num_rows == 0


def test_the_same_units_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, [[record("a", [3, 4, 5])], [record("b", [6, 7])]])
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_rejects_are_counted_and_kept_with_their_reason(tmp_path: Path) -> None:
    with Writer(tmp_path / "dataset", identity(), "capture", SOURCE) as writer:
        writer.commit(UnitResult(0, [record("a", [3, 4])], [Reject("b", None, "empty", "the text is empty")]))
    dataset = kdata.open(tmp_path / "dataset")
    assert dataset.manifest[0].rejected == 1
    assert dataset.sql("select * from rejects").to_pylist() == [
        {"id": "b", "domain": None, "source": "capture", "reason": "empty", "detail": "the text is empty"}
    ]


def broken(**changes: Any) -> Record:
    return replace(record("bad", [3, 4, 5]), **changes)


NAN3 = np.full(3, np.nan, np.float32)
COUNTS = np.array([0, 4, 4], np.int32)
NONE = np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (broken(rank=np.zeros(2, np.int32)), "rank has 2 values for 3 tokens"),
        (broken(target_mask=np.ones(3, bool)), "position 0"),
        (broken(token_ids=np.array([3, 4, VOCAB], np.int32)), "token id lies outside"),
        (broken(logprob=NAN3), "no finite teacher"),
        (
            broken(kept=Kept(COUNTS, NONE, np.full(8, VOCAB, np.int32), np.full(8, -9.0, np.float32))),
            "kept id lies outside",
        ),
        (
            broken(kept=Kept(COUNTS, NONE, np.arange(8, dtype=np.int32), np.full(8, np.nan, np.float32))),
            "not a finite number",
        ),
        (
            broken(kept=Kept(COUNTS, NONE, np.arange(8, dtype=np.int32), np.full(8, -0.7, np.float32))),
            "sum to 1.9",
        ),
    ],
)
def test_a_record_that_is_not_a_distribution_is_refused(tmp_path: Path, changed: Record, message: str) -> None:
    with (
        Writer(tmp_path / "dataset", identity(), "capture", SOURCE) as writer,
        pytest.raises(DataError, match=message),
    ):
        writer.commit(UnitResult(0, [changed]))
    assert kdata.open(tmp_path / "dataset").num_rows == 0


def test_an_id_occurs_once_in_a_unit_and_once_in_the_dataset(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    with Writer(root, identity(), "capture", SOURCE) as writer:
        with pytest.raises(DataError, match="'a' occurs twice"):
            writer.commit(UnitResult(0, [record("a", [3, 4]), record("a", [5, 6])]))
        writer.commit(UnitResult(0, [record("a", [3, 4])]))
        with pytest.raises(DataError, match="already has a row with id 'a'"):
            writer.commit(UnitResult(1, [record("a", [5, 6])]))
    with (
        Writer(root, identity(), "second", SOURCE) as writer,
        pytest.raises(DataError, match="already has a row"),
    ):
        writer.commit(UnitResult(0, [record("a", [3, 4])]))
    assert kdata.open(root).index(["id"])["id"].to_pylist() == ["a"]


def test_numbers_that_were_not_recorded_are_null_in_the_index(tmp_path: Path) -> None:
    no_targets = replace(record("a", [3, 4, 5]), target_mask=np.zeros(3, bool), token_bytes=None)
    no_entropy = replace(record("b", [3, 4, 5]), entropy=unknown(3).entropy)
    first, second = write(tmp_path / "dataset", [[no_targets, no_entropy]]).index().to_pylist()
    assert first["num_target_tokens"] == 0
    assert (first["nll"], first["mean_entropy"], first["kept_mass"]) == (None, None, None)
    assert second["num_target_tokens"] == 2 and second["nll"] is not None and second["mean_entropy"] is None


@given(sizes=st.lists(st.integers(0, 30), max_size=40), most=st.integers(1, 40))
def test_row_groups_cover_the_rows_and_stay_within_the_limit(sizes: list[int], most: int) -> None:
    groups = row_groups(np.array(sizes, np.int64), most)
    assert [row for begin, end in groups for row in range(begin, end)] == list(range(len(sizes)))
    assert all(begin < end for begin, end in groups) or groups == [(0, 0)]
    assert all(sum(sizes[begin:end]) <= most or end - begin == 1 for begin, end in groups)
    assert all(sum(sizes[begin:end]) + sizes[end] > most for begin, end in groups[:-1])


def test_an_index_with_long_texts_has_row_groups_that_the_hub_s_viewer_reads(tmp_path: Path) -> None:
    """The viewer scans at most 300,000,000 bytes, before compression; rows are as they were written."""
    long = "ö" * (15 << 20)  # 30 MiB
    dataset = write(tmp_path / "d", [[record(f"r{n}", [1, 2, 3], text=f"{n}{long}") for n in range(5)]])
    about = pq.ParquetFile(tmp_path / "d/index/capture-00000.parquet").metadata
    groups = [about.row_group(group) for group in range(about.num_row_groups)]
    assert [group.num_rows for group in groups] == [2, 2, 1]
    assert max(group.total_byte_size for group in groups) < GROUP_BYTES + (1 << 20)
    assert dataset.index(["text"])["text"].to_pylist() == [f"{n}{long}" for n in range(5)]
    assert dataset.sql("select count(*) as n from rows where starts_with(text, '4')").to_pylist() == [{"n": 1}]

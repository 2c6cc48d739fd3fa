"""Packing and loading: nothing cut, dropped or reordered by anything but data and seed; exact resume."""

from __future__ import annotations

import gc
import hashlib
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import kdata
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.loader.batches import Arrays, Batches, BatchesConfig, first_targets
from kdata.loader.packing import Place, Shape, best_fit, blocks_of, windows
from kdata.loader.window import Window
from kdata.store.shard import ROWS_PER_BATCH, TOKENS_PER_BATCH, rows_per_batch
from kdata.trainer.loader import Batch, IterableBatches, Loader
from tests.benchmarks.loader import build_dataset
from tests.trainer.datasets import make_dataset

LENGTHS = [int(n) for n in np.random.default_rng(1).integers(1, 33, 90)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS, mask_every=5)


def loader(dataset: kdata.Dataset, rows: np.ndarray | None = None, **config: int) -> Loader:
    return Loader(dataset, rows, BatchesConfig(**{"context_tokens": 64, "batch_rows": 3, **config}))


def documents(batch: Batch) -> list[list[int]]:
    """Token ids of each document, as the grid shows them."""
    documents = []
    for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
        for segment in range(int(segments.max()) + 1):
            documents.append(ids[segments == segment].tolist())
    return documents


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 64))
def test_best_fit_packs_every_item_once_and_overfills_no_bin(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.array(lengths, np.int64), capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= capacity for b in bins)


def test_best_fit_fills_typical_documents_to_98_percent() -> None:
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, 4096).astype(np.int64).clip(2, 1024)
    rows = best_fit(lengths, 1024)
    assert lengths.sum() / (1024 * len(rows)) >= 0.98


def test_an_epoch_holds_every_document_once_whole_and_apart(dataset: kdata.Dataset) -> None:
    batches = list(loader(dataset).epoch())
    rows = np.concatenate([b.rows for b in batches])
    assert sorted(rows.tolist()) == list(range(90))
    for batch in batches:
        stored = [dataset[int(r)].token_ids.tolist() for r in batch.rows]
        assert documents(batch) == stored
        for positions, segments in zip(batch.position_ids, batch.segment_ids, strict=True):
            for segment in segments.unique():
                count = int((segments == segment).sum())
                assert positions[segments == segment].tolist() == list(range(count))


def test_a_target_is_predicted_by_the_cell_before_its_token(dataset: kdata.Dataset) -> None:
    for batch in loader(dataset).epoch():
        seqs = dataset.take(batch.rows)
        counted = np.flatnonzero(seqs.target_mask)
        flat_ids, flat_segments = batch.input_ids.reshape(-1), batch.segment_ids.reshape(-1)
        assert torch.equal(flat_ids[batch.predictor_M + 1], batch.targets.token_ids_C)
        assert torch.equal(flat_segments[batch.predictor_M], flat_segments[batch.predictor_M + 1])
        ids, logprobs = seqs.padded()
        assert np.array_equal(batch.targets.token_ids_C.numpy(), seqs.token_ids[counted])
        assert np.array_equal(batch.targets.ids_CK.numpy(), ids[counted])
        assert np.array_equal(batch.targets.logprobs_CK.numpy(), logprobs[counted])
        assert np.array_equal(batch.targets.log_tail_C.numpy(), seqs.log_tail[counted])
        assert np.array_equal(batch.logprob_M, seqs.logprob[counted])
        owner = np.searchsorted(seqs.offsets, counted, side="right") - 1
        assert np.array_equal(batch.document_M, owner)


@pytest.mark.parametrize("window", [7, 1024])
def test_order_depends_on_data_and_seed_alone(dataset: kdata.Dataset, window: int) -> None:
    def stream(**config: int) -> list[int]:
        batches = islice(loader(dataset, window_documents=window, **config), 60 // config.get("batch_rows", 3))
        return [int(r) for b in batches for r in b.rows]

    assert stream() == stream(batch_rows=5) == stream(prefetch_batches=0) == stream(batch_rows=1)
    assert stream() != stream(seed=1)


def test_the_stream_goes_on_with_another_shuffle_after_each_epoch(dataset: kdata.Dataset) -> None:
    rows: list[int] = []
    for batch in loader(dataset, batch_rows=1):
        rows += batch.rows.tolist()
        if len(rows) >= 180:
            break
    assert sorted(rows[:90]) == sorted(rows[90:180]) == list(range(90))
    assert rows[:90] != rows[90:180]


def test_repeats_of_a_plan_are_read_that_often(dataset: kdata.Dataset) -> None:
    rows = np.array([3, 3, 3, 8], np.int64)
    assert sorted(np.concatenate([b.rows for b in loader(dataset, rows).epoch()])) == [3, 3, 3, 8]


@pytest.mark.parametrize("consumed", [1, 4, 17, 40])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resumed_loader_gives_the_remaining_batches(dataset: kdata.Dataset, consumed: int, prefetch: int) -> None:
    config = {"window_documents": 20, "prefetch_batches": prefetch}
    whole = list(islice(loader(dataset, **config), consumed + 6))
    first = loader(dataset, **config)
    for _ in zip(range(consumed), first, strict=False):
        pass
    second = loader(dataset, **config)
    second.load_state_dict(first.state_dict())
    for got, want in zip(second, whole[consumed:], strict=False):
        assert torch.equal(got.input_ids, want.input_ids)
        assert np.array_equal(got.rows, want.rows)


def test_state_is_small_and_refuses_other_data_or_order(dataset: kdata.Dataset) -> None:
    state = loader(dataset).state_dict()
    assert len(str(state)) < 300
    for _ in zip(range(50), read := loader(dataset), strict=False):
        pass
    assert len(str(read.state_dict())) < 300
    with pytest.raises(MismatchError, match="identity"):
        loader(dataset, np.arange(10)).load_state_dict(state)
    with pytest.raises(MismatchError, match="seed"):
        loader(dataset, seed=5).load_state_dict(state)


def test_a_document_longer_than_the_context_is_named(dataset: kdata.Dataset) -> None:
    longest = int(np.argmax(LENGTHS))
    with pytest.raises(DataError, match=r"'doc-\d+' has \d+ tokens.*context_tokens to 32"):
        loader(dataset, context_tokens=20)
    with pytest.raises(DataError, match=f"doc-{longest}"):
        loader(dataset, np.array([longest]), context_tokens=20)


def test_nothing_to_read_is_refused(dataset: kdata.Dataset) -> None:
    with pytest.raises(DataError, match="no token"):
        loader(dataset, np.zeros(0, np.int64))


def test_a_reading_error_reaches_the_caller_and_the_thread_ends(
    dataset: kdata.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = loader(dataset)

    def fail(slices: list[pa.RecordBatch]) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk gone"):
        patch.setattr(dataset, "decode", fail)
        next(iter(broken))
    stream = iter(loader(dataset))
    next(stream)
    del stream
    time.sleep(0.3)
    assert not [t for t in threading.enumerate() if t.name == "loader"]


def test_the_order_is_the_same_on_every_machine_and_with_every_numpy() -> None:
    lengths, blocks = np.arange(1, 201) % 60 + 1, np.arange(200) // 8
    stream = windows(lengths, blocks, "0123456789abcdef" * 4, 3, Shape(64, 50, 1000), Place())
    order = [rows for window in islice(stream, 20) for rows in window]
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == "981618018427b819"


# What a mixture looks like: some rows several times, in no order.
MIXTURE = np.random.default_rng(3).permutation(np.repeat(np.arange(80), np.arange(80) % 4))


def rows_of(batches: list[Batch] | list[Arrays]) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_every_batch_and_keep_the_order(dataset: kdata.Dataset, world_size: int) -> None:
    config = BatchesConfig(context_tokens=64, batch_rows=6, window_documents=20, shuffle_block_rows=4)
    alone = list(islice(Batches(dataset, MIXTURE, config), 30))
    ranks = [Batches(dataset, MIXTURE, config, rank=r, world_size=world_size) for r in range(world_size)]
    for want, *shares in zip(alone, *ranks, strict=False):
        assert all(share.input_ids.shape == (6 // world_size, 64) for share in shares)
        assert np.array_equal(np.concatenate([share.input_ids for share in shares]), want.input_ids)
        assert np.array_equal(np.concatenate([share.entry_ids for share in shares]), want.entry_ids)
        assert rows_of(shares) == want.rows.tolist()
        assert len({share.place for share in shares}) == 1


def test_a_mixture_resumes_at_any_batch_on_another_number_of_ranks(dataset: kdata.Dataset) -> None:
    config = BatchesConfig(context_tokens=64, batch_rows=4, window_documents=25, shuffle_block_rows=4)
    whole = [batch.rows.tolist() for batch in islice(Batches(dataset, MIXTURE, config), 60)]
    first = Batches(dataset, MIXTURE, config, rank=1, world_size=2)
    for consumed, _ in enumerate(islice(first, 50), 1):
        state = first.state_dict()
        assert len(str(state)) < 300
        ranks = [Batches(dataset, MIXTURE, config, rank=rank, world_size=4) for rank in range(4)]
        for rank in ranks:
            rank.load_state_dict(state)
        shares = [[batch.rows for batch in islice(rank.read(rank.place), 3)] for rank in ranks]
        went_on = [np.concatenate(batches).tolist() for batches in zip(*shares, strict=True)]
        assert went_on == whole[consumed : consumed + 3]


def test_ranks_that_cannot_share_a_batch_are_refused(dataset: kdata.Dataset) -> None:
    with pytest.raises(ConfigError, match="batch_rows=8 evenly"):
        Loader(dataset, None, BatchesConfig(batch_rows=8), rank=0, world_size=3)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_of_a_torch_loader_do_not_change_the_order(dataset: kdata.Dataset, workers: int) -> None:
    plain = loader(dataset, MIXTURE)
    want = rows_of(list(plain.epoch()))
    stream = DataLoader(IterableBatches(loader(dataset, MIXTURE), epochs=1), batch_size=None, num_workers=workers)
    batches = list(stream)
    assert rows_of(batches) == want
    resumed = loader(dataset, MIXTURE)
    resumed.arrays.place = batches[4].place
    resumed.load_state_dict(resumed.state_dict())
    again = list(DataLoader(IterableBatches(resumed, epochs=1), batch_size=None, num_workers=workers))
    assert rows_of(again) == rows_of(batches[5:])


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    block=st.integers(1, 9),
    documents=st.integers(1, 70),
    tokens=st.integers(1, 400),
)
def test_an_epoch_of_windows_holds_every_mention_once(rows: list[int], block: int, documents: int, tokens: int) -> None:
    planned = np.array(rows)
    lengths = planned % 30 + 1
    blocks = blocks_of(planned, np.array([0, 7, 7, 20, 41]), block)
    places = []
    for window in windows(lengths, blocks, "ab" * 32, 0, Shape(32, documents, tokens), Place()):
        count = sum(len(row) for row, _ in window)
        size = sum(int(lengths[row].sum()) for row, _ in window)
        assert count <= documents and (size <= tokens or count == 1)
        places += window
        if window[-1][1].epoch:
            break
    assert sorted(d for row, _ in places for d in row) == list(range(len(rows)))
    if block > 1:
        for number in np.unique(blocks):
            assert len(set(planned[blocks == number])) == (blocks == number).sum(), "a repeat in its row's own block"


def test_every_block_may_come_anywhere() -> None:
    lengths, blocks = np.full(160, 10), np.arange(160) // 8
    firsts = []
    for seed in range(400):
        window = next(windows(lengths, blocks, "cd" * 32, seed, Shape(40, 8, 10_000), Place()))
        firsts.append(blocks[window[0][0][0]])
    counts = np.bincount(firsts, minlength=20)
    assert counts.min() > 5 and counts.max() < 45  # 20 expected; 5 standard deviations


def test_a_window_decompresses_a_record_batch_once_and_frees_it(
    dataset: kdata.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).permutation(np.concatenate([np.arange(90), [5, 5, 70]]))
    stored = [dataset[int(row)].token_ids.tolist() for row in rows]
    read, decompress = [], dataset.record_batch
    monkeypatch.setattr(dataset, "record_batch", lambda *key: read.append(key) or decompress(*key))
    window = Window(dataset, rows)
    parts = [window.slices([int(row)]) for row in rows]
    assert sorted(read) == sorted(set(read)) and len(read) >= 3 and not window._held
    assert [dataset.decode(slices).token_ids.tolist() for slices in parts] == stored
    with pytest.raises(KeyError):
        window.slices([5])


def test_long_documents_get_record_batches_of_their_own() -> None:
    for tokens, rows in ((10, 32), (256, 32), (257, 16), (600, 8), (4096, 2), (100_000, 1)):
        assert rows_per_batch(np.full(ROWS_PER_BATCH, tokens)) == rows
        assert rows * tokens <= TOKENS_PER_BATCH or rows == 1


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return build_dataset(tmp_path_factory.mktemp("wide") / "set", 250_000, 32_000, median=60)


def peak_bytes(dataset: kdata.Dataset, rows: np.ndarray, batches: int) -> int:
    """Most bytes held, by Python, numpy and Arrow together, while reading `batches` batches after some to warm up."""
    config = BatchesConfig(context_tokens=1024, batch_rows=2, window_documents=64, prefetch_batches=2)
    stream = iter(Batches(dataset, rows, config))
    next(stream)
    gc.collect()
    tracemalloc.start()
    arrow, most = pa.total_allocated_bytes(), 0
    for _ in islice(stream, batches):
        most = max(most, pa.total_allocated_bytes() - arrow)
    peak = tracemalloc.get_traced_memory()[1] + most
    tracemalloc.stop()
    stream.close()  # type: ignore[attr-defined]
    return peak


@pytest.mark.slow
def test_memory_is_bounded_by_the_window_not_by_the_data(wide: kdata.Dataset) -> None:
    path = wide.path
    stored = sum(file.stat().st_size for file in (path / "data").iterdir())
    small = peak_bytes(kdata.open(path), np.arange(wide.num_rows // 8), 60)
    whole = peak_bytes(kdata.open(path), np.arange(wide.num_rows), 110)
    assert stored > 30e6 and wide.num_tokens * 64 * 8 > 120e6  # as it is stored, and decoded
    assert whole < 12e6
    assert whole < 2 * small + 2e6  # of an eighth of the data; what a window and the batches ahead take varies


def test_an_epoch_of_documents_of_all_lengths_fills_98_percent_and_drops_no_token(wide: kdata.Dataset) -> None:
    batches = list(Batches(wide, None, BatchesConfig(context_tokens=1024, batch_rows=8)).epoch())
    tokens = sum(batch.num_tokens for batch in batches)
    assert tokens == wide.num_tokens
    assert tokens / sum(batch.input_ids.size for batch in batches) >= 0.98
    batch = batches[0]
    assert batch.entry_ids.shape == batch.entry_logprobs.shape == (len(batch.predictor), 64)
    assert batch.entry_ids.dtype == np.int32 and batch.entry_logprobs.dtype == np.float32


def test_the_content_of_a_shard_is_checked_when_it_is_first_read(dataset: kdata.Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    damaged = sorted((copy / "data").iterdir())[1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    opened = kdata.open(copy)
    second = np.arange(opened.manifest[0].rows, opened.num_rows)
    assert next(iter(loader(opened, np.arange(opened.manifest[0].rows)))).num_tokens
    with pytest.raises(CorruptError, match=damaged.name):
        next(iter(loader(opened, second)))


def test_arrays_need_no_torch() -> None:
    code = "import sys, kdata.loader.batches; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.lists(st.lists(st.booleans(), max_size=9), max_size=9))
def test_the_first_target_is_the_first_of_each_document_or_its_end(masks: list[list[bool]]) -> None:
    offsets = np.cumsum([0, *map(len, masks)])
    flat = np.array([value for mask in masks for value in mask], bool)
    assert first_targets(flat, offsets).tolist() == [[*mask, True].index(True) for mask in masks]

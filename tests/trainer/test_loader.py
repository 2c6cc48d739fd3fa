"""Packing and loading: nothing cut, dropped or reordered by anything but data and seed; exact resume."""

from __future__ import annotations

import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.errors import DataError, MismatchError
from tests.trainer.datasets import make_dataset
from trainer.loader import Batch, Loader, LoaderConfig
from kdata.packing import best_fit

LENGTHS = [int(n) for n in np.random.default_rng(1).integers(1, 33, 90)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS, mask_every=5)


def loader(dataset: kdata.Dataset, rows: np.ndarray | None = None, **config: int) -> Loader:
    return Loader(dataset, rows, LoaderConfig(**{"context_tokens": 64, "batch_rows": 3, **config}))


def documents(batch: Batch) -> list[list[int]]:
    """Token ids of each document, as the grid shows them."""
    found = []
    for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
        for segment in range(int(segments.max()) + 1):
            found.append(ids[segments == segment].tolist())
    return found


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


@pytest.mark.parametrize("taken", [1, 4, 17, 40])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resumed_loader_gives_the_batches_that_would_have_come(
    dataset: kdata.Dataset, taken: int, prefetch: int
) -> None:
    config = {"window_documents": 20, "prefetch_batches": prefetch}
    whole = list(islice(loader(dataset, **config), taken + 6))
    first = loader(dataset, **config)
    for _ in zip(range(taken), first, strict=False):
        pass
    second = loader(dataset, **config)
    second.load_state_dict(first.state_dict())
    for got, want in zip(second, whole[taken:], strict=False):
        assert torch.equal(got.input_ids, want.input_ids)
        assert np.array_equal(got.rows, want.rows)


def test_state_is_small_and_refuses_other_data_or_order(dataset: kdata.Dataset) -> None:
    state = loader(dataset).state_dict()
    assert len(str(state)) < 300
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


def test_a_reading_error_reaches_the_caller_and_the_thread_ends(dataset: kdata.Dataset) -> None:
    broken = loader(dataset)

    def fail(slices: list[pa.RecordBatch]) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(broken.arrays.dataset, "decode", fail)
    with pytest.raises(OSError, match="disk gone"):
        next(iter(broken))
    stream = iter(loader(dataset))
    next(stream)
    del stream
    time.sleep(0.3)
    assert not [t for t in threading.enumerate() if t.name == "loader"]

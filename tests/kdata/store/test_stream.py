"""Training from a URL: what is copied before the first step, what is ahead of it, and how much the cache holds."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.errors import ConfigError, CorruptError, MismatchError, StorageError
from kdata.loader.batches import Batches, BatchesConfig
from kdata.loader.packing import Place, Shape, ShardGroups, blocks_of, windows
from kdata.loader.rows import IndexedRows
from kdata.store.cache import THREADS, cache_limit, hold, keep_all, make_room, payloads
from kdata.store.url_dataset import RemoteDataset
from tests.kdata.selection.plans import Row, dataset_of
from tests.web import Files

SHARDS, ROWS, TOKENS = 40, 32, 256  # of the dataset: shards, rows of a shard, tokens of a row
STREAM = BatchesConfig(context_tokens=512, batch_rows=4, shuffle_group_tokens=2 * ROWS * TOKENS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """40 shards of 32 rows; what is not the text is most of it."""
    place = tmp_path_factory.mktemp("home") / "d"
    rows = [Row(f"row-{n:05}", "ab"[n % 2], TOKENS, 1.0 + n % 7) for n in range(SHARDS * ROWS)]
    return dataset_of(place, rows, shard_rows=ROWS)


@pytest.fixture
def served(home: kdata.Dataset, serve: Callable[[Path], Files]) -> Files:
    """The dataset at a URL, and an empty cache."""
    return serve(home.path.parent)


def remote(served: Files) -> RemoteDataset:
    opened = kdata.open(f"{served.url}/d")
    assert isinstance(opened, RemoteDataset)
    return opened


def digest_of(stream: Iterator[list[tuple[list[int], Place]]], count: int) -> str:
    return hashlib.sha256(repr([next(stream) for _ in range(count)]).encode()).hexdigest()


@given(st.integers(0, 2**32), st.integers(1, 400), st.data())
@settings(max_examples=40, deadline=None)
def test_each_document_is_read_once_an_epoch_and_a_window_stays_in_its_group(
    seed: int, group_tokens: int, data: st.DataObject
) -> None:
    counts = np.array(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)))
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = np.array(data.draw(st.lists(st.integers(0, int(starts[-1]) - 1), min_size=1, max_size=60)))
    shard = np.searchsorted(starts, rows, side="right") - 1
    lengths = 1 + rows % 8
    tokens = np.array([int((1 + np.arange(a, b) % 8).sum()) for a, b in pairwise(starts)])
    groups = ShardGroups(shard, tokens, group_tokens)
    blocks, shape = blocks_of(rows, starts, 4), Shape(16, 10, 100)
    stream = windows(lengths, blocks, "ab" * 32, seed, shape, Place(), groups)
    read: list[int] = []
    seen: list[set[int]] = []
    for window in stream:
        documents = [document for row, _ in window for document in row]
        read += documents
        seen.append(set(shard[documents].tolist()))
        if window[-1][1] == Place(1):
            break
    assert sorted(read) == list(range(len(rows)))
    for shards in seen:  # two shards are together only where all but the last of them are within the bound
        assert len(shards) == 1 or sum(tokens[list(shards)]) - max(tokens[list(shards)]) < 2 * group_tokens
    last = {number: n for n, shards in enumerate(seen) for number in shards}
    first = {number: n for n, shards in reversed(list(enumerate(seen))) for number in shards}
    for number in last:  # once a group is done, its shards are not needed again
        own = set().union(*seen[first[number] : last[number] + 1])
        assert len(own) == 1 or sum(tokens[list(own)]) - max(tokens[list(own)]) < 2 * group_tokens


def test_without_groups_the_order_is_as_before(home: kdata.Dataset) -> None:
    batches = Batches(home, None, BatchesConfig(context_tokens=512))
    assert batches.groups is None and "shuffle_group_tokens" not in batches.state_dict()
    shape = Shape(512, 1024, 524_288)
    assert digest_of(windows(batches.lengths, batches.blocks, "ab" * 32, 0, shape, Place()), 3) == digest_of(
        windows(
            batches.lengths, batches.blocks, "ab" * 32, 0, shape, Place(),
            ShardGroups(np.zeros(len(batches.rows), np.int64), np.array([1]), 1),
        ), 3,
    )  # fmt: skip


def test_before_the_first_step_two_shards_of_forty_are_fetched(home: kdata.Dataset, served: Files) -> None:
    """A plan with rows of every shard: the lengths and ids of all rows, and two of forty shards."""
    rows = np.arange(0, home.num_rows, 3)
    batches = Batches(remote(served), rows, STREAM.model_copy(update={"prefetch_batches": 0}))
    served.bytes_per_sec = 2e6  # what is copied ahead comes later
    next(iter(batches))
    assert {path.split("/")[1] for path, _, _ in served.sent} == {"dataset.json", "manifest.jsonl", "index", "data"}
    assert 2 <= len({path for path, _, _ in served.sent if "/data/" in path}) <= 6  # two, and four on their way
    batches.dataset.copy_ahead([])


def test_streamed_batches_are_those_of_a_folder_with_the_same_setting(home: kdata.Dataset, served: Files) -> None:
    ours, theirs = Batches(home, None, STREAM).epoch(), Batches(remote(served), None, STREAM).epoch()
    count = 0
    for here, there in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(here.input_ids, there.input_ids)
        np.testing.assert_array_equal(here.entry_logprobs, there.entry_logprobs)
        count += 1
    assert count >= home.num_tokens // (STREAM.context_tokens * STREAM.batch_rows)


def test_rows_by_number_are_those_of_the_stream(home: kdata.Dataset) -> None:
    batches = Batches(home, None, STREAM)
    stream, by_number = batches.epoch(), IndexedRows(batches)
    for n, batch in zip(range(3), stream, strict=False):
        np.testing.assert_array_equal(by_number.read(range(4 * n, 4 * n + 4)).input_ids, batch.input_ids)


def test_a_state_of_the_other_order_is_refused(home: kdata.Dataset, served: Files) -> None:
    plain = BatchesConfig(context_tokens=512)
    streamed, local = Batches(remote(served), None, plain), Batches(home, None, plain)
    assert streamed.state_dict()["shuffle_group_tokens"] == 524_288
    for one, other in ((streamed, local), (local, streamed)):
        with pytest.raises(MismatchError, match="shuffle_group_tokens"):
            one.load_state_dict(other.state_dict())
    same = Batches(remote(served), None, plain.model_copy(update={"shuffle_group_tokens": 0}))
    same.load_state_dict(local.state_dict())


class Line:
    """A line that carries bytes for each step that is made, and as many as it takes while a step waits. It knows no clock.

    Args:
        files: the server, whose answers are held back until the line carried them.
        opened: what is read; the main thread makes the steps.
    """

    def __init__(self, files: Files, opened: RemoteDataset) -> None:
        self._moved, self._carried, self._waiting, self._held = threading.Condition(), 0.0, 0, 0
        self._opened = opened
        files.before_sending = self._send
        opened._ahead.get = self._freely(opened._ahead.get, self._is_coming)  # type: ignore[method-assign]
        opened._store.fetch = self._freely(opened._store.fetch, lambda relative: True)  # type: ignore[method-assign]

    def _is_coming(self, relative: str) -> bool:
        future = self._opened._ahead._coming.get(relative)
        return future is not None and not future.done()

    def _freely(self, call: Callable[..., None], waits: Callable[[str], bool]) -> Callable[..., None]:
        """The same call; where the main thread waits in it, and so makes no step, the line carries all."""

        def waiting(*arguments: Any) -> None:
            own = int(threading.current_thread() is threading.main_thread() and waits(arguments[0]))
            with self._moved:
                self._waiting += own
                self._moved.notify_all()
            try:
                call(*arguments)
            finally:
                self._waiting -= own

        return waiting

    def _send(self, size: int) -> None:
        with self._moved:
            self._held += 1
            self._moved.wait_for(lambda: self._waiting or self._carried >= size)
            self._held -= 1
            self._carried = max(self._carried - size, 0.0)

    def step(self, size: float) -> None:
        """What comes while a step is computed. Returns when an answer is too large for the rest, or nothing is asked for."""
        with self._moved:
            self._carried += size
            self._moved.notify_all()
        for _ in range(3):  # a copy that has come is taken, and the next one is asked for
            until = time.monotonic() + 60
            while not self._held and not all(future.done() for future in list(self._opened._ahead._coming.values())):
                assert time.monotonic() < until, "neither the line nor the copying comes to rest"
                time.sleep(0.001)
            time.sleep(0.002)


def waits_on(line_share: float, home: kdata.Dataset, served: Files) -> int:
    """How often a reader waited in an epoch after its first step, where the line carries this share of what it reads."""
    opened = remote(served)
    batches = Batches(opened, None, STREAM.model_copy(update={"prefetch_batches": 0}))
    payload = sum(path.stat().st_size for folder in ("data", "index") for path in (home.path / folder).iterdir())
    steps = -(-home.num_tokens // (STREAM.context_tokens * STREAM.batch_rows))
    line, first, count = Line(served, opened), None, 0
    for _ in batches.epoch():
        first = opened.num_waits if first is None else first
        line.step(line_share * payload / steps)
        count += 1
    assert first is not None and count >= steps
    return opened.num_waits - first


def test_shards_are_there_before_the_step_that_needs_them(home: kdata.Dataset, served: Files) -> None:
    """A line that carries twice what the steps read holds none of them up. One that carries half holds up many."""
    assert waits_on(2.0, home, served) == 0


def test_a_line_that_is_too_slow_shows_as_waits(home: kdata.Dataset, served: Files) -> None:
    """Half of forty shards come while steps are computed; what comes in a wait is at most what four threads copy then."""
    assert waits_on(0.5, home, served) >= SHARDS / 2 / THREADS - 2


def test_the_cache_stays_within_its_bound(
    home: kdata.Dataset, served: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = [entry.files[f"data/{entry.name}.arrow"].bytes for entry in home.manifest]
    limit = 8 * max(sizes)
    monkeypatch.setenv("KDATA_CACHE_LIMIT", f"{limit / 1e3}kB")
    opened = remote(served)
    rows = []
    for batch in Batches(opened, None, STREAM).epoch():
        rows += batch.rows.tolist()
        assert sum(about.st_size for _, about in payloads()) <= limit
    assert sorted(rows) == list(range(home.num_rows))
    assert opened[0].id == home[0].id  # copied again
    with pytest.raises(StorageError, match=r"raise KDATA_CACHE_LIMIT, or copy it to a folder with `kdata pull`"):
        opened.fetch()
    sent = [path for path, _, _ in served.sent if path.startswith("d/data/")]
    assert len(sent) <= SHARDS + 1, "a shard was copied twice in an epoch"


def test_what_is_in_use_is_not_removed(home: kdata.Dataset, served: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = remote(served)
    for shard in range(12):
        opened.shard(shard)
    files = [path for path, _ in payloads()]
    assert len(files) == 12
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "0")
    handle = hold(files[0])
    assert handle is not None and not make_room(files[0].with_name("new"), 1)
    left = {path for path, _ in payloads()}
    assert files[0] in left and 1 < len(left) <= 9  # and the eight that this process read last
    os.close(handle)
    keeper = keep_all(opened.path)
    opened.copy_ahead([])
    make_room(files[0].with_name("new"), 1)
    assert {path for path, _ in payloads()} == left
    os.close(keeper)
    make_room(files[0].with_name("new"), 1)
    assert payloads() == [] and hold(files[0]) is None
    halves = [files[0].with_name(f"{files[0].name}.{n}.tmp") for n in ("left", "coming")]
    for half in halves:
        half.write_bytes(b"half")
    os.utime(halves[0], (0, 0))
    make_room(files[0], 1)
    assert [half.exists() for half in halves] == [False, True]
    assert opened[40].id == home[40].id


def test_an_amount_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, size in (("20GB", 20 * 10**9), ("1.5 m", 1_500_000), ("7", 7), ("", 50 * 10**9)):
        monkeypatch.setenv("KDATA_CACHE_LIMIT", text)
        assert cache_limit() == size
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "much")
    with pytest.raises(
        ConfigError, match=r"KDATA_CACHE_LIMIT='much' is not an amount of disk; write for instance 20GB"
    ):
        cache_limit()


def test_a_column_that_came_with_other_values_is_noticed(home: kdata.Dataset, served: Files) -> None:
    """Ranges have no digests; before a row of the shard is read, its index is copied whole and compared with them."""
    opened = remote(served)
    good = opened.index(["id", "num_tokens"])
    assert good.equals(home.index(["id", "num_tokens"])) and not (opened.path / "index").exists()
    changed = good["num_tokens"].to_numpy().copy()
    changed[5 * ROWS] += 1
    opened._columns["num_tokens"] = pa.chunked_array([changed])
    assert len(opened.shard(4)) == ROWS
    with pytest.raises(CorruptError, match="column num_tokens of the index of shard capture-00005 was read with other"):
        opened.shard(5)


def test_a_connection_that_ends_half_way_is_one_line_and_the_next_call_goes_on(
    home: kdata.Dataset, served: Files
) -> None:
    opened = remote(served)
    served.cut = re.compile("data/capture-00003")
    opened.shard(2)
    with pytest.raises(OSError, match=r"capture-00003") as error:
        opened.shard(3)
    assert isinstance(error.value, StorageError | CorruptError) and "\n" not in str(error.value)
    assert not list((opened.path / "data").glob("*00003*"))
    served.cut = re.compile("(?!)")
    before = len(served.sent)
    opened.shard(2)
    opened.shard(3)
    assert {path for path, _, _ in served.sent[before:]} == {
        "d/data/capture-00003.arrow",
        "d/index/capture-00003.parquet",
    }


def test_what_another_process_is_copying_stays(home: kdata.Dataset, served: Files) -> None:
    opened = remote(served)
    opened.shard(0)
    coming = opened.path / "data/capture-00001.arrow.0123abcd.tmp"
    coming.write_bytes(b"the first half")
    remote(served)
    assert coming.exists()
    os.utime(coming, (time.time() - 3600,) * 2)
    remote(served)
    assert not coming.exists(), "its process has ended"

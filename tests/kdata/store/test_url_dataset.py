"""A dataset at a URL is read where it is: an HTTP server counts the bytes of every range."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import kdata
from kdata.errors import CorruptError, MismatchError, MissingError, QueryError, StorageError
from kdata.loader.batches import Batches, BatchesConfig
from kdata.pipelines.cli.main import app
from kdata.selection.mixtures import Proportional
from kdata.selection.plan import Plan
from kdata.selection.query import Sql
from kdata.selection.ranked import Difference
from kdata.selection.select import select
from kdata.store.url_dataset import SCHEME
from tests.fakes import digests
from tests.kdata.selection.plans import Row, dataset_of, score_with
from tests.web import Files


@pytest.fixture
def dataset(tmp_path: Path) -> kdata.Dataset:
    """6,000 rows in two shards, the text of each row longer than all its numbers; a sidecar."""
    rows = [
        Row(
            f"row-{n * 7919 % 6000:05}",
            "abc"[n % 3],
            2 + n % 5,
            1.0 + n * 31 % 17 + n / 1e4,
            random.randbytes(100).hex(),
        )
        for random in [Random(0)]
        for n in range(6000)
    ]
    written = dataset_of(tmp_path / "home" / "d", rows, shard_rows=3000)
    score_with(written, {row.id: (row.nll or 0) + n * 13 % 29 for n, row in enumerate(rows)})
    return written


@pytest.fixture
def served(dataset: kdata.Dataset, serve: Callable[[Path], Files]) -> Files:
    """The dataset at a URL, and an empty cache."""
    return serve(dataset.path.parent)


def chunks(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of each column of a Parquet file with one row group."""
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(n) for n in range(group.num_columns)]
    return {
        c.path_in_schema: (c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size) for c in columns
    }


def test_only_the_columns_of_a_query_are_fetched(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    before = len(served.sent)
    query = "select domain, sum(num_tokens)::bigint as n, max(nll) as nll from rows group by 1 order by 1"
    assert opened.sql(query).to_pylist() == dataset.sql(query).to_pylist()
    sent = served.sent[before:]
    files = {f"d/index/{path.name}": path for path in (dataset.path / "index").iterdir()}
    assert {path for path, _, _ in sent} == set(files)
    whole, needed = sum(path.stat().st_size for path in files.values()), 0
    for name, path in files.items():
        about, size = chunks(path), path.stat().st_size
        needed += sum(about[column][1] for column in ("domain", "num_tokens", "nll"))
        for _, first, count in (one for one in sent if one[0] == name):
            text, length = about["text"]
            assert first + count <= text or first >= text + length, "a byte of a column that nobody asked for"
            assert count <= 16384 if first + count == size else count < 64_000  # footers, read 16 KiB at a time
    total = sum(count for _, _, count in sent)
    assert needed <= total <= needed + len(files) * (16384 + 1024) and total < whole / 8, (needed, total, whole)


def test_the_end_of_a_file_is_fetched_once(dataset: kdata.Dataset, served: Files) -> None:
    """Each query has a connection of its own, which begins with the footers; columns are fetched for each."""
    opened = kdata.open(f"{served.url}/d")
    for query in ("select max(nll) from rows", "select max(num_tokens) from rows", "select min(nll) from rows"):
        assert opened.sql(query).to_pylist() == dataset.sql(query).to_pylist()
    sizes = {f"d/index/{path.name}": path.stat().st_size for path in (dataset.path / "index").iterdir()}
    ends = [path for path, first, count in served.sent if first + count == sizes.get(path)]
    assert sorted(ends) == sorted(sizes)


def test_a_plan_is_selected_without_a_copy_and_equals_the_local_one(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    by_query = Sql(sql="select id from rows order by nll, id limit 9")
    for step in (Difference(share=0.3), Proportional(parent="difference", size=1000), by_query):
        here, there = select(dataset, step), select(opened, step)
        assert here.ids == there.ids and here.info == there.info
    query = "select id from rows join scores.ref using (id) where ref.nll > 20 order by id"
    assert select(opened, Sql(sql=query, name="scored")).ids == select(dataset, Sql(sql=query, name="scored")).ids
    touched = {path.split("/")[1] for path, _, _ in served.sent}
    assert touched == {"dataset.json", "manifest.jsonl", "index", "scores"}
    assert not any((opened.path / folder).exists() for folder in ("data", "index"))
    plan = Plan.load(opened.path / "plans/difference")
    assert (
        plan.rows(dataset).tolist() == plan.rows(kdata.open(f"{served.url}/d")).tolist()
    )  # the whole, when it is wanted


def test_a_file_that_is_copied_is_compared_with_its_digest(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    assert opened.index().equals(dataset.index())
    path = dataset.path / "index/capture-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (opened.path / "index/capture-00001.parquet").unlink()
    with pytest.raises(OSError, match="damaged"):
        kdata.open(f"{served.url}/d").index()


def test_nothing_but_the_dataset_can_be_read(dataset: kdata.Dataset, served: Files, tmp_path: Path) -> None:
    (dataset.path.parent / "secret.parquet").write_bytes((dataset.path / "index/capture-00000.parquet").read_bytes())
    opened = kdata.open(f"{served.url}/d")
    for place in (f"{served.url}/secret.parquet", f"{SCHEME}://../secret.parquet", f"{tmp_path}/home/secret.parquet"):
        with pytest.raises((QueryError, StorageError)):
            opened.sql(f"select * from read_parquet('{place}')")
    assert not [path for path, _, _ in served.sent if "secret" in path]


def test_opening_a_url_for_info_and_sql_reads_no_payload(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    assert [path for path, _, _ in served.sent] == ["d/dataset.json", "d/manifest.jsonl"]
    assert (len(opened), opened.num_tokens, opened.content_digest) == (6000, dataset.num_tokens, dataset.content_digest)
    assert repr(opened) == f"Dataset('{served.url}/d', rows=6,000, tokens={dataset.num_tokens:,})"
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["info", f"{served.url}/d"])
    assert shown.exit_code == 0 and "6,000 in 2 shards" in shown.output
    opened.sql("select domain, avg(nll) from rows group by 1")
    by_folder: dict[str, int] = {}
    for path, _, count in served.sent:
        by_folder[path.split("/")[1]] = by_folder.get(path.split("/")[1], 0) + count
    assert set(by_folder) == {"dataset.json", "manifest.jsonl", "index"}, by_folder
    whole = sum(path.stat().st_size for path in (dataset.path / "index").iterdir())
    assert 0 < by_folder["index"] < whole / 2
    assert not any((opened.path / folder).exists() for folder in ("data", "index", "tokenizer"))


def test_rows_are_copied_shard_by_shard(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    np.testing.assert_array_equal(opened[4000].token_ids, dataset[4000].token_ids)
    assert opened[4000].text == dataset[4000].text
    payload = [path for path, _, _ in served.sent if "/data/" in path]
    assert payload == ["d/data/capture-00001.arrow"]
    batches = Batches(opened, np.array([3000, 5999, 3001]), BatchesConfig(context_tokens=16, prefetch_batches=0))
    assert sorted(row for batch in batches.epoch() for row in batch.rows.tolist()) == [3000, 3001, 5999]
    assert [path for path, _, _ in served.sent if "/data/" in path] == payload  # once
    assert len(list(opened)) == 6000
    assert [path for path, _, _ in served.sent if "/data/" in path] == [*payload, "d/data/capture-00000.arrow"]


def test_tokens_are_copied_shard_by_shard(dataset: kdata.Dataset, served: Files) -> None:
    """A condition on rows leaves one of the two shards; what is copied is compared with its digest."""
    opened = kdata.open(f"{served.url}/d")
    query = (
        "select id, token_id, rank from tokens join rows using (id) where shard = 'capture-00001' order by id, position"
    )
    assert opened.sql(query).to_pylist() == dataset.sql(query).to_pylist()
    assert [path for path, _, _ in served.sent if "/data/" in path] == ["d/data/capture-00001.arrow"]
    chosen = (
        "select id from tokens join scores.ref using (id) where ref.nll > 30 group by id having count(token_id) > 4"
    )
    by_tokens = Sql(sql=f"{chosen} order by id", name="long")
    assert select(opened, by_tokens).ids == select(dataset, by_tokens).ids
    path = dataset.path / "data/capture-00000.arrow"
    (opened.path / "data/capture-00000.arrow").unlink()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match="capture-00000"):
        kdata.open(f"{served.url}/d").sql("select max(token_id) from tokens")


def test_another_process_opens_it_by_its_address(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    copies = pickle.loads(pickle.dumps(opened))
    assert copies.place == f"{served.url}/d" and copies[7].id == opened[7].id
    assert [path for path, _, _ in served.sent if "/data/" in path] == ["d/data/capture-00000.arrow"]


def test_a_query_does_not_read_a_copy_that_is_out_of_date(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    opened.index()
    path = opened.path / "index/capture-00000.parquet"
    path.write_bytes((opened.path / "index/capture-00001.parquet").read_bytes())
    again = kdata.open(f"{served.url}/d")
    assert again.sql("select count(distinct id) as n from rows")["n"][0].as_py() == 6000
    assert again[0].id == dataset[0].id


def test_a_shard_at_the_url_that_was_replaced_is_a_changed_dataset(dataset: kdata.Dataset, served: Files) -> None:
    opened = kdata.open(f"{served.url}/d")
    payload = dataset.path / "data/capture-00001.arrow"
    payload.write_bytes(payload.read_bytes() + b"x")
    with pytest.raises(CorruptError, match="is damaged"):  # the manifest still names the former bytes
        _ = opened[4000]
    manifest = dataset.path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(MismatchError, match=r"has changed since it was opened.*capture-00001"):
        _ = opened[4000]


def test_the_commands_take_a_url(dataset: kdata.Dataset, served: Files) -> None:
    runner, url = CliRunner(env={"COLUMNS": "200"}), f"{served.url}/d"
    shown = runner.invoke(
        app, ["sql", url, "select count(*) as n from rows join scores.ref using (id)", "--format", "json"]
    )
    assert shown.stdout.strip() == '[{"n": 6000}]', shown.exception
    done = runner.invoke(app, ["select", url, "--method", "difference", "--share", "0.1"])
    assert done.exit_code == 0 and "plan difference: 600 rows" in done.output
    assert {path.split("/")[1] for path, _, _ in served.sent} == {"dataset.json", "manifest.jsonl", "index", "scores"}
    before = digests(dataset.path)
    assert digests(dataset.path) == before and not (dataset.path / "plans").exists()
    with pytest.raises(MissingError, match="is not a kdata dataset"):
        kdata.open(f"{served.url}/nothing")

"""Shards read without kdata: with pyarrow and numpy by the text of schemas/README.md, with DuckDB and Polars as it says."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.format.keep import KeepConfig
from tests.fakes import codec_version, run_capture
from tests.schemas.raw import ids_by_number, plain_row
from tests.schemas.tables import README

# --------------------------------------------------------- section 12 of schemas/README.md, and nothing of kdata

Flat = dict[str, np.ndarray]


def read_shard(root: Path, line: dict[str, Any]) -> tuple[Flat, np.ndarray]:
    """Flat columns of a shard, and the offsets of its rows."""
    path = root / f"data/{line['name']}.arrow"
    about = line["files"][f"data/{line['name']}.arrow"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    table = file.read_all().combine_chunks()
    if "exact_codes" in table.schema.names:
        ids = ids_by_number(file)
        rows = [plain_row(row, ids) for row in table.to_pylist()]
        columns = {name: flattened(rows, name) for name in rows[0] if name != "id" and rows[0][name] is not None}
        lengths = [len(row["input_ids"]) for row in rows]
        return columns, np.concatenate(([0], np.cumsum(lengths)))
    columns = {}
    for name in table.schema.names:
        column = table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)
        if name != "id" and column.null_count < len(column):
            columns[name] = column.flatten().to_numpy(zero_copy_only=False)
    lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
    return columns, np.concatenate(([0], np.cumsum(lengths)))


def flattened(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """One list column of all rows."""
    kind = {
        "target_mask": bool,
        "logprob": np.float32,
        "entropy": np.float32,
        "log_tail": np.float32,
        "log_z": np.float32,
    }
    values = [value for row in rows for value in row[name]]
    return np.array(
        values, kind.get(name, np.float64 if name.startswith("draw_l") or name == "draw_weights" else np.int64)
    )


def segment_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    sums, filled = np.zeros(len(counts)), counts > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, (np.cumsum(counts) - counts)[filled])
    return sums


def round_down(values: np.ndarray) -> np.ndarray:
    near = values.astype(np.float32)
    return np.where(near.astype(np.float64) > values, np.nextafter(near, np.float32(-np.inf)), near)


def running_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Cumulative sums that begin anew at each position."""
    before = np.concatenate(([0], np.cumsum(values)))
    starts = np.cumsum(counts) - counts
    return before[1:] - np.repeat(before[starts], counts)


def joined(columns: Flat, name: str) -> np.ndarray:
    ids = columns[f"{name}_0"].astype(np.int64) + 256 * columns[f"{name}_1"].astype(np.int64)
    return ids + 65536 * columns[f"{name}_2"].astype(np.int64) if f"{name}_2" in columns else ids


def entries(columns: Flat, codec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts per position, ids and log-weights: exact entries first, then draws."""
    num_exact, num_drawn = columns["num_exact"].astype(np.int64), columns["num_drawn"].astype(np.int64)
    if codec["id"] in ("plain", "verbatim"):
        return num_exact + num_drawn, columns["entry_ids"], columns["entry_logprobs"].astype(np.float32)
    assert codec["id"] == "packed" and codec["version"] <= 3
    table = np.array([c if c < 240 else round(240 * 1.25 ** (c - 239)) for c in range(256)])
    u = running_sums(table[columns["exact_gaps"]], num_exact) / 16
    tail = columns["log_tail"].astype(np.float64)
    with np.errstate(divide="ignore"):
        height = np.log(-np.expm1(np.where(num_exact > 0, tail, -1))) - np.log(segment_sums(np.exp(-u), num_exact))
    exact = round_down(np.repeat(height, num_exact) - u)
    is_coded = "exact_ids" in columns
    ids = columns["exact_ids"] if is_coded else joined(columns, "exact_id")
    drawn, draw_ids = np.zeros(0, np.float32), np.zeros(0, np.int64)
    if {"draw_id_0", "draw_counts", "draw_weights"} & columns.keys():
        draw_ids = columns["draw_ids"] if is_coded else running_sums(joined(columns, "draw_id"), num_drawn)
        if "draw_weights" in columns:
            drawn = columns["draw_weights"].astype(np.float32)
        else:
            times = columns["draw_counts"].astype(np.float64)
            share = times / codec["parameters"].get("num_draws", np.repeat(segment_sums(times, num_drawn), num_drawn))
            drawn = round_down(np.log(share) + np.repeat(tail, num_drawn))
    is_draw = np.repeat(np.tile([False, True], len(num_exact)), np.stack([num_exact, num_drawn], 1).reshape(-1))
    all_ids, weights = np.empty(len(is_draw), np.int64), np.empty(len(is_draw), np.float32)
    all_ids[~is_draw], all_ids[is_draw] = ids, draw_ids
    weights[~is_draw], weights[is_draw] = exact, drawn
    return num_exact + num_drawn, all_ids, weights


# ---------------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"kind": "topk", "k": 12},
    {"kind": "adaptive", "mass": 0.9},
    {"kind": "sampled", "num_draws": 12},
    {"kind": "hybrid", "k": 4, "num_draws": 9},
    {"kind": "hybrid", "k": 4, "num_draws": 9, "tau": 0.8, "temperatures": [2.0]},
    {"kind": "threshold", "threshold": 0.08},
]


@pytest.fixture(params=KINDS, ids=lambda s: f"{s['kind']}{s.get('tau', '')}")
def dataset(request: pytest.FixtureRequest, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> kdata.Dataset:
    return run_capture(tmp_path / "d", corpus_file, tokenizer_dir, **request.param)


@pytest.fixture(params=[1, 3])
def of_version(
    request: pytest.FixtureRequest, dataset: kdata.Dataset, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> kdata.Dataset:
    """The same with an earlier version of the codec too."""
    if request.param == dataset.info.codec.version:
        return dataset
    settings = next(s for s in KINDS if KeepConfig(**s).settings() == KeepConfig.of(dataset.info.codec).settings())
    if settings["kind"] == "threshold":
        pytest.skip("there is no such data")
    with codec_version(request.param):
        return run_capture(tmp_path / "older", corpus_file, tokenizer_dir, **settings)


def test_the_documented_reader_gives_the_arrays_that_kdata_gives(of_version: kdata.Dataset) -> None:
    dataset = of_version
    root = dataset.path
    codec = json.loads((root / "dataset.json").read_bytes())["codec"]
    lines = [json.loads(line) for line in (root / "manifest.jsonl").read_bytes().splitlines()]
    for number, line in enumerate(sorted(lines, key=lambda e: e["name"])):
        columns, offsets = read_shard(root, line)
        counts, ids, weights = entries(columns, codec)
        theirs = dataset.shard(number)
        for name in ("target_mask", "rank"):
            np.testing.assert_array_equal(columns[name], getattr(theirs, name))
        np.testing.assert_array_max_ulp(columns["log_tail"], theirs.log_tail, 1)
        np.testing.assert_array_equal(columns["input_ids"], theirs.token_ids)
        np.testing.assert_array_equal(columns["logprob"].astype(np.float32), theirs.logprob)
        np.testing.assert_array_equal(offsets, theirs.offsets)
        np.testing.assert_array_equal(counts, theirs.num_kept)
        np.testing.assert_array_equal(ids, theirs.entry_ids)
        np.testing.assert_allclose(weights, theirs.entry_logprobs, rtol=3e-7)
        if codec["parameters"].get("tau", 1.0) == 1.0:
            assert segment_sums(np.exp(weights.astype(np.float64)), counts).max() <= 1
        if "log_z" in columns:
            assert theirs.log_z is not None
            np.testing.assert_array_equal(columns["log_z"], theirs.log_z.reshape(-1))


def test_the_section_is_in_the_document() -> None:
    assert "## 12. Reading without kdata" in README.read_text("utf-8")


def test_duckdb_and_polars_read_as_documented(dataset: kdata.Dataset) -> None:
    pytest.importorskip("polars")
    block = re.search(r"## 12\..*?```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert block is not None
    name = dataset.manifest[0].name
    names: dict[str, Any] = {"root": str(dataset.path), "name": name}
    exec(block[1], names)
    expected = dataset.sql("select domain, count(*) as n, avg(nll) as nll from rows group by 1 order by 1").to_pylist()
    for row, own in zip(sorted(names["nll"].to_pylist(), key=lambda row: row["domain"]), expected, strict=True):
        assert row == {**own, "nll": pytest.approx(own["nll"])}
    unsure: dict[str, float] = {}
    for domain, row in zip(dataset.index()["domain"].to_pylist(), dataset, strict=True):
        unsure[domain] = max(unsure.get(domain, 0.0), float(np.nanmean(row.entropy)))
    assert {row["domain"]: row["entropy"] for row in names["unsure"].to_dicts()} == pytest.approx(unsure)
    means = names["means"]
    nlls = {row["id"]: row["nll"] for row in pq.read_table(dataset.path / f"index/{name}.parquet").to_pylist()}
    for row in means.to_pylist():  # codes in the payload, float32 before rounding in the index
        assert row["nll"] == pytest.approx(nlls[row["id"]], rel=0.02)
    assert len(means) == len(nlls)


def test_polars_reads_every_column_of_the_payload(dataset: kdata.Dataset) -> None:
    pl = pytest.importorskip("polars")
    frame = pl.scan_ipc(f"{dataset.path}/data/*.arrow").collect()
    assert frame.height == dataset.num_rows
    table = pa.concat_tables(pa.ipc.open_file(path).read_all() for path in sorted((dataset.path / "data").iterdir()))
    assert frame.columns == table.column_names
    assert frame["input_ids"].to_list() == table["input_ids"].to_pylist()
    assert frame["num_exact_codes"].to_list() == table["num_exact_codes"].to_pylist()


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_index_and_payload(
    tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    from kdata.share.card import write_card
    from kdata.share.push import push

    dataset = kdata.open(captured)
    root = Path(push(dataset, str(tmp_path / "pushed")))
    write_card(kdata.open(root))
    options: dict[str, Any] = {"split": "train", "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    index = datasets.load_dataset(str(root), **options)
    payload = datasets.load_dataset(str(root), data_dir="data", **options)
    assert [row["id"] for row in index] == [row["id"] for row in payload]
    for row, sequence in zip(payload, dataset, strict=True):
        assert list(row["input_ids"]) == sequence.token_ids.tolist()
        assert list(row["num_exact_codes"]) == sequence.num_exact.tolist()

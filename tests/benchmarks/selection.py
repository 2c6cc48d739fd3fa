"""How fast plans are made of how many rows, and in how much memory. Prints tables, one JSON line last.

    python tests/benchmarks/selection.py --rows 10000000 [--memory 3GB] [--threads 2] [--folder PLACE] [--no-peers]

An index and a sidecar of reference NLLs are generated: 50 domains (the k-th of size 1/k), ids of 20 characters in no
order, NLLs that differ in every row, 1M rows a shard; about 40 bytes of disk a row, and as much again while it works.
They are a dataset without payload, and what is measured is `kdata.selection.select.select` as the command calls it: digests
compared, rows and scores joined by id, the plan sorted and on disk. Each measurement is a process of its own, the peak
its resident set at most. Two selections:

- difference: the half of all rows with the largest NLL difference;
- mixture: temperature 2 over the domains, half of the tokens in all, small domains repeated up to 4 times.

Sizes grow from 1M rows by factors of about 3; `exponent` is the slope of log seconds against log rows, the larger of the
two selections. `a processor` is rows per second of processor time, which other work on the machine changes less.
pandas and `datasets.filter` do the same difference sampling for as long as 4 GB (RLIMIT_DATA) suffice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

import kdata
from kdata.format.files import file_info
from kdata.format.manifest import append_entry, new_info, write_info, write_json
from kdata.format.schema import FORMAT_VERSION, ManifestEntry, SourceInfo, TeacherInfo
from kdata.selection.sidecar import ScoreInfo

SHARD_ROWS, DOMAINS = 1_000_000, 50
PEER_BYTES = 4 << 30
SIZES = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)

NUMBERS = "select i, hash(i) as h, 'doc-' || left(md5(i::varchar), 16) as id from range({first}, {last}) as t(i)"
INDEX = """
select id,
    'domain-' || lpad(floor(exp((h % 1000003) / 1000003.0 * ln({domains} + 1)))::integer::varchar, 2, '0') as domain,
    (64 + (h >> 8) % 961)::integer as num_tokens, (63 + (h >> 8) % 961)::integer as num_target_tokens,
    2.0 + (h >> 20) % 1000000007 / 1e9 * 1.5 as nll, '{shard}' as shard, (i - {first})::integer as row
from ({numbers})
"""
SCORES = """
select id,
    2.9 + (h >> 20) % 1000000007 / 1e9 * 1.5 + hash(i + 7) % 1000000007 / 1e9 - hash(i + 11) % 1000000007 / 1e9 as nll,
    (63 + (h >> 8) % 961)::integer as num_target_tokens
from ({numbers})
"""


# ---------------------------------------------------------------------------------------------------------- the data


def generate(root: Path, rows: int) -> None:
    """Write the Parquet files of all shards: index/NAME.parquet, scores/ref/NAME.parquet, and a payload that is empty."""
    for folder in ("index", "data", "scores/ref"):
        (root / folder).mkdir(parents=True)
    with duckdb.connect() as connection:
        connection.execute("set threads = 2; set memory_limit = '2GB'")
        for number in range(rows // SHARD_ROWS):
            name, first = f"capture-{number:05}", number * SHARD_ROWS
            numbers = NUMBERS.format(first=first, last=first + SHARD_ROWS)
            for folder, text in (("index", INDEX), ("scores/ref", SCORES)):
                sql = text.format(numbers=numbers, first=first, shard=name, domains=DOMAINS)
                connection.execute(f"copy ({sql}) to '{root}/{folder}/{name}.parquet' (compression zstd)")
            (root / "data" / f"{name}.arrow").touch()


def dataset_of(root: Path, files: Path, rows: int) -> kdata.Dataset:
    """A dataset of the first shards: dataset.json, manifest and sidecar; its files are hard links."""
    teacher = TeacherInfo(model="synthetic", revision=None, weights_hash=None, backend="-", backend_version="-",
                          dtype="float32", logprobs="raw", deterministic=True)  # fmt: skip
    info = new_info(
        format_version=FORMAT_VERSION, vocab_size=2, teacher=teacher, tail="ghost",
        tokenizer={"hash": "-", "chat_template_hash": None, "bos_id": None, "eos_id": None},
        codec={"id": "plain", "version": 1, "kind": "topk", "parameters": {"k": 1}},
    )  # fmt: skip
    for folder in ("index", "data", "scores/ref"):
        (root / folder).mkdir(parents=True)
    source = SourceInfo(kind="capture", settings={}, num_units=rows // SHARD_ROWS)
    write_info(root, info.model_copy(update={"sources": {"capture": source}}))
    parts = {}
    for number in range(rows // SHARD_ROWS):
        name = f"capture-{number:05}"
        paths = {"data": f"data/{name}.arrow", "index": f"index/{name}.parquet", "score": f"scores/ref/{name}.parquet"}
        for path in paths.values():
            os.link(files / path, root / path)
        parts[paths["score"]] = file_info(root / paths["score"])
        held = {path: file_info(root / path) for key, path in paths.items() if key != "score"}
        counts = pq.read_table(root / paths["index"], columns=["num_tokens", "num_target_tokens"])
        tokens, targets = (pc.sum(column).as_py() for column in counts.columns)
        append_entry(root, ManifestEntry(name=name, source="capture", unit=number, rows=SHARD_ROWS, tokens=tokens,
                                         target_tokens=targets, rejected=0, inputs="-", files=held, codec_error=None))  # fmt: skip  # noqa: E501
    dataset = kdata.open(root)
    sidecar = ScoreInfo(name="ref", unit="nats per target token", model=teacher, tokenizer_hash="-",
                        dataset_digest=dataset.content_digest, files=parts)  # fmt: skip
    write_json(root / "scores/ref.json", sidecar.model_dump())
    return dataset


# ------------------------------------------------------------------------------------------------------ what is timed


def ours(root: Path, what: str, memory: str, threads: int) -> int:
    """Make a plan as the command does; return its rows."""
    from kdata.selection.mixtures import Temperature
    from kdata.selection.ranked import Difference
    from kdata.selection.select import select
    from kdata.store.sql import Room

    dataset = kdata.open(root)
    if what == "difference":
        step = Difference(share=0.5)
    else:
        tokens = dataset.sql("select sum(num_tokens)::bigint as n from rows")["n"][0].as_py()
        step = Temperature(temperature=2.0, size=tokens // 2, max_repeats=4.0, name="mixture")  # type: ignore[assignment]
    return select(dataset, step, Room(memory_limit=memory, threads=threads)).info.num_rows


def with_pandas(root: Path, what: str, memory: str, threads: int) -> int:
    """The same difference sampling, with the columns that it needs in memory."""
    import pandas as pd

    rows = pd.read_parquet(root / "index", columns=["id", "nll"])
    scores = pd.read_parquet(root / "scores/ref", columns=["id", "nll"])
    joined = rows.merge(scores, on="id", suffixes=("", "_ref"))
    joined["value"] = joined["nll_ref"] - joined["nll"]
    chosen = joined.sort_values(["value", "id"], ascending=[False, True]).head(math.ceil(len(joined) / 2))
    chosen[["id"]].assign(repeats=1).to_parquet(root / "pandas.parquet", compression="zstd")
    return len(chosen)


def with_datasets(root: Path, what: str, memory: str, threads: int) -> int:
    """The same with `datasets`: columns side by side, as it cannot join; the threshold from numpy, then a batched filter."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "parquet", data_files=str(root / "index/*.parquet"), columns=["id", "nll"], split="train"
    )
    scores = datasets.load_dataset(
        "parquet", data_files=str(root / "scores/ref/*.parquet"), columns=["nll"], split="train"
    )
    both = datasets.concatenate_datasets([rows, scores.rename_column("nll", "ref")], axis=1)
    table = both.with_format("numpy")
    values = np.concatenate([b["ref"] - b["nll"] for b in table.iter(batch_size=100_000)])
    cut = np.partition(values, len(values) // 2)[len(values) // 2]
    chosen = table.filter(lambda b: b["ref"] - b["nll"] >= cut, batched=True, batch_size=100_000)
    chosen.select_columns(["id"]).to_parquet(str(root / "datasets.parquet"))
    return len(chosen)


TIMED: dict[str, Callable[[Path, str, str, int], int]] = {
    "difference": ours, "mixture": ours, "pandas": with_pandas, "datasets": with_datasets,
}  # fmt: skip


def measure(root: Path, what: str, memory: str, threads: int) -> dict[str, float] | None:
    """Seconds, peak resident GB and rows taken, in a process of its own; None where that dies."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        what,
        "--folder",
        str(root),
        "--memory",
        memory,
        "--threads",
        str(threads),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_DATASETS_CACHE": f"{root}/hf"}
    )
    if done.returncode:
        if what in ("difference", "mixture"):
            raise SystemExit(done.stderr)
        print(f"{what} gives up: {done.stderr.strip().splitlines()[-1:] or done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measured(root: Path, what: str, memory: str, threads: int) -> None:
    """The child's part."""
    if what in ("pandas", "datasets"):
        resource.setrlimit(resource.RLIMIT_DATA, (PEER_BYTES, PEER_BYTES))
    began = time.perf_counter()
    num_chosen = TIMED[what](root, what, memory, threads)
    seconds, cpu = time.perf_counter() - began, time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak, "taken": num_chosen}))


# ------------------------------------------------------------------------------------------------------------- report


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log seconds against log rows, by least squares."""
    x, y = [math.log(rows) for rows, _ in points], [math.log(seconds) for _, seconds in points]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the largest index, a multiple of 1M")
    parser.add_argument("--memory", default="3GB", help="DuckDB's memory limit; the process needs a little more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the data go (removed again); a temporary folder if not given"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave pandas and datasets out")
    parser.add_argument("--measure", choices=list(TIMED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measured(options.folder, options.measure, options.memory, options.threads)
    sizes = [size for size in SIZES if size < options.rows] + [options.rows]
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="kdata-selection-") as folder:
        root = Path(folder)
        generate(root / "files", sizes[-1])
        results = run(root, sizes, options)
    report(results, sizes, options)


def run(root: Path, sizes: list[int], options: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Every measurement: by name, then by rows. A peer is asked for larger sizes until it gives up."""
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in TIMED}
    for size in sizes:
        place = root / f"rows-{size}"
        dataset_of(place, root / "files", size)
        for name in TIMED:
            peer = name in ("pandas", "datasets")
            gave_up = peer and (options.no_peers or len(results[name]) < sizes.index(size))
            result = None if gave_up else measure(place, name, options.memory, options.threads)
            if result is not None:
                results[name][size] = {**result, "load": os.getloadavg()[0]}
            print(name, f"{size:,}", result, file=sys.stderr)
        subprocess.run(["rm", "-rf", str(place)], check=True)
    return results


def report(results: dict[str, dict[int, dict[str, float]]], sizes: list[int], options: argparse.Namespace) -> None:
    """Print the table, and the JSON line last."""
    labels = {"difference": "kdata: difference, half", "mixture": "kdata: mixture, T = 2, repeats", "pandas": "pandas: difference",  # noqa: E501
              "datasets": "datasets.filter: difference"}  # fmt: skip
    table = Table("selection", "rows", "seconds", "M rows/s", "a processor", "peak GB", "rows taken", "load",
                  title=f"memory_limit {options.memory}, {options.threads} threads")  # fmt: skip
    for name, by_size in results.items():
        for size, result in by_size.items():
            table.add_row(labels[name], f"{size:,}", f"{result['seconds']:.1f}", f"{size / result['seconds'] / 1e6:.2f}",
                          f"{size / result['cpu_seconds'] / 1e6:.2f}",
                          f"{result['peak_gb']:.2f}", f"{result['taken']:,.0f}", f"{result['load']:.1f}")  # fmt: skip
    Console(width=110).print(table)
    largest, kept = sizes[-1], ("difference", "mixture")
    slopes = (
        {name: exponent([(size, r["seconds"]) for size, r in results[name].items()]) for name in kept}
        if len(sizes) > 1
        else {}
    )
    print(
        json.dumps(
            {
                "rows_s": round(min(largest / results[name][largest]["seconds"] for name in kept)),
                "peak_gb": round(max(results[name][largest]["peak_gb"] for name in kept), 2),
                "exponent": round(max(slopes.values()), 3) if slopes else None,
                "rows": largest,
                **{f"{name}_rows_s": round(largest / results[name][largest]["seconds"]) for name in kept},
                **{f"{name}_rows_cpu_s": round(largest / results[name][largest]["cpu_seconds"]) for name in kept},
                **{f"{name}_exponent": round(slope, 3) for name, slope in slopes.items()},
                **{f"{name}_most_rows": max(results[name], default=0) for name in ("pandas", "datasets")},
                **{f"{name}_rows_s": round(max(results[name]) / results[name][max(results[name])]["seconds"])
                   for name in ("pandas", "datasets") if results[name]},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

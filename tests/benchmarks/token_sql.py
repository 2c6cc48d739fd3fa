"""How fast SQL reads every token and every kept entry, beside nested lists in Parquet. Prints a table, JSON last.

    python -m tests.benchmarks.token_sql [--tokens 5000000] [--entries 32] [--passes 3] [--scan 100000000]

The dataset is that of tests/benchmarks/loader.py (documents of some 330 tokens, `--entries` kept entries each, packed codec),
read from the page cache, its digests compared before. A figure is tokens per second of *processor* time of the whole process,
threads included, the best of some passes. The same queries are asked of a plain dump: one row for each document, lists and
lists of lists, Parquet with zstd, read by DuckDB's own reader with `unnest`; and of the files of a score of tokens. Two more
lines: a query that a condition on `rows` cuts to a hundredth of the rows, and the first query, which compares every digest.

Then memory: queries over a fifth of `--scan` tokens and over all of them, each in a process of its own, and the most memory
that it held (VmHWM). That dataset has the shards above again and again, as hard links under other names, so its ids repeat.
Its digests are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

import kdata
from kdata.format.manifest import write_manifest
from tests.benchmarks.loader import build_dataset, folder_bytes
from tests.kdata.selection.plans import score_tokens_with

# what is asked: the query, and the same over the dump
QUERIES = {
    "count": ("select count(*) from tokens", "select sum(len(token_ids)) from dump"),
    "one column": ("select avg(logprob) from tokens", "select avg(x) from (select unnest(logprob) as x from dump)"),
    "four columns": (
        "select avg(logprob), avg(entropy), max(rank), count(*) filter (target) from tokens",
        "select avg(l), avg(e), max(r), count(*) filter (t) from (select unnest(logprob) as l, unnest(entropy) as e, "
        "unnest(rank) as r, unnest(target_mask) as t from dump)",
    ),
    "by token id": (
        "select count(*) from (select token_id, avg(entropy) from tokens group by 1)",
        "select count(*) from (select i, avg(e) from (select unnest(token_ids) as i, unnest(entropy) as e from dump) "
        "group by 1)",
    ),
    "a score": ("select avg(nll_student) from tokens", "select avg(x) from (select unnest(token_nll) as x from score)"),
    "a score and logprob": (
        "select avg(nll_student + logprob) from tokens",
        "select avg(n + l) from (select unnest(token_nll) as n, unnest(logprob) as l from score positional join dump)",
    ),
    "entries: weight": (
        "select sum(weight) from entries",
        "select sum(exp(x)) from (select unnest(flatten(entry_logprobs)) as x from dump)",
    ),
    "entries: by token id": (
        "select count(*) from (select token_id, sum(weight) from entries group by 1)",
        "select count(*) from (select i, sum(exp(x)) from (select unnest(flatten(entry_ids)) as i, "
        "unnest(flatten(entry_logprobs)) as x from dump) group by 1)",
    ),
}
HUNDREDTH = "select sum(logprob) from tokens t join rows r using (id) where r.row < {rows} and r.shard = '{shard}'"

SCANS = {
    "mean entropy": "select avg(entropy), max(rank) from tokens",
    "entries by token id": "select token_id, sum(weight) as mass from entries group by 1 order by 2 desc limit 10",
}
SCAN = """
import re, sys, time
from pathlib import Path
import kdata
began, data = time.perf_counter(), kdata.open(sys.argv[1])
data.sql(sys.argv[2])
# Not ru_maxrss: a child begins with what its parent had.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(data.num_tokens, peak, time.perf_counter() - began)
"""


def repeated(dataset: kdata.Dataset, root: Path, tokens: int) -> Path:
    """A dataset of at least so many tokens: the shards of another one again and again, as hard links."""
    for folder in ("data", "index"):
        (root / folder).mkdir(parents=True)
    (root / "dataset.json").write_bytes((dataset.path / "dataset.json").read_bytes())
    entries, written = [], 0
    while written < tokens:
        entry = dataset.manifest[len(entries) % len(dataset.manifest)]
        name = f"{entry.source}-{len(entries):05}"
        files = {path.replace(entry.name, name): info for path, info in entry.files.items()}
        for old, new in zip(entry.files, files, strict=True):
            os.link(dataset.path / old, root / new)
        entries.append(entry.model_copy(update={"name": name, "unit": len(entries), "files": files}))
        written += entry.tokens
    write_manifest(root, entries)
    return root


def scans(dataset: kdata.Dataset, root: Path, tokens: int) -> dict[str, list[dict[str, float]]]:
    """Tokens, peak memory (MiB) and seconds of each query of SCANS, over a fifth of `tokens` and over all."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SCANS}
    for size in (tokens // 5, tokens):
        place = repeated(dataset, root / f"scan-{size}", size)
        for name, query in SCANS.items():
            command = [sys.executable, "-c", SCAN, str(place), query]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            results[name].append(dict(zip(("tokens", "peak_mib", "sec"), map(float, answer), strict=True)))
    return results


def dump(dataset: kdata.Dataset, path: Path) -> None:
    """Write the same numbers as lists and lists of lists, a row for each document."""
    writer = None
    for sequences in dataset.iter_sequences():
        table = sequences.to_arrow()
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None, "the dataset is empty"
    writer.close()


def speed(work: Callable[[], Any], tokens: int, passes: int) -> float:
    """Tokens per second of processor time: the best of some passes."""
    best = 0.0
    for _ in range(passes):
        begin = time.process_time()
        work()
        best = max(best, tokens / (time.process_time() - begin))
    return best


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--entries", type=int, default=32, help="kept entries of each token")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument(
        "--scan", type=int, default=100_000_000, help="tokens of the scans that measure memory; 0: none"
    )
    options = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset = build_dataset(root / "d", options.tokens, options.vocab, k=options.entries)
        tokens = dataset.num_tokens
        score_tokens_with(dataset, "student")
        dataset = kdata.open(root / "d")
        first = speed(lambda: dataset.sql("select sum(token_id) from tokens"), tokens, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ours = {name: speed(lambda q=q: dataset.sql(q), tokens, options.passes) for name, (q, _) in QUERIES.items()}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        shard = dataset.manifest[0]
        part = HUNDREDTH.format(shard=shard.name, rows=max(dataset.num_rows // 100, 1))
        hundredth = speed(lambda: dataset.sql(part), tokens, options.passes)
        dump(dataset, root / "dump.parquet")
        with duckdb.connect() as connection:
            connection.execute(f"create view dump as from '{root}/dump.parquet'")
            connection.execute(f"create view score as from '{root}/d/scores/student/*.parquet'")
            dumped = {
                name: speed(lambda q=q: connection.execute(q).fetchall(), tokens, options.passes)
                for name, (_, q) in QUERIES.items()
            }
        scanned = scans(dataset, root, options.scan) if options.scan else {}
        sizes = [folder_bytes(root / "d/data") / tokens, (root / "dump.parquet").stat().st_size / tokens]
    table = Table(
        "query",
        "kdata, M tokens/s/core",
        "nested lists",
        "ratio",
        title=f"{tokens:,} tokens, {options.entries} entries each",
    )
    for name, value in ours.items():
        table.add_row(name, f"{value / 1e6:.2f}", f"{dumped[name] / 1e6:.2f}", f"{value / dumped[name]:.1f}")
    table.add_row("a hundredth of the rows, by a join", f"{hundredth / 1e6:.2f}", "", "")
    table.add_row("the first query (digests)", f"{first / 1e6:.2f}", "", "")
    table.add_row("bytes a token", f"{sizes[0]:.0f}", f"{sizes[1]:.0f}", "")
    memories = Table("scan", "M tokens", "peak memory, MiB", "sec", title="Memory of a process")
    for name, sizes_scanned in scanned.items():
        for scan in sizes_scanned:
            memories.add_row(name, f"{scan['tokens'] / 1e6:.0f}", f"{scan['peak_mib']:.0f}", f"{scan['sec']:.0f}")
    console = Console(width=110)
    console.print(table)
    if scanned:
        console.print(memories)
    print(
        json.dumps(
            {
                "tokens": tokens,
                "kdata_tok_s_core": {name: round(value) for name, value in ours.items()},
                "dump_tok_s_core": {name: round(value) for name, value in dumped.items()},
                "hundredth_tok_s_core": round(hundredth),
                "first_tok_s_core": round(first),
                "memory_growth_mib": round(memory / 1024),
                "scans": scanned,
                "bytes_per_token": [round(size, 1) for size in sizes],
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    main()

"""What it costs to compare index and scores with their digests before the first query. Prints a table, one JSON line last.

    python -m tests.benchmarks.digests [--rows 10000000] [--folder PLACE]

The dataset is that of tests/benchmarks/selection.py: an index and a score, about 40 bytes of disk a row, 1M rows a shard. Two
queries: one over the index (mean NLL of each domain), one that joins the score by id. Each is run in a process of its own,
once with `check="first"` and once with `check="later"`, then a second time in that process, which compares nothing again.
The cost is proportional to bytes: `seconds_100m` is 100M rows at the measured speed. Files are read from the cache of
the operating system (they were just written); from a disk that is slower than SHA-256, its speed decides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import kdata
from tests.benchmarks.selection import SHARD_ROWS, dataset_of, generate

QUERIES = {
    "index": "select domain, avg(nll) as nll from rows group by 1 order by 1",
    "join": "select domain, avg(ref.nll - rows.nll) as gap from rows join scores.ref as ref using (id) group by 1 order by 1",
}
TURNS = 3


def measure(root: Path, query: str, check: Any) -> list[float]:
    """Seconds of the first and of the second time that a query is answered in a process."""
    dataset = kdata.open(root, check=check)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        dataset.sql(QUERIES[query])
        seconds.append(time.perf_counter() - begin)
    return seconds


def in_own_process(root: Path, query: str, check: str) -> list[float]:
    """The same in a process of its own; of TURNS turns the fastest."""
    command = [sys.executable, "-m", "tests.benchmarks.digests", "--measure", str(root), query, check]
    turns = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(TURNS)]
    return [min(seconds) for seconds in zip(*turns, strict=True)]


def bytes_of(root: Path, query: str) -> int:
    """Bytes of the files that a query reads."""
    folders = ["index", "scores/ref"] if query == "join" else ["index"]
    return sum(path.stat().st_size for folder in folders for path in (root / folder).iterdir())


def compare(files: Path, root: Path, rows: int) -> list[dict[str, Any]]:
    """All measurements of one size."""
    dataset_of(root, files, rows)
    time.sleep(3)  # a file that was just written is compared at every query
    lines = []
    for query in QUERIES:
        (first, again), (later, _) = (in_own_process(root, query, check) for check in ("first", "later"))
        size = bytes_of(root, query)
        speed = size / max(first - later, 1e-9)
        lines.append(
            {"query": query, "rows": rows, "bytes_per_row": size / rows, "first": first, "later": later, "again": again,
             "ratio": first / later, "bytes_per_sec": speed, "seconds_100m": 1e8 * size / rows / speed}
        )  # fmt: skip
    return lines


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("ROOT", "QUERY", "CHECK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        root, query, check = arguments.measure
        print(json.dumps(measure(Path(root), query, check)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        generate(folder / "files", arguments.rows)
        sizes = sorted({SHARD_ROWS, arguments.rows})
        lines = [line for rows in sizes for line in compare(folder / "files", folder / f"d{rows}", rows)]
    table = Table("query", "rows", "first, s", "later, s", "ratio", "again, s", "GB/s", "100M rows, s")
    for line in lines:
        values = (
            line["first"],
            line["later"],
            line["ratio"],
            line["again"],
            line["bytes_per_sec"] / 1e9,
            line["seconds_100m"],
        )
        table.add_row(line["query"], f"{line['rows']:,}", *(f"{value:.2f}" for value in values))
    Console(width=120).print(table)
    print(json.dumps(lines))


if __name__ == "__main__":
    main()

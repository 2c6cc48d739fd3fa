"""A payload that is cut short while a reader has it open is an error of that reader, and does not end its process.

What was read before the cut, or lies before it, may still be given; then it is what was committed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Reads once, so that the shard is open and checked; then the file is cut, and everything is read again.
READ = """
import os, sys
import numpy as np
import kdata
from kdata.errors import CorruptError
from kdata.jobs.payloads import inputs_of_shard
from kdata.loader.batches import Batches, BatchesConfig
from kdata.store.pick import tables

dataset = kdata.open(sys.argv[1])
entry = dataset.manifest[0]
stored = dataset.shard(0)
token_ids = np.concatenate([sequences.token_ids for sequences in dataset.iter_sequences()])
path = dataset.shard_file(entry, "data")
batches = iter(Batches(dataset, None, BatchesConfig(context_tokens=64, batch_rows=1, prefetch_batches=0, window_documents=2)))
next(batches)
os.truncate(path, int(path.stat().st_size * float(sys.argv[2])))
ways = {
    "rows": lambda: list(dataset),
    "take": lambda: dataset.take(np.arange(dataset.num_rows)).token_ids,
    "sequences": lambda: np.concatenate([sequences.token_ids for sequences in dataset.iter_sequences()]),
    "batches": lambda: [next(batches) for _ in range(200)],
    "bytes": lambda: dataset.token_bytes(0),
    "rows of a shard": lambda: tables(dataset, entry, np.arange(1), "x-00000"),
    "inputs": lambda: inputs_of_shard(dataset, 0, stored),
}
for name, way in ways.items():
    try:
        value = way()
        assert not isinstance(value, np.ndarray) or np.array_equal(value, token_ids), name
    except CorruptError as error:
        assert str(path) in str(error), error
        print(name)
"""


OPENED = {"bytes", "rows of a shard"}  # these open the file again


@pytest.mark.parametrize(
    ("share", "refused"),
    [(0.0, {"sequences", "batches", *OPENED}), (0.3, {"sequences", "batches", *OPENED}), (0.9, OPENED)],
)
def test_a_payload_that_is_cut_under_its_reader(copied: Path, share: float, refused: set[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READ, str(copied), str(share)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"  # -7 is SIGBUS
    assert refused <= set(result.stdout.splitlines())


def test_an_arrow_corpus_that_is_cut_under_its_reader(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "import pyarrow as pa\n"
        "from kdata.corpus.corpus import Corpus, CorpusConfig\n"
        "from kdata.errors import KdataError\n"
        "table = pa.table({'id': [str(i) for i in range(20000)], 'text': ['some text of a row'] * 20000})\n"
        "with pa.OSFile(sys.argv[1], 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:\n"
        "    writer.write_table(table, max_chunksize=100)\n"
        "try:\n"
        "    for number, row in enumerate(Corpus(CorpusConfig(path=sys.argv[1]))):\n"
        "        if number == 5: os.truncate(sys.argv[1], 5000)\n"
        "except (KdataError, pa.ArrowException, OSError) as error:\n"
        "    print('refused')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.arrow")], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "refused\n"), result.stderr

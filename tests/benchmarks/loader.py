"""How fast a dataset becomes batches, and how fast the same logits are in other formats. Prints a table, JSON last.

    python tests/benchmarks/loader.py [--tokens 2000000] [--passes 3] [--vocab 32000]

The data are made here: documents of some 400 tokens, 64 kept entries each, ids drawn from a Zipf law over the
vocabulary, written with kdata's writer and read from the page cache. A figure is tokens per second of *processor* time
of the whole process, threads included, the best of some passes. kdata's is of finished batches: shuffled, packed,
decoded, laid out as a grid of ids and log-probabilities. The others' documents come in their own shuffled order and are
only joined to batches of as many tokens (an array that is memory-mapped and never looked at would be infinitely fast);
nothing is packed. What they store is what kdata returns, bit for bit, as flat arrays of int32 and float32 (and once as
nested lists), uncompressed. litdata and mosaicml-streaming take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

import kdata
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import FORMAT_VERSION, SourceInfo
from kdata.loader.batches import Batches, BatchesConfig
from kdata.store.writer import Writer

CONTEXT = 1024
UNIT_TOKENS = 250_000
Document = tuple[int, np.ndarray, np.ndarray]  # row, entry ids int32 [M, K], log-probabilities float32 [M, K]


# ---------------------------------------------------------------------------------------------------------- the data


@numba.njit  # no cache on disk: it would name this file as the program or as a module, whichever came first
def _distinct(table, seed, rows, width, vocab):
    """`width` different ids of the law that `table` samples, for each row."""
    np.random.seed(seed)
    distinct = np.empty((rows, width), np.int32)
    seen_in = np.full(vocab, -1, np.int64)
    for row in range(rows):
        n = 0
        while n < width:
            token = table[np.random.randint(0, len(table))]
            if seen_in[token] != row:
                seen_in[token] = row
                distinct[row, n] = token
                n += 1
    return distinct


def build_dataset(root: Path, tokens: int, vocab: int, *, k: int = 64, median: int = 330) -> kdata.Dataset:
    """Write a dataset of at least `tokens` tokens; lengths are log-normal around `median`, at most 1,024."""
    keep = KeepConfig(kind="topk", k=k)
    teacher = {
        "model": "synthetic", "revision": None, "weights_hash": None, "backend": "-", "backend_version": "-",
        "dtype": "float32", "logprobs": "raw", "deterministic": True,
    }  # fmt: skip
    info = new_info(
        format_version=FORMAT_VERSION, vocab_size=vocab, teacher=teacher, codec=keep.codec(vocab), tail=keep.tail,
        tokenizer={"hash": "-", "chat_template_hash": None, "bos_id": None, "eos_id": None},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    law = np.cumsum(1 / np.arange(1, vocab + 1))
    zipf = np.searchsorted(law / law[-1], (np.arange(2**20) + 0.5) / 2**20)
    table = rng.permutation(vocab)[zipf].astype(np.int32)
    number, written = 0, 0
    with Writer(root, info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        while written < tokens:
            records: list[Record] = []
            while (size := sum(len(r.token_ids) for r in records)) < min(UNIT_TOKENS, tokens - written):
                records.append(_record(f"doc-{number}", rng, table, vocab, k, median))
                number += 1
            writer.commit(UnitResult(len(writer.committed), records))
            written += size
    return kdata.open(root)


def _record(name: str, rng: np.random.Generator, table: np.ndarray, vocab: int, k: int, median: int) -> Record:
    tokens = int(np.clip(rng.lognormal(np.log(median), 0.7), 16, CONTEXT))
    predicted = tokens - 1
    logits = -1.6 * np.log(np.arange(1, k + 1)) + 0.3 * rng.standard_normal((predicted, k))
    p = -np.sort(-np.exp(logits), axis=1)
    mass = rng.uniform(0.6, 0.99, (predicted, 1))
    logprobs = np.log(p / p.sum(1, keepdims=True) * mass).astype(np.float32)
    ids = _distinct(table, int(rng.integers(2**31)), predicted, k, vocab)
    counts = np.where(np.arange(tokens) > 0, k, 0).astype(np.int32)

    def aligned(values: np.ndarray, first: float) -> np.ndarray:
        return np.concatenate([[first], values]).astype(np.float32)

    return Record(
        id=name,
        domain="synthetic",
        token_ids=table[rng.integers(0, len(table), tokens)],
        target_mask=counts > 0,
        logprob=aligned(-rng.exponential(2.0, predicted), np.nan),
        rank=aligned(rng.geometric(0.4, predicted), 0).astype(np.int32),
        log_tail=aligned(np.log1p(-mass[:, 0]), 0.0),
        kept=Kept(counts, np.zeros_like(counts), ids.reshape(-1), logprobs.reshape(-1)),
        text=None,
        entropy=aligned(rng.uniform(0.5, 4.0, predicted), np.nan),
    )


# ------------------------------------------------------------------------------------------------- the other formats


def flat_documents(dataset: kdata.Dataset, rows: range) -> Iterator[dict[str, np.ndarray]]:
    """What the others store: a row's number, its entry ids and log-probabilities, flat."""
    for row in rows:
        seq = dataset[row]
        yield {"row": np.array([row], np.int32), "ids": seq.entry_ids, "logprobs": seq.entry_logprobs}


def _arrow(dataset: kdata.Dataset, rows: range, k: int, nested: bool) -> pa.Table:
    parts = []
    for document in flat_documents(dataset, rows):
        columns: list[pa.Array] = [pa.array(document["row"])]
        for name in ("ids", "logprobs"):
            values = pa.array(document[name])
            if nested:
                values = pa.ListArray.from_arrays(np.arange(0, len(values) + 1, k, dtype=np.int32), values)
            columns.append(pa.ListArray.from_arrays([0, len(values)], values))
        parts.append(pa.table(columns, ["row", "ids", "logprobs"]))
    return pa.concat_tables(parts)


def via_datasets(
    dataset: kdata.Dataset, rows: range, k: int, root: Path, nested: bool
) -> Callable[[int], Iterator[Document]]:
    """Hugging Face datasets, numpy format, shuffled by an index; flat lists or lists of lists."""
    from datasets import Dataset, load_from_disk

    Dataset(_arrow(dataset, rows, k, nested)).save_to_disk(str(root))

    def documents(seed: int) -> Iterator[Document]:
        for row in load_from_disk(str(root)).shuffle(seed=seed).with_format("numpy"):
            ids, logprobs = (np.stack(row[n]) if nested else row[n].reshape(-1, k) for n in ("ids", "logprobs"))
            yield int(row["row"]), ids, logprobs

    return documents


def via_litdata(dataset: kdata.Dataset, rows: range, k: int, root: Path) -> Callable[[int], Iterator[Document]]:
    """litdata's chunks of 64 MB and its StreamingDataset, shuffled."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    root.mkdir()
    writer = BinaryWriter(str(root), chunk_bytes="64MB")
    for number, document in enumerate(flat_documents(dataset, rows)):
        writer.add_item(number, document)
    writer.done()
    writer.merge(1)

    def documents(seed: int) -> Iterator[Document]:
        for row in StreamingDataset(str(root), shuffle=True, seed=seed):
            yield int(row["row"][0]), row["ids"].reshape(-1, k), row["logprobs"].reshape(-1, k)

    return documents


def via_streaming(dataset: kdata.Dataset, rows: range, k: int, root: Path) -> Callable[[int], Iterator[Document]]:
    """mosaicml-streaming's MDS shards of 64 MB and its StreamingDataset, shuffled (py1e)."""
    from streaming import MDSWriter, StreamingDataset

    columns = {"row": "ndarray:int32", "ids": "ndarray:int32", "logprobs": "ndarray:float32"}
    with MDSWriter(out=str(root), columns=columns, size_limit=64 << 20) as writer:
        for document in flat_documents(dataset, rows):
            writer.write(document)

    def documents(seed: int) -> Iterator[Document]:
        for row in StreamingDataset(local=str(root), shuffle=True, shuffle_seed=seed, batch_size=1):
            yield int(row["row"][0]), row["ids"].reshape(-1, k), row["logprobs"].reshape(-1, k)

    return documents


# ------------------------------------------------------------------------------------------------------- measurement


def speed(source: Callable[[int], Iterator[int]], passes: int, limit_sec: float) -> float:
    """Tokens per second of processor time: the best of some passes, each cut off after `limit_sec`."""
    best = 0.0
    for seed in range(passes):
        began, tokens = time.process_time(), 0
        for count in source(seed):
            tokens += count
            if time.process_time() - began > limit_sec:
                break
        best = max(best, tokens / (time.process_time() - began))
    return best


def joined(documents: Callable[[int], Iterator[Document]], seed: int) -> Iterator[int]:
    """Positions of each batch of as many as 8 rows hold, once their entries are one array."""
    ids: list[np.ndarray] = []
    logprobs: list[np.ndarray] = []
    for _, ids_MK, logprobs_MK in documents(seed):
        ids.append(ids_MK)
        logprobs.append(logprobs_MK)
        if sum(map(len, ids)) >= 8 * CONTEXT:
            yield len(np.concatenate(logprobs)[: len(np.concatenate(ids))])
            ids, logprobs = [], []


def check_equal(dataset: kdata.Dataset, documents: Iterator[Document]) -> None:
    """Stop unless some documents hold what kdata returns, bit for bit."""
    for row, ids, logprobs in islice(documents, 5):
        seq = dataset[row]
        assert np.array_equal(ids.reshape(-1), seq.entry_ids), f"other ids in row {row}"
        assert np.array_equal(logprobs.reshape(-1), seq.entry_logprobs), f"other log-probabilities in row {row}"


def loaded(dataset: kdata.Dataset, fill: list[float], seed: int, **config: int) -> Iterator[int]:
    """Tokens of each batch of one epoch; the epoch's fill is appended to `fill`."""
    batches = Batches(dataset, None, BatchesConfig(context_tokens=CONTEXT, seed=seed, **config))
    tokens, cells = 0, 0
    for batch in batches.epoch():
        tokens, cells = tokens + batch.num_tokens, cells + batch.input_ids.size
        yield batch.num_tokens
    fill.append(tokens / cells)


def through_torch(dataset: kdata.Dataset, seed: int) -> Iterator[int]:
    """The same through the trainer's Loader."""
    from kdata.trainer.loader import Loader

    for batch in Loader(dataset, None, BatchesConfig(context_tokens=CONTEXT, seed=seed)).epoch():
        yield batch.num_tokens


def folder_bytes(root: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def peers(dataset: kdata.Dataset, rows: range, k: int, root: Path, passes: int) -> Iterator[tuple[str, float, float]]:
    """(name, tokens per second and core, bytes per token) of every other format that is installed."""
    makers: dict[str, Callable[..., Callable[[int], Iterator[Document]]]] = {
        "datasets": partial(via_datasets, nested=False),
        "nested": partial(via_datasets, nested=True),
        "litdata": via_litdata,
        "streaming": via_streaming,
    }
    for name, make in makers.items():
        if importlib.util.find_spec(name if name != "nested" else "datasets") is None:
            continue
        # Nested lists are so slow that a tenth of the documents says it.
        documents = make(dataset, rows[: max(len(rows) // 10, 10)] if name == "nested" else rows, k, root / name)
        check_equal(dataset, documents(0))
        share = 0.1 if name == "nested" else 1.0
        yield (
            name,
            speed(partial(joined, documents), passes, 10.0),
            folder_bytes(root / name) / share / dataset.num_tokens,
        )


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens of the dataset")
    parser.add_argument("--vocab", type=int, default=32_000, help="token ids of the vocabulary")
    parser.add_argument("--passes", type=int, default=3, help="passes of which the best counts")
    options = parser.parse_args()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    pa.set_cpu_count(1)
    fill: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset = build_dataset(root / "kdata", options.tokens, options.vocab)
        k = dataset.info.codec.parameters["k"]
        began = time.process_time()
        dataset.locate(np.arange(dataset.num_rows))
        checking = dataset.num_tokens / (time.process_time() - began)
        size = folder_bytes(root / "kdata" / "data") / dataset.num_tokens
        ours = {
            "kdata: batches of numpy arrays": partial(loaded, dataset, fill, prefetch_batches=0),
            "kdata: the same, read ahead in a thread": partial(loaded, dataset, fill),
            "kdata: trainer.loader, tensors": partial(through_torch, dataset),
            "kdata: uniform shuffle (block of 1)": partial(loaded, dataset, fill, shuffle_block_rows=1),
        }
        speeds = {name: (speed(source, options.passes, 10.0), size) for name, source in ours.items()}
        rows = range(dataset.num_rows)
        others = {n: (s, b) for n, s, b in peers(dataset, rows, k, root, options.passes)}
    report(dataset, speeds, others, checking, min(fill))


def report(
    dataset: kdata.Dataset,
    ours: dict[str, tuple[float, float]],
    others: dict[str, tuple[float, float]],
    checking: float,
    fill: float,
) -> None:
    """Print the table, and the JSON line last."""
    names = {
        "datasets": "datasets, numpy format, flat lists", "nested": "datasets, numpy format, nested lists",
        "litdata": "litdata, flat arrays", "streaming": "mosaicml-streaming, flat arrays",
    }  # fmt: skip
    table = Table("source", "M tokens/s/core", "bytes/token", title=f"{dataset.num_tokens:,} tokens, 64 entries each")
    for name, (value, size) in {**ours, **{names[n]: v for n, v in others.items()}}.items():
        table.add_row(name, f"{value / 1e6:.3f}", f"{size:.0f}")
    table.add_row("kdata: check of digests at first touch", f"{checking / 1e6:.3f}", "")
    Console(width=100).print(table)
    speeds = {name: value for name, (value, _) in ours.items()}
    best = speeds["kdata: batches of numpy arrays"]
    result = {
        "loader_tok_s_core": round(best),
        **{f"ratio_vs_{name}": round(best / value, 2) for name, (value, _) in others.items()},
        "fill": round(fill, 4),
        "torch_tok_s_core": round(speeds["kdata: trainer.loader, tensors"]),
        "prefetched_tok_s_core": round(speeds["kdata: the same, read ahead in a thread"]),
        "uniform_tok_s_core": round(speeds["kdata: uniform shuffle (block of 1)"]),
        "first_touch_tok_s_core": round(checking),
        "bytes_per_token": round(next(iter(ours.values()))[1], 1),
        "tokens": dataset.num_tokens,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

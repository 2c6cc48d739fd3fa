"""What a stored distribution costs and what it loses: bytes, error, KL, gradient angle, speed. Prints a table, JSON last.

    python tests/benchmarks/codec.py [--model DIR] [--student DIR] [--corpus FILE] [--positions N] [--kinds NAME ...]

Every figure is of targets that were written to shards and read back, but the variance: that is of the weights before they are
stored. Without the named folders it stops: this benchmark wants a trained teacher and student, and a corpus of several
domains. The dense distributions are in memory: 4 bytes for each position and id.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import kdata
from kdata.format import codec as codecs
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept, log_tail, segment_sum
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import FORMAT_VERSION, SourceInfo, payload_schema
from kdata.format.sequences import decode as decode_batch
from kdata.format.stored import IDS_KEY, readable_schema, to_stored
from kdata.store.gguf import model_folder
from kdata.store.payload import PayloadReader, read_payload, used_columns
from kdata.store.writer import Writer
from kdata.teachers.model import load_tokenizer
from kdata.teachers.reduce import Reduced, draw_seed, readout_of, reduce_logits, uniforms_of

SHARED = Path(__file__).parents[3] / "shared"
KINDS = {
    "topk 64": KeepConfig(kind="topk", k=64),
    "topk 16": KeepConfig(kind="topk", k=16),
    "adaptive 0.95, at most 64": KeepConfig(kind="adaptive", k=64, mass=0.95),
    "sampled 12": KeepConfig(kind="sampled", num_draws=12),
    "sampled 12, independent": KeepConfig(kind="sampled", num_draws=12, draw_method="independent"),
    "sampled 25": KeepConfig(kind="sampled", num_draws=25),
    "sampled 50": KeepConfig(kind="sampled", num_draws=50),
    "sampled 50, independent": KeepConfig(kind="sampled", num_draws=50, draw_method="independent"),
    "sampled 80": KeepConfig(kind="sampled", num_draws=80),
    "sampled 160": KeepConfig(kind="sampled", num_draws=160),
    "hybrid 4 + 8": KeepConfig(kind="hybrid", k=4, num_draws=8),
    "hybrid 8 + 8": KeepConfig(kind="hybrid", k=8, num_draws=8),
    "hybrid 8 + 25": KeepConfig(kind="hybrid", k=8, num_draws=25),
    "hybrid 8 + 28": KeepConfig(kind="hybrid", k=8, num_draws=28),
    "hybrid 4 + 40": KeepConfig(kind="hybrid", k=4, num_draws=40),
    "hybrid 16 + 16": KeepConfig(kind="hybrid", k=16, num_draws=16),
    "hybrid 16 + 16, independent": KeepConfig(kind="hybrid", k=16, num_draws=16, draw_method="independent"),
    "threshold 0.06": KeepConfig(kind="threshold", threshold=0.06),
    "threshold 0.03": KeepConfig(kind="threshold", threshold=0.03),
    "threshold 0.02": KeepConfig(kind="threshold", threshold=0.02),
    "threshold 0.015": KeepConfig(kind="threshold", threshold=0.015),
    "threshold 0.01": KeepConfig(kind="threshold", threshold=0.01),
    "threshold 0.005": KeepConfig(kind="threshold", threshold=0.005),
}


@dataclass(frozen=True)
class Rule:
    """Another rule for draws by need: exact entries as of `keep`, and `number(tail [M])` systematic draws of the rest."""

    keep: KeepConfig
    number: Callable[[np.ndarray], np.ndarray]


def _one_for_each(mass: float, rounded: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tail_M: np.maximum(rounded(tail_M / mass), 1)


RULES = {
    "threshold 0.02, N rounded": Rule(KINDS["threshold 0.02"], _one_for_each(0.02, np.rint)),
    "threshold 0.02, N rounded down": Rule(KINDS["threshold 0.02"], _one_for_each(0.02, np.floor)),
    "threshold 0.02, exact from 0.03": Rule(KINDS["threshold 0.03"], _one_for_each(0.02, np.ceil)),
    "hybrid 8, one for each 0.02": Rule(KINDS["hybrid 8 + 28"], _one_for_each(0.02, np.rint)),
    "hybrid 8 + 28 by the tail": Rule(KINDS["hybrid 8 + 28"], lambda tail_M: _proportional(tail_M, 28)),
}


def _proportional(tail_M: np.ndarray, mean: float) -> np.ndarray:
    """Draws in proportion to the tail, one at least, whose mean over all positions is `mean`."""
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.rint(middle * tail_M), 1).mean() < mean else (low, middle)
    return np.maximum(np.rint(high * tail_M), 1)


def reduced(logits_MV: torch.Tensor, actual_M: torch.Tensor, how: KeepConfig | Rule, seed: int) -> Reduced:
    """What a kind, or a rule that is none, keeps. A rule's draws by their definition, position by position, in float64."""
    if isinstance(how, KeepConfig):
        return reduce_logits(logits_MV, actual_M, how, seed)
    out = reduce_logits(logits_MV, actual_M, how.keep, seed)
    exact = out.kept.only(np.ones(len(actual_M), bool))
    exact = Kept(exact.num_exact, exact.num_drawn * 0, exact.ids[~exact.is_draw], exact.logprobs[~exact.is_draw])
    rest_MV = torch.softmax(logits_MV.double(), -1).numpy()
    rest_MV[np.repeat(np.arange(len(rest_MV)), exact.num_exact), exact.ids] = 0
    number_M = how.number(np.exp(out.log_tail.astype(np.float64))).astype(int)
    shift_M = uniforms_of([(len(rest_MV), seed)], KINDS["threshold 0.02"])[:, 0]
    ends = np.cumsum(exact.num_exact)[:-1]
    ids, logprobs, counts_M = [], [], np.zeros(len(rest_MV), np.int32)
    parts = zip(np.split(exact.ids, ends), np.split(exact.logprobs, ends), strict=True)
    for m, (own_ids, own_logprobs) in enumerate(parts):
        running_V = np.cumsum(rest_MV[m])
        points = (np.arange(number_M[m]) + shift_M[m]) / number_M[m] * running_V[-1]
        drawn, times = np.unique(np.searchsorted(running_V, points, side="right"), return_counts=True)
        counts_M[m] = len(drawn)
        ids += [own_ids, drawn]
        logprobs += [own_logprobs, np.log(times / number_M[m]) + np.float64(out.log_tail[m])]
    together = [np.concatenate(values).astype(kind) for values, kind in ((ids, np.int32), (logprobs, np.float32))]
    return replace(out, kept=Kept(exact.num_exact, counts_M, *together))


def documents(corpus: Path, tokenizer, positions: int) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
    """Token ids of a domain-balanced sample whose predicted positions number `positions` exactly."""
    import polars as pl

    frame = pl.read_parquet(corpus).sample(fraction=1.0, shuffle=True, seed=5)
    per_domain = positions / frame["domain"].n_unique()
    tokens_of: dict[str, int] = {}
    chosen: list[np.ndarray] = []
    left = positions
    for domain, text in zip(frame["domain"], frame["text"], strict=True):
        if tokens_of.get(domain, 0) >= per_domain or left == 0:
            continue
        ids = np.array(tokenizer(text)["input_ids"][: min(257, left + 1)], np.int32)
        if len(ids) > 1:
            tokens_of[domain] = tokens_of.get(domain, 0) + len(ids) - 1
            left -= len(ids) - 1
            chosen.append(ids)
    return chosen


@torch.inference_mode()
def all_logits(model, docs: list[np.ndarray]) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Float32 logits [M, V] of each document's predicted positions."""
    return [model(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :-1].float() for ids in docs]


def at_once(logits: list[torch.Tensor], how: KeepConfig | Rule) -> KeepConfig | Rule:
    """A rule with the number of draws that it takes over the positions of all documents."""
    if isinstance(how, KeepConfig):
        return how
    keep, number = how.keep, how.number
    tails = [reduce_logits(z, torch.zeros(len(z), dtype=torch.long), keep, 0).log_tail for z in logits]
    tail_M = np.sort(np.exp(np.concatenate(tails).astype(np.float64)))
    number_M = number(tail_M)
    return Rule(keep, lambda own_M: number_M[np.minimum(np.searchsorted(tail_M, own_M), len(tail_M) - 1)])


def store(docs: list[np.ndarray], logits: list[torch.Tensor], how: KeepConfig | Rule, root: Path) -> kdata.Dataset:
    """Reduce, write and open again, as capture does."""
    keep = how if isinstance(how, KeepConfig) else KINDS["threshold 0.02"]  # whose codec stores any number of draws
    teacher = {
        "model": "benchmark", "revision": None, "weights_hash": None, "backend": "transformers", "backend_version": "-",
        "dtype": "float32", "logprobs": "raw", "deterministic": True,
    }  # fmt: skip
    tokenizer = {"hash": "-", "chat_template_hash": None, "bos_id": None, "eos_id": None}
    vocab = logits[0].shape[1]
    info = new_info(
        format_version=FORMAT_VERSION, vocab_size=vocab, teacher=teacher, tokenizer=tokenizer, codec=keep.codec(vocab),
        tail=keep.tail,
    )  # fmt: skip
    records = []
    for number, (ids, logits_MV) in enumerate(zip(docs, logits, strict=True)):
        actual = torch.from_numpy(ids[1:].astype(np.int64))
        out = readout_of(ids, 1, reduced(logits_MV, actual, how, draw_seed(ids, keep)))
        records.append(
            Record(
                id=f"d{number}", domain="d", token_ids=ids, target_mask=out.rank > 0, kept=out.kept, text="",
                token_bytes=np.ones(len(ids), np.uint16), **out.measures(),
            )
        )  # fmt: skip
    with Writer(root, info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(UnitResult(0, records))
    return kdata.open(root)


def column_bytes(dataset: kdata.Dataset) -> tuple[float, float, float]:
    """Bytes per token on disk: (entries, other columns, file), each column written alone as the shard writes it."""
    path = dataset.shard_file(dataset.manifest[0], "data")
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    table = file.read_all()
    tokens = dataset.num_tokens
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))

    def size(names: list[str]) -> int:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.select(names).schema.remove_metadata(), options=options) as writer:
            writer.write_table(table.select(names).replace_schema_metadata(None), max_chunksize=32)
        return sink.getvalue().size

    entries = size([n for n in table.column_names if n.split("_")[0] in ("entry", "exact", "draw")])
    entries += len((file.metadata or {}).get(IDS_KEY, b""))
    whole = path.stat().st_size
    return entries / tokens, (whole - entries) / tokens, whole / tokens


def stored_error(dataset: kdata.Dataset, logits: list[torch.Tensor]) -> dict[str, float]:
    """Error of exact entries and KL(true || reconstructed with ghost), against the dense distribution in float64."""
    errors, kls, sums = [], [], []
    for row, logits_MV in enumerate(logits):
        seq = dataset[row]
        ids, stored = seq.padded()
        dense = torch.log_softmax(logits_MV.double(), -1).numpy()
        ids, stored = ids[1:], stored[1:].astype(np.float64)
        filled = ids >= 0
        true = np.take_along_axis(dense, np.maximum(ids, 0), 1)
        errors.append(np.abs(true - stored)[filled])
        p, q = np.where(filled, np.exp(true), 0), np.where(filled, np.exp(stored), 0)
        rest_p, rest_q = np.clip(1 - p.sum(1), 1e-300, 1), np.clip(1 - q.sum(1), 1e-300, 1)
        gap = np.where(filled, true - np.where(filled, stored, 0), 0)
        kls.append((p * gap).sum(1) + rest_p * np.log(rest_p / rest_q))
        sums.append(q.sum(1))
    return {
        "mean_err_nats": float(np.concatenate(errors).mean()),
        "kl": float(np.concatenate(kls).mean()),
        "rows_sum_gt_1": int((np.concatenate(sums) > 1).sum()),
    }


def student_gradient(student, docs, targets) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Gradient of the mean loss over all positions; `targets(row, logits)` gives d loss / d logits [M, V], summed."""
    student.zero_grad()
    for row, ids in enumerate(docs):
        logits = student(torch.from_numpy(ids[None].astype(np.int64))).logits[0, :-1].float()
        logits.backward(targets(row, logits.detach()))
    return torch.cat([p.grad.flatten().double() for p in student.parameters()])


def target_gradient(dataset: kdata.Dataset, row: int, logits_MV: torch.Tensor, mode: str) -> torch.Tensor:
    """d loss / d logits of one document for stored targets, dense and explicit (not the trainer's fused code)."""
    seq = dataset[row]
    ids, logprobs = (torch.from_numpy(x[1:]) for x in seq.padded())
    weight = torch.where(ids >= 0, logprobs.double().exp(), 0.0)
    index = ids.clamp_min(0).long()
    q = torch.softmax(logits_MV.double(), -1)
    p = torch.zeros_like(q).scatter_add_(1, index, weight)
    if mode == "renormalise":
        p = p / p.sum(1, keepdim=True)
    if mode == "ghost":
        # The rest is one bucket: its mass goes to the unkept ids in the student's own proportions.
        unkept = torch.ones_like(q).scatter_(1, index, torch.where(ids >= 0, 0.0, q.gather(1, index) * 0 + 1))
        rest = unkept * q
        p = p + rest * ((1 - p.sum(1, keepdim=True)) / rest.sum(1, keepdim=True))
    return (q * p.sum(1, keepdim=True) - p).float()


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Degrees between two gradients."""
    return float(torch.rad2deg(torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))))


def variance(docs, logits, how: KeepConfig | Rule, repeats: int) -> float:  # type: ignore[no-untyped-def]
    """Mean of sum_i (w_i - p_i)^2 over positions and `repeats` draws: the variance of the gradient in a student's logits."""
    total = 0.0
    for ids, logits_MV in zip(docs, logits, strict=True):
        p_MV = torch.softmax(logits_MV.double(), -1).numpy()
        rows_M, actual = np.arange(len(p_MV)), torch.from_numpy(ids[1:].astype(np.int64))
        square = float((p_MV**2).sum())
        for number in range(repeats):
            kept = reduced(logits_MV, actual, how, number).kept
            p_N = p_MV[np.repeat(rows_M, kept.num_kept), kept.ids]
            weight_N = np.exp(kept.logprobs.astype(np.float64))
            total += (square + float(((weight_N - p_N) ** 2 - p_N**2).sum())) / repeats
    return total / sum(map(len, logits))


def bias(docs, logits, how: KeepConfig | Rule, repeats: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Mean over `repeats` draws of (weight - p), averaged over positions with random signs, and its 95 % half-width."""
    ids, logits_MV = docs[0], logits[0]
    p = torch.softmax(logits_MV.double(), -1).numpy()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], p.shape[1])
    exact = p @ signs
    errors = []
    for number in range(repeats):
        actual = torch.from_numpy(ids[1:].astype(np.int64))
        kept = reduced(logits_MV, actual, how, number).kept
        sums = segment_sum(np.exp(kept.logprobs.astype(np.float64)) * signs[kept.ids], kept.num_kept)
        errors.append((sums - exact).mean())
    return float(np.mean(errors)), float(1.96 * np.std(errors, ddof=1) / np.sqrt(repeats))


def large_vocabulary(vocab: int, keep: KeepConfig, tokens: int = 4096) -> dict[str, float]:
    """Entry bytes at a large vocabulary: entropy 1 to 2 nats, ids with BPE-like frequencies (Zipf by rank)."""
    rng = np.random.default_rng(vocab)
    width = keep.num_exact
    slope = rng.uniform(1.6, 2.4, (tokens, 1))
    logits = -slope * np.log(np.arange(1, 4097)) + rng.normal(0, 0.5, (tokens, 4096))
    logits = -np.sort(-logits, 1)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    entropy = -(np.exp(logprobs) * logprobs).sum(1).mean()
    frequency = 1.0 / np.arange(1, vocab + 1)
    ids = rng.choice(vocab, (tokens, width * 2), p=frequency / frequency.sum()).astype(np.int32)
    ids = np.stack([row[np.sort(np.unique(row, return_index=True)[1])][:width] for row in ids])
    kept = Kept.top(ids, logprobs[:, :width].astype(np.float32), np.ones(tokens, bool))
    tail = log_tail(kept.exact_mass())
    offsets, info = np.arange(0, tokens + 1, 256), keep.codec(vocab)
    columns, _ = codecs.to_columns(kept, tail, offsets, info)
    schema = readable_schema(info.id, info.version)
    beside = {  # what to_stored needs beside the entries; no rank, so that no id is given by the actual token
        "input_ids": np.zeros(tokens, np.int32), "target_mask": np.ones(tokens, bool), "rank": np.zeros(tokens, np.int32),
        "logprob": np.zeros(tokens, np.float32), "log_tail": tail, "entropy": np.zeros(tokens, np.float32),
        "num_exact": kept.num_exact.astype(np.uint16), "num_drawn": kept.num_drawn.astype(np.uint16),
    }  # fmt: skip
    for name, values in beside.items():
        columns[name] = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(values), type=schema.field(name).type
        )
    columns["id"] = pa.array([str(row) for row in range(len(offsets) - 1)])
    for name in set(schema.names) - columns.keys():
        columns[name] = pa.nulls(len(offsets) - 1, schema.field(name).type)
    stored, ids = to_stored(pa.table(columns, schema=schema), vocab, payload_schema(info.id, info.version))
    zstd = pa.Codec("zstd", compression_level=1)
    entries = [stored[name].combine_chunks().flatten() for name in ("exact_codes", "entry_bits", "exact_gaps")]
    size = sum(len(zstd.compress(c.to_numpy(zero_copy_only=False).tobytes())) for c in entries) + len(ids)
    return {
        "entry_bytes": size / tokens,
        "order0_bytes": order0_bits(ids) * width / 8,
        "entropy": float(entropy),
    }


def order0_bits(ids: np.ndarray) -> float:
    """Order-0 entropy of ids in bits: what coding them one by one cannot go below."""
    counts = np.unique(ids, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def speed(dataset: kdata.Dataset) -> tuple[float, float]:
    """Tokens per second on one core: encode (to a compressed shard in memory) and decode (to padded ids and logprobs)."""
    path, info = dataset.shard_file(dataset.manifest[0], "data"), dataset.info
    schema = payload_schema(info.codec.id, info.codec.version)
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
    readable = read_payload(path, info.codec)
    seq = dataset.take(np.arange(dataset.num_rows))
    kept = Kept(seq.num_exact, seq.num_kept - seq.num_exact, seq.entry_ids, seq.entry_logprobs)
    columns = used_columns(path)
    encode, decode = [], []
    for _ in range(20):
        started = time.perf_counter()
        codecs.to_columns(kept, seq.log_tail, seq.offsets, info.codec)
        stored, _ = to_stored(readable, info.vocab_size, schema)
        with pa.ipc.new_file(pa.BufferOutputStream(), stored.schema, options=options) as writer:
            writer.write_table(stored, max_chunksize=32)
        encode.append(dataset.num_tokens / (time.perf_counter() - started))
        started = time.perf_counter()
        reader = PayloadReader(path, columns)
        for number in range(reader.num_record_batches):
            decode_batch(reader.batch(number), info).padded()
        decode.append(dataset.num_tokens / (time.perf_counter() - started))
    return max(encode), max(decode)


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Measure every kind; one dictionary each."""
    tokenizer = load_tokenizer(arguments.model)
    teacher = AutoModelForCausalLM.from_pretrained(model_folder(arguments.model), dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    docs = documents(arguments.corpus, tokenizer, arguments.positions)
    logits = [logits_MV * arguments.sharpen for logits_MV in all_logits(teacher, docs)]
    full = student_gradient(student, docs, lambda row, z: torch.softmax(z, -1) - torch.softmax(logits[row], -1))
    for name in arguments.kinds:
        how = at_once(logits, {**KINDS, **RULES}[name])
        keep = how if isinstance(how, KeepConfig) else how.keep
        with tempfile.TemporaryDirectory() as folder:
            dataset = store(docs, logits, how, Path(folder) / "dataset")
            entry, other, whole = column_bytes(dataset)
            seq = dataset.take(np.arange(dataset.num_rows))
            measured: dict[str, object] = {
                "name": name, "entry_bytes": entry, "other_bytes": other, "bytes": whole,
                "kept": float(seq.num_kept[seq.num_kept > 0].mean()),
            }  # fmt: skip
            if keep.num_exact:
                measured["order0_bytes"] = order0_bits(seq.entry_ids) * len(seq.entry_ids) / len(seq.token_ids) / 8
            if keep.tail == "ghost":
                measured |= stored_error(dataset, logits)
            for mode in ("draws",) if keep.tail == "draws" else ("ghost", "renormalise"):
                gradient = student_gradient(student, docs, lambda r, z, m=mode, d=dataset: target_gradient(d, r, z, m))
                measured[f"angle_{mode}"] = angle(full, gradient)
                measured[f"norm_{mode}"] = float(gradient.norm() / full.norm())
            if keep.tail == "draws":
                measured["bias"], measured["bias_ci"] = bias(docs, logits, how, 200)
                measured["variance"] = variance(docs, logits, how, 4)
            if name == "topk 64":
                measured["encode_tok_s"], measured["decode_tok_s"] = speed(dataset)
            yield measured


def markdown(figures: dict[str, dict[str, object]]) -> str:
    """The table as kdata/README.md has it."""
    lines = [
        "| kind | entries | B/token | angle | norm ratio | variance | error, nats | KL, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures.values():
        mode = "draws" if "angle_draws" in row else "ghost"
        error = f"{row['mean_err_nats']:.4f} | {row['kl']:.1e}" if "kl" in row else "as topk; draws none | unbiased"
        error = f"{row['variance']:.2e} | {error}" if "variance" in row else f"- | {error}"
        lines.append(
            f"| {row['name']} | {row['kept']:.1f} | {row['bytes']:.1f} | {row[f'angle_{mode}']:.1f} | "
            f"{row[f'norm_{mode}']:.2f} | {error} |"
        )
        if "angle_renormalise" in row:
            lines.append(
                f"| {row['name']}, renormalised | {row['kept']:.1f} | {row['bytes']:.1f} | {row['angle_renormalise']:.1f} | "
                f"{row['norm_renormalise']:.2f} | {error} |"
            )
    return "\n".join(lines)


# Where a label goes, in points from its mark, if not above and to the right.
AWAY = {
    "hybrid 8 + 25": (-22, 8), "hybrid 4 + 40": (8, -6), "hybrid 16 + 16": (8, 0), "hybrid 8 + 8": (8, -2),
    "hybrid 4 + 8": (6, 3), "sampled 12": (-8, -13), "sampled 25": (-8, -13), "sampled 50": (-8, -13),
    "sampled 80": (-8, -13), "hybrid 16 + 16, independent": (7, 3), "sampled 160": (-8, -13),
    "threshold 0.02": (7, -2), "threshold 0.015": (6, -9), "hybrid 8 + 28": (8, -4), "threshold 0.06": (7, -2),
}  # fmt: skip


def draw(figures: dict[str, dict[str, object]], path: Path) -> None:
    """Angle against bytes per token, one mark for each kind; independent draws are hollow."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    marks = {
        "topk": ("o", "#c4501b"), "adaptive": ("s", "#a97b00"), "sampled": ("^", "#1f6fb5"), "hybrid": ("D", "#0f8a6a"),
        "threshold": ("P", "#8d5aa9"),
    }  # fmt: skip
    for kind, (shape, colour) in marks.items():
        for independent in (False, True):
            names = [n for n in figures if n.startswith(kind) and n.endswith(", independent") == independent]
            if not names:
                continue
            sizes = [figures[n]["bytes"] for n in names]
            angles = [figures[n].get("angle_draws", figures[n].get("angle_ghost")) for n in names]
            label = f"{kind}, independent draws" if independent else kind
            face = "none" if independent else colour
            line = "-" if kind in ("sampled", "threshold") else ""
            axes.plot(
                sizes,
                angles,
                marker=shape,
                color=colour,
                markerfacecolor=face,
                linestyle=line,
                linewidth=1,
                label=label,
            )  # type: ignore[arg-type]
            for name, size, angle in zip(names, sizes, angles, strict=True):
                note = name.removeprefix(kind).removesuffix(", independent").removesuffix(", at most 64").strip()
                axes.annotate(
                    note, (size, angle), xytext=AWAY.get(name, (6, 5)), textcoords="offset points", fontsize=8.5
                )  # type: ignore[arg-type]
    axes.set_xlabel("bytes per token on disk, everything included")
    axes.set_ylabel("angle to the gradient of\nfull distillation, degrees")
    axes.set_xlim(0, 145)
    axes.set_yscale("log")
    axes.set_yticks([2, 5, 10, 20, 50])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(1.5, 60)
    axes.legend(fontsize=8.5, loc="center right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run it all, print the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "teacher-10m")
    parser.add_argument("--student", type=Path, default=SHARED / "models" / "ref-1m")
    parser.add_argument("--corpus", type=Path, default=SHARED / "data" / "corpus.parquet")
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *RULES], default=list(KINDS), metavar="NAME")
    parser.add_argument("--sharpen", type=float, default=1.0, help="Multiply the teacher's logits: a surer teacher.")
    parser.add_argument("--plot", type=Path, help="Also draw angle against bytes per token to this PNG.")
    arguments = parser.parse_args()
    for path in (arguments.model, arguments.student, arguments.corpus):
        if not path.exists():
            parser.error(f"{path} does not exist; name a model, a student of the same vocabulary, and a corpus")
    torch.set_num_threads(1)
    table = Table(title=f"stored targets, {arguments.positions:,} positions, one core of {platform.machine()}")
    for column in (
        "kind",
        "entries",
        "entry B",
        "other B",
        "B/token",
        "error nats",
        "KL",
        "angle",
        "norm",
        "variance",
        "bias ± 95 %",
    ):
        table.add_column(column, justify="left" if column == "kind" else "right")
    figures = {str(row["name"]): row for row in rows(arguments)}
    for row in figures.values():
        mode = "draws" if "angle_draws" in row else "ghost"
        text = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items()}
        table.add_row(
            text["name"], text["kept"], text["entry_bytes"], text["other_bytes"], text["bytes"],
            text.get("mean_err_nats", "-"), text.get("kl", "-"), text[f"angle_{mode}"], text[f"norm_{mode}"],
            text.get("variance", "-"), f"{row['bias']:.1e} ± {row['bias_ci']:.1e}" if "bias" in row else "-",
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    print(markdown(figures))
    if arguments.plot:
        draw(figures, arguments.plot)
    vocabularies = {v: large_vocabulary(v, KeepConfig(kind="topk", k=64)) for v in (128_256, 151_936, 201_088, 262_144)}
    sizes = Table("vocabulary", "entry B (topk 64)", "order-0 bound of the ids", "entropy nats")
    for vocab, size in vocabularies.items():
        sizes.add_row(f"{vocab:,}", *(f"{size[k]:.4g}" for k in ("entry_bytes", "order0_bytes", "entropy")))
    console.print(sizes)
    line: dict[str, object] = {"positions": arguments.positions, "kinds": figures}
    if len(figures) == len(KINDS):
        top, drawn, both = figures["topk 64"], figures["sampled 50"], figures["hybrid 16 + 16"]
        line |= {
            "topk64_entry_bytes": top["entry_bytes"], "other_bytes": top["other_bytes"],
            "topk64_order0_id_bytes": top["order0_bytes"], "topk64_mean_err_nats": top["mean_err_nats"],
            "topk64_kl": top["kl"], "rows_sum_gt_1": sum(int(r.get("rows_sum_gt_1", 0)) for r in figures.values()),  # type: ignore[call-overload]
            "topk64_entry_bytes_v151936": vocabularies[151_936]["entry_bytes"],
            "sampled50_bytes": drawn["bytes"], "sampled50_distinct": drawn["kept"],
            "sampled50_angle_deg": drawn["angle_draws"], "hybrid_bytes": both["bytes"],
            "hybrid_angle_deg": both["angle_draws"], "topk64_ghost_angle_deg": top["angle_ghost"],
            "topk64_renormalised_angle_deg": top["angle_renormalise"],
            "encode_tok_s": top["encode_tok_s"], "decode_tok_s": top["decode_tok_s"],
        }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()

"""Megatron-LM's cache of teacher log-probabilities: tar archives of zstd-compressed torch files.

    dp{D}__{I}.tar (older: cp0_dp{D}__{I}.tar)   data-parallel rank D of the teacher run, iterations up to I
      _meta.json                                 {"hash": ..., "identifiers": {...}, "saver": {...}}
      {iteration}.pt.zst                         values, indices_low uint16, bit_17 bool; in version 1 of the format a list of
                                                 [seq, mbs, K] for each micro-batch, in version 2 one [seq, n, K]

An id is bit_17 * 2^16 + indices_low. Position s of a sample is the prediction of token s + 1. Entries that top-p left out
have a value of -1e3 or less and the id -1, which the two columns hold as 131071. Row r of rank d is sample
((r // M) * D + d) * M + r % M of its iteration, where M is the micro-batch and D the number of ranks.

The cache holds no tokens: a student run makes them again from the same seed and data. So an import needs them from elsewhere,
in the order in which the run drew its samples.

Source: github.com/NVIDIA/Megatron-LM, megatron/training/distillation: logits_saver.py (0e099c7), utils_logits.py (059030b),
utils.py and cached_logits_loss.py (10cc4f5), whose LogprobsReshardPlan has the order of samples.

Shapes: S positions of a sample, B samples, K entries.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdata.corpus.json_rows import MOST_BYTES, MOST_TIMES
from kdata.errors import ConfigError, DataError, DependencyError, first_line
from kdata.format.files import local_path
from kdata.format.keep_rules import refuse_sorted
from kdata.format.records import RowError
from kdata.observe.progress import Task
from kdata.share.arrange import new_folder
from kdata.share.interchange.rows import PeerRow, unusable
from kdata.share.interchange.source import PeerFile
from kdata.store.dataset import Dataset

TAR = re.compile(r"^(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?P<iter>\d+)\.tar$")
MEMBER = re.compile(r"^(?P<iter>\d{1,18})\.pt\.zst$")
META = "_meta.json"
MAX_VOCAB = 1 << 17
LEAST = -999.0  # what is below was left out: -1e3 or -1e4
SENTINEL, NO_ID = -1e3, -1
MOST_META_BYTES = 1 << 20
TOKENS_COLUMN = "input_ids"


def read_rows(files: list[PeerFile], samples: Iterator[np.ndarray]) -> Iterator[PeerRow]:
    """Rows of a cache, in the order in which the teacher run drew its samples.

    Args:
        samples: token ids int32 of each sample, in that order.
    Raises DataError where the archives are not such a cache, or ranks or iterations are missing.
    """
    ranks = _ranks(files)
    streams = [_iterations(ranks[rank]) for rank in range(len(ranks))]
    drawn, at = 0, -1
    for parts in zip(*streams, strict=True):
        iterations = {number for number, _, _, _ in parts}
        if len(iterations) > 1 or min(iterations) <= at:
            raise DataError(
                f"the ranks' archives do not have the same iterations in rising order ({sorted(iterations)}); is one missing?"
            )
        at = iterations.pop()
        rows = _in_order([part[1:] for part in parts])
        begin = at * len(rows)
        for _ in range(begin - drawn):  # samples of iterations that the cache does not have
            if next(samples, None) is None:  # a name may say any number, but the samples come to an end
                break
        drawn = begin + len(rows)
        for place, (values_SK, ids_SK) in enumerate(rows):
            yield _row(f"sample-{begin + place:09d}", next(samples, None), values_SK, ids_SK)


def _ranks(files: list[PeerFile]) -> dict[int, list[PeerFile]]:
    """The archives of each rank, by rising iteration."""
    ranks: dict[int, list[tuple[int, PeerFile]]] = {}
    for file in files:
        match = TAR.match(Path(file.name).name)
        if match is None:
            raise DataError(
                f"{file.name} has not the name of an archive of Megatron's cache, dp0__99.tar; leave it out"
            )
        if int(match["cp"] or 0):
            raise DataError(
                f"{file.name} is of context-parallel rank {match['cp']}: such a cache holds pieces of sequences, which "
                "Megatron no longer reads either; write it again with a current Megatron"
            )
        ranks.setdefault(int(match["dp"]), []).append((int(match["iter"]), file))
    if sorted(ranks) != list(range(len(ranks))):
        raise DataError(
            f"the archives are of the ranks {sorted(ranks)}; the others are missing, so no sample has its place"
        )
    return {rank: [file for _, file in sorted(some, key=lambda pair: pair[0])] for rank, some in ranks.items()}


Iteration = tuple[int, np.ndarray, np.ndarray, int]


def _iterations(files: list[PeerFile]) -> Iterator[Iteration]:
    """Iterations of one rank: number, values float32 [S, B, K], ids int64 [S, B, K], and the micro-batch."""
    for file in files:
        is_empty = True
        try:
            for iteration in _members(file):
                is_empty = False
                yield iteration
        except (tarfile.TarError, OSError, pa.ArrowException, EOFError) as error:
            raise DataError(f"{file.place} cannot be read: {first_line(error)}") from error
        if is_empty:
            raise DataError(f"{file.place} holds no iteration of Megatron's cache; copy it again, or leave it out")


def _members(file: PeerFile) -> Iterator[Iteration]:
    saver: dict[str, Any] = {}
    with file.open() as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                continue
            if member.name == META:
                saver = _saver(content.read(MOST_META_BYTES))
            elif match := MEMBER.match(member.name):
                yield (int(match["iter"]), *_decoded(content.read(), f"{member.name} of {file.name}", saver))


def _saver(content: bytes) -> dict[str, Any]:
    try:
        saver = json.loads(content).get("saver", {})
    except (ValueError, AttributeError):
        return {}
    return saver if isinstance(saver, dict) else {}


def _decoded(packed: bytes, what: str, saver: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Values, ids and micro-batch of a member. Only plain tensors are unpickled (torch's weights_only)."""
    torch = _torch()
    limit = max(MOST_BYTES, MOST_TIMES * len(packed))
    with pa.CompressedInputStream(pa.BufferReader(packed), "zstd") as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise DataError(f"{what} becomes more than {MOST_TIMES} times as large when it is decompressed; is it damaged?")
    try:
        tensors = torch.load(io.BytesIO(raw), weights_only=True)
        parts = [tensors[name] for name in ("values", "indices_low", "bit_17")]
        micro = saver.get("mbs_save")
        if isinstance(parts[0], list):  # version 1
            micro = parts[0][0].shape[1]
            parts = [torch.cat(part, 1) for part in parts]
        values, low, high = (
            part.to(kind).numpy() for part, kind in zip(parts, (torch.float32, torch.int64, torch.int64), strict=True)
        )
    except Exception as error:  # torch raises whatever a hostile file makes of it
        raise DataError(f"{what} is not a payload of Megatron's cache ({first_line(error)[:120]})") from error
    if not (values.ndim == 3 and values.shape == low.shape == high.shape):
        raise DataError(
            f"{what} has tensors of the shapes {values.shape}, {low.shape}, {high.shape}; they must be equal"
        )
    if not isinstance(micro, int) or micro < 1 or values.shape[1] % micro:
        raise DataError(
            f"{what} has {values.shape[1]} samples, and {META} has no micro-batch that divides them: mbs_save"
        )
    return values, (high << 16) | low, micro


def _in_order(parts: list[tuple[np.ndarray, np.ndarray, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples of one iteration in the order in which they were drawn: values and ids [S, K] of each."""
    sizes = {(values.shape[1], micro) for values, _, micro in parts}
    if len(sizes) > 1:
        raise DataError(f"ranks have different numbers of samples or micro-batches in one iteration: {sorted(sizes)}")
    samples, micro = sizes.pop()
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, samples, micro):
        for values, ids, _ in parts:
            rows += [(values[:, row], ids[:, row]) for row in range(first, first + micro)]
    return rows


def _row(name: str, token_ids: np.ndarray | None, values_SK: np.ndarray, ids_SK: np.ndarray) -> PeerRow:
    if token_ids is None:
        return unusable(RowError("no_token_ids", "the file of tokens has no sample for it"), id=name)
    lists = min(len(values_SK), len(token_ids))
    there_SK = values_SK[:lists] > LEAST
    return PeerRow(
        token_ids,
        there_SK.sum(1).astype(np.int32),
        ids_SK[:lists][there_SK].astype(np.int32),
        values_SK[:lists][there_SK],
        id=name,
    )


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise DependencyError("Megatron's cache holds torch files: pip install 'kdata[train]'") from error
    return torch


def export_megatron(dataset: Dataset, target: Path | str, seq_length: int) -> list[str]:
    """Write a cache of one sample for each row, and `samples.parquet` with their tokens; return what it does not hold.

    Row i is sample i, on rank 0, micro-batch and global batch 1, so that any batch of a student run is a multiple.

    Args:
        target: a folder that does not exist yet, or is empty.
        seq_length: of the student run; a sample has one more token, and longer rows are cut.
    Raises:
        ConfigError: the folder is not free or a URL, the vocabulary has more than 2^17 ids, or ids of entries are no tokens.
        DataError: the dataset has no rows. DependencyError: torch is not installed.
    """
    target, torch = local_path(target, "name a folder here, and upload it afterwards"), _torch()
    if dataset.info.vocab_size >= MAX_VOCAB:  # the last id means that there is no entry
        raise ConfigError(
            f"{dataset.path} has {dataset.info.vocab_size:,} ids, Megatron's cache holds fewer than {MAX_VOCAB:,}"
        )
    if seq_length < 1:
        raise ConfigError(f"--seq-length {seq_length}: a sample has at least 1 position; name that of the student run")
    if not dataset.num_rows:
        raise DataError(f"{dataset.path} has no rows to export; capture or import some first")
    refuse_sorted(dataset.info.codec, dataset.place, "an export")
    most = max(int(dataset.shard(number).num_kept.max(initial=0)) for number in range(len(dataset.manifest)))
    meta = json.dumps(_meta(dataset, most), separators=(",", ":")).encode()
    schema, sample, cut = pa.schema([("id", pa.string()), (TOKENS_COLUMN, pa.list_(pa.int32()))]), 0, 0
    with (
        new_folder(target) as folder,
        Task("export", dataset.num_tokens, "tokens") as task,
        pq.ParquetWriter(folder / "samples.parquet", schema, compression="zstd") as tokens,
    ):
        for number, entry in enumerate(dataset.manifest):
            if not entry.rows:
                continue
            ids, sequences = dataset.shard_index(entry, ["id"])["id"].to_pylist(), dataset.shard(number)
            kept = [sequences.token_ids[a : min(b, a + seq_length + 1)] for a, b in sequences.spans()]
            cut += len(sequences.token_ids) - sum(len(part) for part in kept)
            tokens.write_table(pa.table([ids, kept], schema=schema))
            name = f"dp0__{sample + entry.rows - 1}.tar"
            with (folder / name).open("xb") as file, tarfile.open(fileobj=file, mode="w") as archive:
                _add(archive, META, meta)
                for row in range(entry.rows):
                    own = sequences.one(row)
                    packed = io.BytesIO()
                    torch.save(_payload(own, seq_length, most), packed)
                    _add(archive, f"{sample}.pt.zst", pa.Codec("zstd", 3).compress(packed.getvalue(), asbytes=True))
                    sample += 1
            task.advance(entry.tokens)
        lines = losses(dataset, cut)
        (folder / "README.md").write_text(_readme(dataset, seq_length, lines), "utf-8")
    return lines


def _payload(own: Any, seq_length: int, most: int) -> dict[str, Any]:
    """The tensors of one row, version 2: [seq_length, 1, K], by falling weight."""
    torch = _torch()
    values_SK = np.full((seq_length, 1, most), SENTINEL, np.float16)
    ids_SK = np.full((seq_length, 1, most), NO_ID, np.int64)
    for place in range(1, min(len(own.token_ids), seq_length + 1)):
        entries = slice(own.entry_offsets[place], own.entry_offsets[place + 1])
        order = np.argsort(-own.entry_logprobs[entries], kind="stable")
        values_SK[place - 1, 0, : len(order)] = own.entry_logprobs[entries][order]
        ids_SK[place - 1, 0, : len(order)] = own.entry_ids[entries][order]
    return {
        "format_version": 2,
        "values": torch.from_numpy(values_SK),
        "indices_low": torch.from_numpy((ids_SK & 0xFFFF).astype(np.uint16)),
        "bit_17": torch.from_numpy((ids_SK >> 16).astype(bool)),
    }


def _meta(dataset: Dataset, most: int) -> dict[str, Any]:
    identifiers = {"kdata": dataset.content_digest}
    saver = {
        "k": most, "p": None, "min_k": 1, "save_dtype": "fp16", "format_version": 2,
        "mbs_save": 1, "dp_size_save": 1, "gbs_save": 1,
    }  # fmt: skip
    digest = hashlib.md5(json.dumps(identifiers).encode(), usedforsecurity=False).hexdigest()
    return {"hash": digest, "identifiers": identifiers, "saver": saver}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    archive.addfile(about, io.BytesIO(content))


def losses(dataset: Dataset, cut: int) -> list[str]:
    """What the cache does not hold, one line each."""
    lines = ["log-probabilities beyond float16: rounded by up to 2^-11 of themselves"]
    if dataset.info.tail in ("ghost", "draws"):
        lines.append("the mass of the rest, and which entries are draws")
    if dataset.info.tail != "absent":
        lines.append("the actual token's log-probability and rank, the entropy, further temperatures")
    lines.append("tokens and ids (they are in samples.parquet, in the cache's order), domains, which positions count")
    lines.append("the identity of a Megatron run: its hash is not that of your run, so read it with the hash ignored")
    if cut:
        lines.append(f"{cut:,} tokens of rows that are longer than the sequence length")
    return lines


def _readme(dataset: Dataset, seq_length: int, lines: list[str]) -> str:
    return (
        f"# Log-probabilities of {dataset.info.teacher.model} as a Megatron-LM cache\n\n"
        "Written by `kdata export --format megatron`. Sample i is row i of `samples.parquet`; a student run must draw these\n"
        f"tokens in this order, unshuffled, one row a sample, padded to {seq_length} positions. `kdata import --format\n"
        "megatron --set samples=samples.parquet` reads it again.\n\nNot in it:\n\n"
        + "".join(f"- {line}\n" for line in lines)
    )

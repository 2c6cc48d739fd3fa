"""Is a dataset whole? Every committed byte against its digest, every row against its index."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from kdata.dataset import Dataset
from kdata.errors import KdataError
from kdata.manifest import inside
from kdata.progress import Stage
from kdata.schema import FileInfo, ManifestEntry, fingerprint
from kdata.score import load_score_info

# Top-level names that belong to a dataset beside its shards.
KNOWN = {
    "README.md",
    "dataset.json",
    "manifest.jsonl",
    "tokenizer",
    "scores",
    "plans",
    "data",
    "index",
    "rejects",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was committed."""

    path: str
    what: str


def verify(dataset: Dataset, *, deep: bool = False) -> list[Problem]:
    """Check sizes and SHA-256 of every committed file, and the sidecars' parts; list files that nothing names.

    Args:
        deep: also decode every row and compare token ids with the index's content hashes, and ids across shards.
    Returns:
        Problems, empty when the dataset is whole.
    """
    problems: list[Problem] = []
    total = sum(info.bytes for entry in dataset.manifest for info in entry.files.values())
    with Stage("verify", total, "bytes") as stage:
        for entry in dataset.manifest:
            for relative, info in entry.files.items():
                problems += check_file(dataset.path, relative, info)
                stage.advance(info.bytes)
    problems += _tokenizer(dataset)
    problems += _sidecars(dataset)
    problems += _strays(dataset)
    if deep and not problems:
        problems += _deep(dataset)
    return problems


def check_file(root: Path, relative: str, info: FileInfo) -> list[Problem]:
    """Compare one file with its committed size and digest."""
    path = inside(root, relative)
    if not path.is_file():
        return [Problem(relative, "is missing")]
    size = path.stat().st_size
    if size != info.bytes:
        return [Problem(relative, f"has {size:,} bytes, committed were {info.bytes:,}")]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            return [Problem(relative, "has other content than was committed (SHA-256 differs)")]
    return []


def _tokenizer(dataset: Dataset) -> list[Problem]:
    """The dataset's own tokenizer must be the one that made its ids (a hash of its content, see schemas/README.md)."""
    path = dataset.path / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        return []
    try:
        state = json.loads(path.read_bytes())
        found = fingerprint({key: value for key, value in state.items() if key not in ("truncation", "padding")})
    except (ValueError, AttributeError) as error:
        return [Problem("tokenizer/tokenizer.json", f"cannot be read: {error}")]
    if found != dataset.info.tokenizer.hash:
        return [Problem("tokenizer/tokenizer.json", "is not the tokenizer that made the token ids (its hash differs)")]
    return []


def _sidecars(dataset: Dataset) -> list[Problem]:
    problems: list[Problem] = []
    for path in sorted((dataset.path / "scores").glob("*.json")):
        try:
            files = load_score_info(dataset, path.stem).files
        except KdataError as error:
            problems.append(Problem(f"scores/{path.name}", f"cannot be read: {str(error).splitlines()[0]}"))
            continue
        for relative, info in files.items():
            problems += check_file(dataset.path, relative, info)
    return problems


def _strays(dataset: Dataset) -> list[Problem]:
    named = {relative for entry in dataset.manifest for relative in entry.files}
    found = [p for folder in ("data", "index", "rejects") for p in (dataset.path / folder).glob("**/*") if p.is_file()]
    strays = [p.relative_to(dataset.path).as_posix() for p in found]
    return [
        Problem(s, "is in no manifest line: left by a killed run, or put there by hand")
        for s in strays
        if s not in named
    ]


def _deep(dataset: Dataset) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    with Stage("verify rows", dataset.num_tokens, "tokens") as stage:
        for number, entry in enumerate(dataset.manifest):
            problems += _deep_shard(dataset, number, entry, seen)
            stage.advance(entry.tokens)
    return problems


def _deep_shard(dataset: Dataset, number: int, entry: ManifestEntry, seen: set[str]) -> list[Problem]:
    where = f"data/{entry.name}.arrow"
    try:
        sequences = dataset.shard(number)
        ids = pq.read_table(dataset.checked_file(entry, "index"), columns=["id"])["id"].to_pylist()
    except KdataError as error:
        return [Problem(where, str(error))]
    problems = []
    if len(sequences.token_ids) != entry.tokens:
        problems.append(Problem(where, f"holds {len(sequences.token_ids)} tokens, the manifest says {entry.tokens}"))
    if len(sequences.entry_ids) and int(sequences.entry_ids.max()) >= dataset.info.vocab_size:
        problems.append(Problem(where, "a kept id is outside the vocabulary"))
    for row_id in ids:
        if row_id in seen:
            problems.append(Problem(where, f"id {row_id!r} stands twice in the dataset"))
        seen.add(row_id)
    return problems

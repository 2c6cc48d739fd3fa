"""Verify a dataset: every committed byte against its digest, every row against its index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from kdata.errors import KdataError
from kdata.format.files import inside, without_hidden
from kdata.format.json_text import MAX_TOKENIZER_BYTES, parse_object, read_json
from kdata.format.manifest import digest_of, json_bytes
from kdata.format.schema import FileInfo, ManifestEntry, canonical_json, json_digest
from kdata.observe.progress import Task
from kdata.selection.plan import Plan
from kdata.selection.sidecar import load_score_info
from kdata.store.dataset import Dataset


@dataclass(frozen=True)
class Problem:
    """One difference from what was committed: the file's path inside the dataset, and what is wrong with it."""

    path: str
    what: str


def verify(dataset: Dataset, *, deep: bool = False) -> list[Problem]:
    """Check every byte of a dataset except the card's (a person may edit it), and list files that do not belong to it.

    Shards, sidecars' parts, plans and the tokenizer's files are compared with their SHA-256. JSON files are compared with
    their own digest and with the one form in which kdata writes them, so that a flipped bit is found even where it changes
    no value.

    Args:
        deep: also decode every row and compare token ids with the index's content hashes, and ids across shards.
    Returns:
        Problems; empty where the dataset is whole.
    Raises:
        CorruptError: the dataset is at a URL or on the Hub, and a file there is not what was committed.
    """
    dataset.fetch()
    problems: list[Problem] = []
    total = sum(info.bytes for entry in dataset.manifest for info in entry.files.values())
    with Task("verify", total, "bytes") as task:
        for entry in dataset.manifest:
            for relative, info in entry.files.items():
                problems += check_file(dataset.path, relative, info)
                task.advance(info.bytes)
    problems += check_json(dataset.path, "dataset.json") + check_json(dataset.path, "manifest.jsonl")
    problems += _tokenizer(dataset)
    problems += _sidecars(dataset)
    problems += _plans(dataset)
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
        return [Problem(relative, f"has {size:,} bytes, but {info.bytes:,} were committed")]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            return [Problem(relative, "differs from what was committed (SHA-256)")]
    return []


def check_json(root: Path, relative: str) -> list[Problem]:
    """Compare a JSON file with its own digest and form, or each line of the manifest with its form."""
    path = root / relative
    if not path.exists():  # a dataset without shards has no manifest
        return []
    content = path.read_bytes()
    try:
        if relative == "manifest.jsonl":
            whole = b"".join(canonical_json(parse_object(line)) + b"\n" for line in content.splitlines()) == content
        else:
            values = parse_object(content)
            if values.get("digest") != digest_of(values):
                return [Problem(relative, "does not match its own digest")]
            whole = json_bytes(values) == content
    except (ValueError, AttributeError) as error:
        return [Problem(relative, f"cannot be read: {error}")]
    return [] if whole else [Problem(relative, "is not as kdata writes it: a flipped bit, or an editor's change")]


def _tokenizer(dataset: Dataset) -> list[Problem]:
    """The tokenizer's files must be the recorded ones, and the tokenizer the one that produced the token ids."""
    path = dataset.path / "tokenizer" / "tokenizer.json"
    recorded = dataset.info.tokenizer_files
    problems = [p for name, info in recorded.items() for p in check_file(dataset.path, f"tokenizer/{name}", info)]
    if problems or not path.is_file():
        return problems
    try:
        state = read_json(path, MAX_TOKENIZER_BYTES)
        digest = json_digest({key: value for key, value in state.items() if key not in ("truncation", "padding")})
    except (ValueError, AttributeError) as error:
        return [Problem("tokenizer/tokenizer.json", f"cannot be read: {error}")]
    if digest != dataset.info.tokenizer.hash:
        return [
            Problem("tokenizer/tokenizer.json", "is not the tokenizer that produced the token ids (its hash differs)")
        ]
    return []


def _sidecars(dataset: Dataset) -> list[Problem]:
    problems: list[Problem] = []
    for path in without_hidden(dataset.path / "scores", "*.json"):
        problems += check_json(dataset.path, f"scores/{path.name}")
        if problems and problems[-1].path == f"scores/{path.name}":
            continue
        try:
            files = load_score_info(dataset, path.stem).files
        except KdataError as error:
            problems.append(Problem(f"scores/{path.name}", f"cannot be read: {str(error).splitlines()[0]}"))
            continue
        for relative, info in files.items():
            problems += check_file(dataset.path, relative, info)
    return problems


def _plans(dataset: Dataset) -> list[Problem]:
    names = {path.stem for path in without_hidden(dataset.path / "plans", "*.*")}
    problems: list[Problem] = []
    for name in sorted(names):
        problems += check_json(dataset.path, f"plans/{name}.json")
        try:
            Plan.load(dataset.path / "plans" / name)
        except KdataError as error:
            problems.append(Problem(f"plans/{name}.parquet", f"is not a valid plan: {str(error).splitlines()[0]}"))
    return problems


def _strays(dataset: Dataset) -> list[Problem]:
    named = {relative for entry in dataset.manifest for relative in entry.files}
    files = [
        p
        for folder in ("data", "index", "rejects")
        for p in without_hidden(dataset.path / folder, "**/*")
        if p.is_file()
    ]
    sidecars = {p.stem for p in without_hidden(dataset.path / "scores", "*.json")}
    files += [p for p in without_hidden(dataset.path / "scores", "*/*") if p.parent.name not in sidecars]
    return [
        Problem(path, "is in no manifest line: a killed run left it, or a person added it")
        for path in sorted(p.relative_to(dataset.path).as_posix() for p in files)
        if path not in named
    ]


def _deep(dataset: Dataset) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    with Task("verify rows", dataset.num_tokens, "tokens") as task:
        for number, entry in enumerate(dataset.manifest):
            problems += _deep_shard(dataset, number, entry, seen)
            task.advance(entry.tokens)
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
    for row_id in ids:
        if row_id in seen:
            problems.append(Problem(where, f"id {row_id!r} is repeated in the dataset"))
        seen.add(row_id)
    return problems

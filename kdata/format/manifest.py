"""dataset.json and manifest.jsonl: what a dataset is, and which shards it has.

A file that the manifest does not name is not part of the dataset. Neither file is trusted: names are checked against a
pattern, and paths must stay inside the dataset.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdata.config import first_problem
from kdata.errors import CorruptError, DataError, FormatError, MissingError
from kdata.format.files import inside, not_through_a_link, sync_directory, write_atomically
from kdata.format.json_text import parse_object, read_json
from kdata.format.plain import plain_lines
from kdata.format.schema import (
    FORMAT_MAJOR,
    FORMAT_VERSION,
    NO_IDENTITY,
    DatasetInfo,
    ManifestEntry,
    canonical_json,
    json_digest,
)

MAX_LINE_BYTES = 1 << 20  # of the manifest; a line has 600


def read_info(root: Path) -> DatasetInfo:
    """Read dataset.json.

    Raises:
        MissingError: there is no dataset.
        FormatError: a newer major version, or not a dataset description.
    """
    path = root / "dataset.json"
    if not path.exists():
        raise MissingError(f"{root} is not a kdata dataset: it has no dataset.json")
    if path.is_dir():
        raise CorruptError(f"{path} is a folder; restore the file from a copy of the dataset")
    try:
        raw = read_json(path)
    except DataError as error:
        raise CorruptError(f"{path} is not JSON ({error}); restore it from a copy of the dataset") from error
    version = str(raw.get("format_version", ""))
    major = version.split(".")[0]
    if not re.fullmatch("[0-9]{1,6}", major):
        raise FormatError(f"{path} names no format version, so it is not a kdata dataset")
    if int(major) > FORMAT_MAJOR:
        raise FormatError(f"{root} has format {version}, this kdata reads up to {FORMAT_MAJOR}.x; upgrade kdata")
    if raw.get("digest") != digest_of(raw):
        raise CorruptError(
            f"{path} is damaged: it does not match its own digest; restore it from a copy of the dataset"
        )
    try:
        info = DatasetInfo.model_validate(raw)
    except ValidationError as error:
        raise CorruptError(f"{path} does not follow the format: {first_problem(error)}") from error
    # A newer minor version may leave further keys out of the identity.
    if version == FORMAT_VERSION and info.identity_digest != _identity_digest(raw):
        raise CorruptError(
            f"{path} was edited: its fingerprint is not that of its content; restore it from a copy of the dataset"
        )
    return info


def _identity_digest(raw: dict[str, Any]) -> str:
    """`DatasetInfo.identity_digest` from the file itself, which may have keys that only the kdata that wrote it knew."""
    identity = {key: value for key, value in raw.items() if key not in NO_IDENTITY}
    return json_digest(DatasetInfo.without_speed(copy.deepcopy(identity)))


def check_binding(root: Path, info: DatasetInfo, entries: Iterable[ManifestEntry]) -> None:
    """Raise CorruptError where a manifest line is not of this dataset, or of other work. Older lines say neither."""
    for entry in entries:
        if reason := foreign(info, entry):
            raise CorruptError(
                f"{root}/manifest.jsonl: shard {entry.name} does not belong to this dataset: {reason}. Restore the "
                "dataset.json and the manifest.jsonl that belong together, or run `kdata repair`, which sets the shard aside"
            )


def foreign(info: DatasetInfo, entry: ManifestEntry) -> str | None:
    """Why a manifest line does not belong to a dataset; None where it does, or where an older kdata wrote it."""
    source = info.sources.get(entry.source)
    if not entry.is_bound:
        all_are = source is not None and source.shards_bound
        return f"its line names no dataset, and all of source {entry.source!r} do" if all_are else None
    if entry.identity_digest != info.identity_digest:
        return (
            "it was written for another dataset, with another teacher, tokenizer, codec or vocabulary (fingerprint "
            f"{str(entry.identity_digest)[:12]}, that of dataset.json is {info.identity_digest[:12]})"
        )
    if source is None:
        return f"dataset.json has no source {entry.source!r}"
    if entry.work_digest not in (source.work_digest, *source.former_digests):
        return f"it was written by other work: another corpus, or other settings, than those of source {entry.source!r}"
    return None


def write_info(root: Path, info: DatasetInfo) -> None:
    """Write dataset.json atomically."""
    write_json(root / "dataset.json", info.model_dump())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one of the dataset's JSON files atomically, with its own digest."""
    write_atomically(path, json_bytes({**content, "digest": digest_of(content)}))


def json_bytes(content: dict[str, Any]) -> bytes:
    """The bytes of dataset.json, and of the JSON of a plan or a sidecar: always in this form."""
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def digest_of(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of everything but `digest` itself."""
    return json_digest({key: value for key, value in content.items() if key != "digest"})


def read_manifest(root: Path, *, heal: bool = False) -> list[ManifestEntry]:
    """Read manifest.jsonl in order. A last line without a newline is a commit that was cut off, and is ignored.

    Args:
        heal: also remove such a line from the file, as a writer does before it adds lines.
    Raises:
        CorruptError: a line is not a manifest entry, or names a shard again.
    """
    path = root / "manifest.jsonl"
    if not path.exists():
        return []
    if path.is_dir():
        raise CorruptError(f"{path} is a folder; restore the file from a copy of the dataset")
    entries: list[ManifestEntry] = []
    names: set[str] = set()
    for number, line in enumerate(plain_lines(path, MAX_LINE_BYTES), 1):
        if not line.endswith(b"\n"):
            if heal:
                with path.open("rb+") as file:
                    file.truncate(path.stat().st_size - len(line))
                    os.fsync(file.fileno())
            break
        entry = _entry(line, f"{path} line {number}")
        if entry.name in names:
            raise CorruptError(f"{path} line {number}: shard {entry.name} occurs twice; restore the file from a copy")
        for relative in entry.files:
            inside(root, relative)
        names.add(entry.name)
        entries.append(entry)
    return entries


def _entry(line: bytes, where: str) -> ManifestEntry:
    remedy = "restore manifest.jsonl from a copy of the dataset"
    try:
        raw = parse_object(line, MAX_LINE_BYTES)
        entry = ManifestEntry.model_validate(raw)
    except ValidationError as error:
        raise CorruptError(f"{where} is damaged ({first_problem(error)}); {remedy}") from error
    except ValueError as error:
        raise CorruptError(f"{where} is damaged ({error}); {remedy}") from error
    if raw.get("digest") != digest_of(raw):
        raise CorruptError(f"{where} is damaged: it does not match its own digest; {remedy}")
    return entry


def append_entry(root: Path, entry: ManifestEntry) -> None:
    """Append one line and flush it: the commit."""
    line = manifest_line(entry)
    path = root / "manifest.jsonl"
    fresh = not path.exists()
    with open(path, "ab", opener=not_through_a_link) as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        sync_directory(root)


def manifest_line(entry: ManifestEntry) -> bytes:
    """One line of manifest.jsonl with its own digest."""
    content = entry.model_dump()
    return canonical_json({**content, "digest": digest_of(content)}) + b"\n"


def write_manifest(root: Path, entries: list[ManifestEntry]) -> None:
    """Replace manifest.jsonl whole."""
    write_atomically(root / "manifest.jsonl", b"".join(manifest_line(entry) for entry in entries))


def order_manifest(root: Path, source: str) -> None:
    """Sort the manifest lines of one source by unit.

    A dataset that was repaired, or written by several workers, then has the bytes of an undisturbed run.
    """
    entries = read_manifest(root)
    own = [entry for entry in entries if entry.source == source]
    ordered = sorted(own, key=lambda entry: entry.unit)
    if own == ordered:
        return
    first = entries.index(own[0])
    others = [entry for entry in entries if entry.source != source]
    write_manifest(root, [*others[:first], *ordered, *others[first:]])


def of_version(info: DatasetInfo, version: int) -> DatasetInfo:
    """The dataset with another version of its codec, and the digest of the identity that it then has."""
    other: DatasetInfo = info.model_copy(update={"codec": info.codec.model_copy(update={"version": version})})
    return other.model_copy(update={"identity_digest": json_digest(other.identity())})


def new_info(**fields: object) -> DatasetInfo:
    """A DatasetInfo with the digest of its identity."""
    draft = DatasetInfo.model_validate({**fields, "sources": {}, "identity_digest": ""})
    return draft.model_copy(update={"identity_digest": json_digest(draft.identity())})

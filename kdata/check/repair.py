"""Repair: set aside what is damaged, so that the rest is a dataset again, and say which work to repeat.

Nothing is deleted and nothing is guessed: a shard that is not what was committed goes whole into `DATASET.aside/N/` beside
the dataset, its manifest line goes, and its source counts as incomplete; the same capture, run again, does the units that
are missing and no others. So do shards that no manifest line names, and sidecars and plans that are damaged.

Order: manifest and dataset.json as they were are copied aside; dataset.json (source incomplete) and the manifest are
replaced whole; files are moved last. A crash in between leaves strays, which the next repair sets aside.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from kdata.check.verify import Problem, check_file, verify
from kdata.errors import CorruptError, FormatError, MismatchError, MissingError, StorageError
from kdata.format.files import inside, lock_of, storage_errors, write_atomically
from kdata.format.manifest import digest_of, json_bytes, manifest_line, read_info, write_info, write_manifest
from kdata.format.schema import FORMAT_VERSION, DatasetInfo, ManifestEntry
from kdata.store.dataset import Dataset


@dataclass
class Repair:
    """What was done.

    problems: what was found. moved: files that were set aside, relative to the dataset, into `aside`. units: work units
    to run again, by source. remaining: what cannot be mended here. commands: what to run.
    """

    problems: list[Problem] = field(default_factory=list)
    aside: Path | None = None
    moved: list[str] = field(default_factory=list)
    units: dict[str, list[int]] = field(default_factory=dict)
    remaining: list[Problem] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def repair(root: Path | str, *, copy: Path | None = None) -> Repair:
    """Set aside what is damaged in the dataset at `root`.

    Args:
        copy: a whole copy of dataset.json, or of the dataset, to restore dataset.json from.
    Raises:
        CorruptError: dataset.json is damaged, and there is no copy of it.
        MismatchError: the copy is of another dataset.
        StorageError: another process is writing, or the disk refused.
    """
    root = Path(root)
    if not root.is_dir():
        raise MissingError(f"{root} does not exist or is no folder; name the dataset's folder")
    lock = lock_of(root)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(f"{root} is being written by another process; wait for it") from error
    try:
        with storage_errors(root):
            return _repair(root, copy)
    finally:
        lock.release()


def _repair(root: Path, copy: Path | None) -> Repair:
    done = Repair()
    info = _info(root, copy, done)
    if info.format_version != FORMAT_VERSION:
        raise FormatError(f"{root} has format {info.format_version}; repair it with the kdata that writes that")
    entries, problems = _entries(root)
    done.problems += problems
    whole, bad = _whole(root, entries, info, done)
    done.units = _lost_units(root, info, whole)
    if done.problems or any(info.sources[name].num_units is not None for name in done.units):
        _set_json_aside(root, done)
        _rewrite(root, info, whole, set(done.units))
    _move(root, [path for entry in bad for path in entry.files], done)
    _sweep(root, done)
    done.commands += [command(root, info, source) for source in sorted(done.units)]
    return done


def _info(root: Path, copy: Path | None, done: Repair) -> DatasetInfo:
    """dataset.json, or the copy of it, put in its place."""
    path = root / "dataset.json"
    try:
        info = read_info(root)
        if path.read_bytes() != json_bytes(json.loads(path.read_bytes())):
            done.problems.append(
                Problem("dataset.json", "is not as kdata writes it; its values are whole: written anew")
            )
        return info
    except (CorruptError, MissingError) as error:
        if copy is None:
            raise CorruptError(
                f"{path} is damaged or gone, and cannot be made from the shards: teacher, tokenizer and settings stand "
                f"nowhere else. Give a copy of it: kdata repair {root} --copy FILE"
            ) from error
        done.problems.append(Problem("dataset.json", f"restored from {copy}"))
    other = read_info(copy if copy.is_dir() else _folder_of(copy))
    _refuse_other_shards(root, other)
    if path.exists():
        _move(root, ["dataset.json"], done)
    write_info(root, other)
    return other


def _folder_of(copy: Path) -> Path:
    if copy.name != "dataset.json":
        raise MissingError(f"--copy {copy}: name a dataset.json, or a dataset's folder")
    return copy.parent


def _refuse_other_shards(root: Path, info: DatasetInfo) -> None:
    """Refuse a copy whose codec, vocabulary or sources are not those of the shards."""
    import pyarrow as pa

    for entry in _entries(root)[0]:
        if entry.source not in info.sources:
            raise MismatchError(f"the copy of dataset.json has no source {entry.source!r}: it is another's, or older")
        try:
            metadata = pa.ipc.open_file(inside(root, f"data/{entry.name}.arrow")).schema.metadata or {}
        except (pa.ArrowException, OSError):
            continue
        if (
            json.loads(metadata[b"kdata.codec"]) != info.codec.model_dump()
            or int(metadata[b"kdata.vocab_size"]) != info.vocab_size
        ):
            raise MismatchError(
                "the copy of dataset.json has another codec or vocabulary than the shards: it is another's"
            )


def _entries(root: Path) -> tuple[list[ManifestEntry], list[Problem]]:
    """Manifest lines that are whole, each name once, and what is wrong with the others."""
    path = root / "manifest.jsonl"
    content = path.read_bytes() if path.exists() else b""
    found: dict[str, list[ManifestEntry]] = {}
    problems = []
    if content and not content.endswith(b"\n"):
        problems.append(Problem("manifest.jsonl", "ends within a line: that commit did not happen"))
        content = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        entry = _entry(root, line)
        if entry is not None and manifest_line(entry) != line + b"\n":
            problems.append(Problem("manifest.jsonl", f"line {number} is not as kdata writes it; its values are whole"))
        if entry is None:
            problems.append(Problem("manifest.jsonl", f"line {number} is damaged"))
        elif entry.name in found:
            problems.append(Problem("manifest.jsonl", f"line {number}: shard {entry.name} stands twice"))
            found[entry.name].append(entry)
        else:
            found[entry.name] = [entry]
    return [_likeliest(root, same) for same in found.values()], problems


def _entry(root: Path, line: bytes) -> ManifestEntry | None:
    try:
        raw: Any = json.loads(line)
        entry = ManifestEntry.model_validate(raw)
        for relative in entry.files:
            inside(root, relative)
        return entry if raw.get("digest") == digest_of(raw) else None
    except (ValueError, AttributeError, CorruptError):  # a ValidationError is a ValueError
        return None


def _likeliest(root: Path, same: list[ManifestEntry]) -> ManifestEntry:
    """Of several lines for one shard, the one that its files follow; else the first."""
    return next((e for e in same if not any(check_file(root, path, f) for path, f in e.files.items())), same[0])


def _whole(
    root: Path, entries: list[ManifestEntry], info: DatasetInfo, done: Repair
) -> tuple[list[ManifestEntry], list[ManifestEntry]]:
    """Shards that are what was committed, and those that are not: by their bytes, then by what is in them."""
    whole: list[ManifestEntry] = []
    bad: list[ManifestEntry] = []
    for entry in entries:
        problems = [p for path, file in entry.files.items() for p in check_file(root, path, file)]
        if entry.source not in info.sources:
            problems.append(Problem("manifest.jsonl", f"{entry.name} is of a source that dataset.json does not have"))
        done.problems += problems
        (bad if problems else whole).append(entry)
    return whole, bad


def _lost_units(root: Path, info: DatasetInfo, whole: list[ManifestEntry]) -> dict[str, list[int]]:
    """Units to run again: those that a complete source lacks, and those of files that no whole line names."""
    lost = {name: set(range(source.num_units or 0)) for name, source in info.sources.items()}
    for path in (p for folder in ("data", "index", "rejects") for p in (root / folder).glob("*-*")):
        source, _, unit = path.stem.rpartition("-")
        if source in lost and unit.isdigit():
            lost[source].add(int(unit))
    for entry in whole:
        lost[entry.source].discard(entry.unit)
    return {name: sorted(units) for name, units in lost.items() if units}


def _rewrite(root: Path, info: DatasetInfo, whole: list[ManifestEntry], incomplete: set[str]) -> None:
    """dataset.json with the sources marked incomplete, then the manifest of what is whole."""
    sources = {
        name: source.model_copy(update={"num_units": None}) if name in incomplete else source
        for name, source in info.sources.items()
    }
    write_info(root, info.model_copy(update={"sources": sources}))
    write_manifest(root, whole)


def _aside(root: Path, done: Repair) -> Path:
    """The folder of this repair, beside the dataset."""
    if done.aside is None:
        place = root.resolve()
        base = place.with_name(f"{place.name}.aside")
        taken = [int(p.name) for p in base.glob("*") if p.name.isdigit()] if base.exists() else []
        done.aside = base / str(max(taken, default=0) + 1)
        done.aside.mkdir(parents=True)
    return done.aside


def _set_json_aside(root: Path, done: Repair) -> None:
    """Copy manifest and dataset.json as they were."""
    for name in ("manifest.jsonl", "dataset.json"):
        target = _aside(root, done) / name
        if (root / name).exists() and not target.exists():
            write_atomically(target, (root / name).read_bytes())


def _move(root: Path, relatives: list[str], done: Repair) -> None:
    """Move files that are there into the folder of this repair, under their own paths."""
    for relative in relatives:
        path = root / relative
        if path.is_symlink() or path.exists():
            target = _aside(root, done) / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
            done.moved.append(relative)


def _sweep(root: Path, done: Repair) -> None:
    """What verify still finds once the dataset opens: strays, sidecars, plans, tokenizer are set aside, the rest is said."""
    commands: set[str] = set()
    for problem in verify(Dataset(root)):
        folder, _, name = problem.path.partition("/")
        done.problems.append(problem)
        stem = name.split("/")[0].split(".")[0]
        if folder in ("scores", "plans"):
            _move(root, [f"{folder}/{stem}.json", f"{folder}/{stem}" + (".parquet" if folder == "plans" else "")], done)
            commands.add(f"kdata {'score' if folder == 'scores' else 'select'} {root} ... --name {stem}")
        elif folder == "tokenizer":
            _move(root, ["tokenizer"], done)
            commands.add(f"repeat any capture, generation or import into {root}: it writes tokenizer/ again")
        else:
            _move(root, [problem.path], done)
    done.commands += sorted(commands)
    lasting = {"tokenizer"} if "tokenizer" in done.moved else set()
    done.remaining = [p for p in verify(Dataset(root), deep=True) if p.path.split("/")[0] not in lasting]


def command(root: Path, info: DatasetInfo, source: str) -> str:
    """The command that does the missing units of a source again, as far as the dataset knows it."""
    about = info.sources[source]
    settings = about.settings
    if about.kind not in ("capture", "generate"):
        return f"kdata {about.kind} ...: repeat what made {source!r}, into {root}"
    place = "--corpus CORPUS" if about.kind == "capture" else "--prompts PROMPTS"
    keep = f" --k {settings['k']}" if "k" in settings else ""
    return (
        f"kdata {about.kind} {root} --teacher {info.teacher.model} --backend {info.teacher.backend} {place}{keep} ... "
        f"(with the settings of source {source!r}, see `kdata info` or dataset.json; another setting is refused)"
    )

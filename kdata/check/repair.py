"""Repair: set aside what is damaged, so that the rest is a dataset again, and name the work to repeat.

Nothing is deleted and nothing is guessed. A damaged shard goes whole into `DATASET.aside/N/` beside the dataset, its manifest
line is removed, and its source counts as incomplete; the same capture, run again, does the missing units and no others.
Shards that no manifest line names are set aside too, and so are damaged sidecars, plans and tokenizers.

A dataset at a URL is repaired from a copy of all its files on this machine; what is damaged goes to `URL.aside/N/`.

The order: copy manifest and dataset.json aside; replace dataset.json (source incomplete) and the manifest whole; move files.
A crash in between leaves files that no manifest line names, and the next repair sets these aside.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from kdata.calls import validated
from kdata.check.verify import FOLDERS, Problem, check_file, check_index, check_shard, verify
from kdata.errors import CorruptError, FormatError, MismatchError, MissingError, ShapeError, StorageError
from kdata.format.codec import codec_of
from kdata.format.files import inside, local_path, lock_of, storage_errors, without_hidden, write_atomically
from kdata.format.json_text import parse_json, read_json
from kdata.format.manifest import (
    MAX_LINE_BYTES,
    digest_of,
    json_bytes,
    manifest_line,
    read_info,
    write_info,
    write_manifest,
)
from kdata.format.plain import GET_FILES, is_pointer, plain_lines
from kdata.format.schema import FORMAT_VERSION, DatasetInfo, ManifestEntry
from kdata.store.dataset import Dataset
from kdata.store.hidden import forget_part
from kdata.store.listed import HIDDEN
from kdata.store.shard import check_header
from kdata.store.url import Store, copy_of, is_url

JSON = ("manifest.jsonl", "dataset.json")
STAYS = {
    "data",
    "index",
    "rejects",
    "scores",
    "plans",
    "hidden",
    "manifest.jsonl",
}  # repaired in place, never moved whole


MOST_LOST = 1_000_000  # units of a source: a shard each


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        problems: everything that was wrong.
        aside: the folder of this repair, or its URL; None where nothing was set aside.
        moved: files that were set aside, relative to the dataset.
        units: work units to run again, by source.
        remaining: problems that cannot be repaired here.
        commands: commands to run.
    """

    problems: list[Problem] = field(default_factory=list)
    aside: Path | str | None = None
    moved: list[str] = field(default_factory=list)
    units: dict[str, list[int]] = field(default_factory=dict)
    remaining: list[Problem] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


class _Aside:
    """The files that one repair sets aside. `folder` is created with the first of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder: Path | None = None
        self.moved: list[str] = []

    def _place(self) -> Path:
        if self.folder is None:
            dataset = self.root.resolve()
            base = dataset.with_name(f"{dataset.name}.aside")
            numbers = [int(p.name) for p in base.glob("*") if p.name.isdigit()] if base.exists() else []
            for number in numbers:  # what a killed repair left: half a copy, and folders of files that it did not move
                for name in JSON:
                    (base / str(number) / f"{name}.tmp").unlink(missing_ok=True)
                for folder in sorted((base / str(number)).glob("**/"), reverse=True):
                    with suppress(OSError):  # it holds something
                        folder.rmdir()
            self.folder = base / str(max(numbers, default=0) + 1)
            self.folder.mkdir(parents=True)
        return self.folder

    def copy_json(self) -> None:
        """Copy manifest and dataset.json as they were."""
        for name in JSON:
            target = self._place() / name
            if (self.root / name).exists() and not target.exists():
                write_atomically(target, (self.root / name).read_bytes())

    def move(self, relatives: list[str]) -> None:
        """Move files and folders under their own paths, but for those that do not exist or are no part of a dataset."""
        for relative in filter(self._is_part, relatives):
            path = self.root / relative
            if path.is_symlink() or path.exists():
                target = self._place() / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
                self.moved.append(relative)

    def _is_part(self, relative: str) -> bool:
        """Whether a path may be moved: below the dataset, not the dataset itself or one of its folders.

        A JSON of the dataset may name anything. A link is moved, not what it leads to.
        """
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in relative:
            return False
        is_below = (self.root / pure).parent.resolve().is_relative_to(self.root.resolve())
        return is_below and pure.as_posix() not in STAYS


@validated
def repair(root: Path | str, *, copy: Path | None = None) -> Repair:
    """Set aside what is damaged in the dataset at `root`.

    Args:
        root: folder of the dataset, or its URL.
        copy: an intact copy of dataset.json, or of the dataset, to restore dataset.json from.
    Raises:
        ConfigError: `root` is on the Hub, or a web server's URL.
        CorruptError: dataset.json is damaged, and there is no copy of it.
        MismatchError: the copy is of another dataset.
        StorageError: another process is writing, or the disk refused.
    """
    if is_url(root) and not str(root).startswith(("http:", "https:")):
        return _repair_at_url(Store(str(root)), copy)
    root = local_path(root, "repair changes files where they are, and nothing can be changed there")
    if not root.is_dir():
        raise MissingError(f"{root} does not exist or is not a folder; name the dataset's folder")
    with storage_errors(root), lock_of(root):
        return _repair(root, copy)


def _repair_at_url(store: Store, copy: Path | None) -> Repair:
    """Copy every file as it is, repair the copy, and do the same at the URL: JSON files first, then the moves."""
    root = copy_of(store.url, "repairing")
    aside = Store(f"{store.url}.aside")
    with storage_errors(root), lock_of(root):
        try:
            size = _copy_as_it_is(store, root)
            done = _repair(root, copy, store.url)
            if done.aside is None and not done.problems:
                return done
            if store.size("manifest.jsonl") != size:
                raise StorageError(
                    f"{store.url} is being written by another process (its manifest has changed); let it finish, then run "
                    "this again"
                )
            number = max((int(name) for name in aside.names() if name.isdigit()), default=0) + 1
            _publish(store, root, done, aside, number)
        finally:
            for folder in (root, root.with_name(f"{root.name}.aside")):
                shutil.rmtree(folder, ignore_errors=True)
    return replace(done, aside=None if done.aside is None else f"{aside.url}/{number}")


def _publish(store: Store, root: Path, done: Repair, aside: Store, number: int) -> None:
    """Do at the URL what a repair did in its copy `root`."""
    for name in ("manifest.jsonl", "dataset.json"):
        if isinstance(done.aside, Path) and (done.aside / name).exists():
            aside.put(done.aside / name, f"{number}/{name}")
    for name in ("dataset.json", "manifest.jsonl"):
        if (root / name).exists():
            store.replace(root / name, name)
    moved = {path for relative in done.moved for path in store.files() if f"{path}/".startswith(f"{relative}/")}
    for path in sorted(moved - {"dataset.json"}):
        store.move(path, f"{number}/{path}", aside)


def _copy_as_it_is(store: Store, root: Path) -> int:
    """Copy every file at the URL to a new folder `root`, damage included.

    Returns:
        The size of the manifest at the URL.
    Raises MissingError where the URL has no dataset.
    """
    shutil.rmtree(root, ignore_errors=True)  # of a repair that was killed; a good copy would hide damage at the URL
    size, names = store.size("manifest.jsonl"), store.files()
    if "dataset.json" not in names and "manifest.jsonl" not in names:
        raise MissingError(f"{store.url} is not a kdata dataset: it has no dataset.json")
    root.mkdir(parents=True)
    for name in names:
        store.get(name, inside(root, name))
    return size


def _repair(root: Path, copy: Path | None, place: str | None = None) -> Repair:
    """Repair a folder; `place` is where people know the dataset, if that is another."""
    for path in (path for folder in ("data", "index") for path in without_hidden(root / folder, "*")):
        if is_pointer(path):
            raise MissingError(f"{path} {GET_FILES}. Nothing was set aside")
    aside = _Aside(root)
    info, problems = _info(root, copy, aside)
    if info.format_version != FORMAT_VERSION:
        raise FormatError(
            f"{root} has format {info.format_version}, this kdata repairs {FORMAT_VERSION}; use the kdata that wrote it"
        )
    entries, manifest_problems = _entries(root)
    whole, damaged, shard_problems = _whole(root, entries, info)
    problems += manifest_problems + shard_problems
    units = _lost_units(root, info, whole)
    if problems or any(info.sources[name].num_units is not None for name in units):
        aside.copy_json()
        _rewrite(root, info, whole, set(units))
    aside.move([path for entry in damaged for path in entry.files])
    swept, commands = _sweep(root, aside, place or root)
    repaired_later = {"tokenizer"} if "tokenizer" in aside.moved else set()
    return Repair(
        problems=problems + swept,
        aside=aside.folder,
        moved=aside.moved,
        units=units,
        remaining=[
            p for p in verify(Dataset(root), deep=True) if _is_left(p) and p.path.split("/")[0] not in repaired_later
        ],
        commands=commands + [command(place or root, info, source) for source in sorted(units)],
    )


def _info(root: Path, copy: Path | None, aside: _Aside) -> tuple[DatasetInfo, list[Problem]]:
    """dataset.json, restored from the copy where it is damaged; and what was wrong with it."""
    path = root / "dataset.json"
    try:
        info = read_info(root)
        _refuse_foreign_info(root, info)
        if path.read_bytes() == json_bytes(read_json(path)):
            return info, []
        return info, [Problem("dataset.json", "is not in the form that kdata writes; its values are whole: rewritten")]
    except (CorruptError, MissingError) as error:
        if copy is None:
            raise CorruptError(
                f"{path} is damaged, missing or of another dataset, and it cannot be made from the shards: only it holds "
                f"teacher, tokenizer and settings. Name a copy of it: kdata repair {root} --copy FILE"
            ) from error
    other = read_info(copy if copy.is_dir() else _folder_of(copy))
    _refuse_other_shards(root, other)
    if path.exists():
        aside.move(["dataset.json"])
    write_info(root, other)
    return other, [Problem("dataset.json", f"was damaged, missing or of another dataset; restored from {copy}")]


def _refuse_foreign_info(root: Path, info: DatasetInfo) -> None:
    """Raise CorruptError where shards name their dataset and none names this one: then not the shards are the strangers."""
    named = {entry.identity_digest for entry in _entries(root)[0] if entry.is_bound}
    if named and info.identity_digest not in named:
        raise CorruptError(f"{root}/dataset.json is of another dataset than every shard that names one")


def _folder_of(copy: Path) -> Path:
    if copy.name != "dataset.json":
        raise MissingError(f"--copy {copy} is not a dataset.json; name a dataset.json, or a dataset's folder")
    return copy.parent


def _refuse_other_shards(root: Path, info: DatasetInfo) -> None:
    """Refuse a copy whose codec, vocabulary or sources are not those of the shards. Raises FormatError for a newer codec."""
    codec_of(info.codec)
    for entry in _entries(root)[0]:
        if entry.source not in info.sources:
            raise MismatchError(
                f"the copy of dataset.json has no source {entry.source!r} of a shard: it is of another dataset, or "
                "older; name another copy"
            )
        try:
            reader = pa.ipc.open_file(inside(root, f"data/{entry.name}.arrow"))
        except (pa.ArrowException, OSError):
            continue
        try:
            check_header(reader, info, entry)
        except ShapeError as error:
            raise MismatchError(
                f"the copy of dataset.json does not fit shard {entry.name}: {error}; name another copy"
            ) from error


def _entries(root: Path) -> tuple[list[ManifestEntry], list[Problem]]:
    """Manifest lines that are whole, one per shard, and the problems of the others."""
    path = root / "manifest.jsonl"
    by_name: dict[str, list[ManifestEntry]] = {}
    problems = []
    for number, line in enumerate(plain_lines(path, MAX_LINE_BYTES) if path.exists() else (), 1):
        if not line.endswith(b"\n"):
            problems.append(Problem("manifest.jsonl", "ends in the middle of a line: its last commit did not complete"))
            break
        entry = _entry(root, line)
        if entry is not None and manifest_line(entry) != line:
            problems.append(
                Problem("manifest.jsonl", f"line {number} is not in the form that kdata writes; its values are whole")
            )
        if entry is None:
            problems.append(Problem("manifest.jsonl", f"line {number} is damaged"))
        elif entry.name in by_name:
            problems.append(Problem("manifest.jsonl", f"line {number}: shard {entry.name} is repeated"))
            by_name[entry.name].append(entry)
        else:
            by_name[entry.name] = [entry]
    return [_likeliest(root, same) for same in by_name.values()], problems


def _entry(root: Path, line: bytes) -> ManifestEntry | None:
    try:
        raw: Any = parse_json(line)
        entry = ManifestEntry.model_validate(raw)
        for relative in entry.files:
            inside(root, relative)
        return entry if raw.get("digest") == digest_of(raw) else None
    except (ValueError, AttributeError, CorruptError):  # a ValidationError is a ValueError
        return None


def _likeliest(root: Path, same: list[ManifestEntry]) -> ManifestEntry:
    """Of several lines for one shard, the one that its files match; otherwise the first."""
    return next((e for e in same if not any(check_file(root, path, f) for path, f in e.files.items())), same[0])


def _whole(
    root: Path, entries: list[ManifestEntry], info: DatasetInfo
) -> tuple[list[ManifestEntry], list[ManifestEntry], list[Problem]]:
    """Shards whose bytes are what was committed, the damaged ones, and what is wrong with these."""
    whole: list[ManifestEntry] = []
    damaged: list[ManifestEntry] = []
    problems: list[Problem] = []
    for entry in entries:
        own = [p for path, file in entry.files.items() for p in check_file(root, path, file)]
        own = own or check_shard(root, entry, info) or check_index(root, entry)
        if entry.source not in info.sources:
            own.append(Problem("manifest.jsonl", f"{entry.name} is of a source that dataset.json does not have"))
        problems += own
        (damaged if own else whole).append(entry)
    return whole, damaged, problems


def _lost_units(root: Path, info: DatasetInfo, whole: list[ManifestEntry]) -> dict[str, list[int]]:
    """Units to run again: those that a complete source lacks; of another those of files that no intact line names.

    Raises CorruptError where dataset.json names so many units that its number cannot be right.
    """
    for name, about in info.sources.items():
        there = sum(entry.source == name for entry in whole)
        if (about.num_units or 0) - there > MOST_LOST:
            raise CorruptError(
                f"{root}: dataset.json says that source {name!r} has {about.num_units:,} units, and {there:,} are there; "
                "the number is damaged. Copy dataset.json again from where the dataset came from"
            )
    lost = {name: set(range(source.num_units or 0)) for name, source in info.sources.items()}
    for path in (p for folder in ("data", "index", "rejects") for p in (root / folder).glob("*-*")):
        source, _, unit = path.stem.rpartition("-")
        if source in lost and info.sources[source].num_units is None and re.fullmatch("[0-9]{5,15}", unit):
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


def _sweep(root: Path, aside: _Aside, place: Path | str) -> tuple[list[Problem], list[str]]:
    """Set aside what `verify` finds now that the dataset opens: unnamed files, sidecars, plans, the tokenizer.

    Returns:
        The problems, and the commands that write again what was set aside.
    """
    commands: set[str] = set()
    problems = verify(Dataset(root))
    for problem in problems:
        folder, _, name = problem.path.partition("/")
        stem = name.split("/")[0].split(".")[0]
        if problem.stray:
            if _is_left(problem):
                aside.move([problem.path])
        elif folder == HIDDEN.folder:
            # One part is made again in minutes, all of them perhaps in days: the others stay.
            own = [f"hidden/{stem}.json", f"hidden/{stem}"]
            if problem.path.endswith(HIDDEN.suffix) and own[0] not in aside.moved:
                forget_part(root, stem, problem.path)
                own = [problem.path]
            aside.move(own)
            commands.add(f"kdata hidden {place} ... --name {stem}")
        elif folder in ("scores", "plans"):
            aside.move([f"{folder}/{stem}.json", f"{folder}/{stem}" + (".parquet" if folder == "plans" else "")])
            commands.add(f"kdata {'score' if folder == 'scores' else 'select'} {place} ... --name {stem}")
        elif folder == "tokenizer":
            aside.move(["tokenizer"])
            commands.add(f"repeat any capture, generation or import into {place}: it writes tokenizer/ again")
        else:
            aside.move([problem.path])
    return problems, sorted(commands)


def _is_left(problem: Problem) -> bool:
    """Whether a problem is for repair to solve: what a person put beside the dataset's own files stays where it is."""
    return not problem.stray or problem.path.partition("/")[0] in FOLDERS or problem.path.rstrip("/").endswith(".tmp")


def command(root: Path | str, info: DatasetInfo, source: str) -> str:
    """The command that runs the missing units of a source again, as far as the dataset records it."""
    about = info.sources[source]
    settings = about.settings
    if about.kind not in ("capture", "generate"):
        return f"kdata {about.kind} ...: repeat the command that wrote {source!r}, into {root}"
    place = "--corpus CORPUS" if about.kind == "capture" else "--prompts PROMPTS"
    keep = f" --k {settings['k']}" if "k" in settings else ""
    return (
        f"kdata {about.kind} {root} --teacher {info.teacher.model} --backend {info.teacher.backend} {place}{keep} ... "
        f"(with the settings of source {source!r}, see `kdata info` or dataset.json; other settings are refused)"
    )

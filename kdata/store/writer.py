"""Writing a dataset: work units become shards, each committed whole or not at all.

A unit's files are written and renamed first (`kdata.store.shard`), its manifest line comes last. So a crash loses at
most the unit that was being written.
"""

from __future__ import annotations

import copy
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, settings_difference
from kdata.format.files import (
    copy_files,
    file_info,
    inside,
    journal_of,
    lock_of,
    storage_errors,
    sync_directory,
    sync_tree,
)
from kdata.format.manifest import (
    append_entry,
    check_binding,
    of_version,
    order_manifest,
    read_info,
    read_manifest,
    write_info,
    write_manifest,
)
from kdata.format.records import Shard, UnitResult
from kdata.format.schema import FORMER, DatasetInfo, ManifestEntry, SourceInfo
from kdata.store.index import read_index
from kdata.store.shard import write_shard
from kdata.store.staging import FolderStaging, Staging

# Temporary files that a killed run may leave. A writer removes these and nothing else.
TEMPORARY = ("dataset.json.tmp", "tokenizer.tmp", "data/*.tmp", "index/*.tmp", "rejects/*.tmp", "units-*.tmp")
# What a folder may hold without a dataset.json: a run that was killed at its start leaves these.
BEGUN = {"data", "index", "rejects", "tokenizer", "tokenizer.tmp", "dataset.json.tmp"}


class Writer:
    """Adds the units of one source to a dataset; a context manager that holds the dataset's lock.

    Args:
        root: dataset directory, made when absent.
        info: identity of the dataset (teacher, tokenizer, codec); compared with what is there.
        source: name of the work, the prefix of its shards.
        source_info: kind and settings of the work; compared with what is there.
        resume: "auto" continues where an earlier run stopped, "never" refuses a source that has rows, "must" refuses a source
            that does not exist.
        tokenizer_dir: its files are copied to DATASET/tokenizer.
        follows: settings, by dotted path, that identify the inputs by content and may differ from those on disk (where a
            corpus has grown). Then `is_followed` is true, and `follow` has to be called before anything is committed.
    Raises:
        MismatchError: the dataset was begun with other settings; the message lists them.
        ConfigError: the folder holds something else than a dataset.
        StorageError: the disk refused, or another process is writing.
    """

    def __init__(
        self,
        root: Path,
        info: DatasetInfo,
        source: str,
        source_info: SourceInfo,
        *,
        resume: str = "auto",
        tokenizer_dir: Path | None = None,
        follows: Sequence[str] = (),
    ) -> None:
        self.root, self.source, self.info = root, source, info
        self._source_info = source_info
        self._follows = follows
        self._followed_info: SourceInfo | None = None
        self._resume = resume
        self._tokenizer_dir = tokenizer_dir
        self._lock = lock_of(root)

    def __enter__(self) -> Writer:
        with storage_errors(self.root):
            self._lock.acquire()
            with ExitStack() as undo:
                undo.callback(self._lock.release)
                self._open()
                undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _open(self) -> None:
        known, manifest = None, read_manifest(self.root, heal=True)
        entries = [e for e in manifest if e.source == self.source]
        self.is_anew = not (self.root / "dataset.json").exists()
        if not self.is_anew:
            before = read_info(self.root)
            self.info = _of_version(self.info, before)
            # A run that ended before its first shard binds nobody: its settings may be set right in the same folder.
            self.is_anew = not manifest and bool(settings_difference(before.identity(), self.info.identity()))
        if self.is_anew:
            self._clear_begun()
        else:
            _refuse_difference("the dataset", before.identity(), self.info.identity(), self.root)
            known = before.sources.get(self.source)
            if known is not None and not entries and self._differs(known):
                known = None
            if known is not None:
                self._followed_info = self._compare(known)
                self._source_info = known
            self.info = before
        if known is None:
            self._source_info = self._source_info.model_copy(update={"shards_bound": True})
        if known is None and self._resume == "must":
            raise MismatchError(
                f"--resume must: {self.root} has no source {self.source!r} to continue; use --resume auto"
            )
        for name in ("data", "index"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._clear_temporary()
        check_binding(self.root, self.info, manifest)
        self._ids = _committed_ids(self.root, manifest)
        if entries and self._resume == "never":
            raise MismatchError(
                f"--resume never: {self.root} already holds {len(entries)} shards of {self.source!r}; "
                "choose another folder, or --resume auto"
            )
        self.committed = {entry.unit: entry for entry in entries}
        self._copy_tokenizer()
        self._write_info(self._source_info)

    def _clear_begun(self) -> None:
        """Remove what a run left that ended before its first shard. Raises as `_refuse_foreign` for other folders."""
        if not (self.root / "dataset.json").exists():
            _refuse_foreign(self.root)
        if self._tokenizer_dir is not None and (self.root / "tokenizer").exists():
            _remove_tree(self.root / "tokenizer")
        for name in ("manifest.jsonl", "dataset.json"):
            (self.root / name).unlink(missing_ok=True)
        journal_of(self.root).unlink(missing_ok=True)  # of a dataset that was deleted, or of the failed run

    def _differs(self, known: SourceInfo) -> bool:
        """Whether a source without shards was begun as other work, or with other settings or inputs."""
        return (known.kind, known.settings) != (self._source_info.kind, self._source_info.settings)

    def _compare(self, known: SourceInfo) -> SourceInfo | None:
        """The source as it will be recorded where its inputs have changed, now or in an earlier run; else None.

        Raises MismatchError where something differs that must not.
        """
        now = self._source_info
        rest, inputs = _split(now.settings, self._follows)
        rest_before, inputs_before = _split(known.settings, self._follows)
        before, after = {**rest_before, "work": known.kind}, {**rest, "work": now.kind}
        _refuse_difference(f"source {self.source!r}", before, after, self.root)
        former, digests = list(known.settings.get(FORMER, [])), list(known.former_digests)
        if inputs != inputs_before:
            former.append(inputs_before)
            digests.append(known.work_digest)
        if not former:
            return None
        settings = {**now.settings, FORMER: former}
        return known.model_copy(update={"settings": settings, "former_digests": digests, "num_units": now.num_units})

    @property
    def has_rows(self) -> bool:
        """Whether `root` has the index and the payload of what is committed."""
        return True

    @property
    def is_followed(self) -> bool:
        """Whether the inputs are others than those that committed shards are from, or were so in an earlier run."""
        return self._followed_info is not None

    @property
    def has_other_inputs(self) -> bool:
        """Whether the inputs differ from those that dataset.json names."""
        after = self._followed_info
        return after is not None and after.settings[FORMER] != self._source_info.settings.get(FORMER)

    def refuse_other_inputs(self) -> None:
        """Raise MismatchError that says how the inputs differ from those that the dataset was begun with."""
        assert self._followed_info is not None
        inputs = [_split(info.settings, self._follows)[1] for info in (self._source_info, self._followed_info)]
        _refuse_difference(f"source {self.source!r}", inputs[0], inputs[1], self.root)

    def follow(self, dropped: Sequence[ManifestEntry], added: Sequence[Shard]) -> None:
        """Record the inputs as they are now, and replace shards by others whose files are in place, in one step.

        The manifest is replaced whole, so a crash leaves the old shards or the new ones. Only then are files removed.
        """
        with storage_errors(self.root):
            if self._followed_info is not None:
                self._source_info = self._followed_info
            self._write_info(self._source_info)
            gone = {entry.name for entry in dropped}
            lost = {i for entry in dropped for i in _committed_ids(self.root, [entry])}
            kept = [entry for entry in read_manifest(self.root) if entry.name not in gone]
            self._publish_added(added)
            write_manifest(self.root, [*kept, *(shard.entry for shard in added)])
            self._publish_manifest()
            for entry in dropped:
                del self.committed[entry.unit]
                for relative in entry.files:
                    self._remove(relative)
        self._ids -= lost
        for shard in added:
            self.committed[shard.entry.unit] = shard.entry
            self._ids.update(shard.ids)

    def sweep(self) -> None:
        """Remove files of this source that the manifest does not name: a crash may have left some of replaced shards."""
        named = {path for entry in read_manifest(self.root) for path in entry.files}
        for folder in ("data", "index", "rejects"):
            for name in self._names(folder):
                path = f"{folder}/{name}"
                if re.fullmatch(rf"{re.escape(self.source)}-\d{{5,}}", Path(name).stem) and path not in named:
                    self._remove(path)

    def _names(self, folder: str) -> list[str]:
        return [path.name for path in (self.root / folder).glob("*")]

    def fetch(self, entry: ManifestEntry) -> None:
        """Bring the files of a committed shard to `root`; nothing for a folder."""

    def _publish_added(self, added: Sequence[Shard]) -> None:
        """Copy the files of shards to where the dataset is; nothing for a folder."""

    def _publish_manifest(self) -> None:
        """Copy the manifest and dataset.json to where the dataset is; nothing for a folder."""

    def _remove(self, relative: str) -> None:
        (self.root / relative).unlink(missing_ok=True)

    def _write_info(self, source_info: SourceInfo) -> None:
        sources = {**self.info.sources, self.source: source_info}
        self.info = self.info.model_copy(update={"sources": dict(sorted(sources.items()))})
        write_info(self.root, self.info)

    def _copy_tokenizer(self) -> None:
        """Copy the tokenizer's files, if the dataset has none, and record their digests once."""
        target = self.root / "tokenizer"
        if self._tokenizer_dir is not None and not target.exists():
            temporary = self.root / "tokenizer.tmp"
            temporary.mkdir()
            copy_files(self._tokenizer_dir, temporary)
            sync_tree(temporary)
            os.rename(temporary, target)
        elif self.info.tokenizer_files:
            return
        files = {path.name: file_info(path) for path in sorted(target.glob("*")) if path.is_file()}
        self.info = self.info.model_copy(update={"tokenizer_files": files})

    def _clear_temporary(self) -> None:
        for pattern in TEMPORARY:
            for path in list(self.root.glob(pattern)):
                _remove_tree(path) if path.is_dir() else path.unlink()

    def commit(self, unit: UnitResult) -> Shard:
        """Store one unit: its files are renamed into place, then the manifest line is written.

        Raises:
            StorageError: the disk refused; what was committed before is unchanged.
            DataError: an id occurs twice in the unit, or is an id of the dataset already.
        """
        self.refuse_twice([record.id for record in unit.records])
        return self.accept(write_shard(self.root, self.info, self.source, unit))

    def staging(self) -> Staging:
        """A new folder in which other processes may write shards; `finish` removes what is left."""
        folder = self.root.resolve() / f"units-{secrets.token_hex(4)}.tmp"
        with storage_errors(self.root):
            folder.mkdir()
        return FolderStaging(folder)

    def adopt(self, staging: Staging, attempt: str, shard: Shard) -> Shard:
        """Commit a shard that another process wrote: rename its files into place, then `accept` it."""
        self.refuse_twice(shard.ids)
        with storage_errors(self.root):
            for relative in shard.entry.files:
                self._take(staging, attempt, relative)
        return self.accept(shard)

    def _take(self, staging: Staging, attempt: str, relative: str) -> None:
        assert isinstance(staging, FolderStaging)
        target = self.root / relative
        target.parent.mkdir(exist_ok=True)
        os.replace(staging.folder / attempt / relative, target)
        sync_directory(target.parent)

    def accept(self, shard: Shard) -> Shard:
        """Commit a shard whose files are in place: write its manifest line."""
        self.refuse_twice(shard.ids)
        with storage_errors(self.root):
            append_entry(self.root, shard.entry)
        self.committed[shard.entry.unit] = shard.entry
        self._ids.update(shard.ids)
        return shard

    def present(self, ids: Iterable[str]) -> set[str]:
        """Those of these ids that the dataset has already."""
        return self._ids.intersection(ids)

    def refuse_twice(self, ids: list[str]) -> None:
        """Raise DataError where one of these ids is in the dataset already."""
        for row_id in ids:
            if row_id in self._ids:
                raise DataError(
                    f"{self.root} already has a row with id {row_id!r}; ids are unique in a dataset. Rename it in "
                    "the input (a text that is split takes ID#0, ID#1, a completion ID~0), or use another dataset."
                )

    def finish(self, num_units: int) -> None:
        """Mark the source complete with `num_units` units, and sort its manifest lines by unit."""
        with storage_errors(self.root):
            self._clear_temporary()
            order_manifest(self.root, self.source)
            self._write_info(self._source_info.model_copy(update={"num_units": num_units}))


def _remove_tree(folder: Path) -> None:
    """Remove a folder into which another process may still be writing."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)
    shutil.rmtree(folder)


def _refuse_foreign(root: Path) -> None:
    """Refuse to start a dataset among other files, or beside a manifest without dataset.json."""
    if (root / "manifest.jsonl").exists():
        raise CorruptError(f"{root} has a manifest but no dataset.json; restore it from a copy of the dataset")
    names = sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) if root.exists() else []
    foreign = [name for name in names if name not in BEGUN]
    if foreign:
        raise ConfigError(
            f"{root} is not a dataset and holds other things ({foreign[0]!r}); name a new or empty folder"
        )


def _committed_ids(root: Path, manifest: list[ManifestEntry]) -> set[str]:
    """Ids of all committed rows of all sources. Raises CorruptError where an index cannot be read."""
    ids: set[str] = set()
    for entry in manifest:
        path = inside(root, f"index/{entry.name}.parquet")
        ids.update(read_index(path, ["id"])["id"].to_pylist())
    return ids


def _split(settings: dict[str, Any], paths: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings without the values at some dotted paths and without FORMER; and those values, by path, where there are any."""
    rest, values = copy.deepcopy(settings), {}
    rest.pop(FORMER, None)
    for path in paths:
        *parents, last = path.split(".")
        place: Any = rest
        for parent in parents:
            place = place.get(parent, {})
        if last in place:
            values[path] = place.pop(last)
    return rest, values


def _of_version(info: DatasetInfo, before: DatasetInfo) -> DatasetInfo:
    """`info` with the version of the codec that a dataset was begun with, where it is an older one of the same codec."""
    codec, older = info.codec, before.codec
    if codec.id != older.id or older.version >= codec.version:
        return info
    return of_version(info, older.version)


def _refuse_difference(what: str, before: dict[str, Any], after: dict[str, Any], root: Path) -> None:
    difference = settings_difference(before, after)
    if difference:
        raise MismatchError(
            f"{root}: {what} was begun with other settings (before -> now):\n{difference}\n"
            "Use the earlier settings to continue, or another folder (or source name) for the new ones."
        )

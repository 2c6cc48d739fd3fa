"""Merge datasets of one teacher, split one, take its head. A row keeps its id, its content hash and every number.

Merging renames shards where two inputs have a source of the same name; payloads are copied or linked. Where the inputs have
several versions of one codec, the result has the earliest, and payloads of later ones get its columns: no entry changes.
Splitting and taking the head pick rows out of shards as Arrow rows. Numbers are not rounded again, so nothing is lost; codes
of ids change with the ids that are common in the new shard.
The codec's error can be measured only against the teacher, so it is carried over from the shard that the rows are from.

Inputs may be at a URL or on the Hub: only shards that hold a chosen row are fetched. Sidecars and plans belong to one state
of one dataset and are not copied; neither are the rejects of split datasets.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from kdata.calls import validated
from kdata.errors import ConfigError, DataError, MismatchError, StorageError, settings_difference
from kdata.format.files import (
    copy_files,
    file_info,
    folder_beside,
    local_path,
    lock_of,
    storage_errors,
    sync_directory,
    sync_tree,
)
from kdata.format.manifest import append_entry, of_version, write_info
from kdata.format.records import inputs_of
from kdata.format.schema import CodecInfo, DatasetInfo, FileInfo, ManifestEntry, SourceInfo, rejects_schema, shard_name
from kdata.format.stored import as_earlier
from kdata.observe.progress import Task
from kdata.selection.plan import Plan
from kdata.store.dataset import Dataset
from kdata.store.index import UNREADABLE, damaged, read_index, read_part
from kdata.store.open import AnyDataset, open_dataset, opened
from kdata.store.payload import read_payload
from kdata.store.pick import renamed, tables
from kdata.store.shard import bind_payload, check_header, fits, write_parquet, write_payload, write_tables
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.store.writer import Writer

LOCAL_TARGET = "name a new folder, and copy it to the Hub with `kdata push`"


@validated
def merge(datasets: Sequence[AnyDataset], target: Path | str, *, link: bool = False) -> Dataset:
    """Write the rows of several datasets into a new one.

    Args:
        target: a folder that does not exist yet, or is empty.
        link: link the payloads instead of copying them: no space is used, but damage to one file damages both. Payloads of
            a dataset with another file of the same tokenizer are copied nevertheless, because they name their dataset.
    Raises:
        ConfigError: the folder is not free, or `target` is a URL.
        MismatchError: teacher, tokenizer, codec or another part of the identity differs; the message lists what.
        DataError: two datasets share an id, or there is only one dataset.
        StorageError: the file system does not link to that place.
    """
    inputs = [opened(dataset) for dataset in datasets]
    target = local_path(target, LOCAL_TARGET)
    if len(inputs) < 2:
        raise DataError(f"merge needs two datasets or more, but got {len(inputs)}; name another one")
    first = inputs[0]
    # The earliest version of the codec, so that no row is rounded again.
    info = of_version(first.info, min(dataset.info.codec.version for dataset in inputs))
    for other in inputs[1:]:
        difference = settings_difference(info.identity(), _identity_like(first, other, info))
        if difference:
            raise MismatchError(
                f"{first.path} and {other.path} cannot be merged, because they differ (first -> other):\n{difference}"
            )
    _refuse_shared_ids(inputs)
    total = sum(dataset.num_tokens for dataset in inputs)
    with new_folder(target) as folder, Task("merge", total, "tokens") as task:
        sources: dict[str, SourceInfo] = {}
        for dataset in inputs:
            names = _free_names(list(dataset.info.sources), set(sources))
            sources |= {names[name]: source for name, source in dataset.info.sources.items()}
            for entry in dataset.manifest:
                append_entry(folder, _copy_shard(dataset, entry, info, names[entry.source], folder, link))
                task.advance(entry.tokens)
        files = _tokenizer(first, folder)
        write_info(folder, info.model_copy(update={"sources": dict(sorted(sources.items())), "tokenizer_files": files}))
    return open_dataset(target)


def _identity_like(first: Dataset, other: Dataset, info: DatasetInfo) -> dict[str, Any]:
    """The identity of a dataset as part of `info`: with the first one's tokenizer where ids mean the same in both.

    Raises MismatchError where they do not.
    """
    identity = other.info.identity()
    if other.info.codec.id == info.codec.id:
        identity["codec"]["version"] = info.codec.version
    if "unknown" not in (first.info.tokenizer.hash, other.info.tokenizer.hash):
        remedy = "merge datasets of one tokenizer"
        refuse_other_ids(Vocabulary.of_dataset(first), Vocabulary.of_dataset(other), remedy)
        identity["tokenizer"]["hash"] = first.info.tokenizer.hash
    return identity


@validated
def split(
    dataset: AnyDataset, target: Path | str, *, by: Literal["domain", "plan"], plan: Plan | None = None
) -> dict[str, Dataset]:
    """Divide a dataset into disjoint parts, each a dataset of its own in a folder of `target`.

    Args:
        by: domain: one part per domain; plan: the plan's rows (once each), and the `rest`.
    Raises:
        ConfigError: by plan without a plan, the folder is not free, or `target` is a URL.
        DataError: the folders of two domains would have the same name.
    """
    dataset = opened(dataset)
    target = local_path(target, LOCAL_TARGET)
    if by == "plan":
        if plan is None:
            raise ConfigError("split by plan needs a plan; name one with --plan NAME")
        chosen = np.unique(plan.rows(dataset))
        parts = {plan.info.name: chosen, "rest": np.setdiff1d(np.arange(dataset.num_rows), chosen)}
    else:
        domains = np.array(dataset.index(["domain"])["domain"].to_pylist(), dtype=object)
        parts = {str(domain): np.flatnonzero(domains == domain) for domain in sorted(set(domains))}
    folders = {name: folder_name(name) for name in parts}
    if len(set(folders.values())) < len(folders):
        raise DataError(f"two parts would have the same folder: {folders}; rename a domain, or split by plan")
    with new_folder(target) as place:
        for name, rows in parts.items():
            if (place / folders[name]).exists():  # on a disk for which a and A are one name
                raise DataError(
                    f"part {name!r} would have the folder of another one, {folders[name]!r}; rename a domain"
                )
            write_rows(dataset, rows, place / folders[name], {"by": by, "part": name})
    return {name: open_dataset(target / folders[name]) for name in parts}


@validated
def head(dataset: AnyDataset, target: Path | str, num_rows: int) -> Dataset:
    """Write the first rows of a dataset, in its own order, as a dataset.

    Raises:
        ConfigError: fewer than one row, the folder is not free, or `target` is a URL.
    """
    dataset = opened(dataset)
    target = local_path(target, LOCAL_TARGET)
    if num_rows < 1:
        raise ConfigError(f"-n {num_rows} is too few; ask for at least one row")
    with new_folder(target) as place:
        write_rows(dataset, np.arange(min(num_rows, dataset.num_rows)), place, {"by": "head", "part": num_rows})
    return open_dataset(target)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, beside `target`; it is flushed to the disk and renamed at the end. Holds the lock of `target`.

    Raises:
        ConfigError: `target` exists and is not empty.
        StorageError: another process writes to `target`, or the disk refused.
    """
    place = target.resolve()
    # The folder beside it comes before the look at it: what a run left that was killed after its rename goes here too.
    with storage_errors(target), lock_of(target), folder_beside(place) as temporary:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
        yield temporary
        sync_tree(temporary)
        if place.exists():
            place.rmdir()
        os.rename(temporary, place)
        try:
            sync_directory(place.parent)
        except OSError:  # the name may not outlive a power cut: as if there were none
            os.rename(place, temporary)
            raise


def folder_name(name: str) -> str:
    """A domain's or plan's name as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "unnamed"


def _refuse_shared_ids(datasets: list[Dataset]) -> None:
    first_with: dict[str, Path] = {}
    for dataset in datasets:
        for row_id in dataset.index(["id"])["id"].to_pylist():
            if row_id in first_with:
                raise DataError(
                    f"{first_with[row_id]} and {dataset.path} both have a row with id {row_id!r}, and ids are unique in a "
                    "dataset. Leave these rows out of one with `kdata split --by plan`, or capture it under other ids."
                )
            first_with[row_id] = dataset.path


def _free_names(names: list[str], used: set[str]) -> dict[str, str]:
    """A new name for each source, different from all others: capture, capture-2, capture-3."""
    renamed: dict[str, str] = {}
    for name in names:
        number, free = 1, name
        while free in used | set(renamed.values()):
            number += 1
            free = f"{name}-{number}"
        renamed[name] = free
    return renamed


def _copy_shard(
    dataset: Dataset, entry: ManifestEntry, info: DatasetInfo, source: str, folder: Path, link: bool
) -> ManifestEntry:
    """Copy one shard into a folder; its index is rewritten where its name changes.

    A payload that names its dataset, which has another identity than `info` (another file of the same tokenizer), gets new
    metadata.
    """
    name = f"{source}-{entry.unit:05d}"
    files: dict[str, FileInfo] = {}
    for relative in entry.files:
        kind = relative.split("/")[0]
        path, target = dataset.checked_file(entry, kind), folder / kind / f"{name}{Path(relative).suffix}"
        target.parent.mkdir(exist_ok=True)
        if kind == "data" and dataset.info.codec.is_coded and not info.codec.is_coded:
            work = entry.work_digest or dataset.info.sources[entry.source].work_digest
            write_payload(folder, f"{kind}/{target.name}", _earlier(path, dataset.info, entry, info.codec), info, work)
            entry = entry.model_copy(update={"identity_digest": info.identity_digest, "work_digest": work})
        elif kind == "data" and not fits(path, dataset.info, entry, info):
            work = entry.work_digest or dataset.info.sources[entry.source].work_digest
            bind_payload(path, target, info, work)
            entry = entry.model_copy(update={"identity_digest": info.identity_digest, "work_digest": work})
        elif kind == "data" and link:
            _link(path, target)
        elif kind == "data" or name == entry.name:
            shutil.copyfile(path, target)
        else:
            with target.open("wb") as file:
                write_parquet(renamed(table_of(path, kind), name, source), file)
        files[f"{kind}/{target.name}"] = file_info(target)
    return entry.model_copy(update={"name": name, "source": source, "files": files})


def _earlier(path: Path, own: DatasetInfo, entry: ManifestEntry, codec: CodecInfo) -> pa.Table:
    """A payload of the dataset `own` with the columns of an earlier version of its codec.

    Raises CorruptError where it is not the payload of `own` that the manifest line says.
    """
    try:
        check_header(pa.ipc.open_file(pa.OSFile(str(path))), own, entry)
        return as_earlier(read_payload(path, own.codec), codec)
    except UNREADABLE as error:
        raise damaged(path, error) from error


def table_of(path: Path, kind: str) -> pa.Table:
    """The table of an index or rejects part. Raises CorruptError where it cannot be read."""
    if kind == "index":
        return read_index(path)
    try:
        return read_part(path, rejects_schema(), rejects_schema().names)
    except UNREADABLE as error:
        raise damaged(path, error) from error


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be linked into {target.parent} ({os.strerror(error.errno or 0)}); both must be on one file "
            "system that has links. Use --copy."
        ) from error


def _tokenizer(dataset: Dataset, folder: Path) -> dict[str, FileInfo]:
    if dataset.tokenizer_dir is None:
        return {}
    (folder / "tokenizer").mkdir()
    copy_files(dataset.tokenizer_dir, folder / "tokenizer")
    return {path.name: file_info(path) for path in sorted((folder / "tokenizer").iterdir())}


def write_rows(dataset: Dataset, rows: np.ndarray, root: Path, what: dict[str, object]) -> None:
    """Write rows (rising numbers) as a dataset: the shards of each source in order, without empty ones.

    Args:
        what: how the rows were chosen, the keys `by` and `part`; it becomes a part of the settings of each source.
    """
    origin = dataset.content_digest
    info: DatasetInfo = dataset.info.model_copy(update={"sources": {}, "tokenizer_files": {}})
    with Task(f"write {what['part']}", len(rows), "rows") as task:
        for source, about in dataset.info.sources.items():
            settings = {**what, "of": origin, "made_by": {"kind": about.kind, **about.settings}}
            inputs = [dataset.as_input(source)]
            part = SourceInfo(kind="split", settings=settings, num_units=None, inputs=inputs)
            with Writer(root, info, source, part, tokenizer_dir=dataset.tokenizer_dir) as writer:
                units = 0
                for number, entry in enumerate(dataset.manifest):
                    start, end = dataset.shard_starts[number : number + 2]
                    local = rows[(rows >= start) & (rows < end)] - start
                    if entry.source == source and len(local):
                        table, index = tables(dataset, entry, local, shard_name(source, units))
                        shard = write_tables(
                            root, writer.info, source, units, table, index, entry.codec_error, inputs=inputs_of(table)
                        )
                        writer.accept(shard)
                        units += 1
                        task.advance(len(local))
                writer.finish(units)

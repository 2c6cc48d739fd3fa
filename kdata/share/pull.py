"""Bring a dataset from a URL or the Hub to a folder: all of it, or the rows of a plan or a condition."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kdata.calls import validated
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, DataError, FormatError
from kdata.format.files import local_path, lock_of, remove_left_beside, storage_errors, sync_directory, sync_tree
from kdata.observe.progress import Task
from kdata.selection.plan import open_plan
from kdata.share.arrange import new_folder, write_rows
from kdata.store.conditions import check_condition
from kdata.store.dataset import Dataset
from kdata.store.listed import PLANS, SCORES
from kdata.store.open import AnyDataset, open_dataset, opened
from kdata.store.url_dataset import RemoteDataset

REMOVE = "remove it, and run the same command again"


@validated
def pull(dataset: AnyDataset, target: Path | str, *, plan: str | None = None, where: str | None = None) -> Dataset:
    """Copy a dataset that is elsewhere, or some of its rows, to a folder, and verify what is there.

    All of it is a copy, byte for byte, with scores, plans and card where the place can list them. It is made in `.NAME.pull`
    beside the folder, which becomes the folder at the end: a call that was stopped goes on there. Rows are written as a
    dataset of their own, as `kdata split` does, of shards in the cache; only shards that hold one are fetched. Where the
    folder is what the same call made, it is verified, and stays.

    Args:
        target: a folder that does not exist yet, is empty, or is of the same call.
        plan: name of a plan: its rows, once each.
        where: a condition in SQL over the columns of `rows`, and of scores as NAME.COLUMN.
    Raises:
        ConfigError: plan and condition, or a folder as the dataset without one of them; the folder is not free.
        DataError: no row meets the condition.
        MismatchError: the dataset has changed since it was opened.
        CorruptError: a file is not what was committed.
        StorageError: the place cannot be read, another process writes to the folder, or the disk refused.
    """
    dataset = opened(dataset)
    target = local_path(target, "name a new folder")
    if plan is not None and where is not None:
        raise ConfigError("--plan and --where both choose rows; give one of them (`kdata select --where` makes a plan)")
    if plan is not None:
        rows = np.unique(open_plan(dataset, plan).rows(dataset))
        _pull_rows(dataset, rows, target, {"by": "plan", "part": plan})
    elif where is not None:
        _pull_rows(dataset, rows_where(dataset, where), target, {"by": "where", "part": where})
    elif isinstance(dataset, RemoteDataset):
        _pull_all(dataset, target)
    else:
        raise ConfigError(
            f"{dataset.place} is a folder on this machine; copy it with `kdata push`, or name --plan or --where"
        )
    return open_dataset(target)


def rows_where(dataset: Dataset, where: str) -> np.ndarray:
    """Global row numbers int64, rising, of the rows that meet a condition. Raises ConfigError, QueryError, DataError."""
    scores = sorted(set(check_condition(where)) - {"rows"})
    joins = "".join(f' left join scores."{name}" as "{name}" on "{name}".id = rows.id' for name in scores)
    for name in scores:
        dataset.fetch_sidecar(name)
    # On lines of its own, so that a comment ends in it.
    ids = dataset.sql(f"select rows.id from rows{joins} where (\n{where}\n)")["id"].to_pylist()
    if not ids:
        raise DataError(f"no row of {dataset.place} meets the condition {where!r}")
    return np.sort(dataset.rows_of(ids))


def _pull_rows(dataset: Dataset, rows: np.ndarray, target: Path, what: dict[str, object]) -> None:
    if _holds_rows(target, dataset, rows, {**what, "of": dataset.content_digest}):
        _look_again(target, dataset)
        return
    with new_folder(target) as folder:
        write_rows(dataset, rows, folder, what)
        _refuse_damaged(folder, dataset)


def _pull_all(dataset: RemoteDataset, target: Path) -> None:
    if _holds_all(target, dataset):
        _look_again(target, dataset)
        return
    place = target.resolve()
    partial = place.with_name(f".{place.name}.pull")
    with storage_errors(target), lock_of(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and is not an empty folder; name a new one")
        partial.mkdir(parents=True, exist_ok=True)
        total = sum(info.bytes for entry in dataset.manifest for info in entry.files.values())
        with Task("pull", total, "bytes") as task:
            dataset.copy_to(partial, task.advance)
        _refuse_damaged(partial, dataset)
        sync_tree(partial)
        if place.exists():
            place.rmdir()
        os.rename(partial, place)
        sync_directory(place.parent)


def _holds_rows(target: Path, dataset: Dataset, rows: np.ndarray, settings: dict[str, object]) -> bool:
    """Whether the folder has these rows, written with these settings. A plan of the same name may have had others."""
    if not (target / "dataset.json").is_file():
        return False
    ids = dataset.index(["id"])["id"].take(rows).to_pylist()
    with _readable(target, dataset):
        here = open_dataset(target)
        sources = here.info.sources.values()
        if any(about.kind != "split" or not settings.items() <= about.settings.items() for about in sources):
            return False
        return sorted(here.index(["id"])["id"].to_pylist()) == sorted(ids)


def _holds_all(target: Path, dataset: Dataset) -> bool:
    """Whether the folder has the same rows, scores and plans."""
    if not (target / "dataset.json").is_file():
        return False
    theirs = {kind: dataset.listings(kind) for kind in (SCORES, PLANS)}
    with _readable(target, dataset):
        here = open_dataset(target)
        return here.content_digest == dataset.content_digest and all(
            listings in (None, here.listings(kind)) for kind, listings in theirs.items()
        )


def _look_again(target: Path, dataset: Dataset) -> None:
    """Verify a copy that is there, and remove what a run left that was killed after its rename."""
    with storage_errors(target), lock_of(target):
        remove_left_beside(target.resolve())
        _refuse_damaged(target, dataset, REMOVE)


@contextmanager
def _readable(target: Path, dataset: Dataset) -> Iterator[None]:
    """Raise CorruptError with a remedy where the folder is a copy that cannot be read any more."""
    try:
        yield
    except (CorruptError, FormatError) as error:
        reason = str(error).rpartition("; ")[0] or str(error)  # to restore it from a copy is no advice for a copy
        raise CorruptError(f"the copy of {dataset.place} in {target} is damaged ({reason}); {REMOVE}") from error


def _refuse_damaged(folder: Path, dataset: Dataset, remedy: str = "run the same command again") -> None:
    problems = [problem for problem in verify(open_dataset(folder)) if not problem.stray]
    if problems:
        raise CorruptError(
            f"the copy of {dataset.place} is not whole ({problems[0].path} {problems[0].what}); {remedy}"
        )

"""Data sets of the Hugging Face library `datasets`, saved to disk or streamed from the Hub. No remote code is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdata.corpus.files import exists, files_digest, format_of, labelled, labels_identity, rows_of
from kdata.errors import ConfigError, DataError, DependencyError, KdataError, MissingError, first_line
from kdata.store.hub import hub_errors

HUB_NAME = re.compile(r"^(?:hf://(?:datasets/)?)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` of a Dataset and of a DatasetDict leaves
BATCH_ROWS = 1024


def hub_name(path: str) -> tuple[str, str | None] | None:
    """OWNER/NAME and revision of a data set on the Hub; None for a path.

    A bare OWNER/NAME is a data set on the Hub if no such path exists here and it does not end as a file does.
    Raises ConfigError where it begins with hf:// and is not such a name.
    """
    match = HUB_NAME.match(path)
    if path.startswith("hf:") and match is None:
        raise ConfigError(
            f"{path!r} does not name a data set on the Hub; write hf://datasets/OWNER/NAME, or ...@REVISION"
        )
    local = exists(Path(path)) or format_of(Path(path)) is not None or path.startswith((".", "~"))
    if match is None or (local and not path.startswith("hf:")):
        return None
    return match["name"], match["revision"]


def is_saved(path: Path) -> bool:
    """True for a folder that `datasets` saved."""
    return exists(path) and any((path / name).is_file() for name in SAVED)


def open_saved(path: Path, split: str | None, columns: set[str]) -> LibraryRows:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, memory-mapped.

    Args:
        columns: those that will be read, where they exist.
    Raises:
        ConfigError: there are several splits and none is named, or the named one does not exist.
        DataError: the folder is damaged.
        DependencyError: `datasets` is not installed.
    """
    library = _library()
    with _readable(f"{path} cannot be read as a folder of `datasets`"):
        data = library.load_from_disk(str(path))
    if isinstance(data, library.DatasetDict):
        data = data[_split(list(data), split, str(path))]
    elif split is not None:
        raise ConfigError(f"{path} has no splits (split {split!r}); leave split away")
    files = [Path(file["filename"]) for file in data.cache_files]
    identity = {"sha256": files_digest(files), **labels_identity(_labels(data), columns)}
    return LibraryRows(data, identity, f"{path} cannot be read", data.num_rows)


def open_hub(remote: tuple[str, str | None], subset: str | None, split: str | None, columns: set[str]) -> LibraryRows:
    """A data set on the Hub, streamed, at the current commit of its revision.

    Args:
        columns: those that will be read, where they exist.
    Raises:
        MissingError: it does not exist, or the Hub cannot be reached.
        ConfigError: there are several splits and none is named, or the named split or subset does not exist.
        DependencyError: `datasets` is not installed.
    """
    library, (name, revision) = _library(), remote
    try:
        commit = _commit(name, revision)
        splits = library.get_dataset_split_names(name, subset, revision=commit)
        stream = library.load_dataset(name, subset, split=_split(splits, split, name), revision=commit, streaming=True)
        names = stream.column_names or list(next(iter(stream), {}))
    except hub_errors() as error:
        raise MissingError(
            f"data set {name!r} is neither a local path nor available on the Hub ({type(error).__name__}: "
            f"{first_line(error)}); check the name, the network and HF_TOKEN"
        ) from error
    except ValueError as error:
        if isinstance(error, KdataError):
            raise
        raise ConfigError(f"data set {name!r} on the Hub: {error}") from error
    known = (stream.info.splits or {}).get(stream.split)
    identity = {"hub": name, "commit": commit, **labels_identity(_labels(stream), columns)}
    what = f"data set {name!r} could not be read on from the Hub; run the same command again"
    return LibraryRows(stream, identity, what, None if known is None else known.num_examples or None, names)


def _labels(data: Any) -> dict[str, Any]:
    """Columns with class labels; see `kdata.corpus.files.class_labels`."""
    return {} if data.features is None else labelled(data.features.to_dict())


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision of a Hub data set (null: its default branch) stands for."""
    from huggingface_hub import dataset_info

    return str(dataset_info(name, revision=revision).sha)


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DependencyError("reading a data set of `datasets` needs it: pip install 'kdata[hub]'") from error
    return datasets


def _split(splits: list[str], wanted: str | None, where: str) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted not in splits:
        said = "name one" if wanted is None else f"there is no {wanted!r}"
        raise ConfigError(f"{where} has the splits {sorted(splits)}: {said} (split: ...)")
    return wanted


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn errors of the library about broken input into one DataError that begins with `what`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KdataError):
            raise
        reason = first_line(error)
        raise DataError(f"{what}: {reason}") from error


class LibraryRows:
    """See `kdata.corpus.corpus.Rows`.

    Args:
        data: a `datasets.Dataset` or `datasets.IterableDataset`.
        identity: what identifies the rows.
        what: beginning of the message of an error.
        num_rows: how many, where that is known.
        names: columns, where the data set does not know them itself.
    """

    def __init__(
        self, data: Any, identity: dict[str, Any], what: str, num_rows: int | None, names: list[str] | None = None
    ) -> None:
        self._data, self._identity, self._what = data, identity, what
        self.num_rows, self.names = num_rows, names or list(data.column_names)
        self._labels = _labels(data)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Rows in the data set's order."""
        with _readable(self._what):
            tables = self._data.select_columns(columns).with_format("arrow")
            for table in tables.iter(BATCH_ROWS):
                yield from rows_of(table, self._labels)

    def identity(self) -> dict[str, Any]:
        """SHA-256 of the files of a saved data set; name and commit of one on the Hub."""
        return self._identity

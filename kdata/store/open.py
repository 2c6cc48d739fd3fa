"""Open a dataset, wherever it is: a folder, a URL, or hf://OWNER/NAME."""

from __future__ import annotations

from pathlib import Path

from kdata.calls import validated
from kdata.errors import ConfigError, MissingError
from kdata.store.dataset import Dataset
from kdata.store.queryable import Check
from kdata.store.url_dataset import RemoteDataset

AnyDataset = Dataset | str | Path  # what the functions of `kdata` take: a dataset, or where it is


@validated
def open_dataset(path: str | Path, *, check: Check = "first") -> Dataset:
    """Open a dataset: a folder, any URL that fsspec opens ("s3://BUCKET/NAME"), or "hf://OWNER/NAME[@REVISION]".

    Of what is not here, only dataset.json and the manifest are read now; other files are copied into the cache when they are
    needed, and compared with their digests. `Dataset.fetch` copies the rest.

    Args:
        check: first: a query reads files whose bytes were compared with their digests, once per process and file. later:
            queries do not wait for that (`Dataset.unchecked` says which views they read); `kdata verify` compares. At a URL
            queries and selection read parts of index, rejects and scores, which have no digests, so with first these views
            are in `unchecked`, too. whole: such files are copied and compared first; in a folder the same as first.
    Raises:
        ConfigError: `path` is a file.
        MissingError: nothing there.
        FormatError: written by a newer major version.
        CorruptError: dataset.json or manifest.jsonl is damaged.
        StorageError: the URL cannot be read.
    """
    if "://" in str(path):
        return RemoteDataset(str(path), check=check)
    local = Path(path)
    if not local.exists():
        raise MissingError(f"{local} does not exist; a Hub dataset is named hf://OWNER/NAME")
    if not local.is_dir():
        raise ConfigError(f"{local} is a file; name the dataset's folder")
    return Dataset(local, check)


def opened(dataset: AnyDataset) -> Dataset:
    """A dataset itself, or the one at a path or URL. Raises what `open_dataset` raises."""
    return dataset if isinstance(dataset, Dataset) else open_dataset(dataset)

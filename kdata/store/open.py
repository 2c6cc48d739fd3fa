"""Open a dataset, wherever it lies: a folder, hf://OWNER/NAME, or a URL."""

from __future__ import annotations

from pathlib import Path

from kdata.errors import ConfigError, MissingError
from kdata.store.dataset import Dataset
from kdata.store.url import is_url
from kdata.store.url_index import RemoteIndex


def open_dataset(path: str | Path) -> Dataset:
    """Open a local dataset, one on the Hub as "hf://OWNER/NAME", or one at any URL that fsspec opens ("s3://BUCKET/NAME").

    What is not local is copied into the cache first; a URL's files are compared with their digests, the Hub's by its client.

    Raises:
        MissingError: nothing there.
        FormatError: written by a newer major version.
        CorruptError: dataset.json or manifest.jsonl is damaged.
    """
    if str(path).startswith("hf://"):
        from kdata.store.hub import download

        return Dataset(download(str(path)))
    if "://" in str(path):
        from kdata.store.url import download as fetch

        return Dataset(fetch(str(path)))
    local = Path(path)
    if not local.exists():
        raise MissingError(f"{local} does not exist; a Hub dataset is named hf://OWNER/NAME")
    if not local.is_dir():
        raise ConfigError(f"{local} is a file; name the dataset's folder")
    return Dataset(local)


def open_index(path: str | Path) -> Dataset:
    """Open a dataset for queries and plans: at a URL without copying what they do not need, elsewhere as `kdata.open`."""
    return RemoteIndex(str(path)) if is_url(path) else open_dataset(path)

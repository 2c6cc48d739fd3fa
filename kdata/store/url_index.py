"""A dataset at a URL, asked without copying it: DuckDB reads the columns that a query needs, where they are.

Any URL that fsspec opens. Read as ranges of bytes: a Parquet footer, then the column chunks of the query; nothing is read
ahead. dataset.json, manifest and tokenizer are copied into the cache, where plans are written too and where `kdata.open`
completes the copy when the payload is wanted. Bytes that stay at the URL are not compared with their digests: that would
be reading all of them.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.spec import AbstractFileSystem

from kdata.errors import MissingError
from kdata.format.files import inside, lock_of, write_atomically
from kdata.format.schema import ManifestEntry
from kdata.store.dataset import Dataset
from kdata.store.sql import unglobbed
from kdata.store.url import Store, copy_of, mirror

SCHEME = "kdata-index"


class RangeFiles(AbstractFileSystem):
    """The files of one store as DuckDB opens them, SCHEME://PATH, each read being one range."""

    protocol = SCHEME
    cachable = False

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def _relative(self, path: str) -> str:
        """The path inside the store. Raises PermissionError where it leaves it."""
        pure = PurePosixPath(str(self._strip_protocol(path)))
        if pure.is_absolute() or ".." in pure.parts:
            raise PermissionError(f"{path} lies outside of {self._store.url}")
        return str(pure)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return self._store.open_ranges(self._relative(path))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size and kind of a file."""
        relative = self._relative(path)
        return {"name": relative, "size": self._store.size(relative), "type": "file"}

    def glob(self, path: str, **options: Any) -> list[str]:
        """The file itself: names are given in full, and a web server lists nothing."""
        return [f"{SCHEME}://{self._strip_protocol(path)}"]

    def modified(self, path: str) -> datetime:
        """Always the same: what is committed does not change."""
        return datetime(2000, 1, 1, tzinfo=UTC)


class RemoteIndex(Dataset):
    """A dataset whose index and sidecars stay at a URL; a file that is asked for otherwise is fetched whole, and checked.

    Raises:
        MissingError: no dataset there.
        CorruptError, StorageError: see `kdata.store.url.mirror`.
    """

    def __init__(self, url: str) -> None:
        self.url, self._store = url, Store(url)
        root = copy_of(url, "datasets")
        root.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(root):
            if not mirror(self._store, root, ()):
                raise MissingError(f"{url} is no kdata dataset: it has no dataset.json")
        super().__init__(root)
        self._files = RangeFiles(self._store)

    def __reduce__(self) -> tuple[type[RemoteIndex], tuple[str]]:  # type: ignore[override]
        return RemoteIndex, (self.url,)

    @property
    def sql_filesystem(self) -> Any:
        """See `Dataset.sql_filesystem`."""
        return self._files

    def sql_file(self, entry: ManifestEntry, folder: str) -> str:
        """See `Dataset.sql_file`."""
        relative = next((name for name in entry.files if name.split("/")[0] == folder), None)
        if relative is None:
            raise MissingError(f"{self.url}: shard {entry.name} has no file in {folder}/")
        return self._located(relative)

    def _located(self, relative: str) -> str:
        """A file here, where there is one (a former copy, a sidecar of one's own); else at the URL."""
        path = inside(self.path, relative)
        return unglobbed(path.resolve()) if path.exists() else f"{SCHEME}://{relative}"

    def sql_sidecars(self) -> dict[str, list[str]]:
        """See `Dataset.sql_sidecars`; those that were fetched by name, as the store may list nothing."""
        found = {}
        for path in sorted((self.path / "scores").glob("*.json")):
            parts = json.loads(path.read_bytes()).get("files", {})
            found[path.stem] = [self._located(relative) for relative in sorted(parts)]
        return found

    def fetch_sidecar(self, name: str) -> None:
        """See `Dataset.fetch_sidecar`."""
        content = self._store.read(f"scores/{name}.json")
        if content is not None:
            (self.path / "scores").mkdir(exist_ok=True)
            write_atomically(self.path / "scores" / f"{name}.json", content)

    def check_index(self) -> None:
        """Nothing is compared: see the module."""

    def shard_file(self, entry: ManifestEntry, folder: str) -> Path:
        """See `Dataset.shard_file`; fetched where it is not here yet."""
        for relative, info in entry.files.items():
            if relative.split("/")[0] == folder:
                path = inside(self.path, relative)
                if not path.exists():
                    self._store.fetch(relative, path, info)
        return super().shard_file(entry, folder)

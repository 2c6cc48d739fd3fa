"""A dataset at a URL or on the Hub, read where it is: each file is copied here when its bytes are first needed.

Any URL that fsspec opens, and hf:// at one commit. Opening copies dataset.json and the manifest into the cache. A query
reads ranges of bytes: a Parquet footer, then the column chunks that it names. Rows are decoded from whole shards, which are
copied one by one. Scores and plans that are made here are written into the copy.

Every file that is copied is compared with its digest in the manifest before use. The ranges that a query reads are not,
because only a whole file has a digest; `Dataset.unchecked` then names the view. With check="whole" a query reads copies.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.spec import AbstractFileSystem

from kdata.errors import CorruptError, MissingError
from kdata.format.files import inside, lock_of, matches, write_atomically
from kdata.format.json_text import read_json
from kdata.format.schema import FileInfo, ManifestEntry
from kdata.store.dataset import Dataset
from kdata.store.hub import HubStore
from kdata.store.index import replaced
from kdata.store.listed import COPIED, SCORES, Kind, read_listing
from kdata.store.sql import Check, unglobbed
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
        """The file itself: names come in full, and a web server has no listings."""
        return [f"{SCHEME}://{self._strip_protocol(path)}"]

    def modified(self, path: str) -> datetime:
        """Always the same: what is committed does not change."""
        return datetime(2000, 1, 1, tzinfo=UTC)


class RemoteDataset(Dataset):
    """A dataset at a URL or on the Hub. `path` is the copy in the cache, with those files that were needed so far.

    Args:
        address: for instance s3://BUCKET/NAME, https://HOST/NAME, hf://OWNER/NAME or hf://OWNER/NAME@REVISION.
        commit: of the Hub's repository; None takes the newest commit of the revision.
    Raises:
        MissingError: there is no dataset.
        CorruptError, StorageError: see `kdata.store.url.mirror`.
    """

    def __init__(self, address: str, commit: str | None = None, check: Check = "first") -> None:
        self._store = HubStore(address, commit) if address.startswith("hf://") else Store(address)
        root = copy_of(self._store.url, "datasets")
        root.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(root.with_name(f"{root.name}.copy"), wait=True):  # readers wait for each other, not for a scoring
            if not mirror(self._store, root, ()):
                raise MissingError(f"{address} is not a kdata dataset: it has no dataset.json")
        super().__init__(root, check)
        self.place = address
        self._copies: set[tuple[str, str]] = set()  # files of the copy, with the digest that they have
        self._files = RangeFiles(self._store)

    def __reduce__(self) -> tuple[type[Dataset], tuple[Any, ...]]:
        return RemoteDataset, (self.place, self._store.commit, self.check)

    def shard_file(self, entry: ManifestEntry, folder: str) -> Path:
        """See `Dataset.shard_file`; it is copied at first use."""
        relative = self.file_name(entry, folder)
        try:
            return self._copied(relative, entry.files[relative])
        except CorruptError:
            self._refuse_replaced(entry)
            raise

    def _copied(self, relative: str, info: FileInfo) -> Path:
        """Path of a copy of a file that has the digest in `info`."""
        path = inside(self.path, relative)
        if (relative, info.sha256) not in self._copies:
            self._store.fetch(relative, path, info)
            self._copies.add((relative, info.sha256))
        return path

    def _refuse_replaced(self, entry: ManifestEntry) -> None:
        """See `Dataset._refuse_replaced`: the manifest at the URL decides, the copy is that of when it was opened."""
        content = self._store.read("manifest.jsonl")
        if content is not None and any(info.sha256.encode() not in content for info in entry.files.values()):
            raise replaced(self.place, entry.name)

    @property
    def tokenizer_dir(self) -> Path | None:
        """See `Dataset.tokenizer_dir`; its files are copied at first use."""
        for name, info in self.info.tokenizer_files.items():
            self._copied(f"tokenizer/{name}", info)
        return super().tokenizer_dir

    def fetch(self) -> None:
        """See `Dataset.fetch`. Scores and plans are copied where the store can list them (a web server cannot)."""
        for entry in self.manifest:
            for relative, info in entry.files.items():
                self._copied(relative, info)
        _ = self.tokenizer_dir
        for name in self._names("scores"):
            self.fetch_sidecar(name)
            for relative, info in read_listing(self.path / "scores" / f"{name}.json", SCORES)[0].files.items():
                self.score_part(relative, info)
        for name in self._names("plans"):
            self.fetch_plan(name)

    def _names(self, folder: str) -> list[str]:
        return sorted(name.removesuffix(".json") for name in self._store.names(folder) if name.endswith(".json"))

    @property
    def sql_filesystem(self) -> Any:
        """See `Dataset.sql_filesystem`."""
        return self._files

    def sql_file(self, entry: ManifestEntry, folder: str, *, compare: bool = True) -> str:
        """See `Dataset.sql_file`; a file that stays at the URL is not compared."""
        if self.check == "whole":
            return super().sql_file(entry, folder)
        relative = self.file_name(entry, folder)
        return self._located(relative, entry.files[relative], "rows" if folder == "index" else folder)

    def _located(self, relative: str, info: FileInfo, view: str) -> str:
        """The name by which DuckDB opens a file of a view: the copy, if there is a good one, else the file at the URL."""
        if self._has_copy(relative, info):
            return unglobbed(inside(self.path, relative).resolve())
        self.unchecked.add(view)
        return f"{SCHEME}://{relative}"

    def _has_copy(self, relative: str, info: FileInfo) -> bool:
        """Whether there is a copy with the digest in `info`, or a file that was made in its place."""
        path, copy = inside(self.path, relative), (relative, info.sha256)
        if copy not in self._copies and path.is_file() and matches(path, info):
            self._copies.add(copy)
        return copy in self._copies

    def _listed_file(self, relative: str, info: FileInfo, kind: Kind, compare: bool) -> str:
        """See `Dataset.listed_files`; the parts of a score stay at the URL, a plan was copied."""
        if kind is SCORES and self.check != "whole":
            return self._located(relative, info, f"scores.{PurePosixPath(relative).parts[1]}")
        if kind is SCORES and not self._has_copy(relative, info):
            self.score_part(relative, info)
        return super()._listed_file(relative, info, kind, compare)

    def score_part(self, relative: str, info: FileInfo) -> Path:
        """See `Dataset.score_part`; it is copied at first use."""
        path = inside(self.path, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / COPIED).touch()
        return self._copied(relative, info)

    def fetch_hidden(self, name: str) -> None:
        """See `Dataset.fetch_hidden`. What was made in the copy stays, if it belongs to the dataset as it is now."""
        if not self._is_current(f"hidden/{name}.json"):
            self._copy_small(f"hidden/{name}.json")

    def hidden_part(self, relative: str, info: FileInfo) -> Path:
        """See `Dataset.hidden_part`; it is copied at first use."""
        return self._copied(relative, info)

    def fetch_sidecar(self, name: str) -> None:
        """See `Dataset.fetch_sidecar`. One that was made in the copy stays, if it belongs to the dataset as it is now."""
        folder = self.path / "scores" / name
        made_here = folder.is_dir() and not (folder / COPIED).exists()
        if not (made_here and self._is_current(f"scores/{name}.json")):
            self._copy_small(f"scores/{name}.json")

    def fetch_plan(self, name: str) -> None:
        """See `Dataset.fetch_plan`. A plan in the copy stays, if it belongs to the dataset as it is now."""
        if not self._is_current(f"plans/{name}.json"):
            self._copy_small(f"plans/{name}.parquet")
            self._copy_small(f"plans/{name}.json")

    def _is_current(self, relative: str) -> bool:
        """Whether the copy has a score or plan that belongs to the dataset as it is now."""
        path = self.path / relative
        try:
            return path.is_file() and read_json(path)["dataset_fingerprint"] == self.content_digest
        except (ValueError, KeyError, TypeError):  # damaged
            return False

    def _copy_small(self, relative: str) -> None:
        """Copy a file that the manifest does not name, if it exists."""
        content = self._store.read(relative)
        if content is not None:
            (self.path / relative).parent.mkdir(exist_ok=True)
            write_atomically(self.path / relative, content)

    def check_index(self) -> None:
        """See `Dataset.check_index`. The index stays at the URL, where only a whole file has a digest, but for "whole"."""
        if self.check == "whole":
            super().check_index()

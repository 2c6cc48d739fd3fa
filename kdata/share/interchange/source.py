"""The files of another tool: in a folder, on the Hub at one commit, or at any URL that fsspec opens.

Nothing is copied: Parquet at a URL is read in ranges, row group by row group, other files from their beginning to the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from kdata.errors import ConfigError, MissingError
from kdata.format.files import without_hidden
from kdata.store.hub import HubStore
from kdata.store.url import Store

READ_BYTES = 8 << 20  # of a file at a URL that is read on
MOST_SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class PeerFile:
    """A file of a source. name: inside the source; place: as people know it; size in bytes.

    identity: what says that it has not changed: SHA-256 of a file here; at a URL what the store says of it.
    """

    name: str
    place: str
    size: int
    open: Callable[[], BinaryIO]
    identity: Callable[[], str]

    @property
    def suffix(self) -> str:
        """How its name ends, with the dot."""
        return PurePosixPath(self.name).suffix

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> PeerFile:
        """A file on this machine."""

        def identity() -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return cls(name or path.name, str(path), path.stat().st_size, lambda: path.open("rb"), identity)


class Source:
    """A file, or a folder with all files below it.

    Args:
        place: a path, hf://OWNER/NAME[@REVISION], or a URL.
    Raises:
        MissingError: there is nothing there. ConfigError, DependencyError: as `kdata.store.url.Store`.
    """

    def __init__(self, place: Path | str) -> None:
        self.place, self._name = str(place), ""
        self._store: Store | None = None
        self._root = Path(place)
        if "://" in self.place:
            self._open_store()
        elif not self._root.exists():
            raise MissingError(f"{place} does not exist; name a file or folder of another tool")
        elif self._root.is_file():
            self._root, self._name = self._root.parent, self._root.name

    def _open_store(self) -> None:
        self._store = HubStore(self.place) if self.place.startswith("hf://") else Store(self.place)
        if not self.place.startswith("hf://") and self._store.is_file:
            folder, _, self._name = self.place.rpartition("/")
            self._store = Store(folder)

    def files(self, suffixes: tuple[str, ...]) -> list[PeerFile]:
        """The files that have one of these suffixes, in order. Raises ConfigError where there is none."""
        names = [name for name in self._names() if PurePosixPath(name).suffix in suffixes]
        if self._name:
            names = [name for name in names if name == self._name]
        if not names:
            kinds = " or ".join(suffixes)
            raise ConfigError(f"{self.place} has no {kinds} file; name a file or folder of these")
        return [self._file(name) for name in names]

    def _names(self) -> list[str]:
        """Relative paths of all files, without hidden ones, in order."""
        if self._store is None:
            if self._name:
                return [path.name for path in self._root.iterdir() if path.is_file()]
            files = (path for path in without_hidden(self._root, "**/*") if path.is_file())
            return [path.relative_to(self._root).as_posix() for path in files]
        if self.place.startswith(("http:", "https:")):  # no listings
            return [self._name] if self._name else []
        return [name for name in self._store.files() if not any(part.startswith(".") for part in name.split("/"))]

    def _file(self, name: str) -> PeerFile:
        if self._store is None:
            return PeerFile.of(self._root / name, name)
        store = self._store

        def identity() -> str:
            return f"{store.commit or ''} {store.token(name)}"

        place = f"{store.url}/{name}"
        return PeerFile(
            name, place, store.size(name), lambda: cast(BinaryIO, store.open_on(name, READ_BYTES)), identity
        )

    def beside(self, *endings: str, most: int = MOST_SETTINGS_BYTES) -> list[PeerFile]:
        """Files of at most so many bytes beside the data whose names end so: settings, pages, a tokenizer."""
        files = [self._file(name) for name in self._names() if name.endswith(endings)]
        return [file for file in files if file.size <= most]


def identity_of(files: list[PeerFile]) -> str:
    """SHA-256 of the files' SHA-256 in order; of files at a URL, of their names and what the store says of them."""
    digest = hashlib.sha256()
    for file in files:
        own = file.identity()
        digest.update(bytes.fromhex(own) if len(own) == 64 else f"{file.name} {file.size} {own}\n".encode())
    return digest.hexdigest()

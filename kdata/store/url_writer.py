"""Write a dataset to a URL: a shard goes to a staging folder there, and its manifest line commits it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, StorageError
from kdata.format.files import inside, lock_of, temporary_folder
from kdata.format.records import Shard, UnitResult
from kdata.format.schema import DatasetInfo, ManifestEntry, SourceInfo
from kdata.store.shard import write_shard
from kdata.store.staging import Staging
from kdata.store.url import STAGING, Store, copy_of, is_url, mirror
from kdata.store.writer import BEGUN, Writer


@dataclass(frozen=True)
class RemoteStaging:
    """A folder at the URL; each shard is written on the machine's own disk first."""

    url: str
    folder: str

    @cached_property
    def _store(self) -> Store:
        return Store(self.url)

    def check(self) -> None:
        """See `Staging.check`: opens the store, which needs its client here."""
        _ = self._store

    def write(self, attempt: str, info: DatasetInfo, source: str, unit: UnitResult) -> Shard:
        """See `Staging.write`."""
        with temporary_folder("shard") as place:
            shard = write_shard(place, info, source, unit)
            for relative in shard.entry.files:
                self._store.put(place / relative, f"{self.folder}/{attempt}/{relative}")
        return shard


class RemoteWriter(Writer):
    """Adds units to a dataset at a URL; arguments and errors as `Writer`. `root` is the local copy, without payload.

    The copy's lock, in the cache, stands for the URL: a second writer with the same cache is refused before it reads or
    writes anything, and hears who holds it.
    """

    def __init__(self, url: str, info: DatasetInfo, source: str, source_info: SourceInfo, **options: Any) -> None:
        self._store = Store(url)
        self._manifest_bytes = 0
        root = copy_of(self._store.canonical, "writing")
        super().__init__(root, info, source, source_info, **options)
        self.place = self._store.url
        self._lock = lock_of(root, shown=self.place)

    @property
    def has_rows(self) -> bool:
        """See `Writer.has_rows`: they go to the URL."""
        return False

    def _open(self) -> None:
        exists = mirror(self._store, self.root, ("index", "rejects", "tokenizer"))
        if not exists:
            foreign = [name for name in self._store.names() if name not in BEGUN and not name.startswith(STAGING)]
            if foreign:
                raise ConfigError(
                    f"{self.place} is not a dataset and holds other things ({foreign[0]!r}); name a new folder"
                )
        self._manifest_bytes = self._store.size("manifest.jsonl")
        super()._open()
        for path in sorted((self.root / "tokenizer").glob("*")):
            if self.is_anew:
                self._store.replace(path, f"tokenizer/{path.name}")
        self._store.replace(self.root / "dataset.json", "dataset.json")

    def _clear_temporary(self) -> None:
        super()._clear_temporary()
        for name in self._store.names():
            if name.startswith(STAGING) and name.endswith(".tmp"):
                self._store.remove(name)

    def staging(self) -> Staging:
        """See `Writer.staging`."""
        return RemoteStaging(self.place, f"{STAGING}{secrets.token_hex(4)}.tmp")

    def commit(self, unit: UnitResult) -> Shard:
        """See `Writer.commit`."""
        self.refuse_twice([record.id for record in unit.records])
        staging = self.staging()
        return self.adopt(staging, "0", staging.write("0", self.info, self.source, unit))

    def _take(self, staging: Staging, attempt: str, relative: str) -> None:
        assert isinstance(staging, RemoteStaging)
        self._store.move(f"{staging.folder}/{attempt}/{relative}", relative)

    def accept(self, shard: Shard) -> Shard:
        """See `Writer.accept`; the manifest at the URL names the shard before this returns."""
        super().accept(shard)
        self._publish_manifest()
        return shard

    def fetch(self, entry: ManifestEntry) -> None:
        """See `Writer.fetch`."""
        for relative, info in entry.files.items():
            self._store.fetch(relative, inside(self.root, relative), info)

    def _names(self, folder: str) -> list[str]:
        return self._store.names(folder)

    def _publish_added(self, added: Sequence[Shard]) -> None:
        self._store.replace(self.root / "dataset.json", "dataset.json")
        for shard in added:
            for relative in shard.entry.files:
                self._store.put(self.root / relative, relative)

    def _remove(self, relative: str) -> None:
        super()._remove(relative)
        self._store.remove(relative)

    def _publish_manifest(self) -> None:
        """Replace the manifest at the URL. Raises StorageError where another process has changed it."""
        if self._store.size("manifest.jsonl") != self._manifest_bytes:
            raise StorageError(
                f"{self.place} is being written by another process (its manifest has changed); let one of the two finish, "
                "then run the same command again"
            )
        path = self.root / "manifest.jsonl"
        self._manifest_bytes = path.stat().st_size
        self._store.replace(path, path.name)

    def finish(self, num_units: int) -> None:
        """See `Writer.finish`."""
        super().finish(num_units)
        self._publish_manifest()
        self._store.replace(self.root / "dataset.json", "dataset.json")


def writer_at(place: Path | str, *arguments: Any, **options: Any) -> Writer:
    """The writer for a folder or a URL; arguments as `Writer`."""
    return (
        RemoteWriter(str(place), *arguments, **options) if is_url(place) else Writer(Path(place), *arguments, **options)
    )

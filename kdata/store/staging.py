"""A folder in which other processes than the writer put shards, until the writer makes them part of the dataset.

Every attempt at a unit writes under a name of its own, so two attempts never share a file. The writer holds the lock.
It renames the files of one attempt (`Writer.adopt`) and removes the folder at the end. A process that is still writing
then gets an error, because its folder is missing, and changes nothing in the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdata.errors import StorageError
from kdata.format.files import storage_errors
from kdata.format.records import Shard, UnitResult
from kdata.format.schema import DatasetInfo
from kdata.store.shard import write_shard


class Staging(Protocol):
    """A place for shards before they are committed; picklable, and the same place from every machine."""

    def check(self) -> None:
        """Raise StorageError where this process does not see the place."""
        ...

    def write(self, attempt: str, info: DatasetInfo, source: str, unit: UnitResult) -> Shard:
        """Write one shard under the name of an attempt. Errors as in `write_shard`."""
        ...


@dataclass(frozen=True)
class FolderStaging:
    """A folder inside the dataset's own, on a file system that every machine mounts at the same path."""

    folder: Path

    def check(self) -> None:
        """See `Staging.check`."""
        if not self.folder.is_dir():
            raise StorageError(
                f"{self.folder.parent} does not exist on this machine: a dataset that several machines write must lie on "
                "a file system that all of them mount at the same path (or at a URL, such as s3://BUCKET/NAME)"
            )

    def write(self, attempt: str, info: DatasetInfo, source: str, unit: UnitResult) -> Shard:
        """See `Staging.write`."""
        self.check()
        with storage_errors(self.folder):
            (self.folder / attempt).mkdir()
        return write_shard(self.folder / attempt, info, source, unit)

"""A stand-in for an object store: an fsspec file system of its own that every process sees, bucket:///FOLDER/NAME.

As in a store, a key needs no folder, there is no rename (fsspec copies and deletes), and nothing can be appended to.
"""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem


class Bucket(LocalFileSystem):
    """Objects are files; nothing but that is like a disk."""

    protocol = "bucket"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    def mv(self, path1: str, path2: str, recursive: bool = True, **options: Any) -> None:
        """Copy, then delete."""
        AbstractFileSystem.mv(self, path1, path2, recursive=False)


fsspec.register_implementation("bucket", Bucket, clobber=True)

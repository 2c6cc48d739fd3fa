"""What SQL needs of a dataset, and which names its scores, plans and columns may have there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from kdata.errors import ConfigError
from kdata.format.schema import ManifestEntry
from kdata.store.listed import PLANS, SCORES, Kind
from kdata.store.token_table import TokenSource

Check = Literal["first", "later", "whole"]


class Queryable(TokenSource, Protocol):
    """What SQL needs of a dataset: its manifest, and the names by which DuckDB opens its files."""

    @property
    def path(self) -> Path:
        """Folder of the dataset, or of its local copy."""
        ...

    @property
    def place(self) -> str:
        """The address by which it was opened."""
        ...

    @property
    def sql_filesystem(self) -> Any:
        """The fsspec file system through which DuckDB reads (`url_dataset.RangeFiles`); None: the local one."""
        ...

    @property
    def check(self) -> Check:
        """When files are compared with their digests; see `Dataset`."""
        ...

    @property
    def unchecked(self) -> set[str]:
        """Views that answered without that."""
        ...

    def sql_file(self, entry: ManifestEntry, folder: str, *, compare: bool = True) -> str:
        """The name under which DuckDB opens a file of a shard."""
        ...

    def listed(self, kind: Kind) -> list[str]:
        """Names of the scores or plans that are here."""
        ...

    def listed_files(self, kind: Kind, name: str, *, compare: bool = True) -> list[str]:
        """The names under which DuckDB opens the files of a score or a plan."""
        ...

    def fetch_sidecar(self, name: str) -> None:
        """Copy scores/NAME.json here where the dataset is elsewhere."""
        ...

    def fetch_plan(self, name: str) -> None:
        """Copy plans/NAME.json and NAME.parquet here where the dataset is elsewhere."""
        ...

    def checked_file(self, entry: ManifestEntry, folder: str) -> Path:
        """A file of a shard whose bytes were compared with the manifest."""
        ...


NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


def is_name(text: str) -> bool:
    """Whether a sidecar, its column or a plan may have this name. (With `$` alone a newline would pass.)"""
    return NAME.fullmatch(text) is not None


def check_new_name(kind: str, name: str, existing: Iterable[str]) -> None:
    """Raise ConfigError where a new name differs from an existing one in case alone, because SQL ignores case."""
    for other in existing:
        if other.lower() == name.lower() and other != name:
            raise ConfigError(
                f"there is a {kind} {other!r} already, and SQL does not distinguish it from {name!r}; choose another name"
            )


def listed_views(dataset: Queryable) -> list[tuple[Kind, str]]:
    """Scores and plans whose names can be views."""
    return [(kind, name) for kind in (SCORES, PLANS) for name in dataset.listed(kind) if is_name(name)]

"""What a shard is written from: records of sequences, rejects, and the unit of work that holds both.

Shapes: T tokens of one sequence, N kept entries of it in all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from kdata.errors import DataError
from kdata.format.kept import Kept
from kdata.format.measures import Measures
from kdata.format.schema import ManifestEntry


def inputs_of(payload: pa.Table) -> str:
    """`inputs_digest` of the rows of a payload table."""
    ids, token_ids = payload["id"].to_pylist(), (value.values.to_numpy() for value in payload["input_ids"])
    return digest_of(zip(ids, token_ids, strict=True))


class HasTokens(Protocol):
    """A sequence as its digest sees it."""

    @property
    def id(self) -> str:
        """Id of the row."""
        ...

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [T]."""
        ...


def inputs_digest(sequences: Iterable[HasTokens]) -> str:
    """`digest_of` for sequences."""
    return digest_of((sequence.id, sequence.token_ids) for sequence in sequences)


def digest_of(rows: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 (hex) over ids and token ids, in order; see schemas/README.md."""
    digest = hashlib.sha256()
    for row_id, token_ids in rows:
        digest.update(row_id.encode() + b"\0" + token_ids.astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Record(Measures):
    """One sequence ready to be stored: token_ids int32 [T], target_mask bool [T], and what is kept at each position."""

    id: str
    domain: str
    token_ids: np.ndarray
    target_mask: np.ndarray
    kept: Kept
    text: str | None
    messages: str | None = None
    tools: str | None = None
    token_bytes: np.ndarray | None = None
    origin: str | None = None
    license: str | None = None
    prompt: str | None = None
    finish_reason: str | None = None


@dataclass
class Reject:
    """One input that was refused."""

    id: str
    domain: str | None
    reason: str
    detail: str


class RowError(DataError):
    """A row that cannot be used; `reason` and `detail` go into the rejects."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, str(self.args[1])  # without secrets

    def __str__(self) -> str:
        return self.detail


@dataclass
class UnitResult:
    """The result of one work unit, ready to be committed."""

    number: int
    records: list[Record]
    rejects: list[Reject] = field(default_factory=list)
    inputs: str = ""


@dataclass(frozen=True)
class Shard:
    """A unit whose files are written: its manifest line, the ids of its rows, and the mean kept mass of its targets."""

    entry: ManifestEntry
    ids: list[str]
    kept_mass: float | None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of payload per token; NaN for an empty shard."""
        payload = sum(f.bytes for name, f in self.entry.files.items() if name.startswith("data/"))
        return payload / self.entry.tokens if self.entry.tokens else float("nan")

"""Scores with a number for each token (`kdata score --tokens`): the column `nll_NAME` of the table `tokens`.

Beside its numbers for each row, a part of such a score has the list column TOKEN_NLL: the scoring model's negative
log-likelihood of each token, nats, as float16; NaN at position 0, which no distribution predicts. Rounding is to the nearest,
so a stored value is off by at most 2^-11 of itself (0.05 %), and by at most 2^-25 below 2^-14.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from kdata.errors import KdataError, MissingError, TeacherError
from kdata.format.schema import FileInfo, ManifestEntry
from kdata.store.index import UNREADABLE, damaged, largest_column, read_part
from kdata.store.listed import SCORES, Kind, Listing

TOKEN_NLL = pa.field("token_nll", pa.list_(pa.field("element", pa.float16(), False)), False)
MOST_NLL = float(np.finfo(np.float16).max)  # nats
COLUMN = re.compile(r"nll_([A-Za-z][A-Za-z0-9_]*)")


class ScoreSource(Protocol):
    """What reading a score needs of a dataset."""

    manifest: list[ManifestEntry]

    def listed(self, kind: Kind) -> list[str]:
        """Names of the scores or plans that are here."""
        ...

    def listing(self, kind: Kind, name: str) -> Listing:
        """What NAME.json says of a complete score."""
        ...

    def fetch_sidecar(self, name: str) -> None:
        """Copy scores/NAME.json here where the dataset is elsewhere."""
        ...

    def score_part(self, relative: str, info: FileInfo) -> Path:
        """A part of a score whose bytes were compared with its digest."""
        ...


def stored_nll(logprob_T: np.ndarray) -> np.ndarray:
    """Log-probabilities of the tokens of a row, float32 [T], as they are stored: their NLL, float16 [T], NaN at position 0.

    Raises TeacherError where one behind position 0 is not finite, or its NLL is above 65,504 nats.
    """
    bad_T = np.flatnonzero(~(np.abs(logprob_T[1:]) <= MOST_NLL))
    if len(bad_T):
        place = int(bad_T[0]) + 1
        raise TeacherError(
            f"the model gives the token at position {place} the log-probability {logprob_T[place]}, which is not finite or "
            f"below -{MOST_NLL:,.0f} nats; are its weights sound?"
        )
    nll_T: np.ndarray = -logprob_T.astype(np.float16)
    nll_T[:1] = np.nan
    return nll_T


def score_of(column: str) -> str | None:
    """The score whose numbers a column of `tokens` has; None for other columns."""
    match = COLUMN.fullmatch(column)
    return None if match is None else match[1]


def scores_in(text: str) -> list[str]:
    """Each NAME of which a query has the word `nll_NAME`, whatever it means there."""
    return sorted(set(re.findall(rf"\b{COLUMN.pattern}\b", text, re.IGNORECASE)))


def present_scores(source: ScoreSource, names: Iterable[str]) -> list[str]:
    """Names of those of some scores, in any case, that have a number for each token.

    A score that does not belong to the dataset as it is now is left out. At a URL its JSON is copied here first.
    """
    for name in (names := list(names)):
        source.fetch_sidecar(name)
    known = {name.lower() for name in names}
    return [name for name in source.listed(SCORES) if name.lower() in known and has_tokens(source, name)]


def has_tokens(source: ScoreSource, name: str) -> bool:
    """Whether a score has a number for each token, and belongs to the dataset as it is now."""
    try:
        return TOKEN_NLL.name in source.listing(SCORES, name).columns
    except KdataError:  # the query that reads it fails, and `missing_score` says why
        return False


def missing_score(source: ScoreSource, column: str) -> str | None:
    """Why `tokens` lacks the column `nll_NAME`; None for a column of another name, or where `tokens` has it."""
    match = re.fullmatch(COLUMN, column.lower())
    if match is None:
        return None
    name = next((name for name in source.listed(SCORES) if name.lower() == match[1]), match[1])
    try:
        TokenScore(source, name)
    except KdataError as error:
        return str(error)
    return None


class TokenScore:
    """The NLL of each token by one score, read a shard at a time.

    Raises:
        MissingError: there is no such score, it is not complete or of another state of the dataset, or it has no number for
            each token.
        MismatchError: it is of another dataset.
        CorruptError: its JSON is damaged.
    """

    def __init__(self, source: ScoreSource, name: str) -> None:
        source.fetch_sidecar(name)
        listing = source.listing(SCORES, name)
        if TOKEN_NLL.name not in listing.columns:
            raise MissingError(
                f"score {name!r} has a number for each row and none for each token; write one that has, under another name: "
                "`kdata score --tokens --name NAME`"
            )
        self.name, self._source, self._files = name, source, listing.files
        self._last: tuple[int, Path, pa.ListArray] | None = None  # the shard that was read last

    def nll(self, shard: int, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """NLL of each token of some rows of a shard, float32 [T], nats; NaN at position 0 of a row.

        Args:
            rows: int64 [S], their numbers in the shard. counts: int64 [S], how many tokens they have.
        Raises:
            CorruptError: the part is not what was committed, or a row has another number of values than of tokens.
        """
        if self._last is None or self._last[0] != shard:
            path, table = self.part(shard, pa.schema([TOKEN_NLL]))
            self._last = shard, path, table[TOKEN_NLL.name].combine_chunks()
        _, path, lists = self._last
        part = lists.take(pa.array(rows))
        lengths = part.value_lengths().to_numpy()
        if not np.array_equal(lengths, counts):
            place = int(np.flatnonzero(lengths != counts)[0])
            raise damaged(path, f"row {rows[place]} has {lengths[place]} values and {counts[place]} tokens")
        values: np.ndarray = part.flatten().to_numpy().astype(np.float32)
        return values

    def relative(self, shard: int) -> str:
        """Path of the part of a shard inside the dataset."""
        return f"scores/{self.name}/{self._source.manifest[shard].name}.parquet"

    def part(self, shard: int, schema: pa.Schema) -> tuple[Path, pa.Table]:
        """The path of a shard's part, and these columns of it. Raises CorruptError where it is not what was committed."""
        relative, entry = self.relative(shard), self._source.manifest[shard]
        path = self._source.score_part(relative, self._files[relative])
        try:
            if (count := largest_column(path)) > entry.tokens + entry.rows:  # a row without tokens counts as a value
                raise ValueError(f"it holds {count:,} values, the shard has {entry.tokens:,} tokens")
            table = read_part(path, schema, schema.names)
            if table.num_rows != entry.rows:
                raise ValueError(f"it holds {table.num_rows} rows, the manifest says {entry.rows}")
        except UNREADABLE as error:
            raise damaged(path, error) from error
        return path, table


def token_scores(source: ScoreSource, columns: Iterable[str]) -> dict[str, TokenScore]:
    """The scores that some columns of `tokens` have their numbers from, by column. Raises as `TokenScore`."""
    return {column: TokenScore(source, name) for column in columns if (name := score_of(column)) is not None}

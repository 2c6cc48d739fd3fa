"""What every rule that chooses positions is: its settings, what it gets, and the choice of a share.

`kdata.selection.position_rules` holds the rules themselves.

Shapes: S rows of a piece, T tokens of a piece, C candidates among them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import Field

from kdata.config import Strict
from kdata.errors import DataError
from kdata.format.sequences import Sequences
from kdata.selection.apportion import as_written
from kdata.store.dataset import Dataset
from kdata.store.token_columns import TokenColumns
from kdata.store.token_scores import TokenScore


class TokenReader(Protocol):
    """A model that says how likely it finds the tokens of a text; `kdata.jobs.selecting` opens one."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What a plan records of the model."""
        ...

    def logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token of some sequences (token ids int32 [T] each), float32 [T], nats; the first is NaN."""
        ...


@dataclass(frozen=True)
class Piece:
    """The rows of one record batch, and which of their tokens may be chosen.

    wanted_S: bool [S], the chosen rows. candidate_C: int64 [C], rising indices of tokens: targets of the chosen rows, and of
    the parent plan's positions where it has any. parent_weights_C: float32 [C], those of the parent plan, or None. index_of:
    reads columns of the index of a shard. reader: the model of the rule `gap`, None for other rules. scores: those of which
    the rule needs the number of each token, by name.
    """

    dataset: Dataset
    read: TokenColumns
    wanted_S: np.ndarray
    candidate_C: np.ndarray
    parent_weights_C: np.ndarray | None
    index_of: Callable[[int, tuple[str, ...]], pa.Table]
    reader: TokenReader | None = None
    scores: Mapping[str, TokenScore] = field(default_factory=dict)

    @cached_property
    def row_C(self) -> np.ndarray:
        """Row of each candidate, int64 [C], from 0 in this piece."""
        rows: np.ndarray = np.searchsorted(self.read.offsets, self.candidate_C, side="right") - 1
        return rows

    @cached_property
    def position_C(self) -> np.ndarray:
        """Position of each candidate in its row, int64 [C]."""
        positions: np.ndarray = self.candidate_C - self.read.offsets[self.row_C]
        return positions

    @property
    def rows(self) -> np.ndarray:
        """Global rows of the piece, int64 [S]."""
        return np.arange(self.read.first_row, self.read.first_row + len(self.read.offsets) - 1)

    def index(self, *columns: str) -> pa.Table:
        """Columns of the index, a line for each row of the piece."""
        table = self.index_of(self.read.shard, columns)
        return table.slice(self.read.first_row - int(self.dataset.shard_starts[self.read.shard]), len(self.rows))

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the rows."""
        ids: list[str] = self.index("id")["id"].to_pylist()
        return ids

    def nll(self, score: str) -> np.ndarray:
        """NLL of each candidate by one of the scores, float32 [C], nats."""
        first = self.read.first_row - int(self.dataset.shard_starts[self.read.shard])
        rows = np.arange(first, first + len(self.rows))
        nll_T = self.scores[score].nll(self.read.shard, rows, np.diff(self.read.offsets))
        nll_C: np.ndarray = nll_T[self.candidate_C]
        return nll_C

    def sequences(self) -> Sequences:
        """The rows with their kept entries, decoded."""
        return self.dataset.decode([self.dataset.record_batch(self.read.shard, self.read.batch)])


# What a rule chooses of a piece: bool [C], and the weights of the candidates, float32 [C], or None.
Marker = Callable[[Piece], tuple[np.ndarray, np.ndarray | None]]


class PositionRule(Strict):
    """Settings that every rule has. `rule` is its key in RULES."""

    COLUMNS: ClassVar[tuple[str, ...]] = ()  # of the payload that it reads, beside target_mask

    rule: str

    @abstractmethod
    def marker(self, dataset: Dataset) -> Marker:
        """Check the dataset, and return what chooses the candidates of a piece.

        Raises:
            DataError, ConfigError, MissingError: the rule does not fit the dataset.
        """

    @property
    def query(self) -> str | None:
        """The query that chooses, for the plan to record; None: no query does."""
        return None

    def token_scores(self) -> list[str]:
        """Names of the scores of which the rule reads the number of each token."""
        return []

    def named_scores(self) -> list[str]:
        """The same, and those that a query names, whose case does not count."""
        return self.token_scores()

    def mentions(self, dataset: Dataset) -> dict[str, list[str]]:
        """Names of the `scores` and `plans` that the rule reads."""
        return {"scores": self.token_scores(), "plans": []}

    def recorded(self) -> dict[str, Any]:
        """The settings that a plan records."""
        return self.model_dump(exclude={"rule"})


class ShareRule(PositionRule):
    """A rule that chooses a share of the candidates: those with the largest number, or with LOWEST the smallest."""

    LOWEST: ClassVar[bool] = False
    MEANS_SOMETHING: ClassVar[bool] = True  # whether a reader learns something from the number at which the choice ends

    share: float = Field(
        gt=0,
        le=1,
        examples=[0.2],
        description="Share of the target positions to choose; the number of them is rounded up.",
    )
    per: Literal["dataset", "row"] = Field(
        "dataset",
        description="dataset: the share of all positions of the chosen rows, each row counted once. row: of each row alone.",
    )

    @abstractmethod
    def numbers(self, piece: Piece) -> np.ndarray:
        """A number for each candidate of a piece, float32 or uint32 [C]; NaN where it is not known."""

    def keys(self, piece: Piece) -> np.ndarray:
        """The same as uint32 [C] that rise with the preference. Raises DataError where a number is not known."""
        numbers_C = self.numbers(piece)
        if numbers_C.dtype == np.uint32:
            return numbers_C
        unknown_C = np.flatnonzero(np.isnan(numbers_C))
        if len(unknown_C):
            row_id, position = piece.ids[piece.row_C[unknown_C[0]]], piece.position_C[unknown_C[0]]
            raise DataError(
                f"the rule {self.rule!r} needs a number that is not known at position {position} of row {row_id!r}; "
                "imported data often lacks it. Use another rule, or choose rows that have it (--parent PLAN)"
            )
        keys_C = rising_keys(numbers_C)
        return ~keys_C if self.LOWEST else keys_C

    def number_of(self, key: int) -> float | None:
        """The number that a key stands for; None where it means nothing to a reader."""
        if not self.MEANS_SOMETHING:
            return None
        bits = np.array([key], np.uint32)
        bits = ~bits if self.LOWEST else bits
        bits = np.where(bits >> 31, bits ^ np.uint32(1 << 31), ~bits).astype(np.uint32)
        return float(bits.view(np.float32)[0])

    def marker(self, dataset: Dataset) -> Marker:
        """See `PositionRule.marker`: the share of each row of a piece."""

        def mark(piece: Piece) -> tuple[np.ndarray, None]:
            return highest_of_rows(self.keys(piece), piece.row_C, piece.position_C, len(piece.rows), self.share), None

        return mark


def rising_keys(numbers: np.ndarray) -> np.ndarray:
    """float32 as uint32 in the same order; -0 and 0 are equal."""
    bits = (numbers + np.float32(0)).astype(np.float32, copy=False).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32)


def number_to_choose(share: float, count: int) -> int:
    """How many of `count` a share is, rounded up, in exact arithmetic."""
    return math.ceil(as_written(share) * count)


def highest_of_rows(
    keys_C: np.ndarray, row_C: np.ndarray, position_C: np.ndarray, num_rows: int, share: float
) -> np.ndarray:
    """The share of each row's candidates that has the largest keys (uint32 [C]), bool [C].

    Its number is rounded up; of equal keys the first positions are taken. row_C, position_C: int64 [C].
    """
    order = np.lexsort((position_C, ~keys_C, row_C))
    counts = np.bincount(row_C, minlength=num_rows)
    place_C = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen_C = np.zeros(len(order), bool)
    chosen_C[order] = place_C < np.array([number_to_choose(share, n) for n in counts.tolist()])[row_C]
    return chosen_C

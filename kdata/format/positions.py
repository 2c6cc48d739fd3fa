"""Positions that a plan chooses: which tokens of its rows count in training, and how much.

Shapes: R rows, P chosen positions, S documents, T tokens of the documents, N chosen tokens among them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kdata.format.compiled import compiled

LEAST_WEIGHT, MOST_WEIGHT = 1e-30, 1e30  # beyond, a weighted sum in float32 is 0 or infinite


@dataclass(frozen=True)
class ChosenPositions:
    """The chosen positions of each row of a plan: 4 bytes each in memory, 8 with weights.

    rows: int64 [R], rising global dataset rows. offsets: int64 [R+1], where the positions of each row begin. positions: int32
    [P], rising within a row; position t is the prediction of token t. weights: float32 [P] > 0, or None where each counts 1.
    """

    rows: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray
    weights: np.ndarray | None = None

    @classmethod
    def of(
        cls, rows: np.ndarray, offsets: np.ndarray, positions: np.ndarray, weights: np.ndarray | None = None
    ) -> ChosenPositions:
        """The same fields with the rows in any order, each once."""
        order = np.argsort(rows)
        source, counts = _entries(offsets, order)
        own = None if weights is None else weights[source]
        return cls(rows[order], np.concatenate([[0], np.cumsum(counts)]), positions[source], own)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of rows, positions and weights."""
        content = hashlib.sha256()
        arrays = ((self.rows, "<i8"), (self.offsets, "<i8"), (self.positions, "<i4"), (self.weights, "<f4"))
        for values, dtype in arrays:
            content.update(b"\0" if values is None else b"\1" + np.ascontiguousarray(values, dtype).tobytes())
        return content.hexdigest()

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows`, int64, of which no position is chosen."""
        return rows[~np.isin(rows, self.rows)]

    def tokens(self, rows: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Chosen tokens of documents that are laid end to end.

        Args:
            rows: int64 [S], global row of each document; repeats are allowed.
            offsets: int64 [S+1], where each document's tokens begin.
        Returns:
            int64 [N], rising indices of tokens; and their weights, float32 [N], or None.
        """
        source_N, counts = _entries(self.offsets, np.searchsorted(self.rows, rows))
        token_N = self.positions[source_N] + np.repeat(offsets[:-1], counts)
        return token_N, None if self.weights is None else self.weights[source_N]


def _entries(offsets: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices int64 of the entries of some segments, one segment after the other, and the number of each segment's."""
    counts = np.diff(offsets)[which]
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(offsets[which] - before, counts), counts


def position_problem(
    offsets: np.ndarray, positions: np.ndarray, num_tokens: np.ndarray, weights: np.ndarray | None = None
) -> tuple[int, str] | None:
    """The first row whose positions cannot be right, and what is wrong with them; None where all are well-formed.

    Args:
        offsets: int64 [R+1], where the positions of each row begin.
        positions: int [P]. num_tokens: int [R], tokens of each row. weights: float [P] or None.
    """
    bounds = np.array([LEAST_WEIGHT, MOST_WEIGHT], np.float32 if weights is None else weights.dtype)
    row, at = _first_problem(offsets, positions, num_tokens, bounds[:0] if weights is None else weights, bounds)
    if row < 0:
        return None
    if at < 0:
        return row, "it has no position"
    position = int(positions[at])
    if not 1 <= position < num_tokens[row]:
        return row, f"position {position} is not in 1 to {num_tokens[row] - 1}"
    if at > offsets[row] and position <= positions[at - 1]:
        again = "is there twice" if position == positions[at - 1] else f"comes after {positions[at - 1]}"
        return row, f"position {position} {again}"
    assert weights is not None
    return row, f"the weight of position {position} is {weights[at]}; it must lie in 1e-30 to 1e30"


@compiled()
def _first_problem(
    offsets: np.ndarray, positions: np.ndarray, num_tokens: np.ndarray, weights: np.ndarray, bounds: np.ndarray
) -> tuple[int, int]:
    """The first wrong row and its first wrong position's place, -1 where the row has none; (-1, -1) where all are right.

    A loop, since whole arrays of what is wrong took 34 bytes a position.

    Args:
        weights: of no position where there are none. bounds: the least and the most weight, of the same type.
    """
    for row in range(len(offsets) - 1):
        if offsets[row] == offsets[row + 1]:
            return row, -1
        before = 0  # positions begin at 1
        for at in range(offsets[row], offsets[row + 1]):
            position = positions[at]
            if position <= before or position >= num_tokens[row]:
                return row, at
            if len(weights) and not bounds[0] <= weights[at] <= bounds[1]:
                return row, at
            before = position
    return -1, -1

"""Positions that a plan chooses: which tokens of its rows count in training, and how much.

Shapes: R rows, P chosen positions, S documents, T tokens of the documents, N chosen tokens among them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
    counts = np.diff(offsets)
    row_P = np.repeat(np.arange(len(counts)), counts)
    first_P = np.zeros(len(positions), bool)
    first_P[offsets[:-1][counts > 0]] = True
    outside_P = (positions < 1) | (positions >= num_tokens[row_P])
    step_P = np.diff(positions.astype(np.int64), prepend=0)
    wrong_P = outside_P | (~first_P & (step_P <= 0))
    if weights is not None:
        wrong_P = wrong_P | ~((weights >= LEAST_WEIGHT) & (weights <= MOST_WEIGHT))
    rows = np.concatenate([np.flatnonzero(counts == 0)[:1], row_P[np.flatnonzero(wrong_P)[:1]]])
    if not len(rows):
        return None
    row = int(rows.min())
    if not counts[row]:
        return row, "it has no position"
    at = int(np.flatnonzero(wrong_P)[0])
    if outside_P[at]:
        return row, f"position {positions[at]} is not in 1 to {num_tokens[row] - 1}"
    if not first_P[at] and step_P[at] <= 0:
        again = "is there twice" if not step_P[at] else f"comes after {positions[at - 1]}"
        return row, f"position {positions[at]} {again}"
    assert weights is not None
    return row, f"the weight of position {positions[at]} is {weights[at]}; it must lie in 1e-30 to 1e30"

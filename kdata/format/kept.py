"""Kept entries: what is stored of a teacher's distribution at each position, and small sums over them.

Shapes: T tokens, K kept entries of one position, N kept entries in all, D draws in all."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kdata.errors import ShapeError


@dataclass(frozen=True)
class Kept:
    """Ragged kept entries of T positions: at each, exact entries by falling probability, then draws by rising id.

    num_exact, num_drawn: int32 [T]. ids: int32 [N]. logprobs: float32 [N], nats, not renormalised: for an exact entry
    its log-probability, for a draw the log of its unbiased weight. draw_logprobs: float32 [D], the log-probability of
    each draw, or None where it is not known (it is needed at temperatures other than 1 only).
    """

    num_exact: np.ndarray
    num_drawn: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    draw_logprobs: np.ndarray | None = field(default=None)

    def __post_init__(self) -> None:
        total = int(self.num_exact.sum()) + int(self.num_drawn.sum())
        if len(self.ids) != total or len(self.logprobs) != total:
            raise ShapeError(
                f"the counts sum to {total}, but there are {len(self.ids)} ids and {len(self.logprobs)} logprobs"
            )

    @property
    def num_kept(self) -> np.ndarray:
        """Entries at each position, exact and drawn, int32 [T]."""
        num_kept: np.ndarray = self.num_exact + self.num_drawn
        return num_kept

    @property
    def is_draw(self) -> np.ndarray:
        """Which entries are draws, bool [N]."""
        return draw_mask(self.num_exact, self.num_drawn)

    @staticmethod
    def concatenate(parts: list[Kept]) -> Kept:
        """Join the positions of several parts in order."""
        counts, reals = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if not parts:
            return Kept(counts, counts, counts, reals)
        known = [p.draw_logprobs for p in parts if p.draw_logprobs is not None]
        return Kept(
            np.concatenate([p.num_exact for p in parts]),
            np.concatenate([p.num_drawn for p in parts]),
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.logprobs for p in parts]),
            np.concatenate(known) if len(known) == len(parts) else None,
        )

    @staticmethod
    def top(ids_TK: np.ndarray, logprobs_TK: np.ndarray, recorded_T: np.ndarray) -> Kept:
        """Keep all K entries at each position where `recorded_T` is true, nothing elsewhere."""
        width = ids_TK.shape[1]
        return Kept(
            np.where(recorded_T, width, 0).astype(np.int32),
            np.zeros(len(recorded_T), np.int32),
            ids_TK[recorded_T].reshape(-1).astype(np.int32, copy=False),
            logprobs_TK[recorded_T].reshape(-1).astype(np.float32, copy=False),
        )

    def only(self, chosen_T: np.ndarray) -> Kept:
        """The entries of the positions where `chosen_T` (bool [T]) is true, and none elsewhere."""
        stays_N = np.repeat(chosen_T, self.num_kept)
        return Kept(
            np.where(chosen_T, self.num_exact, 0).astype(np.int32),
            np.where(chosen_T, self.num_drawn, 0).astype(np.int32),
            self.ids[stays_N],
            self.logprobs[stays_N],
            None if self.draw_logprobs is None else self.draw_logprobs[np.repeat(chosen_T, self.num_drawn)],
        )

    def mass(self) -> np.ndarray:
        """Sum of all weights at each position, float64 [T]."""
        return segment_sum(np.exp(self.logprobs.astype(np.float64)), self.num_kept)

    def exact_mass(self) -> np.ndarray:
        """Probability mass of the exact entries at each position, float64 [T]."""
        weights = np.where(self.is_draw, 0.0, np.exp(self.logprobs.astype(np.float64)))
        return segment_sum(weights, self.num_kept)


def draw_mask(num_exact: np.ndarray, num_drawn: np.ndarray) -> np.ndarray:
    """Which of the entries laid out position by position (exact first) are draws, bool [N]."""
    if not num_drawn.any():
        return np.zeros(int(num_exact.sum()), bool)
    counts = np.stack([num_exact, num_drawn], 1).reshape(-1)
    return np.repeat(np.tile([False, True], len(num_exact)), counts)


def segment_sum(values_N: np.ndarray, counts_T: np.ndarray) -> np.ndarray:
    """Sum `counts_T[t]` consecutive values for each t; float64 [T], 0 for an empty segment.

    `reduceat` sums each segment on its own, so that a long array loses no precision to a running total.
    """
    sums_T = np.zeros(len(counts_T))
    filled = counts_T > 0
    if filled.any():
        starts = (np.cumsum(counts_T) - counts_T)[filled]
        sums_T[filled] = np.add.reduceat(values_N.astype(np.float64), starts)
    return sums_T


def log_tail(mass_T: np.ndarray) -> np.ndarray:
    """Natural log of 1 - mass, float32 [T]; -inf where nothing is left, never above 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.clip(1.0 - mass_T, 0.0, 1.0)).astype(np.float32)


def pad(num_kept: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged entries as a grid: ids int32 [T, width] padded with -1, logprobs float32 [T, width] padded with -inf.

    Raises:
        ShapeError: a position holds more than `width` entries.
    """
    widest, tokens = int(num_kept.max(initial=0)), len(num_kept)
    if widest > width:
        raise ShapeError(f"a position holds {widest} kept entries, more than width={width}")
    if len(ids) == tokens * width:
        return ids.reshape(tokens, width), logprobs.reshape(tokens, width)
    ids_TK = np.full((tokens, width), -1, np.int32)
    logprobs_TK = np.full((tokens, width), -np.inf, np.float32)
    filled_TK = np.arange(width) < num_kept[:, None]
    ids_TK[filled_TK] = ids
    logprobs_TK[filled_TK] = logprobs
    return ids_TK, logprobs_TK


def mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed

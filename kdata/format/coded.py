"""A byte for each number beside the entries, in version 3 of the codec packed: log-probability, rank, tail, entropy, counts.

    logprob   -(c/32)^2 nats, so that the step grows with the surprise: the error is at most sqrt(x)/32 + 1/4096 at x nats
    entropy   (c/64)^2 nats: the error is at most sqrt(x)/64 + 1/16384
    tail      the mass outside the exact entries. Below 0.0101 in quarters of a doubling (at most 9.1 % off), and likewise the
              mass of the exact entries where that is small; between them sin^2 of an angle (at most 0.0048 off). A mass is 0
              only where it was: what is smaller than 2^-24 is read as that. Exact entries have 2^-16 at least.
    rank, counts, bytes of a token   themselves

A number that has no code (a rank above 253, say) is `FAR`: it stands in a list of its own, exactly. Coding what was decoded
gives the same bytes. Why the tail has these steps: a mass that is off by d costs d^2 / (2 t (1 - t)) nats, which is the same
at every angle: 5e-5 at most and 1.6e-5 on average; the gaps of the entries cost 1.6e-4.

Shapes: T tokens, S rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdata.errors import ShapeError

MOST, UNKNOWN, FAR = 253, 254, 255  # the largest code of a number; no number was recorded; the number is in the list
# Masses that are small: 2^-24 times 2^(1/4), and so on. Outside the exact entries; and of the exact entries, from 2^-16 on.
_PER_DOUBLING, _LOWEST, _NUM_SMALL, _LOWEST_EXACT, _NUM_LARGE = 4, -24, 70, -16, 38


@dataclass(frozen=True)
class Grid:
    """Numbers that have a code.

    values: float32 [256], by code; NaN of UNKNOWN and FAR. borders: float64, between a code and the next one, rising with the
    code in the direction of `sign`.
    """

    values: np.ndarray
    borders: np.ndarray
    sign: int = 1

    def encode(self, numbers_T: np.ndarray) -> np.ndarray:
        """The code of each number, uint8 [T]: of the nearest in the grid, UNKNOWN where it is NaN, FAR beyond the ends."""
        size_T = numbers_T.astype(np.float64) * self.sign
        codes_T = np.searchsorted(self.borders, size_T).astype(np.uint8)
        codes_T[size_T > self.values[MOST] * self.sign] = FAR
        codes_T[size_T < -1e-3] = FAR  # a probability of 1 may be 1 + 1e-7
        codes_T[np.isnan(size_T)] = UNKNOWN
        return codes_T


def _squares(per_unit: int, sign: int) -> Grid:
    roots = np.arange(MOST + 1) / per_unit
    values = np.concatenate([sign * roots**2, [np.nan, np.nan]]).astype(np.float32)
    return Grid(values, (roots[:-1] + 0.5 / per_unit) ** 2, sign)


LOGPROB, ENTROPY = _squares(32, -1), _squares(64, 1)


def _small(lowest: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` masses from 2^lowest on, and the border above each."""
    steps = lowest + np.arange(count) / _PER_DOUBLING
    return 2.0**steps, 2.0 ** (steps + 0.5 / _PER_DOUBLING)


def _tails() -> tuple[np.ndarray, np.ndarray]:
    """log_tail float64 [254] by code, and the masses between codes [253]."""
    small, above_small = _small(_LOWEST, _NUM_SMALL)
    exact, above_exact = _small(_LOWEST_EXACT, _NUM_LARGE)
    num_middle = MOST - _NUM_SMALL - _NUM_LARGE - 1  # codes 0 and 253 are masses of 0 and 1
    begin, end = np.arcsin(np.sqrt(above_small[-1])), np.pi / 2 - np.arcsin(np.sqrt(above_exact[-1]))
    angles = begin + (end - begin) / num_middle * np.arange(num_middle + 1)
    middle = np.sin((angles[:-1] + angles[1:]) / 2) ** 2
    with np.errstate(divide="ignore"):
        logs = np.concatenate([[-np.inf], np.log(small), np.log(middle), np.log1p(-exact[::-1]), [0.0]])
    borders = np.concatenate(
        [[0.0], above_small[:-1], np.sin(angles) ** 2, 1 - above_exact[-2::-1], [1 - exact[0] / 2]]
    )
    return logs, borders


TAIL_LOGS, _TAIL_BORDERS = _tails()
TAIL_VALUES = np.concatenate([TAIL_LOGS, [np.nan, np.nan]]).astype(np.float32)  # float32 log_tail by code


def logprob_bound(nats_T: np.ndarray) -> np.ndarray:
    """How far the code of a log-probability may be off, float64 [T], nats."""
    bound_T: np.ndarray = np.sqrt(np.abs(nats_T.astype(np.float64))) / 32 + 1 / 4096
    return bound_T


TAIL_BOUND = 0.1  # nats that a log_tail above 2^-24 may be off


def encode_tail(log_tail_T: np.ndarray, num_exact_T: np.ndarray) -> np.ndarray:
    """Codes uint8 [T] of the tail mass, from its natural log.

    Args:
        log_tail_T: float [T] <= 0; NaN where none was recorded.
        num_exact_T: int [T], exact entries at each position: they do not lose all of their mass to rounding.
    """
    mass_T = np.exp(log_tail_T.astype(np.float64))
    codes_T = np.searchsorted(_TAIL_BORDERS, mass_T)
    codes_T = np.where(log_tail_T > -np.inf, np.maximum(codes_T, 1), 0)
    codes_T = np.where(
        num_exact_T > 0, np.minimum(codes_T, MOST - 1), codes_T
    )  # e^-200 beside a tail of 1 is no mass of 0
    codes_T[np.isnan(log_tail_T)] = UNKNOWN
    return codes_T.astype(np.uint8)


def round_tail(log_tail_T: np.ndarray, num_exact_T: np.ndarray) -> np.ndarray:
    """The tail as it will be read, float32 [T]; see `encode_tail`."""
    return decode_tail(encode_tail(log_tail_T, num_exact_T))


def decode_tail(codes_T: np.ndarray) -> np.ndarray:
    """log_tail float32 [T]. Raises ShapeError for FAR, which no tail is."""
    if (codes_T == FAR).any():
        raise ShapeError("a tail has a code that stands for nothing")
    log_tail_T: np.ndarray = TAIL_VALUES[codes_T]
    return log_tail_T


def encode_whole(numbers_T: np.ndarray) -> np.ndarray:
    """Codes uint8 [T] of whole numbers: themselves, or FAR."""
    wide_T = numbers_T.astype(np.int64)
    return np.where((wide_T < 0) | (wide_T > MOST), FAR, wide_T).astype(np.uint8)

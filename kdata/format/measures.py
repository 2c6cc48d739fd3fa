"""The numbers of a position: one definition for the teacher's readout, the record, the decoded sequence and the batch.

Shapes: T positions, n further temperatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Numbers of a teacher's whole distribution at each of T positions; entry t is about the prediction of token t.

    logprob: float32 [T], nats, of the actual token. rank: int32 [T], of the actual token, 1 = first choice. log_tail:
    float32 [T], nats, log of the exact mass outside the kept entries, -inf where none is left. entropy: float32 [T], nats.
    log_z: float32 [T, n], ln sum_i p_i^(1/temperature) for each further temperature, or None where there is none.
    Where a number is not known it is NaN, and the rank is 0.
    """

    logprob: np.ndarray
    rank: np.ndarray
    log_tail: np.ndarray
    entropy: np.ndarray
    log_z: np.ndarray | None = None

    def measures(self, change: Callable[[np.ndarray], np.ndarray] = lambda values: values) -> dict[str, Any]:
        """These five after `change`, by name: arguments of another class that holds them."""
        values = {name: getattr(self, name) for name in NAMES}
        return {name: None if array is None else change(array) for name, array in values.items()}


NAMES = ("logprob", "rank", "log_tail", "entropy", "log_z")


def unknown(tokens: int) -> Measures:
    """Measures of positions of which nothing is known."""
    absent = np.full(tokens, np.nan, np.float32)
    return Measures(logprob=absent, rank=np.zeros(tokens, np.int32), log_tail=absent, entropy=absent)


def only(chosen_T: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A change that marks positions outside `chosen_T`, bool [T], as not known."""

    def change(values: np.ndarray) -> np.ndarray:
        return np.where(chosen_T.reshape(-1, *[1] * (values.ndim - 1)), values, _not_known(values))

    return change


def beside(start: int) -> Callable[[np.ndarray], np.ndarray]:
    """A change from the positions from `start` on, [L, ...], to the whole sequence, [start + L, ...]."""

    def change(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full((start, *values.shape[1:]), _not_known(values), values.dtype), values])

    return change


def joined(parts: Sequence[Measures]) -> dict[str, Any]:
    """Every array of several objects of one class, laid end to end: arguments of that class."""
    arrays = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return {name: None if some[0] is None else np.concatenate(some) for name, some in arrays.items()}


def _not_known(values: np.ndarray) -> Any:
    return values.dtype.type(0 if values.dtype.kind in "iu" else np.nan)

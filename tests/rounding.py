"""How far stored numbers may be from the teacher's: the bounds of version 3 of the codec packed in schemas/README.md."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

TAIL = 0.0048  # of a mass


def assert_logprobs(stored: ArrayLike, true: ArrayLike, times: float = 1.0) -> None:
    """Log-probabilities, nats; NaN only where NaN is. `times`: so many roundings."""
    ours, theirs = np.atleast_1d(np.asarray(stored, np.float64)), np.atleast_1d(np.asarray(true, np.float64))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    bound = times * (np.sqrt(np.abs(theirs)) / 32 + 1 / 4096) + 1e-4
    off = np.abs(ours - theirs)
    assert (off <= bound)[~np.isnan(theirs)].all(), f"{np.nanmax(off - bound)} beyond the bound"


def assert_tails(stored: ArrayLike, true: ArrayLike) -> None:
    """Masses outside the exact entries."""
    np.testing.assert_allclose(np.asarray(stored, np.float64), np.asarray(true, np.float64), atol=TAIL)

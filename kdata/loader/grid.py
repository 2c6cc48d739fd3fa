"""Ragged entries to a grid, compiled: one pass over the data.

At 64 entries per token this takes a tenth of the time of a boolean mask in numpy. It releases the interpreter lock, so a
background thread really helps.

Shapes: N entries, M positions, K columns.
"""

from __future__ import annotations

import numpy as np

from kdata.format.compiled import compiled


def entry_grid(
    positions_M: np.ndarray,
    entry_offsets: np.ndarray,
    values_N: np.ndarray,
    fill: float,
    dtype: type,
    with_entries_M: np.ndarray | None = None,
) -> np.ndarray:
    """Ragged entries of chosen positions as a grid.

    Args:
        positions_M: int64 [M], which positions.
        entry_offsets: int64 [T+1], where the entries of each of all T positions begin.
        values_N: any numbers [N].
        fill: pads positions that have fewer entries than the widest of the M.
        dtype: of the grid.
        with_entries_M: bool [M], positions whose entries are wanted; the others are padding. None: all.
    Returns:
        dtype [M, K], K the most entries that one of the M positions has.
    """
    first_M, count_M = entry_offsets[positions_M], np.diff(entry_offsets)[positions_M]
    if with_entries_M is not None:
        count_M = np.where(with_entries_M, count_M, 0)
    grid_MK: np.ndarray = np.empty((len(positions_M), int(count_M.max(initial=0))), dtype)
    _entry_grid(first_M, count_M, values_N, grid_MK.dtype.type(fill), grid_MK)
    return grid_MK


@compiled()
def _entry_grid(
    first_M: np.ndarray, count_M: np.ndarray, values_N: np.ndarray, fill: np.generic, grid_MK: np.ndarray
) -> None:
    width = grid_MK.shape[1]
    for m in range(len(first_M)):
        first, count = first_M[m], count_M[m]
        for k in range(count):
            grid_MK[m, k] = values_N[first + k]
        for k in range(count, width):
            grid_MK[m, k] = fill

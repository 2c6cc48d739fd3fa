"""The two attacks of the leakage audit, each as plain functions on what datasets release; see `kdata.check.audit`.

Shapes: T positions, N entries, B ids of the block, E eigenvalues = B, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kdata.errors import DataError
from kdata.format.compiled import compiled
from kdata.format.kept import draw_mask, mix64
from kdata.format.sequences import Sequences

ROWS_AT_ONCE = 64


class Released(Protocol):
    """What the attacks read: a `Dataset`, or some of its rows."""

    @property
    def num_rows(self) -> int:
        """Rows."""

    def take(self, rows: np.ndarray) -> Sequences:
        """Some of them, by number."""


# ------------------------------------------------------------------------------------------------------ algebra


def distinct_per_context(datasets: Sequence[Released], hidden_size: int | None) -> tuple[int, int | None]:
    """Most distinct ids released for one context, and how many contexts have more than d.

    A context is input_ids[:t], hashed to 64 bits. Two passes, so that contexts that occur once need no set: memory is 8 bytes
    for each position and 12 for each entry of a repeated context.
    """
    hashes_T = np.concatenate([context_hashes(s) for s in _all(datasets)] or [np.zeros(0, np.uint64)])
    values, times = np.unique(hashes_T, return_counts=True)
    repeated = values[times > 1]
    counts: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    for sequences in _all(datasets):
        own_T, ids_N, place_N = context_hashes(sequences), *_released(sequences)
        repeated_T = np.isin(own_T, repeated)
        counts.append(np.bincount(place_N, minlength=len(own_T))[~repeated_T])
        repeated_N = repeated_T[place_N]
        pairs.append(np.stack([own_T[place_N[repeated_N]], ids_N[repeated_N].astype(np.uint64)], 1))
    distinct = np.unique(np.concatenate(pairs), axis=0)
    shared = np.unique(distinct[:, 0], return_counts=True)[1]
    everything = np.concatenate([*counts, shared])
    over = None if hidden_size is None else int((everything > hidden_size).sum())
    return int(everything.max(initial=0)), over


def context_hashes(sequences: Sequences) -> np.ndarray:
    """A 64-bit hash of input_ids[:t] at each position, uint64 [T]: sum over i < t of mix(id_i) m^i, mod 2^64."""
    lengths = np.diff(sequences.offsets)
    starts_T = np.repeat(sequences.offsets[:-1], lengths)
    place_T = np.arange(len(sequences.token_ids)) - starts_T
    powers = np.cumprod(np.full(int(lengths.max(initial=1)), 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)
    terms_T = mix64(sequences.token_ids.astype(np.uint64) + np.uint64(1)) * powers[place_T]
    before_T = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms_T, dtype=np.uint64)))
    return mix64(before_T[:-1] - before_T[starts_T] + place_T.astype(np.uint64))


def _released(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 [N] whose probability a position releases, each once (kept entries, and the actual token where its
    log-probability is stored), and the position of each."""
    place_N = np.repeat(np.arange(len(sequences.token_ids)), sequences.num_kept)
    known_T = np.flatnonzero(np.isfinite(sequences.logprob))
    ids = np.concatenate([sequences.entry_ids, sequences.token_ids[known_T]]).astype(np.int64)
    pairs = np.unique(np.concatenate([place_N, known_T]) << 32 | ids)
    return pairs & 0xFFFFFFFF, pairs >> 32


# --------------------------------------------------------------------------------------------------- statistics


def frequent_ids(datasets: Sequence[Released], vocab_size: int, size: int) -> np.ndarray:
    """The ids that are stored most often with an exact log-probability, int64 [B], rising. Raises DataError without any."""
    counts_V = np.zeros(vocab_size, np.int64)
    for sequences in _all(datasets):
        ids_N, _, _ = _exact(sequences)
        counts_V += np.bincount(ids_N, minlength=vocab_size)
    if not counts_V.any():
        raise DataError(
            "no position holds exact log-probabilities, which the second attack needs; audit a dataset that has some"
        )
    size = min(size, int((counts_V > 0).sum()))
    return np.sort(np.argsort(-counts_V, kind="stable")[:size])


def _exact(sequences: Sequences) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, log-probabilities and positions of everything that is stored exactly, by rising position and id.

    Exact entries, draws whose log-probability is kept, and the actual token.
    """
    draws_N = draw_mask(sequences.num_exact, sequences.num_kept - sequences.num_exact)
    values_N = sequences.entry_logprobs.astype(np.float64)
    if sequences.draw_logprobs is not None:
        values_N = np.where(draws_N, sequences.draw_logprobs, values_N)
        draws_N = np.zeros_like(draws_N)
    place_N = np.repeat(np.arange(len(sequences.token_ids)), sequences.num_kept)
    known_T = np.flatnonzero(np.isfinite(sequences.logprob))
    keys = np.concatenate([place_N[~draws_N], known_T]) << 32
    keys |= np.concatenate([sequences.entry_ids[~draws_N], sequences.token_ids[known_T]])
    values = np.concatenate([values_N[~draws_N], sequences.logprob[known_T].astype(np.float64)])
    keys, first = np.unique(keys, return_index=True)  # of two equal keys np.unique keeps the first: the entry
    return keys & 0xFFFFFFFF, values[first], keys >> 32


@dataclass(frozen=True)
class Moments:
    """Of a block of ids: pairs float64 [B, B], positions that store both; values float64 [B, B], their co-moment there."""

    pairs_BB: np.ndarray
    values_BB: np.ndarray


def co_moments(
    datasets: Sequence[Released], ids_B: np.ndarray, vocab_size: int, rng: np.random.Generator | None
) -> tuple[Moments, int]:
    """Co-moments of the block's log-probabilities about each id's own mean, and the number of positions.

    The mean is subtracted because log-probabilities are far below 0, and their mean would hide the rest in its noise. With
    `rng` the values of each position are permuted at random, which is the null.
    """
    column_V = np.full(vocab_size, -1, np.int64)
    column_V[ids_B] = np.arange(len(ids_B))
    pairs_BB, sums_BB, first_BB = np.zeros((3, len(ids_B), len(ids_B)))
    positions = 0
    for sequences in _all(datasets):
        ids_N, values_N, place_N = _exact(sequences)
        if rng is not None:
            values_N = values_N[np.lexsort((rng.random(len(place_N)), place_N))]
        inside_N = column_V[ids_N] >= 0
        column_N, values_N = column_V[ids_N[inside_N]], values_N[inside_N]
        positions += int((sequences.num_kept > 0).sum())
        ends = np.flatnonzero(np.diff(place_N[inside_N], append=-1)) + 1
        _add_pairs(ends, column_N, values_N, pairs_BB, sums_BB, first_BB)
    mean_B = np.diagonal(first_BB) / np.maximum(np.diagonal(pairs_BB), 1.0)
    shift_BB = mean_B[None, :] * first_BB
    sums_BB += pairs_BB * np.outer(mean_B, mean_B) - shift_BB - shift_BB.T
    return Moments(pairs_BB, sums_BB / np.maximum(pairs_BB, 1.0)), positions


@compiled()
def _add_pairs(
    ends: np.ndarray,
    column_N: np.ndarray,
    values_N: np.ndarray,
    pairs_BB: np.ndarray,
    sums_BB: np.ndarray,
    first_BB: np.ndarray,
) -> None:
    """Add each position's pairs: their number, z_i z_j, and z_i. About k^2 steps a position; dense products take B^2."""
    start = 0
    for end in ends:
        for m in range(start, end):
            for n in range(start, end):
                i, j = column_N[m], column_N[n]
                pairs_BB[i, j] += 1.0
                sums_BB[i, j] += values_N[m] * values_N[n]
                first_BB[i, j] += values_N[m]
        start = end


def eigen_gap(moments_BB: np.ndarray, hidden_size: int | None) -> tuple[float, int]:
    """Largest ratio of consecutive eigenvalues by size, and the number of eigenvalues before it.

    With d the search goes from d/2 to 3d/2, otherwise from 4 to three quarters of the block: the first few eigenvalues fall
    steeply in any data.
    """
    sizes_E = np.sort(np.abs(np.linalg.eigvalsh(moments_BB)))[::-1]
    size = len(sizes_E)
    first, last = (4, 3 * size // 4) if hidden_size is None else (max(hidden_size // 2, 2), 3 * hidden_size // 2)
    last = min(last, size - 1)
    if first > last:
        return 1.0, 0
    floor = sizes_E[0] * size * np.finfo(np.float64).eps
    ratios = np.maximum(sizes_E[first - 1 : last], floor) / np.maximum(sizes_E[first : last + 1], floor)
    return float(ratios.max()), first + int(ratios.argmax())


def subspace_overlap(moments_BB: np.ndarray, head_BD: np.ndarray) -> float:
    """Share of the head's span (and the normaliser's direction) in the top eigenvectors: ||U^T Q||_F^2 / rank, in [0, 1].

    By chance it is rank / block.
    """
    span = np.concatenate([head_BD.astype(np.float64), np.ones((len(head_BD), 1))], 1)
    basis, values, _ = np.linalg.svd(span, full_matrices=False)
    basis = basis[:, values > values[0] * 1e-10]
    eigenvalues, vectors = np.linalg.eigh(moments_BB)
    top = vectors[:, np.argsort(-np.abs(eigenvalues))[: basis.shape[1]]]
    return float(((top.T @ basis) ** 2).sum() / basis.shape[1])


def _all(datasets: Sequence[Released]) -> Iterator[Sequences]:
    """All sequences, some rows at a time."""
    for dataset in datasets:
        for start in range(0, dataset.num_rows, ROWS_AT_ONCE):
            yield dataset.take(np.arange(start, min(start + ROWS_AT_ONCE, dataset.num_rows)))

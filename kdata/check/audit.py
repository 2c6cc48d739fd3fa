"""The leakage audit: does a published logit dataset give the teacher's output projection away?

Logits are z = W h with W [V, d]: whoever knows enough of them recovers the span of W, and with it the hidden size d and the
projection up to a d x d matrix (Carlini et al., arXiv 2403.06634; Finlayson et al., 2403.09539). Two attacks work on sparse
rows, and this runs both on the dataset as it would be published:

1. Algebra. A context owns d free numbers, so only more than d distinct ids released for one context can determine W. The
   count is over all rows and sources that share the context, the actual tokens included (their log-probability is stored).
2. Statistics. Cov(z_i, z_j) = (W Cov(h) W^T)_ij can be estimated from all positions at which i and j are both stored,
   however few are stored at each. The co-moment matrix of a block of frequent ids has rank d (d + 1 for log-probabilities,
   whose normaliser is one more direction), so a gap after eigenvalue d, or an overlap of its eigenspace with the true head,
   tells. The null permutes the values within each position, which keeps everything but the pairing.

The verdict is FAIL, WARN, or "not recovered by these two attacks". There is no third attack here and no proof of safety.
Derived from the mean and rank of sparse rows, simulated on synthetic z = W h, and not calibrated on a large model: the
threshold of WARN is where the simulation starts to recover (about 7 pairs: subspace overlap 0.66; 70 pairs: 0.97).

Shapes: T positions, N entries, B ids of the block, E eigenvalues = B, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

from kdata.errors import ConfigError, DataError, DependencyError, MismatchError, MissingError
from kdata.format.kept import draw_mask
from kdata.format.sequences import Sequences
from kdata.observe.progress import Task
from kdata.store.dataset import Dataset

WARN_PAIRS = 5.0
OVERLAP_RECOVERED = 0.9
NULLS = 3
ROWS_AT_ONCE = 64
UNKNOWN_BLOCK = 512
NOT_RECOVERED = "not recovered by these two attacks"


@dataclass(frozen=True)
class Audit:
    """What the two attacks found.

    k_eff: most distinct ids released for one context. contexts_over: contexts with more than d (None: d unknown).
    block: ids in the co-moment matrix. median_pairs: median over pairs of ids of the positions that hold both. gap: largest
    ratio of consecutive eigenvalues near d (anywhere where d is unknown); gap_index: after which. null_gap: the largest
    such ratio under the null. overlap, null_overlap: share of the true head's span in the top eigenspace, None without head.
    """

    verdict: str
    reasons: list[str]
    positions: int
    hidden_size: int | None
    k_eff: int
    contexts_over: int | None
    block: int
    median_pairs: float
    gap: float
    gap_index: int
    null_gap: float
    overlap: float | None
    null_overlap: float | None

    def lines(self) -> list[str]:
        """The audit for a person, the verdict last."""
        d = "unknown" if self.hidden_size is None else f"{self.hidden_size:,}"
        found = [
            f"positions: {self.positions:,}; hidden size d: {d}",
            f"most distinct ids released for one context: {self.k_eff:,}"
            + ("" if self.contexts_over is None else f"; contexts with more than d: {self.contexts_over:,}"),
            f"median pair count on the {self.block:,} most frequent ids: {self.median_pairs:,.1f}",
            f"largest eigenvalue gap: {self.gap:.2f} after {self.gap_index:,}; null {self.null_gap:.2f}",
        ]
        if self.overlap is not None:
            found.append(f"overlap with the true head's span: {self.overlap:.3f}; null {self.null_overlap:.3f}")
        return [*found, *self.reasons, f"verdict: {self.verdict}"]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def audit(
    datasets: list[Dataset],
    *,
    hidden_size: int | None = None,
    head_VD: np.ndarray | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Audit:
    """Run both attacks on everything that has been or would be released of one teacher.

    Args:
        datasets: all of them, as what leaks adds up; of one vocabulary.
        hidden_size: d, where it is known.
        head_VD: float [V, d], the teacher's true output projection, as ground truth.
        block: ids in the co-moment matrix; None takes 2d, or 512 where d is unknown. Memory is 40 bytes times its square.
    Raises:
        DataError: no exact entries to attack.
        MismatchError: vocabularies differ, or the head is of another vocabulary or hidden size.
        ConfigError: a block that is not larger than d.
    """
    vocab_size = _check(datasets, head_VD, hidden_size)
    d = hidden_size or (None if head_VD is None else head_VD.shape[1])
    size = min(block or (UNKNOWN_BLOCK if d is None else 2 * d), vocab_size)
    if d is not None and size <= d + 1:
        raise ConfigError(f"a block of {size} ids cannot show a rank of {d}; set --block to {2 * d}")
    with Task("audit", 3 + NULLS, "passes") as task:
        k_eff, over = distinct_per_context(datasets, d)
        task.advance(1)
        ids_B = frequent_ids(datasets, vocab_size, size)
        task.advance(1)
        rng = np.random.default_rng(seed)
        moments, positions = co_moments(datasets, ids_B, vocab_size, None)
        task.advance(1)
        nulls = []
        for _ in range(NULLS):
            nulls.append(co_moments(datasets, ids_B, vocab_size, rng)[0])
            task.advance(1)
    return _judge(d, k_eff, over, positions, ids_B, moments, nulls, head_VD)


def _check(datasets: list[Dataset], head_VD: np.ndarray | None, hidden_size: int | None) -> int:
    if not datasets or not any(dataset.num_rows for dataset in datasets):
        raise DataError("there are no rows to audit")
    sizes = {dataset.info.vocab_size for dataset in datasets}
    if len(sizes) > 1:
        raise MismatchError(
            f"the datasets have vocabularies of {sorted(sizes)} ids; audit those of one teacher together"
        )
    size = sizes.pop()
    if head_VD is not None and (head_VD.shape[0] < size or hidden_size not in (None, head_VD.shape[1])):
        raise MismatchError(f"the head is {head_VD.shape}, the dataset has {size} ids and d is {hidden_size}")
    return size


# ------------------------------------------------------------------------------------------------------ algebra


def distinct_per_context(datasets: list[Dataset], hidden_size: int | None) -> tuple[int, int | None]:
    """Most distinct ids released for one context, and how many contexts have more than d.

    A context is input_ids[:t], hashed to 64 bits. Contexts that stand once need no set: two passes, memory 8 bytes for each
    position and 12 for each entry of a repeated context.
    """
    hashes_T = np.concatenate([context_hashes(s) for s in _all(datasets)] or [np.zeros(0, np.uint64)])
    values, times = np.unique(hashes_T, return_counts=True)
    repeated = values[times > 1]
    counts: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    for sequences in _all(datasets):
        own_T, ids_N, place_N = context_hashes(sequences), *_released(sequences)
        again_T = np.isin(own_T, repeated)
        counts.append(np.bincount(place_N, minlength=len(own_T))[~again_T])
        taken_N = again_T[place_N]
        pairs.append(np.stack([own_T[place_N[taken_N]], ids_N[taken_N].astype(np.uint64)], 1))
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
    terms_T = _mixed(sequences.token_ids.astype(np.uint64) + np.uint64(1)) * powers[place_T]
    before_T = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms_T, dtype=np.uint64)))
    return _mixed(before_T[:-1] - before_T[starts_T] + place_T.astype(np.uint64))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _released(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Ids whose probability a position tells, each once: kept entries, and the actual token where it is stored."""
    place_N = np.repeat(np.arange(len(sequences.token_ids)), sequences.num_kept)
    known_T = np.flatnonzero(np.isfinite(sequences.logprob))
    ids = np.concatenate([sequences.entry_ids, sequences.token_ids[known_T]]).astype(np.int64)
    pairs = np.unique(np.concatenate([place_N, known_T]) << 32 | ids)
    return pairs & 0xFFFFFFFF, pairs >> 32


# --------------------------------------------------------------------------------------------------- statistics


def frequent_ids(datasets: list[Dataset], vocab_size: int, size: int) -> np.ndarray:
    """The ids that stand most often among exact entries, int64 [B], rising."""
    counts_V = np.zeros(vocab_size, np.int64)
    for sequences in _all(datasets):
        ids_N, _, _ = _exact(sequences)
        counts_V += np.bincount(ids_N, minlength=vocab_size)
    if not counts_V.any():
        raise DataError("no position holds exact log-probabilities; the second attack has nothing to work on")
    size = min(size, int((counts_V > 0).sum()))
    return np.sort(np.argsort(-counts_V, kind="stable")[:size])


def _exact(sequences: Sequences) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, log-probabilities and positions of all that is stored exactly, by rising position and id.

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
    keys, first = np.unique(keys, return_index=True)  # of two the entry, which comes first
    return keys & 0xFFFFFFFF, values[first], keys >> 32


@dataclass(frozen=True)
class Moments:
    """Of a block: pairs float64 [B, B], positions that hold both ids; values float64 [B, B], their co-moment over those."""

    pairs_BB: np.ndarray
    values_BB: np.ndarray


def co_moments(
    datasets: list[Dataset], ids_B: np.ndarray, vocab_size: int, rng: np.random.Generator | None
) -> tuple[Moments, int]:
    """Co-moments of the block's log-probabilities about each id's own mean, and the number of positions.

    About the mean, as log-probabilities lie far below 0 and their mean would drown the rest in its noise. With `rng` the
    values of each position change places at random: the null.
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


@numba.njit(cache=True, nogil=True)
def _add_pairs(ends, column_N, values_N, pairs_BB, sums_BB, first_BB):
    """Add each position's pairs: how many, z_i z_j, and z_i. About k^2 steps a position; dense products take B^2."""
    start = 0
    for end in ends:
        for m in range(start, end):
            for n in range(start, end):
                i, j = column_N[m], column_N[n]
                pairs_BB[i, j] += 1.0
                sums_BB[i, j] += values_N[m] * values_N[n]
                first_BB[i, j] += values_N[m]
        start = end


def _judge(
    d: int | None, k_eff: int, over: int | None, positions: int, ids_B: np.ndarray, moments: Moments,
    nulls: list[Moments], head_VD: np.ndarray | None,
) -> Audit:  # fmt: skip
    size = len(ids_B)
    median = float(np.median(moments.pairs_BB[~np.eye(size, dtype=bool)])) if size > 1 else 0.0
    gap, index = eigen_gap(moments.values_BB, d)
    null_gap = max(eigen_gap(null.values_BB, d)[0] for null in nulls)
    overlap = null_overlap = None
    if head_VD is not None:
        overlap = subspace_overlap(moments.values_BB, head_VD[ids_B])
        null_overlap = max(subspace_overlap(null.values_BB, head_VD[ids_B]) for null in nulls)
    fails, warns = [], []
    if d is not None and k_eff > d:
        fails.append(
            f"FAIL: {k_eff:,} distinct ids are released for one context, more than d = {d:,} ({over:,} such contexts)"
        )
    if gap > null_gap and (d is None or index in (d, d + 1)):
        fails.append(
            f"FAIL: the eigenvalues drop {gap:.2f}-fold after {index:,}, under the null at most {null_gap:.2f}-fold"
        )
    if overlap is not None and null_overlap is not None and overlap > max(OVERLAP_RECOVERED, null_overlap):
        fails.append(f"FAIL: {overlap:.1%} of the head's span is recovered")
    if median >= WARN_PAIRS:
        warns.append(
            f"WARN: half of all pairs of frequent ids stand together {median:,.0f} times or more; more rows will tell"
        )
    if d is not None and size <= d + 1:
        warns.append(f"WARN: {size:,} distinct ids are stored in all: too few for the second attack at d = {d:,}")
    verdict = "FAIL" if fails else "WARN" if warns else NOT_RECOVERED
    return Audit(
        verdict, fails + warns, positions, d, k_eff, over, size, median, gap, index, null_gap, overlap, null_overlap
    )


def eigen_gap(moments_BB: np.ndarray, hidden_size: int | None) -> tuple[float, int]:
    """Largest ratio of consecutive eigenvalues by size, and after how many it comes.

    With d it is looked for from d/2 to 3d/2, else from 4 to three quarters of the block: the first few eigenvalues fall
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
    """Share of the head's span (with the normaliser's direction) in the top eigenvectors: ||U^T Q||_F^2 / rank, in [0, 1].

    Chance is rank / block.
    """
    span = np.concatenate([head_BD.astype(np.float64), np.ones((len(head_BD), 1))], 1)
    basis, values, _ = np.linalg.svd(span, full_matrices=False)
    basis = basis[:, values > values[0] * 1e-10]
    eigenvalues, vectors = np.linalg.eigh(moments_BB)
    top = vectors[:, np.argsort(-np.abs(eigenvalues))[: basis.shape[1]]]
    return float(((top.T @ basis) ** 2).sum() / basis.shape[1])


def _all(datasets: list[Dataset]) -> Iterator[Sequences]:
    """All sequences, some rows at a time."""
    for dataset in datasets:
        for start in range(0, dataset.num_rows, ROWS_AT_ONCE):
            yield dataset.take(np.arange(start, min(start + ROWS_AT_ONCE, dataset.num_rows)))


def load_head(folder: Path) -> np.ndarray:
    """The output projection float32 [V, d] of a model's folder: lm_head, or the embedding where they are tied.

    Raises:
        MissingError: no such tensor in the folder's safetensors.
        DependencyError: torch or safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise DependencyError("--head reads a model's weights: pip install 'kdata[train]'") from error
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, this object is no mapping
                for wanted in ("lm_head.weight", "embed_tokens.weight", "wte.weight", "embed_out.weight"):
                    if name.endswith(wanted):
                        found.setdefault(wanted, (path, name))
    for wanted in ("lm_head.weight", "embed_out.weight", "embed_tokens.weight", "wte.weight"):
        if wanted in found:
            path, name = found[wanted]
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(name).float().numpy()
    raise MissingError(f"{folder} has no safetensors with an output projection (lm_head or embed_tokens)")

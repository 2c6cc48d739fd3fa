"""Measure a dataset again: its teacher reads some rows, and the result is compared with what is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdata.errors import MismatchError
from kdata.format.codec import measure_error
from kdata.format.coded import TAIL_BOUND, logprob_bound
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept
from kdata.format.schema import CodecError, CodecInfo
from kdata.format.sequences import Sequences
from kdata.store.dataset import Dataset
from kdata.teachers.base import Readout, Teacher


@dataclass(frozen=True)
class Remeasured:
    """Differences between what is stored and what the teacher returns now.

    Attributes:
        codec: error of the exact entries, matched by id. An id that left the top k is not in the mean but counts in KL.
        max_logprob_nats: largest difference of an actual token's log-probability beyond what its rounding may be; 0: none.
        max_log_tail_nats: the same of log_tail.
        same_draws: share of positions with the same draws; None without draws. A uniform number within rounding of a
            border may fall on either side, so it can be below 1.
    """

    rows: int
    positions: int
    codec: CodecError
    max_logprob_nats: float
    max_log_tail_nats: float
    same_draws: float | None


def against_teacher(dataset: Dataset, teacher: Teacher, num_rows: int, *, seed: int = 0) -> Remeasured:
    """Let a teacher read `num_rows` rows again, and measure the error of what is stored.

    Args:
        teacher: has the weights that the dataset names.
        seed: seed of the choice of rows.
    Raises:
        MismatchError: the teacher has other weights.
    """
    ours, theirs = dataset.info.teacher, teacher.info
    if (ours.weights_hash, ours.revision) != (theirs.weights_hash, theirs.revision):
        raise MismatchError(
            f"{theirs.model} is not the teacher of {dataset.path}: its weights are "
            f"{theirs.weights_hash or theirs.revision}, not {ours.weights_hash or ours.revision}; name {ours.model}"
        )
    rows = np.sort(np.random.default_rng(seed).permutation(dataset.num_rows)[:num_rows])
    keep = KeepConfig.of(dataset.info.codec)
    stored = dataset.take(rows)
    ids = [stored.token_ids[a:b] for a, b in stored.spans()]
    readouts = teacher.read(ids, keep)
    compared = [
        _compare(_one(dataset, row), readout, dataset.info.codec) for row, readout in zip(rows, readouts, strict=True)
    ]
    counts = np.array([positions for positions, *_ in compared], np.float64)
    errors = [error for _, error, _, _ in compared]
    share = counts / max(counts.sum(), 1)
    return Remeasured(
        rows=len(rows),
        positions=int(counts.sum()),
        codec=CodecError(
            mean_nats=float(share @ [e.mean_nats for e in errors]),
            max_nats=max((e.max_nats for e in errors), default=0.0),
            kl_nats=float(share @ [e.kl_nats for e in errors]),
            max_sum=max((e.max_sum for e in errors), default=0.0),
        ),
        max_logprob_nats=max((logprob for _, _, logprob, _ in compared), default=0.0),
        max_log_tail_nats=max((tail for _, _, _, tail in compared), default=0.0),
        same_draws=_same_draws(dataset, rows, readouts) if dataset.info.tail == "draws" else None,
    )


def _one(dataset: Dataset, row: int) -> Sequences:
    return dataset.take(np.array([row]))


def _compare(stored: Sequences, fresh: Readout, info: CodecInfo) -> tuple[int, CodecError, float, float]:
    """Positions compared, error of exact entries, largest differences of logprob and log_tail, of one sequence."""
    recorded = stored.rank > 0
    # Rows of version 3 of the codec packed may stand in a dataset of an earlier one, so its rounding is allowed to these too.
    is_coded = info.id == "packed"
    rounding = logprob_bound(fresh.logprob) if is_coded else np.abs(fresh.logprob) * 2.0**-11
    logprob = (np.abs(stored.logprob - fresh.logprob) - rounding)[recorded]
    # A tail of e^-16 or less is within float32's noise, at least where the engine returns log-probabilities.
    heavy = recorded & (stored.log_tail > -12)
    tail = np.abs(stored.log_tail - fresh.log_tail)[heavy] - (TAIL_BOUND if is_coded else 0)
    error = measure_error(_matched(stored, fresh), _entries_of(stored), info)
    assert error is not None or not stored.num_kept.any()
    return (
        int((stored.num_kept > 0).sum()),
        error or CodecError(mean_nats=0, max_nats=0, kl_nats=0, max_sum=0),
        float(logprob.max(initial=0.0)),
        float(tail.max(initial=0.0)),
    )


def _entries_of(stored: Sequences) -> Kept:
    return Kept(stored.num_exact, stored.num_kept - stored.num_exact, stored.entry_ids, stored.entry_logprobs)


def _matched(stored: Sequences, fresh: Readout) -> Kept:
    """The stored entries with the fresh log-probability of each id, the stored one where the id is no longer kept."""
    where = np.repeat(np.arange(len(stored.num_kept)), stored.num_kept).astype(np.int64) << 32
    again = np.repeat(np.arange(len(fresh.kept.num_kept)), fresh.kept.num_kept).astype(np.int64) << 32
    exact = ~fresh.kept.is_draw
    keys = (again | fresh.kept.ids)[exact]
    order = np.argsort(keys)
    wanted = where | stored.entry_ids
    place = np.minimum(np.searchsorted(keys[order], wanted), max(len(keys) - 1, 0))
    logprobs = stored.entry_logprobs.copy()
    if len(keys):
        hit = keys[order][place] == wanted
        logprobs[hit] = fresh.kept.logprobs[exact][order][place[hit]]
    return Kept(stored.num_exact, stored.num_kept - stored.num_exact, stored.entry_ids, logprobs)


def _same_draws(dataset: Dataset, rows: np.ndarray, readouts: list[Readout]) -> float:
    """Share of positions with entries whose drawn ids are the stored ones."""
    same = total = 0
    for row, fresh in zip(rows, readouts, strict=True):
        stored = _one(dataset, row)
        ours, theirs = (
            np.split(ids, np.cumsum(counts)[:-1])
            for ids, counts in (
                (stored.entry_ids, stored.num_kept),
                (fresh.kept.ids, fresh.kept.num_kept),
            )
        )
        for t in np.flatnonzero(stored.num_kept):
            a, b = ours[t][stored.num_exact[t] :], theirs[t][fresh.kept.num_exact[t] :]
            same += int(np.array_equal(a, b))
            total += 1
    return same / max(total, 1)

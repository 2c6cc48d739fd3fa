"""Does a dataset say what its teacher believes? A teacher reads some rows again, and what is stored is compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdata.errors import MismatchError
from kdata.format.codec import measure_error
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept
from kdata.format.schema import CodecError, CodecInfo
from kdata.format.sequences import Sequences
from kdata.store.dataset import Dataset
from kdata.teachers.base import Readout, Teacher


@dataclass(frozen=True)
class Remeasured:
    """What storing cost, measured again: error of the exact entries; the largest differences of the actual tokens'
    log-probabilities (stored as float16) and of log_tail, in nats; the share of positions whose draws came out the same,
    None without draws (a uniform within rounding of a border may fall either way)."""

    rows: int
    positions: int
    codec: CodecError
    max_logprob_nats: float
    max_log_tail_nats: float
    same_draws: float | None


def against_teacher(dataset: Dataset, teacher: Teacher, num_rows: int, *, seed: int = 0) -> Remeasured:
    """Have a teacher read `num_rows` rows again, and measure the error of what is stored.

    Args:
        teacher: with the weights that the dataset names.
        seed: of the choice of rows.
    Returns:
        codec: error of the exact entries, by id (an id that changed places at the border of the top k is left out of the
        mean but counts in KL); the largest difference of the actual tokens' log-probabilities and of the tails, in nats.
    Raises:
        MismatchError: another teacher.
    """
    ours, theirs = dataset.info.teacher, teacher.info
    if (ours.weights_hash, ours.revision) != (theirs.weights_hash, theirs.revision):
        raise MismatchError(
            f"{theirs.model} is not the teacher of {dataset.path} ({ours.model}): weights "
            f"{theirs.weights_hash or theirs.revision} instead of {ours.weights_hash or ours.revision}"
        )
    rows = np.sort(np.random.default_rng(seed).permutation(dataset.num_rows)[:num_rows])
    keep = KeepConfig.of(dataset.info.codec)
    stored = dataset.take(rows)
    ids = [stored.token_ids[a:b] for a, b in stored.spans()]
    readouts = teacher.read(ids, keep)
    found = [_compare(stored.one(number), readout, dataset.info.codec) for number, readout in enumerate(readouts)]
    counts = np.array([positions for positions, *_ in found], np.float64)
    errors = [error for _, error, _, _ in found]
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
        max_logprob_nats=max((logprob for _, _, logprob, _ in found), default=0.0),
        max_log_tail_nats=max((tail for _, _, _, tail in found), default=0.0),
        same_draws=_same_draws(dataset, rows, readouts) if dataset.info.tail == "draws" else None,
    )


def _compare(stored: Sequences, fresh: Readout, info: CodecInfo) -> tuple[int, CodecError, float, float]:
    """Positions compared, error of exact entries, largest differences of logprob and log_tail, of one sequence."""
    recorded = stored.rank > 0
    logprob = np.abs(stored.logprob - fresh.logprob)[recorded]
    # A tail of e^-16 or less is float32's own noise, on the path of the engine's log-probabilities at least.
    heavy = recorded & (stored.log_tail > -12)
    tail = np.abs(stored.log_tail - fresh.log_tail)[heavy]
    error = measure_error(_matched(stored, fresh), _entries_of(stored), info)
    assert error is not None or not recorded.any()
    return (
        int(recorded.sum()),
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
    """Share of recorded positions whose drawn ids are those that were stored."""
    same = total = 0
    for row, fresh in zip(rows, readouts, strict=True):
        stored = dataset[int(row)]
        ours, theirs = (
            np.split(ids, np.cumsum(counts)[:-1])
            for ids, counts in (
                (stored.entry_ids, stored.num_kept),
                (fresh.kept.ids, fresh.kept.num_kept),
            )
        )
        for t in np.flatnonzero(stored.rank > 0):
            a, b = ours[t][stored.num_exact[t] :], theirs[t][fresh.kept.num_exact[t] :]
            same += int(np.array_equal(a, b))
            total += 1
    return same / max(total, 1)

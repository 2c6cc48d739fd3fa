"""The average of several teachers' sparse probability distributions, position by position.

The target is p = sum_m w_m p_m, where p_m is the distribution of teacher m and w_m >= 0 its share, sum_m w_m = 1. Of
each p_m only a sparse part is known. The payload is taken as exact; its error of storage is in its own manifest.

Draws (hybrid, sampled, threshold). Payload m has exact ids E_m, where p_m(i) is known, and draws outside of them with weights
v_m(i), 0 where an id was not drawn, such that E[v_m(i)] = p_m(i). Let v_m(i) = p_m(i) on E_m too. Stored is

    exact   i in every E_m:  p(i) = sum_m w_m p_m(i)
    draw    other i:         v(i) = sum_m w_m v_m(i),  where it is not 0
    tail    sum_m w_m (tail_m + sum of p_m over E_m outside the intersection)  =  1 - sum of the exact entries

By linearity E[v(i)] = sum_m w_m E[v_m(i)] = p(i): the result is unbiased, whether the draws of different teachers are
independent or not, as the E_m do not depend on the draws. An id that one teacher knows exactly and another does not becomes a
draw whose weight is in part certain. Where tau is 1 the draws of m sum to tail_m, so those of the result sum to its tail.

Ghost (topk, adaptive). Payload m has the probabilities of its kept ids K_m, the largest, and the exact mass tail_m of the
others. Stored is, on the union U of the K_m,

    exact   i in U:  l(i) = sum of w_m p_m(i) over those m that keep i
    tail    sum_m w_m tail_m

The sum of all is sum_m w_m (mass of K_m + tail_m) = 1. l(i) is a lower bound of p(i): what a teacher that does not keep i
believes of it is not known, and stays in the tail. It is at most c_m, the smallest kept probability of m, for each such id,
and at most tail_m for all of them, so that

    unknown  u = sum over U of p(i) - l(i)  <=  sum_m w_m min(tail_m, |U outside K_m| c_m)

u is the total variation between what is stored and p itself lumped in the same way (U, and one bucket for the rest): a mass u
lies in the bucket that belongs to kept ids. The bound is returned for every position.

Where only one teacher has a share, the result equals that teacher's payload.

Shapes: S rows, T tokens, M teachers, N pooled entries, G different (position, id) of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdata.errors import DataError
from kdata.format.kept import draw_mask
from kdata.format.sequences import Sequences


@dataclass(frozen=True)
class Average:
    """The average as decoded sequences, and the bound of `unknown` above at each position, float64 [T] (0 with draws).

    The actual token's logprob is exact. Its rank is 0 and the entropy NaN where several teachers have a share: neither
    follows from sparse distributions. Nor does log_z, the sum over the vocabulary at another temperature: there is none.
    """

    sequences: Sequences
    unknown: np.ndarray


def mix(
    members: list[Sequences], weights_SM: np.ndarray, tail: Literal["ghost", "draws"], *, keeps_some: bool = False
) -> Average:
    """Average the same S rows of M payloads.

    Args:
        members: M decodings of the same rows (same token ids and target masks; the caller has checked).
        weights_SM: float64 [S, M], shares of the teachers in each row, >= 0, each row sums to 1.
        tail: of all payloads.
        keeps_some: the payloads keep entries at some targets only. At the others, the same ones in all payloads, the numbers
            of each teacher are averaged all the same.
    Raises:
        DataError: a target position at which a teacher with a share has nothing recorded, or no entries where another has.
    """
    first = members[0]
    weights_TM = np.repeat(weights_SM, np.diff(first.offsets), axis=0)
    has_entries_TM = np.stack([m.num_kept for m in members], 1) > 0
    kept_T = (has_entries_TM | (weights_TM == 0)).all(1)
    recorded_T = kept_T
    if keeps_some:
        numbers_TM = np.isfinite(np.stack([m.logprob for m in members], 1)) | (weights_TM == 0)
        recorded_T = kept_T | (numbers_TM.all(1) & ~(has_entries_TM & (weights_TM > 0)).any(1))
    if (first.target_mask & ~recorded_T).any():
        what = "keeps no distribution where another does" if keeps_some else "has nothing recorded at a target position"
        raise DataError(f"one of the payloads {what}; reread its rows (kdata reread)")
    weights_TM[~recorded_T] = 0.0
    pooled = _pool(members, np.where(kept_T[:, None], weights_TM, 0.0))
    drawn_G = np.zeros(len(pooled.ids), bool)
    if tail == "draws":
        drawn_G = pooled.num_known < (weights_TM > 0).sum(1)[pooled.position]
    tokens = len(weights_TM)
    num_kept_T = np.bincount(pooled.position, minlength=tokens).astype(np.int32)
    num_drawn_T = np.bincount(pooled.position[drawn_G], minlength=tokens).astype(np.int32)
    order = _in_order(pooled, drawn_G, num_kept_T - num_drawn_T, num_drawn_T)
    sequences = dataclasses.replace(
        first,
        logprob=_average_log([m.logprob for m in members], weights_TM, recorded_T),
        rank=_own([m.rank for m in members], weights_TM, 0),
        log_tail=_log_tail(members, weights_TM, recorded_T, pooled, drawn_G),
        entropy=_own([m.entropy for m in members], weights_TM, np.nan),
        num_exact=num_kept_T - num_drawn_T,
        num_kept=num_kept_T,
        log_z=None,
        entry_offsets=np.concatenate(([0], np.cumsum(num_kept_T, dtype=np.int64))),
        entry_ids=pooled.ids[order],
        entry_logprobs=np.log(pooled.weight[order]).astype(np.float32),
        draw_logprobs=None,
    )
    unknown_T = (
        _unknown(members, np.where(kept_T[:, None], weights_TM, 0.0), num_kept_T)
        if tail == "ghost"
        else np.zeros(tokens)
    )
    return Average(sequences, unknown_T)


@dataclass(frozen=True)
class _Pool:
    """Different (position, id), in that order: position int64, ids int32, weight float64 sum_m w_m v_m, certain float64 its
    part from exact entries, num_known how many teachers know it exactly; [G] each."""

    position: np.ndarray
    ids: np.ndarray
    weight: np.ndarray
    certain: np.ndarray
    num_known: np.ndarray


def _pool(members: list[Sequences], weights_TM: np.ndarray) -> _Pool:
    """Entries of all teachers that have a share, summed by position and id, teacher after teacher."""
    keys, weights, known = [], [], []
    for number, member in enumerate(members):
        share_N = np.repeat(weights_TM[:, number], member.num_kept)
        position_N = np.repeat(np.arange(len(weights_TM), dtype=np.int64), member.num_kept)
        place_N = np.arange(len(share_N)) - np.repeat(member.entry_offsets[:-1], member.num_kept)
        counts_N = share_N > 0
        keys.append((position_N << 32 | member.entry_ids)[counts_N])
        weights.append(share_N[counts_N] * np.exp(member.entry_logprobs[counts_N].astype(np.float64)))
        known.append((place_N < np.repeat(member.num_exact, member.num_kept))[counts_N])
    key_N, weight_N, known_N = np.concatenate(keys), np.concatenate(weights), np.concatenate(known)
    order = np.argsort(key_N, kind="stable")
    key_N, weight_N, known_N = key_N[order], weight_N[order], known_N[order]
    starts = np.flatnonzero(np.diff(key_N, prepend=-1))
    key_G = key_N[starts]
    sums = [np.add.reduceat(values, starts) if len(starts) else np.zeros(0) for values in (
        weight_N, np.where(known_N, weight_N, 0.0), known_N.astype(np.int64)
    )]  # fmt: skip
    return _Pool(key_G >> 32, (key_G & 0xFFFFFFFF).astype(np.int32), *sums)


def _in_order(pooled: _Pool, drawn_G: np.ndarray, num_exact_T: np.ndarray, num_drawn_T: np.ndarray) -> np.ndarray:
    """Places int64 [G]: at each position exact entries by falling probability, then draws by rising id.

    The rows of a grid are sorted, not all entries at once: 58k instead of 25k tokens/s of the whole command (topk 64).
    """
    exact, starts_T = np.flatnonzero(~drawn_G), np.cumsum(num_exact_T) - num_exact_T
    filled_TK = np.arange(num_exact_T.max(initial=0)) < num_exact_T[:, None]
    falling_TK = np.full(filled_TK.shape, np.inf)
    falling_TK[filled_TK] = -pooled.weight[exact]
    within_TK = np.argsort(falling_TK, axis=1, kind="stable")
    order_G, draws = np.empty(len(drawn_G), np.int64), draw_mask(num_exact_T, num_drawn_T)
    order_G[~draws] = exact[(starts_T[:, None] + within_TK)[filled_TK]]
    order_G[draws] = np.flatnonzero(drawn_G)
    return order_G


def _log_tail(
    members: list[Sequences], weights_TM: np.ndarray, recorded_T: np.ndarray, pooled: _Pool, drawn_G: np.ndarray
) -> np.ndarray:
    """Log of the mass outside the exact entries, float32 [T]; NaN where nothing is recorded."""
    tails_TM = np.exp(np.stack([m.log_tail for m in members], 1).astype(np.float64))
    tail_T = np.where(weights_TM > 0, weights_TM * tails_TM, 0.0).sum(1)
    tail_T += np.bincount(pooled.position[drawn_G], pooled.certain[drawn_G], minlength=len(tail_T))
    with np.errstate(divide="ignore"):
        log_tail_T = np.log(np.minimum(tail_T, 1.0))
    return np.where(recorded_T, log_tail_T, np.nan).astype(np.float32)


def _average_log(logs: list[np.ndarray], weights_TM: np.ndarray, recorded_T: np.ndarray) -> np.ndarray:
    """log sum_m w_m e^logs_m, float32 [T]; NaN where nothing is recorded."""
    probs_TM = np.exp(np.stack(logs, 1).astype(np.float64))
    with np.errstate(divide="ignore"):
        average_T = np.log(np.where(weights_TM > 0, weights_TM * probs_TM, 0.0).sum(1))
    return np.where(recorded_T, average_T, np.nan).astype(np.float32)


def _own(values: list[np.ndarray], weights_TM: np.ndarray, unknown: float) -> np.ndarray:
    """The value of the only teacher with a share; `unknown` where several teachers have one, or none."""
    chosen_T = np.take_along_axis(np.stack(values, 1), weights_TM.argmax(1)[:, None], 1)[:, 0]
    return np.where((weights_TM > 0).sum(1) == 1, chosen_T, unknown).astype(chosen_T.dtype)


def _unknown(members: list[Sequences], weights_TM: np.ndarray, num_kept_T: np.ndarray) -> np.ndarray:
    """Upper bound of the mass in the tail that belongs to kept ids, float64 [T]."""
    bound_T = np.zeros(len(weights_TM))
    for number, member in enumerate(members):
        live_T = weights_TM[:, number] > 0
        smallest_T = np.exp(member.entry_logprobs[member.entry_offsets[1:][live_T] - 1].astype(np.float64))
        missing_T = num_kept_T[live_T] - member.num_kept[live_T]
        tail_T = np.exp(member.log_tail[live_T].astype(np.float64))
        bound_T[live_T] += weights_TM[live_T, number] * np.minimum(tail_T, missing_T * smallest_T)
    return bound_T

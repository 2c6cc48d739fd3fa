"""The teacher's entries as the student's: which are kept at a position, with which ids and probabilities.

`kdata.jobs.retokenize` says what of a row comes where, and has the meaning of the maps; here are the arrays.

Shapes: T tokens of the teacher, S of the student, N entries, P positions with entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdata.corpus.align import Alignment
from kdata.format.kept import Kept
from kdata.format.sequences import Sequences
from kdata.store.token_map import Beginnings, TokenMapper

LEAST = 1e-12  # probability of a token that was read, where what is stored leaves it nothing


@dataclass(frozen=True)
class EntryMaps:
    """theirs, own: bytes of the ids of teacher and student. map_V: see `token_map`. mapper: the same for other texts.
    beginnings: of the teacher's tokens, None where nothing is kept inside of them. spare: int32, the student's ids that no id
    of the teacher is mapped to. draws: whether the result holds some."""

    theirs: list[bytes | None]
    own: list[bytes | None]
    map_V: np.ndarray
    mapper: TokenMapper
    beginnings: Beginnings | None
    spare: np.ndarray
    draws: bool


def bytes_before(maps: EntryMaps, ids_T: np.ndarray, bytes_T: np.ndarray, aligned: Alignment) -> np.ndarray:
    """Bytes of the teacher's token before each token of the student, int64 [S]; -1 where nothing is kept inside.

    Args:
        ids_T: int32 [T], the teacher's actual tokens. bytes_T: int64 [T], bytes of the text that each stands for.
    """
    at_S, rest_S = aligned.within_S, aligned.rest_S
    before_S = np.where(rest_S == bytes_T[at_S], 0, -1)  # num_bytes leaves out a space before the text
    if maps.beginnings is not None:
        inside_S = np.flatnonzero(before_S < 0)
        before_S[inside_S] = np.maximum(maps.beginnings.size_V[ids_T[at_S[inside_S]]] - rest_S[inside_S], -1)
    return before_S


def mapped(
    maps: EntryMaps,
    theirs_T: np.ndarray,
    stored: Sequences,
    at_P: np.ndarray,
    before_P: np.ndarray,
    actual_P: np.ndarray,
) -> tuple[Kept, np.ndarray, float]:
    """Entries of the teacher at positions at_P (int64 [P]) as the student's.

    Args:
        theirs_T: int32 [T], the teacher's actual tokens. before_P: int64 [P], bytes of these that stand before the student's
            token. actual_P: int32 [P], the student's at those positions.
    Returns:
        The entries, the log of the mass of the tail, float32 [P], and the mass that the map dropped, summed.
    """
    counts_P, first_P = stored.num_kept[at_P].astype(np.int64), stored.entry_offsets[at_P]
    place_N = np.repeat(np.arange(len(at_P)), counts_P)
    entry_N = np.arange(len(place_N)) - np.repeat(np.cumsum(counts_P) - counts_P, counts_P) + first_P[place_N]
    theirs_N, weight_N = stored.entry_ids[entry_N], np.exp(stored.entry_logprobs[entry_N].astype(np.float64))
    tail_P = np.exp(stored.log_tail[at_P].astype(np.float64))
    mapped_N = maps.map_V[theirs_N]
    inside_N = before_P[place_N] > 0
    if inside_N.any():
        goes_on_N = ~inside_N
        goes_on_N[inside_N], mapped_N[inside_N] = _inside(
            maps, theirs_T[at_P], before_P, place_N[inside_N], theirs_N[inside_N]
        )
        place_N, theirs_N, weight_N, mapped_N = (
            values[goes_on_N] for values in (place_N, theirs_N, weight_N, mapped_N)
        )
        whole_P = np.bincount(place_N, weights=weight_N, minlength=len(at_P)) + (0 if maps.draws else tail_P)
        whole_P[(before_P == 0) | (whole_P == 0)] = 1
        weight_N, tail_P = weight_N / whole_P[place_N], tail_P / whole_P
    mapped_N = np.where(theirs_N == theirs_T[at_P][place_N], actual_P[place_N], mapped_N)
    known_N = mapped_N >= 0
    dropped_P = np.bincount(place_N[~known_N], weights=weight_N[~known_N], minlength=len(at_P))
    keys, where = np.unique(place_N[known_N] << 32 | mapped_N[known_N].astype(np.int64), return_inverse=True)
    sums = np.bincount(where, weights=weight_N[known_N], minlength=len(keys))
    positions, ids = keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32)
    if not maps.draws:  # the largest first, as exact entries are
        order = np.lexsort((ids, -sums, positions))
        positions, ids, sums = positions[order], ids[order], sums[order]
    counts = np.bincount(positions, minlength=len(at_P)).astype(np.int32)
    none = np.zeros_like(counts)
    exact, drawn = (none, counts) if maps.draws else (counts, none)
    with np.errstate(divide="ignore"):
        logprobs = np.log(sums).astype(np.float32)
        log_tail_P = np.zeros(len(at_P)) if maps.draws else np.log(np.minimum(tail_P + dropped_P, 1.0))
    return Kept(exact, drawn, ids, logprobs), log_tail_P.astype(np.float32), float(dropped_P.sum())


def _inside(
    maps: EntryMaps, actual_P: np.ndarray, before_P: np.ndarray, place_N: np.ndarray, theirs_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which entries begin with the bytes that stand before and go on, bool [N], and the student's ids for what is left of
    them, int32 [N].

    Args:
        actual_P: int32 [P], the teacher's actual tokens at the positions.
    """
    assert maps.beginnings is not None
    span_P = np.zeros((2, len(actual_P)), np.int64)
    for place in np.unique(place_N).tolist():
        content = maps.theirs[actual_P[place]] or b""
        span_P[:, place] = maps.beginnings.span(content[: before_P[place]])
    first_N, stop_N = span_P[:, place_N]
    order_N = maps.beginnings.places_of(theirs_N)
    goes_on_N = (order_N >= first_N) & (order_N < stop_N)
    before_N = before_P[place_N][goes_on_N]
    goes_on_N[goes_on_N] = maps.beginnings.size_V[theirs_N[goes_on_N]] > before_N
    mapped_N = np.full(len(theirs_N), -1, np.int32)
    pairs, where = np.unique(
        theirs_N[goes_on_N].astype(np.int64) << 32 | before_P[place_N][goes_on_N], return_inverse=True
    )
    rests = [(maps.theirs[pair >> 32] or b"")[pair & 0xFFFFFFFF :] for pair in pairs.tolist()]
    mapped_N[goes_on_N] = np.array(maps.mapper.ids_of(rests), np.int32)[where]
    return goes_on_N, mapped_N


def by_falling_probability(
    maps: EntryMaps, theirs_T: np.ndarray, stored: Sequences, at_P: np.ndarray, merged_T: np.ndarray, *, ranks: bool
) -> tuple[Kept, np.ndarray, np.ndarray, float]:
    """Exact entries of the teacher at positions at_P (int64 [P]), for objectives that compare sorted probabilities.

    A position whose actual token needs a place of its own, and for which the student has no id to spare, has no entries.

    Args:
        theirs_T: int32 [T], the teacher's actual tokens. merged_T: bool [T], those in chunks of two or more of them.
    Returns:
        The entries, the log of the mass of the tail, float32 [P], the rank of the teacher's actual token among the entries
        (see the file), int32 [P], and the mass of tokens that the student lacks, summed.
    """
    counts_P, first_P = stored.num_exact[at_P].astype(np.int64), stored.entry_offsets[at_P]
    place_N = np.repeat(np.arange(len(at_P)), counts_P)
    rank_N = np.arange(len(place_N)) - np.repeat(np.cumsum(counts_P) - counts_P, counts_P)
    entry_N = rank_N + first_P[place_N]
    theirs_N, p_N = stored.entry_ids[entry_N], np.exp(stored.entry_logprobs[entry_N].astype(np.float64))
    tail_P = np.exp(stored.log_tail[at_P].astype(np.float64))
    actual_P, added_N = np.full(len(at_P), -1), np.zeros(len(place_N), bool)
    if ranks:
        own_N, lacked = np.where(rank_N < len(maps.own), rank_N, -1), 0.0
    else:
        actual_P = np.where(merged_T[at_P], theirs_T[at_P], -1)
        is_kept_P = np.bincount(place_N[theirs_N == actual_P[place_N]], minlength=len(at_P)) > 0
        added_A = np.flatnonzero((actual_P >= 0) & ~is_kept_P)
        least_P = np.minimum.reduceat(p_N, np.cumsum(counts_P) - counts_P) if len(p_N) else tail_P
        p_A = np.exp(stored.logprob[at_P[added_A]].astype(np.float64))
        p_A = np.minimum(p_A, np.minimum(least_P, tail_P)[added_A])  # a rounded one may be above what is kept
        p_A = np.maximum(p_A, LEAST)  # and a rounded tail may be 0
        tail_P[added_A] -= p_A
        place_N, theirs_N = np.append(place_N, added_A), np.append(theirs_N, actual_P[added_A])
        p_N, added_N = np.append(p_N, p_A), np.append(added_N, np.ones(len(added_A), bool))
        order = np.argsort(place_N, kind="stable")
        place_N, theirs_N, p_N, added_N = place_N[order], theirs_N[order], p_N[order], added_N[order]
        own_N = maps.map_V[theirs_N].astype(np.int64)
        lacked = float(p_N[own_N < 0].sum())
        own_N = _with_spare(maps.spare, place_N, own_N)
        lost_P = np.bincount(place_N[(theirs_N == actual_P[place_N]) & (own_N < 0)], minlength=len(at_P)) > 0
        own_N = np.where(lost_P[place_N], -1, own_N)
        tail_P[lost_P] = 1.0  # as where nothing is kept
    known_N = own_N >= 0
    tail_P += np.bincount(place_N[~known_N], weights=p_N[~known_N], minlength=len(at_P))
    keys, where = np.unique(place_N[known_N] << 32 | own_N[known_N], return_inverse=True)
    sums, added = np.bincount(where, p_N[known_N], len(keys)), np.bincount(where, ~added_N[known_N], len(keys)) == 0
    positions, ids = keys >> 32, (keys & 0xFFFFFFFF).astype(np.int32)
    order = np.lexsort((ids, -sums, added, positions))
    counts = np.bincount(positions, minlength=len(at_P)).astype(np.int32)
    # Where the actual token of each position went, in the new order.
    actual_N = (theirs_N == actual_P[place_N])[known_N]
    ranks_P, place_of = np.zeros(len(at_P), np.int32), np.argsort(order)
    new, at = place_of[where[actual_N]], place_N[known_N][actual_N]
    ranks_P[at] = new - (np.cumsum(counts) - counts)[at] + 1 + added[where[actual_N]]
    with np.errstate(divide="ignore"):
        log_tail_P = np.log(np.clip(tail_P, 0.0, 1.0)).astype(np.float32)
        logprobs = np.log(sums[order]).astype(np.float32)
    return Kept(counts, np.zeros_like(counts), ids[order], logprobs), log_tail_P, ranks_P, lacked


def _with_spare(spare: np.ndarray, place_N: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """The ids of entries, int64 [N], -1 of those that the student lacks: these get spare ids, at each position the first the
    first one, and -1 where none is left.

    Args:
        place_N: int64 [N], rising, the position of each entry; at a position they fall by probability.
    """
    lacked = np.flatnonzero(own_N < 0)
    before = np.searchsorted(place_N[lacked], place_N[lacked], side="left")
    number = np.arange(len(lacked)) - before
    given = own_N.copy()
    if len(spare):
        given[lacked] = np.where(number < len(spare), spare[np.minimum(number, len(spare) - 1)], -1)
    return given

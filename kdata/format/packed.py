"""The arithmetic of the packed codec: byte planes, gaps, counts.

Exact entries. At one position the entries fall from the first. Entry r is u_r grid steps of 1/16 nat below the first, and its
code is the gap u_r - u_(r-1) to the value coded before, so rounding does not add up (closed loop).
Codes 0 to 239 are that many steps, 240 to 255 longer and longer jumps (`GAP_STEPS`). The first entry's own height is not
stored: the mass of all exact entries is 1 - e^log_tail, exactly, and fixes it.

    logprob_r = log(1 - e^log_tail) - log(sum_j e^(-u_j/16)) - u_r/16

computed in float64 and rounded down to float32: the sum never exceeds 1 - tail. Rounding is to the nearest step, so the
error is at most 1/32 nat plus the shift of the sum.

Draws. With N draws from the tail, entry i was drawn c_i times and weighs tail * c_i / N. c_i is stored, so draws are exact.
Where N differs from position to position (kind threshold), it is the sum of the c_i.

The kernels are compiled (numba). They decode 64 entries per token about six times as fast as numpy, because the gap sum, the
normalization and the rounding are one pass over the data.

Shapes: T tokens, N exact entries, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdata.errors import DataError, ShapeError
from kdata.format.compiled import compiled


def join_bytes(planes: list[np.ndarray]) -> np.ndarray:
    """Little-endian byte planes, one to three of uint8 [N], as int32 [N]. Raises ShapeError where they differ in length."""
    if not planes or any(plane.dtype != np.uint8 or len(plane) != len(planes[0]) for plane in planes):
        raise ShapeError("the byte planes of the ids are not bytes of equal number")
    if len(planes) == 1:
        return planes[0].astype(np.int32)
    joined_N = np.empty(len(planes[0]), np.int32)
    _join_bytes(planes[0], planes[1], planes[-1], len(planes) == 3, joined_N)
    return joined_N


@compiled()
def _join_bytes(
    low_N: np.ndarray, middle_N: np.ndarray, high_N: np.ndarray, has_high: bool, joined_N: np.ndarray
) -> None:
    if has_high:
        for n in range(len(low_N)):
            joined_N[n] = low_N[n] | np.int32(middle_N[n]) << 8 | np.int32(high_N[n]) << 16
    else:
        for n in range(len(low_N)):
            joined_N[n] = low_N[n] | np.int32(middle_N[n]) << 8


STEPS_PER_NAT = 16
LINEAR_CODES = 240

# Steps that a gap code stands for: exact up to 239 (14.9 nats), then growing by a quarter up to 8,000 (500 nats).
GAP_STEPS = np.concatenate([np.arange(LINEAR_CODES), np.round(LINEAR_CODES * 1.25 ** np.arange(1, 17))]).astype(
    np.int32
)
# e^(-u/16) for u grid steps; beyond 800 nats a float64 is 0 anyway.
_EXP = np.exp(-np.arange(800 * STEPS_PER_NAT) / STEPS_PER_NAT)


def planes(name: str, ids_N: np.ndarray, num_bytes: int) -> dict[str, np.ndarray]:
    """Split ids into little-endian byte planes NAME_0 ... uint8 [N] each.

    Raises:
        ShapeError: an id does not fit.
    """
    if len(ids_N) and (int(ids_N.max()) >> (8 * num_bytes) or int(ids_N.min()) < 0):
        raise ShapeError(f"ids from {int(ids_N.min())} to {int(ids_N.max())} do not fit {num_bytes} bytes")
    grid = np.ascontiguousarray(ids_N, "<i4").view(np.uint8).reshape(-1, 4)
    return {f"{name}_{n}": np.ascontiguousarray(grid[:, n]) for n in range(num_bytes)}


def join_planes(name: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Ids int32 [N] from the byte planes NAME_0, NAME_1 ... in `columns`."""
    return join_bytes([columns[f"{name}_{number}"] for number in range(3) if f"{name}_{number}" in columns])


def steps_up(ids_D: np.ndarray, num_drawn_T: np.ndarray) -> np.ndarray:
    """Distance of each drawn id from the one before it at its position, int32 [D]; of the first the id itself.

    Raises:
        DataError: ids do not rise within a position.
    """
    steps_D = np.diff(ids_D, prepend=np.int32(0))
    first = first_of(num_drawn_T)
    steps_D[first] = ids_D[first]
    inner = np.ones(len(ids_D), bool)
    inner[first] = False
    if (steps_D[inner] < 1).any():
        raise DataError("drawn ids must rise within a position")
    return steps_D


def sum_steps(steps_D: np.ndarray, num_drawn_T: np.ndarray) -> np.ndarray:
    """Ids int32 [D]: the running sum of steps within each position; inverse of `steps_up`."""
    if int(num_drawn_T.sum()) != len(steps_D):
        raise ShapeError(f"{len(steps_D)} draws, their counts say {int(num_drawn_T.sum())}")
    running_D = np.cumsum(steps_D, dtype=np.int64)
    first = first_of(num_drawn_T)
    before = running_D[first] - steps_D[first]
    ids_D: np.ndarray = running_D - np.repeat(before, num_drawn_T[num_drawn_T > 0])
    if ids_D.max(initial=0) > np.iinfo(np.int32).max:
        raise ShapeError("drawn ids are too large")
    return ids_D.astype(np.int32)


def first_of(counts_T: np.ndarray) -> np.ndarray:
    """Where the entries of each position that has some begin, int64."""
    first: np.ndarray = (np.cumsum(counts_T, dtype=np.int64) - counts_T)[counts_T > 0]
    return first


def encode_gaps(logprobs_N: np.ndarray, num_exact_T: np.ndarray) -> np.ndarray:
    """Gap codes uint8 [N] of exact entries, falling within each position.

    Raises:
        DataError: entries rise within a position, or fall by more than 500 nats at once.
    """
    codes_N = np.empty(len(logprobs_N), np.uint8)
    bad = _encode_gaps(logprobs_N, num_exact_T, GAP_STEPS, codes_N)
    if bad >= 0:
        raise DataError(f"kept log-probabilities must fall within a position and stay above -500 nats (position {bad})")
    return codes_N


@compiled()
def _encode_gaps(logprobs_N: np.ndarray, num_exact_T: np.ndarray, gap_steps: np.ndarray, codes_N: np.ndarray) -> int:
    n = 0
    for t in range(len(num_exact_T)):
        reached = 0
        for r in range(num_exact_T[t]):
            if r == 0:
                first = np.float64(logprobs_N[n])
                codes_N[n] = 0
            else:
                if logprobs_N[n] > logprobs_N[n - 1]:
                    return t
                steps = (first - np.float64(logprobs_N[n])) * 16.0 - reached
                code = max(int(np.floor(steps + 0.5)), 0)
                if code >= 240:
                    if steps > gap_steps[255]:
                        return t
                    code = 239
                    while code < 255 and abs(gap_steps[code + 1] - steps) < abs(gap_steps[code] - steps):
                        code += 1
                codes_N[n] = code
                reached += gap_steps[code]
            n += 1
    return -1


def decode_gaps(codes_N: np.ndarray, num_exact_T: np.ndarray, log_tail_T: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [N] of exact entries; inverse of `encode_gaps` given the exact tail.

    Raises:
        ShapeError: counts and codes disagree, or the tail of a position with entries is not the log of a share.
    """
    if int(num_exact_T.sum()) != len(codes_N) or codes_N.dtype != np.uint8:
        raise ShapeError(f"{len(codes_N)} codes for {int(num_exact_T.sum())} exact entries")
    if len(log_tail_T) != len(num_exact_T) or not ((log_tail_T <= 0) | (num_exact_T == 0)).all():
        raise ShapeError("log_tail is not the log of a probability where entries are kept")
    logprobs_N = np.empty(len(codes_N), np.float32)
    _decode_gaps(codes_N, num_exact_T, log_tail_T, GAP_STEPS, _EXP, logprobs_N, logprobs_N.view(np.int32))
    return logprobs_N


@compiled()
def _decode_gaps(
    codes_N: np.ndarray,
    num_exact_T: np.ndarray,
    log_tail_T: np.ndarray,
    gap_steps: np.ndarray,
    exp_table: np.ndarray,
    logprobs_N: np.ndarray,
    bits_N: np.ndarray,
) -> None:
    """Fill logprobs_N, of which bits_N is a view as integers: one more is the next number away from 0."""
    n = 0
    for t in range(len(num_exact_T)):
        count = num_exact_T[t]
        if count == 0:
            continue
        total, reached = 0.0, 0
        for r in range(count):
            reached += gap_steps[codes_N[n + r]]
            total += exp_table[min(reached, len(exp_table) - 1)]
        height = np.log1p(-np.exp(np.float64(log_tail_T[t]))) - np.log(total)
        height -= (
            count + 4
        ) * 2.0**-52  # what rounding of these sums can add: near p = 1 float32 is fine enough to show it
        reached = 0
        for r in range(count):
            reached += gap_steps[codes_N[n + r]]
            exact = height - reached * 0.0625
            near = np.float32(exact)
            logprobs_N[n + r] = near
            # Rounded down, without a branch: half of all numbers are rounded up, which no processor foresees.
            away = np.int32(1) if near <= 0 else np.int32(-1)
            bits_N[n + r] += away * np.int32(np.float64(near) > exact)
        n += count


def encode_counts(
    weights_D: np.ndarray, num_drawn_T: np.ndarray, log_tail_T: np.ndarray, num_draws: int | None
) -> np.ndarray:
    """How often each drawn id was drawn, uint8 [D], from log-weights float32 [D].

    Args:
        num_draws: draws at each position with a tail. None: it differs, and the id that was drawn least often at a position
            was drawn once (two draws of each of two ids are one draw of each).
    Raises:
        DataError: a weight is not a whole number of draws.
    """
    share_D = np.exp(weights_D.astype(np.float64) - np.repeat(log_tail_T.astype(np.float64), num_drawn_T))
    if num_draws is None and len(share_D):
        least_T = np.minimum.reduceat(share_D, first_of(num_drawn_T))
        share_D *= np.repeat(np.rint(1 / np.maximum(least_T, 1e-9)), num_drawn_T[num_drawn_T > 0])
    elif num_draws is not None:
        share_D *= num_draws
    counts_D: np.ndarray = np.rint(share_D)
    if len(counts_D) and not (
        np.abs(share_D - counts_D).max() <= 1e-3 and 1 <= counts_D.min() <= counts_D.max() <= 255
    ):
        raise DataError("a draw's weight is not a whole number of draws from the tail")
    return counts_D.astype(np.uint8)


def decode_counts(
    counts_D: np.ndarray, num_drawn_T: np.ndarray, log_tail_T: np.ndarray, num_draws: int | None
) -> np.ndarray:
    """Log-weights float32 [D], log(tail * count / N), rounded down. Raises ShapeError where counts disagree or are 0.

    N is num_draws, or the sum of the counts at the position where that is None.
    """
    if int(num_drawn_T.sum()) != len(counts_D):
        raise ShapeError(f"{len(counts_D)} draw counts for {int(num_drawn_T.sum())} draws")
    if counts_D.dtype != np.uint8 or not counts_D.all():
        raise ShapeError("a draw has the count 0")
    if num_draws is not None and not 0 < num_draws < len(_LOGS):
        raise ShapeError(f"{num_draws} draws at each position are more than a count can tell")
    if len(log_tail_T) != len(num_drawn_T):
        raise ShapeError(f"{len(log_tail_T)} tails for {len(num_drawn_T)} positions")
    weights_D = np.empty(len(counts_D), np.float32)
    _decode_counts(counts_D, num_drawn_T, log_tail_T, num_draws or 0, _LOGS, weights_D, weights_D.view(np.int32))
    return weights_D


_LOGS = np.log(np.maximum(np.arange(1 << 16, dtype=np.float64), 1))


@compiled()
def _decode_counts(
    counts_D: np.ndarray, num_drawn_T: np.ndarray, log_tail_T: np.ndarray, num_draws: int,
    logs: np.ndarray, weights_D: np.ndarray, bits_D: np.ndarray,
) -> None:  # fmt: skip
    """Fill weights_D, of which bits_D is a view, as in `_decode_gaps`. num_draws 0: the sum of the position's counts."""
    n = 0
    for t in range(len(num_drawn_T)):
        total = num_draws
        if num_draws == 0:
            for i in range(num_drawn_T[t]):
                total += counts_D[n + i]
        tail, log_total = np.float64(log_tail_T[t]), logs[total] if total < len(logs) else np.log(total)
        for _ in range(num_drawn_T[t]):
            exact = tail
            if counts_D[n] != total:  # 2^-48: what rounding of these sums can add, so that they stay below the tail
                exact += logs[counts_D[n]] - log_total - 2.0**-48
            near = np.float32(exact)
            weights_D[n] = near
            if np.float64(near) > exact:
                bits_D[n] += 1 if near <= 0 else -1
            n += 1


def interleaved(
    exact_N: np.ndarray, draws_D: np.ndarray, num_exact_T: np.ndarray, num_drawn_T: np.ndarray
) -> np.ndarray:
    """Values of all entries, [N + D]: at each position those of the exact entries, then those of the draws.

    Raises:
        ShapeError: values and counts disagree.
    """
    if (int(num_exact_T.sum()), int(num_drawn_T.sum())) != (len(exact_N), len(draws_D)):
        raise ShapeError("ids or log-probabilities differ in number from their counts")
    entries = np.empty(len(exact_N) + len(draws_D), exact_N.dtype)
    _interleave(exact_N, draws_D.astype(exact_N.dtype, copy=False), num_exact_T, num_drawn_T, entries)
    return entries


@compiled()
def _interleave(
    exact_N: np.ndarray, draws_D: np.ndarray, num_exact_T: np.ndarray, num_drawn_T: np.ndarray, entries: np.ndarray
) -> None:
    n, exact, drawn = 0, 0, 0
    for t in range(len(num_exact_T)):
        for _ in range(num_exact_T[t]):
            entries[n] = exact_N[exact]
            n += 1
            exact += 1
        for _ in range(num_drawn_T[t]):
            entries[n] = draws_D[drawn]
            n += 1
            drawn += 1


@dataclass(frozen=True)
class Compared:
    """Sums over N entries and, float64 [T], masses of T positions: of exact entries, and of draws too (stored_sum)."""

    error_sum: float
    error_max: float
    kl_sum: float
    true_mass: np.ndarray
    stored_mass: np.ndarray
    stored_sum: np.ndarray


def compare_entries(
    true_N: np.ndarray, stored_N: np.ndarray, num_exact_T: np.ndarray, num_drawn_T: np.ndarray
) -> Compared:
    """Error of exact entries (exact ones first at each position, then draws), in float64. KL as in `codec.compare`.

    Raises:
        ShapeError: counts and entries disagree.
    """
    total = int(num_exact_T.sum()) + int(num_drawn_T.sum())
    if not len(true_N) == len(stored_N) == total:
        raise ShapeError(f"{len(true_N)} and {len(stored_N)} entries for counts of {total}")
    masses = np.zeros((3, len(num_exact_T)))
    sums = _compare_entries(true_N, stored_N, num_exact_T, num_drawn_T, masses)
    return Compared(*sums, *masses)


@compiled()
def _compare_entries(
    true_N: np.ndarray, stored_N: np.ndarray, num_exact_T: np.ndarray, num_drawn_T: np.ndarray, masses: np.ndarray
) -> tuple[float, float, float]:
    error_sum, error_max, kl_sum, n = 0.0, 0.0, 0.0, 0
    for t in range(len(num_exact_T)):
        true_mass, stored_mass, kl = 0.0, 0.0, 0.0
        for _ in range(num_exact_T[t]):
            log_p, log_q = np.float64(true_N[n]), np.float64(stored_N[n])
            gap = log_p - log_q
            p = np.exp(log_p)
            true_mass += p
            stored_mass += np.exp(log_q)
            kl += p * gap
            error_sum += abs(gap)
            error_max = max(error_max, abs(gap))
            n += 1
        drawn = 0.0
        for _ in range(num_drawn_T[t]):
            drawn += np.exp(np.float64(stored_N[n]))
            n += 1
        masses[0, t], masses[1, t], masses[2, t] = true_mass, stored_mass, stored_mass + drawn
        if num_exact_T[t] > 0:
            rest_p, rest_q = min(max(1 - true_mass, 0.0), 1.0), min(max(1 - stored_mass, 0.0), 1.0)
            if rest_p > 0:
                kl += rest_p * (np.log(rest_p) - np.log(rest_q)) if rest_q > 0 else np.inf
            kl_sum += kl
    return error_sum, error_max, kl_sum

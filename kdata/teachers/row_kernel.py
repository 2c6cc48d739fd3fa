"""The reduction of logits on a CPU: compiled, one row at a time while it is in cache.

torch makes the matrix products; everything behind them (exponentials, sums, top-k of a wide row, weighted draws, the sum of
what was not kept) is here: two vectorised passes over a row of logits, and work on the few blocks that hold something kept or
drawn. Threads: the caller splits rows; the kernel holds no lock.

Shapes: C rows, V vocabulary, K exact entries, N draws.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kdata.format.compiled import compiled

BLOCK = 64  # ids whose largest value, or whose sum, is looked at before the ids themselves
FLOOR = np.float32(-87.0)  # below it exp is no normal float32: taken as 0
BELOW_1 = float(np.nextafter(1.0, 0.0))  # the largest uniform: rounding may reach 1

# Sums may be reordered (they are of blocks, joined in float64), and no value is NaN: this lets the loops vectorise.
_FAST = {"reassoc", "contract", "nsz", "nnan"}
# Parts are inlined (forceinline) for the same bits in every process: where they are called, the process that compiles links
# the caller with another copy of them, vectorised otherwise, than those that load it from numba's cache.


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 with these bits (int32): numba has no name for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@numba.njit(inline="always")
def _exp(x):
    """exp of a float32 in [FLOOR, 0], error below 1e-7 relative: 2^n e^r with |r| <= ln 2 / 2, r's part as a polynomial.

    Source of the split of ln 2 and of the coefficients: Cephes `expf` (S. Moshier). numba's own is a call for each number.
    """
    n = np.int32(x * np.float32(1.44269504) - np.float32(0.5))  # truncation towards 0: the nearest, as x <= 0
    f = np.float32(n)
    r = x - f * np.float32(0.693359375) + f * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    return y * _float_of_bits((n + np.int32(127)) << np.int32(23))


@compiled()
def any_bad(logits_CV):
    """True where a logit is NaN or +inf. Apart from the rest, whose arithmetic takes for granted that none is."""
    for c in range(logits_CV.shape[0]):
        row, bad = logits_CV[c], np.int32(0)
        for v in range(len(row)):
            bad |= np.int32(not (row[v] < np.float32(np.inf)))
        if bad:
            return True
    return False


@compiled(fastmath=_FAST)
def reduce_rows(
    logits_CV, own_C, uniforms_CN, threshold,
    logprob_C, rank_C, entropy_C, log_tail_C, ids_CK, logprobs_CK, draws_CN,
):  # fmt: skip
    """Reduce C rows in place of the outputs.

    logits_CV float32, finite or -inf; own_C int64; uniforms_CN float64 in [0, 1), rising along N. Outputs: logprob_C float32,
    rank_C int32, entropy_C float32, log_tail_C float32 (of what is outside ids_CK), ids_CK int32 and logprobs_CK float32 by
    falling probability, draws_CN int64 (ids, rising; -1 where the tail is empty).

    threshold: None, or a probability from which on ids are in ids_CK; the most probable one always is. Places behind the last
    one hold -1 and -inf. uniforms_CN then has one column, the shift of as many evenly spaced points as the tail holds
    thresholds, rounded up; the rest of draws_CN is -1. (numba compiles the two ways apart.)
    """
    rows, width = logits_CV.shape
    k = ids_CK.shape[1]
    blocks = (width + BLOCK - 1) // BLOCK
    p, weighted_V, bits_CV = np.empty(width, np.float32), np.empty(width, np.float32), logits_CV.view(np.int32)
    largest_B, sums_B, best = np.empty(blocks, np.float32), np.empty(blocks, np.float64), np.empty(k, np.float32)
    points = np.empty(draws_CN.shape[1], np.float64)
    for c in range(rows):
        z = logits_CV[c]
        top = _largest(bits_CV[c], largest_B)
        _exponentials(z, top, p, weighted_V)
        total, weighted, above = _sums(z, z[own_C[c]], p, weighted_V, sums_B)
        log_total = np.log(total)
        lse = top + log_total
        logprob_C[c] = min(z[own_C[c]] - lse, 0.0)
        rank_C[c] = above + 1
        entropy_C[c] = max(log_total - weighted / total, 0.0)
        if k:
            if threshold is None:
                _top(z, largest_B, ids_CK[c], best)
                num_exact = k
            else:
                num_exact = _above(z, largest_B, top, lse, np.float32(np.log(threshold)), ids_CK[c], best)
                ids_CK[c, num_exact:] = -1
                logprobs_CK[c, num_exact:] = -np.inf
            for r in range(num_exact):
                logprobs_CK[c, r] = min(best[r] - lse, 0.0)
                p[ids_CK[c, r]] = 0
            for r in range(num_exact):
                _sum_block(p, ids_CK[c, r] // BLOCK, sums_B)
        rest = sums_B.sum()
        log_tail_C[c] = min(np.log(rest / total), 0.0) if rest > 0 else -np.inf
        if threshold is None:
            _draw(p, sums_B, rest, uniforms_CN[c], draws_CN[c])
        else:
            num = min(max(int(np.ceil(rest / total / threshold)), 1), len(points))
            for n in range(num):
                points[n] = min((n + uniforms_CN[c, 0]) / num, BELOW_1)
            _draw(p, sums_B, rest, points[:num], draws_CN[c, :num])
            draws_CN[c, num:] = -1


@numba.njit(inline="always")
def _ordered(bits):
    """Bits of a float32 (int32) as an integer that orders as the float does; its own inverse. LLVM vectorises a largest
    integer, but not a largest float that numba compares."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled(forceinline=True)
def _largest(bits_V, largest_B):
    """The largest value of each block of a row, given as its bits (int32), into largest_B; returns the largest of all."""
    width = len(bits_V)
    for b in range(len(largest_B)):
        largest = _ordered(bits_V[b * BLOCK])
        if (b + 1) * BLOCK <= width:
            for v in range(BLOCK):
                largest = max(largest, _ordered(bits_V[b * BLOCK + v]))
        else:
            for v in range(b * BLOCK, width):
                largest = max(largest, _ordered(bits_V[v]))
        largest_B[b] = _float_of_bits(_ordered(largest))
    return largest_B.max()


@compiled(forceinline=True, fastmath={"contract"})
def _exponentials(z, top, p, weighted):
    """p = exp(z - top), 0 where that is no normal float32; weighted = p (z - top)."""
    for v in range(len(z)):
        x = z[v] - top
        inside = max(x, FLOOR)
        e = _exp(inside) if x >= FLOOR else np.float32(0)
        p[v] = e
        weighted[v] = e * inside


@compiled(forceinline=True, fastmath=_FAST)
def _sums(z, own, p, weighted_V, sums_B):
    """Sums of p in each block; returns the sum of p, that of weighted_V, and how many logits exceed `own`."""
    width, total, weighted, above = len(z), 0.0, 0.0, 0
    whole = width // BLOCK
    for b in range(whole):
        part, part_weighted, part_above = np.float32(0), np.float32(0), np.int32(0)
        for v in range(b * BLOCK, b * BLOCK + BLOCK):
            part += p[v]
            part_weighted += weighted_V[v]
            part_above += np.int32(z[v] > own)
        sums_B[b] = part
        total += part
        weighted += part_weighted
        above += part_above
    if width % BLOCK:
        sums_B[whole] = 0.0
    for v in range(whole * BLOCK, width):
        sums_B[whole] += p[v]
        total += p[v]
        weighted += weighted_V[v]
        above += z[v] > own
    return total, weighted, above


@compiled(forceinline=True, fastmath=_FAST)
def _sum_block(p, b, sums_B):
    part = np.float32(0)
    for v in range(b * BLOCK, min((b + 1) * BLOCK, len(p))):
        part += p[v]
    sums_B[b] = part


@compiled(forceinline=True, fastmath=_FAST)
def _top(z, largest_B, ids_K, best_K):
    """The K largest values and their ids, falling; equal values by rising id.

    The K-th largest of the blocks' largest values bounds the K-th largest of all from below: what lies under it is passed by,
    block by block.
    """
    k, width, filled = len(ids_K), len(z), 0
    bound = -np.inf
    if len(largest_B) > k:
        for b in range(len(largest_B)):
            filled = _insert(best_K, ids_K, filled, largest_B[b], b)
        bound, filled = best_K[k - 1], 0
    for b in range(len(largest_B)):
        if largest_B[b] < bound or (filled == k and largest_B[b] <= best_K[k - 1]):
            continue
        for v in range(b * BLOCK, min((b + 1) * BLOCK, width)):
            if z[v] >= bound:
                filled = _insert(best_K, ids_K, filled, z[v], v)


@compiled(forceinline=True, fastmath=_FAST)
def _above(z, largest_B, top, lse, log_threshold, ids_K, best_K):
    """The values whose log-probability, as float32, is log_threshold or more, and their ids, as in `_top`; returns how many.

    Where none is, the largest value alone.
    """
    filled = 0
    for b in range(len(largest_B)):
        if np.float32(largest_B[b] - lse) >= log_threshold:
            for v in range(b * BLOCK, min((b + 1) * BLOCK, len(z))):
                if np.float32(z[v] - lse) >= log_threshold:
                    filled = _insert(best_K, ids_K, filled, z[v], v)
    if filled:
        return filled
    for b in range(len(largest_B)):
        if largest_B[b] == top:
            for v in range(b * BLOCK, min((b + 1) * BLOCK, len(z))):
                if z[v] == top:
                    return _insert(best_K, ids_K, 0, z[v], v)
    return 0


@compiled(inline="always")
def _insert(best_K, ids_K, filled, value, number):
    """Put a value into its place of a falling list of at most K, behind equal ones; returns how many there are."""
    k = len(best_K)
    if filled == k and value <= best_K[k - 1]:
        return filled
    place = filled if filled < k else k - 1
    while place > 0 and best_K[place - 1] < value:
        best_K[place] = best_K[place - 1]
        ids_K[place] = ids_K[place - 1]
        place -= 1
    best_K[place] = value
    ids_K[place] = number
    return min(filled + 1, k)


@compiled(forceinline=True, fastmath=_FAST)
def _draw(p, sums_B, rest, uniforms_N, draws_N):
    """Ids whose share of the running sum of p covers each (rising) uniform; -1 where nothing is left to draw from."""
    n, drawn, before, last = len(uniforms_N), 0, 0.0, -1
    if rest <= 0:
        draws_N[:] = -1
        return
    for b in range(len(sums_B)):
        if drawn == n:
            return
        if before + sums_B[b] > uniforms_N[drawn] * rest:
            running = before
            for v in range(b * BLOCK, min((b + 1) * BLOCK, len(p))):
                if p[v] > 0:
                    running += p[v]
                    last = v
                    while drawn < n and uniforms_N[drawn] * rest < running:
                        draws_N[drawn] = v
                        drawn += 1
        before += sums_B[b]
    # A uniform so near 1 that rounding left it behind the last id belongs to that id.
    if drawn < n:
        for v in range(len(p) - 1, -1, -1):
            if p[v] > 0:
                last = v
                break
    while drawn < n:
        draws_N[drawn] = last
        drawn += 1

"""Reduce logits, or hidden states, to what is stored: one reduction for every teacher that sees the full distribution.

It computes exact entries, draws, tail mass, log-sum-exp at further temperatures, entropy, and log-probability and rank
of the actual token. The tail is the sum of the entries that are not kept, not 1 minus the kept mass, so it is exact
even if it is tiny. Draws depend on the settings and the token ids of the sequence only (for written text: on the
prompt's ids and the seed of the sample; with `draws_by=context`: on the ids before the position), not on order, batching
or backend: uniforms come from numpy's Philox (by context: from SplitMix64), and both backends invert the same cumulative
sum. A uniform within rounding of a border may fall on either side, and so may a probability within rounding of the
threshold, or a tail within rounding of a multiple of it.

From hidden states the head is applied chunk by chunk: never [tokens, V].

Shapes: M predicted positions, C of them in a chunk, V vocabulary, D hidden, K exact entries, N draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from kdata.errors import DistributionError
from kdata.format.keep import KeepConfig, keep_top
from kdata.format.kept import Kept, mix64
from kdata.format.measures import Measures, beside, joined
from kdata.teachers.base import Readout
from kdata.teachers.row_kernel import BELOW_1, any_bad, reduce_rows

# Of float32 logits at a time. On a CPU they stay in its cache; on a GPU few large kernels are faster than many small ones,
# and torch's way holds about ten times as much for a moment.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# But no fewer rows, as each chunk reads the whole head from memory, whatever its width: at 262,144 x 640 on one AVX2 core a
# row takes 14 ms in chunks of 8, 5.7 in 64, 5.1 in 128. Larger chunks gained nothing in a whole capture.
CHUNK_ROWS = 128

Logits = Callable[[int, int], torch.Tensor]
Seeds = int | np.ndarray  # of the draws: of a sequence, or of each of its positions, uint64 [M]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step of SplitMix64


@dataclass(frozen=True, kw_only=True)
class Reduced(Measures):
    """M positions: their numbers and the kept entries."""

    kept: Kept


@dataclass(frozen=True, kw_only=True)
class Rows(Measures):
    """C positions, their entries still rectangular: ids int32 and logprobs float32 [C, K] of the top (-1 and -inf where fewer
    are kept); of the draws ids int64 (-1 where there is no tail, and behind the last draw of a position), log-probabilities
    and log shares of the tail, float32 [C, N]."""

    ids: np.ndarray
    logprobs: np.ndarray
    draws: np.ndarray
    draw_logprobs: np.ndarray
    draw_shares: np.ndarray


def reduce_logits(logits_MV: torch.Tensor, actual_M: torch.Tensor, keep: KeepConfig, seed: Seeds) -> Reduced:
    """Reduce logits of one sequence's predicted positions.

    Args:
        logits_MV: [M, V], converted to float32 where they are not.
        actual_M: int64 [M], the tokens that are there.
        keep: what to keep.
        seed: of the draws, see `draws_of`.
    """
    return reduce_chunks(
        lambda a, b: logits_MV[a:b].float(), logits_MV.shape[1], actual_M, keep, [(len(actual_M), seed)]
    )


def reduce_chunks(
    logits: Logits, vocab_size: int, actual_M: torch.Tensor, keep: KeepConfig, parts: Sequence[tuple[int, Seeds]]
) -> Reduced:
    """Reduce positions whose logits are made on demand.

    Args:
        logits: (begin, end) -> float32 [end - begin, V]; called with rising chunks; may be overwritten.
        actual_M: int64 [M].
        parts: (positions, seed of the draws) of each sequence, in order; the positions sum to M.
    """
    return assemble(reduce_each(logits, vocab_size, actual_M, keep, uniforms_of(parts, keep)), keep)


def reduce_each(
    logits: Logits, vocab_size: int, actual_M: torch.Tensor, keep: KeepConfig, uniforms_MN: np.ndarray
) -> list[Rows]:
    """Reduce positions chunk by chunk; `assemble` then lays them out as entries."""
    device = actual_M.device.type
    step = rows_of_chunk(len(actual_M), vocab_size, device)
    work = _reduce_cpu if device == "cpu" and keep.tau == 1.0 and keep.kind != "adaptive" else _reduce_torch
    chunks = []
    for begin in range(0, max(len(actual_M), 1), step):  # at least once, even where nothing is predicted
        end = min(begin + step, len(actual_M))
        chunks.append(work(logits(begin, end), actual_M[begin:end], keep, uniforms_MN[begin:end]))
    return chunks


def rows_of_chunk(num_rows: int, vocab_size: int, device: str) -> int:
    """Rows that are reduced together: as many as the cache holds, but no fewer than reading the head from memory is worth.

    Beyond the cache the rows are divided evenly, so that no chunk of a few rows is left over.
    """
    step = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    if step >= CHUNK_ROWS:
        return step
    return max(1, -(-num_rows // max(1, round(num_rows / CHUNK_ROWS))))


def reads_the_head(vocab_size: int, device: str) -> bool:
    """Whether the logits of a chunk are beyond the cache, so that reading the head from memory is what costs."""
    return CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocab_size) < CHUNK_ROWS


def uniforms_of(parts: Sequence[tuple[int, Seeds]], keep: KeepConfig) -> np.ndarray:
    """Uniforms in [0, 1), float64 [M, N], rising along N; N = 0 for kinds without draws.

    Of the kind threshold N = 1: the shift alone, as the number of evenly spaced points depends on the position.
    """
    width = 1 if keep.kind == "threshold" else keep.most_draws
    if not parts or not width:
        return np.zeros((sum(count for count, _ in parts), width))
    systematic = keep.draw_method == "systematic"
    drawn = np.concatenate([_uniforms(count, 1 if systematic else width, seed) for count, seed in parts])
    if not systematic:
        return np.sort(drawn, -1)
    uniforms: np.ndarray = np.minimum((np.arange(width) + drawn) / width, BELOW_1)
    return uniforms


def _uniforms(count: int, width: int, seed: Seeds) -> np.ndarray:
    """Uniforms in [0, 1), float64 [count, width]: numpy's Philox, or SplitMix64 from the seed of each position.

    SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014) needs no state that costs
    more to make than the few numbers that a position draws.
    """
    if isinstance(seed, int):
        return np.random.Generator(np.random.Philox(key=seed)).random((count, width))
    mixed_MN = mix64(seed[:, None] + GOLDEN * np.arange(1, width + 1, dtype=np.uint64))
    uniforms: np.ndarray = (mixed_MN >> np.uint64(11)) * 2.0**-53
    return uniforms


def _log_z(logprobs_or_logits_CV: torch.Tensor, lse_C: torch.Tensor, keep: KeepConfig) -> np.ndarray | None:
    """ln sum_i p_i^(1/T) for each further temperature, float32 [C, n]."""
    if not keep.temperatures:
        return None
    log_z = [torch.logsumexp(logprobs_or_logits_CV / t, -1) - lse_C / t for t in keep.temperatures]
    return torch.stack(log_z, 1).cpu().numpy()


def _reduce_cpu(logits_CV: torch.Tensor, actual_C: torch.Tensor, keep: KeepConfig, uniforms_CN: np.ndarray) -> Rows:
    """The compiled rows kernel; the rows are split between threads."""
    rows, vocab = logits_CV.shape
    log_z = _log_z(logits_CV, torch.logsumexp(logits_CV, -1), keep) if keep.temperatures else None
    width, draws = min(keep.num_exact, vocab), keep.most_draws
    threshold = keep.threshold if keep.kind == "threshold" else None
    z, own = logits_CV.numpy(), actual_C.numpy()
    out = (
        np.empty(rows, np.float32), np.empty(rows, np.int32), np.empty(rows, np.float32), np.empty(rows, np.float32),
        np.empty((rows, width), np.int32), np.empty((rows, width), np.float32), np.empty((rows, draws), np.int64),
    )  # fmt: skip

    def work(part: slice) -> None:
        if any_bad(z[part]):
            raise DistributionError("the teacher's logits hold NaN or infinity")
        reduce_rows(z[part], own[part], uniforms_CN[part], threshold, *(o[part] for o in out))

    parts = torch.get_num_threads() if rows > 16 else 1
    edges = [rows * n // parts for n in range(parts + 1)]
    list(_threads(parts).map(work, map(slice, edges, edges[1:])))
    logprob, rank, entropy, log_tail, ids, logprobs, drawn = out
    lse_C = z[np.arange(rows), own] - logprob
    draw_logprobs = np.take_along_axis(z, np.maximum(drawn, 0), 1) - lse_C[:, None]
    return Rows(
        logprob=logprob,
        rank=rank,
        log_tail=log_tail,
        entropy=entropy,
        log_z=log_z,
        ids=ids,
        logprobs=logprobs,
        draws=drawn,
        draw_logprobs=draw_logprobs,
        draw_shares=draw_logprobs,
    )


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="kdata-rows")


def _reduce_torch(logits_CV: torch.Tensor, actual_C: torch.Tensor, keep: KeepConfig, uniforms_CN: np.ndarray) -> Rows:
    """The same in torch: any device, any tau, and the reference of the compiled kernel."""
    logprobs_CV = torch.log_softmax(logits_CV, -1)
    own_C = logprobs_CV.gather(1, actual_C[:, None])[:, 0]
    rank_C = (logits_CV > logits_CV.gather(1, actual_C[:, None])).sum(1) + 1
    entropy_C = -(logprobs_CV.exp() * logprobs_CV.clamp_min(-1e4)).sum(-1)
    width = min(keep.num_exact, logprobs_CV.shape[1])
    top = logprobs_CV.topk(width, -1)
    kept_CK = torch.ones_like(top.indices, dtype=torch.bool)
    if keep.kind in ("adaptive", "threshold"):
        counts = keep_top(
            keep, top.indices.cpu().numpy(), top.values.cpu().numpy(), np.ones(len(own_C), bool)
        ).num_exact
        kept_CK = torch.arange(width, device=own_C.device) < torch.as_tensor(counts, device=own_C.device)[:, None]
    rest_CV = logprobs_CV.scatter(1, top.indices, torch.where(kept_CK, -torch.inf, top.values))
    log_tail_C = torch.logsumexp(rest_CV, -1).clamp_max(0.0)
    alive_C = torch.isfinite(log_tail_C)
    share_CV = torch.softmax(torch.where(alive_C[:, None], rest_CV, 0.0).double() * keep.tau, -1)
    running_CV = share_CV.cumsum(-1)
    points_CN, drawn_from_CN = torch.as_tensor(uniforms_CN, device=own_C.device), alive_C[:, None]
    if keep.kind == "threshold":
        num_C = (log_tail_C.double().exp() / keep.threshold).ceil().clamp(1, keep.most_draws)
        number_N = torch.arange(keep.most_draws, device=own_C.device)
        points_CN = ((number_N + points_CN) / num_C[:, None]).clamp_max(BELOW_1)
        drawn_from_CN = drawn_from_CN & (number_N < num_C[:, None])
    drawn_CN = torch.searchsorted(running_CV, points_CN * running_CV[:, -1:], right=True)
    drawn_CN = torch.where(drawn_from_CN, drawn_CN.clamp_max(logprobs_CV.shape[1] - 1), -1)
    safe_CN = drawn_CN.clamp_min(0)
    return Rows(
        logprob=own_C.cpu().numpy(),
        rank=rank_C.cpu().numpy().astype(np.int32),
        log_tail=log_tail_C.cpu().numpy(),
        entropy=entropy_C.cpu().numpy(),
        log_z=_log_z(logprobs_CV, torch.zeros_like(own_C), keep),
        ids=top.indices.cpu().numpy().astype(np.int32),
        logprobs=top.values.cpu().numpy(),
        draws=drawn_CN.cpu().numpy(),
        draw_logprobs=logprobs_CV.gather(1, safe_CN).cpu().numpy(),
        draw_shares=share_CV.gather(1, safe_CN).log().float().cpu().numpy(),
    )


def picked(rows: Rows, places: np.ndarray | slice) -> Rows:
    """Some positions of `rows`, in the order of `places`."""
    values: dict[str, Any] = {name: None if array is None else array[places] for name, array in vars(rows).items()}
    return Rows(**values)


def assemble(chunks: list[Rows], keep: KeepConfig) -> Reduced:
    """Join chunks, in order, and lay entries out position by position."""
    rows = Rows(**joined(chunks))
    everywhere = np.full(len(rows.ids), rows.ids.shape[1] > 0)
    top = keep if keep.kind in ("adaptive", "threshold") else KeepConfig(kind="topk", k=max(rows.ids.shape[1], 1))
    kept = keep_top(top, rows.ids, rows.logprobs, everywhere)
    if keep.tail == "draws":
        kept = _with_draws(kept, rows, keep)
    return Reduced(kept=kept, **rows.measures())


def _with_draws(exact: Kept, rows: Rows, keep: KeepConfig) -> Kept:
    """Append draws to exact entries.

    At tau = 1 an id drawn c times of N weighs tail * c / N. Otherwise c/N * p_i / d_i, with d proportional to p^tau over
    the tail. Positions without a tail have no draws.
    """
    drawn_MN, width = rows.draws, rows.draws.shape[1]
    fresh_MN = drawn_MN >= 0
    num_M = fresh_MN.sum(1)
    fresh_MN[:, 1:] &= drawn_MN[:, 1:] != drawn_MN[:, :-1]
    starts = np.flatnonzero(fresh_MN.reshape(-1))
    # A run of equal draws ends where the next begins, or with the draws of its position.
    position = starts // width
    ends = np.minimum(np.append(starts[1:], fresh_MN.size), position * width + num_M[position])
    log_count = np.log((ends - starts) / num_M[position])
    logprobs = rows.draw_logprobs[fresh_MN]
    if keep.tau == 1.0:
        weights = log_count + rows.log_tail.astype(np.float64)[position]
    else:
        weights = log_count + logprobs.astype(np.float64) - rows.draw_shares[fresh_MN].astype(np.float64)
    counts = fresh_MN.sum(1).astype(np.int32)
    layout = np.stack([exact.num_exact, counts], 1).reshape(-1)
    draws = np.repeat(np.tile([False, True], len(counts)), layout)
    ids, all_logprobs = np.empty(len(draws), np.int32), np.empty(len(draws), np.float32)
    ids[~draws], ids[draws] = exact.ids, drawn_MN[fresh_MN]
    all_logprobs[~draws], all_logprobs[draws] = exact.logprobs, weights
    return Kept(exact.num_exact, counts, ids, all_logprobs, logprobs)


def draw_seed(token_ids: np.ndarray, keep: KeepConfig, sample: int | None = None) -> int:
    """Seed of a sequence's draws, independent of order, batching and backend.

    Of text that is read: of the setting and the whole sequence. Of text that is being written, whose end is not known yet: of
    the setting, the prompt and the seed of the `sample`.
    """
    digest = hashlib.blake2b(digest_size=8, key=keep.draw_seed.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
    if sample is not None:
        digest.update(b"written" + sample.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") >> 1


def draws_of(token_ids: np.ndarray, start: int, keep: KeepConfig, sample: int | None = None) -> Seeds:
    """What the draws of the positions from `start` on come from, as `keep.draws_by` says.

    Args:
        token_ids: int32 [T], the whole sequence.
        sample: seed of the sample, of text that was written behind token_ids[:start].
    Returns:
        `draw_seed`, or of each position a digest of the setting and the ids before it, uint64 [T - start]. Then equal
        contexts have equal uniforms, whatever follows and wherever they stand, and equal draws where the teacher's
        distribution is equal to the bit.
    """
    if keep.draws_by == "sequence":
        return draw_seed(token_ids if sample is None else token_ids[:start], keep, sample)
    digest = hashlib.blake2b(digest_size=8, key=keep.draw_seed.to_bytes(8, "little"), person=b"context")
    ids = np.ascontiguousarray(token_ids, "<i4").tobytes()
    digest.update(ids[: 4 * start])
    seeds = []
    for place in range(start, len(token_ids)):
        seeds.append(digest.copy().digest())
        digest.update(ids[4 * place : 4 * place + 4])
    return np.frombuffer(b"".join(seeds), "<u8")


def readout_of(token_ids: np.ndarray, start: int, reduced: Reduced) -> Readout:
    """A Readout of a whole sequence from its reduced positions, those from `start` on."""
    kept = reduced.kept
    whole = beside(start)
    num_exact, num_drawn = whole(kept.num_exact), whole(kept.num_drawn)
    return Readout(
        token_ids=token_ids,
        kept=Kept(num_exact, num_drawn, kept.ids, kept.logprobs, kept.draw_logprobs),
        **reduced.measures(whole),
    )

"""From logits to what is stored: one reduction for every teacher that sees the whole distribution.

Exact entries, draws, tail mass, log-sum-exp at further temperatures, entropy, and the actual token's log-probability and
rank, in float32 with exact tails: the tail is the log-sum-exp of what was not kept, not 1 minus what was.

Shapes: M predicted positions, V vocabulary, K exact entries, N draws.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from kdata.codec import Kept
from kdata.keep import KeepConfig, keep_top
from kdata.teachers import Readout


@dataclass(frozen=True)
class Reduced:
    """Numpy arrays of M positions: logprob float32, rank int32, log_tail float32, entropy float32, log_z float32 [M, n]
    or None, and the kept entries."""

    logprob: np.ndarray
    rank: np.ndarray
    log_tail: np.ndarray
    entropy: np.ndarray
    log_z: np.ndarray | None
    kept: Kept


def reduce_logits(logits_MV: torch.Tensor, actual_M: torch.Tensor, keep: KeepConfig, seed: int) -> Reduced:
    """Reduce logits of one sequence's predicted positions.

    Args:
        logits_MV: float32 [M, V] (converted where it is not).
        actual_M: int64 [M], the tokens that are there.
        keep: what to keep.
        seed: of the draws; from the sequence's content, so that neither order nor batching matters.
    """
    logprobs_MV = torch.log_softmax(logits_MV.float(), -1)
    own_M = logprobs_MV.gather(1, actual_M[:, None])[:, 0]
    rank_M = (logprobs_MV > own_M[:, None]).sum(1) + 1
    entropy_M = -(logprobs_MV.exp() * logprobs_MV.clamp_min(-1e4)).sum(-1)
    log_z = [torch.logsumexp(logprobs_MV / t, -1) for t in keep.temperatures]
    width = min(keep.num_exact, logprobs_MV.shape[1])
    top = logprobs_MV.topk(width, -1)
    kept = keep_top(
        keep if keep.kind == "adaptive" else KeepConfig(k=max(width, 1)),
        top.indices.cpu().numpy(),
        top.values.cpu().numpy(),
        np.full(len(logprobs_MV), width > 0),
    )
    rest_MV = logprobs_MV.clone()
    if width:
        taken_MK = torch.arange(width, device=top.indices.device) < torch.as_tensor(
            kept.num_exact, device=top.indices.device
        ).unsqueeze(1)
        rest_MV.scatter_(1, top.indices, torch.where(taken_MK, -torch.inf, top.values))
    log_tail_M = torch.logsumexp(rest_MV, -1).clamp_max(0.0)
    if keep.tail == "draws":
        kept = _with_draws(kept, rest_MV, log_tail_M, keep, seed)
    return Reduced(
        logprob=own_M.cpu().numpy(),
        rank=rank_M.cpu().numpy().astype(np.int32),
        log_tail=log_tail_M.cpu().numpy(),
        entropy=entropy_M.cpu().numpy(),
        log_z=torch.stack(log_z, 1).cpu().numpy() if log_z else None,
        kept=kept,
    )


def _with_draws(
    exact: Kept, rest_MV: torch.Tensor, log_tail_M: torch.Tensor, keep: KeepConfig, seed: int
) -> Kept:
    """Append draws from the tail to exact entries.

    At tau = 1 an id drawn c times of N weighs tail * c / N. Otherwise c/N * p_i / d_i, with d proportional to p^tau over
    the tail. Positions without a tail (log_tail = -inf) have no draws.
    """
    device = rest_MV.device
    generator = torch.Generator(device=device).manual_seed(seed)
    alive_M = torch.isfinite(log_tail_M)
    probs_MV = torch.softmax(torch.where(alive_M[:, None], rest_MV, torch.zeros((), device=device)) * keep.tau, -1)
    drawn_MN = torch.multinomial(probs_MV, keep.draws, replacement=True, generator=generator).sort(-1).values
    fresh_MN = torch.ones_like(drawn_MN, dtype=torch.bool)
    fresh_MN[:, 1:] = drawn_MN[:, 1:] != drawn_MN[:, :-1]
    fresh_MN &= alive_M[:, None]
    logprob_MN = rest_MV.gather(1, drawn_MN)
    log_draw_MN = probs_MV.gather(1, drawn_MN).log()

    fresh = fresh_MN.cpu().numpy()
    starts = np.flatnonzero(fresh.reshape(-1))
    # A run of equal draws ends where the next begins, or with its position.
    position = starts // keep.draws
    ends = np.minimum(np.append(starts[1:], fresh.size), (position + 1) * keep.draws)
    counts = (ends - starts).astype(np.float64)
    logprobs = logprob_MN.cpu().numpy()[fresh].astype(np.float64)
    if keep.tau == 1.0:
        weights = np.log(counts / keep.draws) + log_tail_M.cpu().numpy().astype(np.float64)[position]
    else:
        weights = np.log(counts / keep.draws) + logprobs - log_draw_MN.cpu().numpy()[fresh].astype(np.float64)
    return _interleave(
        exact,
        fresh.sum(1).astype(np.int32),
        drawn_MN.cpu().numpy()[fresh].astype(np.int32),
        weights.astype(np.float32),
        logprobs.astype(np.float32),
    )


def _interleave(
    exact: Kept, num_drawn: np.ndarray, ids: np.ndarray, weights: np.ndarray, logprobs: np.ndarray
) -> Kept:
    """Lay exact entries and draws out position by position."""
    counts = np.stack([exact.num_exact, num_drawn], 1).reshape(-1)
    draws = np.repeat(np.tile([False, True], len(num_drawn)), counts)
    all_ids, all_logprobs = np.empty(len(draws), np.int32), np.empty(len(draws), np.float32)
    all_ids[~draws], all_ids[draws] = exact.ids, ids
    all_logprobs[~draws], all_logprobs[draws] = exact.logprobs, weights
    return Kept(exact.num_exact, num_drawn, all_ids, all_logprobs, logprobs)


def draw_seed(token_ids: np.ndarray, keep: KeepConfig) -> int:
    """Seed of a sequence's draws: of the setting and the sequence's content, independent of order and batching."""
    digest = hashlib.blake2b(digest_size=8, key=keep.draw_seed.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def readout_of(token_ids: np.ndarray, start: int, reduced: Reduced) -> Readout:
    """Place reduced positions, the last of `token_ids` from `start` on, beside the whole sequence."""

    def beside(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([np.full((start, *values.shape[1:]), fill, values.dtype), values])

    kept = reduced.kept
    return Readout(
        token_ids=token_ids,
        logprob=beside(reduced.logprob, np.nan),
        rank=beside(reduced.rank, 0),
        kept=Kept(
            beside(kept.num_exact, 0), beside(kept.num_drawn, 0), kept.ids, kept.logprobs, kept.draw_logprobs
        ),
        log_tail=beside(reduced.log_tail, np.nan),
        entropy=beside(reduced.entropy, np.nan),
        log_z=None if reduced.log_z is None else beside(reduced.log_z, np.nan),
    )

"""GOLD: a student with another tokenizer, tokens that match by their divergence and the others by rank.

A chunk is the same bytes as tokens of the teacher and of the student. At one place of it, its first token or its last one,
both have a distribution p and q. Each is multiplied by the probability of the other actual tokens of the chunk, t and s; so a
value P_i = t p_i or Q_i = s q_i is that of a whole chunk, in which token i stands at that place. With the tokens that both
tokenizers have ("matched") and the others of each side by falling probability,

    L = w_m sum_matched j(P_i, Q_i) + w_u sum_r |P_(r) - Q_(r)|
    j(P, Q) = b P log(P / M) + (1 - b) Q log(Q / M),  M = b P + (1 - b) Q

w_m is the number of matched tokens by that of the teacher's ids and w_u = 1 - w_m, unless `gold_weights` says otherwise.

Source: TRL's GOLD trainer (trl/experimental/gold, of 2026-07-24), read there: groups, both merges ("observed", the default:
the first token's distribution; "bayesian": the last one's), j without scaling P and Q to sum to 1, the sorted L1, weights,
b = 0.5. Ours, or our default: tokens match by their bytes, and the ends of a text by what they are for; there by the strings
of the vocabularies. Under "observed" TRL takes the distribution *after* the first token; here, as TRL has it under
"bayesian", it is the one that predicts it. The ends of texts count, and TRL skips them. Sums are divided by the number of
counted tokens, as every other objective is. TRL bounds probabilities at 1e-8.

What is inexact on sparse data: of the teacher's tail only its mass is known, and not how much of it lies on matched tokens.
The rest is the least that any such share gives (`_least_share`), by merging and by the triangle inequality, so that the whole
is a lower bound. It is exact where all of the teacher's probability is kept.

The derivative of the loss by log s is that of a cross-entropy of the other tokens of the chunk with a weight, as in
`kdata.trainer.chunks`. So the core of `kdata.trainer.fused` runs three times: for the probabilities of actual tokens, for the
distributions at their places, and for these weights in chunks of several tokens. A [positions, vocabulary] matrix exists at
no time.

Shapes: M or C counted positions, K kept entries, N of the student's likeliest tokens that the teacher lacks, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdata.errors import ConfigError
from kdata.trainer.chunks import sums_of_chunks
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Targets

LEAST = 1e-30  # probability that stands for 0 in a logarithm


class Sides(NamedTuple):
    """What `gold` compares, all times s or t. kept_CK, top_CN, rest_C, lacked_C: the student's probabilities of the entries,
    of its likeliest unmatched tokens, of all matched tokens that are no entry, and of all unmatched tokens. p_CK, tail_C:
    the teacher's of the entries, 0 where there is none, and of all else. by_rank_CK: bool, entries that do not match."""

    kept_CK: Tensor
    top_CN: Tensor
    rest_C: Tensor
    lacked_C: Tensor
    p_CK: Tensor
    tail_C: Tensor
    by_rank_CK: Tensor


def gold(x: Sides, weights: tuple[float, float], beta: float) -> Tensor:
    """The loss at each position, float [C].

    Args:
        weights: w_m and w_u. beta: the teacher's share b of the mixture, in (0, 1).
    """
    matched_CK = (x.p_CK > 0) & ~x.by_rank_CK
    matched_C = _gap(x.p_CK.where(matched_CK, 1.0), x.kept_CK.where(matched_CK, 1.0), beta).sum(-1)
    place_CK = x.by_rank_CK.cumsum(-1) - 1
    ranked_CK = torch.zeros_like(x.p_CK)
    if x.top_CN.shape[1]:
        is_one_CK = x.by_rank_CK & (place_CK < x.top_CN.shape[1])
        ranked_CK = x.top_CN.gather(-1, place_CK.clamp(0, x.top_CN.shape[1] - 1)).where(is_one_CK, 0.0)
    sorted_C = (ranked_CK - x.p_CK).where(x.by_rank_CK, 0.0).abs().sum(-1)
    lacked_C = x.lacked_C - ranked_CK.sum(-1)
    share_C = _least_share(x.rest_C.detach(), x.tail_C, x.tail_C - lacked_C, weights, beta)
    matched_C = matched_C + _gap(share_C, x.rest_C, beta)
    sorted_C = sorted_C + (x.tail_C - share_C - lacked_C).abs()
    return weights[0] * matched_C + weights[1] * sorted_C


def _gap(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """j of two probabilities: at least 0, and 0 where they are equal."""
    p, q = p.clamp_min(LEAST), q.clamp_min(LEAST)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * p * (p.log() - log_m) + (1 - beta) * q * (q.log() - log_m)


def _least_share(rest_C: Tensor, tail_C: Tensor, even_C: Tensor, weights: tuple[float, float], beta: float) -> Tensor:
    """The part of the teacher's tail on matched tokens that makes the loss least, [C].

    w_m j(a, rest) + w_u |even - a| is convex in a. The slope of the first part is w_m b log(a / m), m = b a + (1 - b) rest,
    so it outweighs the second one where a / m is beyond e^(w_u / (b w_m)), or below its inverse. Between these a is `even_C`,
    and moves with it; elsewhere the loss does not change with a, so a is a constant.
    """
    low_C, high_C = torch.zeros_like(rest_C), torch.full_like(rest_C, torch.inf)
    if weights[0] > 0:
        reach = min(weights[1] / (beta * weights[0]), 700.0)
        low_C = rest_C * (1 - beta) / (math.exp(reach) - beta)
        if math.exp(reach) * beta < 1:
            high_C = rest_C * (1 - beta) / (math.exp(-reach) - beta)
    return even_C.maximum(low_C).minimum(high_C).clamp_min(0.0).minimum(tail_C)


@dataclass(frozen=True)
class MergedTargets(Targets):
    """Targets with what multiplies a distribution. log_s_C, log_t_C: float [C], the probability of the other actual tokens of
    a chunk. unranked_C: int64 [C], the entry that is the teacher's actual token and whose rank is not known, or -1."""

    log_s_C: Tensor | None = None
    log_t_C: Tensor | None = None
    unranked_C: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """How a mix counts tokens: weights w_m and w_u; is_lacked_V: bool [V], the student's that the teacher lacks."""

    weights: tuple[float, float]
    is_lacked_V: Tensor

    @classmethod
    def of(cls, config: ObjectiveConfig, targets: Targets, vocab_size: int) -> Tokens:
        """Those of targets, whose student may have a larger head. Raises ConfigError where they do not say what matches."""
        if targets.matched is None:
            raise ConfigError("objective gold needs `matched` of the targets; set it")
        own_V = targets.matched.is_own_V.to(targets.ids_CK.device)
        is_lacked_V = torch.nn.functional.pad(~own_V, (0, vocab_size - len(own_V)), value=True)
        share = targets.matched.share
        return cls(config.gold_weights or (share, 1.0 - share), is_lacked_V)


def with_scales(log_q_M: Tensor, targets: Targets) -> MergedTargets:
    """The targets with the probabilities of the other tokens of each chunk.

    Args:
        log_q_M: float [M], the student's log-probabilities of the actual tokens.
        targets: with `chunk_C`, `actual_logprobs_C` and `rank_C`.
    Raises:
        ConfigError: the targets lack one of these, or some log-probabilities are not known.
    """
    if targets.chunk_C is None or targets.actual_logprobs_C is None or targets.rank_C is None:
        raise ConfigError("objective gold needs chunk_C, actual_logprobs_C and rank_C of the targets; set them")
    if not bool(torch.isfinite(targets.actual_logprobs_C).all()):
        raise ConfigError(
            "objective gold needs the teacher's log-probability of every actual token, and the dataset does not hold that of "
            "some; imported data often lacks it. Use another objective, or have a teacher read the text"
        )
    chunk_M, count_M = targets.chunk_C - targets.chunk_C[:1], (targets.ids_CK >= 0).sum(-1)
    log_s_M, sum_M = (sums_of_chunks(x_M, chunk_M)[chunk_M] for x_M in (log_q_M, targets.actual_logprobs_C))
    entry_M = targets.rank_C.minimum(count_M) - 1  # of the teacher's actual token, where its chunk has others
    own_CK = torch.nn.functional.pad(targets.logprobs_CK, (0, 1))  # where nothing is kept at all
    log_t_M = sum_M - own_CK.gather(1, entry_M.clamp_min(0)[:, None])[:, 0].double()
    return MergedTargets(
        **vars(targets),
        log_s_C=log_s_M - log_q_M.double(),
        log_t_C=log_t_M.clamp_max(0.0).where(targets.rank_C > 0, 0.0),
        unranked_C=entry_M.where(targets.rank_C > count_M, -1),
    )


def sides(
    log_q_CK: Tensor, log_top_CN: Tensor, log_rest_C2: Tensor, log_s_C: Tensor, targets: MergedTargets, tokens: Tokens
) -> Sides:
    """What `gold` compares, from log-probabilities of the student.

    Args:
        log_q_CK: of the entries, -inf where there is none. log_top_CN: of its likeliest unmatched tokens. log_rest_C2: of the
            matched and of the unmatched tokens that are no entry. log_s_C: as in the targets.
    """
    assert targets.log_t_C is not None and targets.unranked_C is not None
    s_C, t_C = log_s_C.exp().to(log_q_CK.dtype), targets.log_t_C.exp().to(log_q_CK.dtype)
    p_CK = targets.logprobs_CK.to(log_q_CK.dtype).exp() * t_C[:, None]
    lacked_CK = tokens.is_lacked_V[targets.ids_CK.clamp_min(0)] & (targets.ids_CK >= 0)
    unranked_CK = torch.arange(p_CK.shape[1], device=p_CK.device) == targets.unranked_C[:, None]
    apart_CK = lacked_CK & unranked_CK  # it joins the tail: which rank it would have is not known
    kept_CK = log_q_CK.exp() * s_C[:, None]
    rest_C2 = log_rest_C2.exp() * s_C[:, None]
    return Sides(
        kept_CK=kept_CK,
        top_CN=log_top_CN.exp() * s_C[:, None],
        rest_C=rest_C2[:, 0],
        lacked_C=rest_C2[:, 1] + (kept_CK * lacked_CK).sum(-1),
        p_CK=p_CK.masked_fill(apart_CK, 0.0),
        tail_C=targets.log_tail_C.to(p_CK.dtype).exp() * t_C + (p_CK * apart_CK).sum(-1),
        by_rank_CK=lacked_CK & ~apart_CK,
    )

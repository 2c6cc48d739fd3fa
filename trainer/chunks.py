"""ALM: the likelihood of chunks, for a student with another tokenizer than the teacher's.

A chunk is the same bytes as tokens of the teacher and as tokens of the student. With a and b the sums of the teacher's and of
the student's log-probabilities of its actual tokens, and T a temperature,

    L = T KL(p || q),  the divergence of two outcomes with the probabilities p = e^(a/T) and q = e^(b/T)

dL/db = (q - p) / (1 - q): 0 where student and teacher agree, and for large T near a/b - 1.

Source: approximate likelihood matching, Minixhofer, Ponti and Vulic, Cross-Tokenizer Distillation via Approximate Likelihood
Matching, arXiv 2503.20083, with T = 100, as the binary cross-entropy -[p log q + (1 - p) log(1 - q)]. The divergence differs
by a constant, and is 0 at best. The factor T is our default: without it the gradient is T times smaller than that of the
cross-entropy, with which it is mixed. So is the bound on 1 - q, `LEAST`, and that the sum over chunks is divided by the
number of counted tokens, as every other objective is.

The student's side needs the log-probabilities of actual tokens alone, so the gradient is that of a cross-entropy in which
each token weighs -dL/db of its chunk. Those weights are known once the log-probabilities are: the core of
`kdata.trainer.fused` runs twice, and a [positions, vocabulary] matrix exists at no time.

Shapes: M counted positions, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdata.errors import ConfigError
from kdata.trainer.objectives import Targets

LEAST = 1e-6  # of 1 - q: the loss of a student that is sure stays finite


def chunks_of(predictor_M: Tensor, logprob_M: Tensor) -> Tensor:
    """Number of the chunk that each counted position belongs to, int64 [M].

    A chunk ends at a token that has a log-probability of the teacher's below 0, and where the next target is not the
    next token. (A chunk of which the teacher is sure becomes part of the next one, whose sum it does not change.)

    Args:
        predictor_M: int64 [M], rising, cell before each token. logprob_M: float [M], the teacher's, nats; 0 in a chunk before
            its last token.
    """
    begins_M = torch.ones_like(predictor_M)
    begins_M[1:] = (logprob_M[:-1] != 0) | (predictor_M[1:] != predictor_M[:-1] + 1)
    return begins_M.cumsum(0) - 1


def chunk_loss(log_q_M: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss of chunks, and its derivative.

    Args:
        log_q_M: float [M], the student's log-probabilities of the actual tokens.
        targets: with `chunk_C` and `actual_logprobs_C`.
        temperature: T.
    Returns:
        float64 [M]: each chunk's loss in equal parts at its tokens; float64 [M]: d loss / d log q.
    Raises:
        ConfigError: the targets hold no log-probabilities of the teacher, or some are not known.
    """
    if targets.chunk_C is None or targets.actual_logprobs_C is None:
        raise ConfigError("objective alm needs chunk_C and actual_logprobs_C of the targets; set them")
    if not bool(torch.isfinite(targets.actual_logprobs_C).all()):
        raise ConfigError(
            "objective alm needs the teacher's log-probability of every actual token, and the dataset does not hold that of "
            "some; imported data often lacks it. Use another objective, or have a teacher read the text"
        )
    chunk_M = targets.chunk_C - targets.chunk_C[:1]
    a_C, b_C = (sums_of_chunks(x_M, chunk_M) / temperature for x_M in (targets.actual_logprobs_C, log_q_M))
    p_C, not_p_C, not_q_C = a_C.exp(), -torch.expm1(a_C), -torch.expm1(b_C)
    bounded_C = not_q_C.clamp_min(LEAST)
    loss_C = temperature * (p_C * (a_C - b_C) + torch.special.xlogy(not_p_C, not_p_C) - not_p_C * bounded_C.log())
    # The bound is a constant where it holds.
    slope_C = torch.where(not_q_C > LEAST, not_p_C * b_C.exp() / bounded_C, 0.0) - p_C
    size_C = sums_of_chunks(torch.ones_like(log_q_M), chunk_M)
    return (loss_C / size_C)[chunk_M], slope_C[chunk_M]


def sums_of_chunks(values_M: Tensor, chunk_M: Tensor) -> Tensor:
    """float64 [C], the sum of the values of each chunk; chunk_M: int64 [M], rising from 0."""
    count = int(chunk_M[-1]) + 1 if len(chunk_M) else 0
    return values_M.new_zeros(count, dtype=torch.float64).index_add_(0, chunk_M, values_M.double())

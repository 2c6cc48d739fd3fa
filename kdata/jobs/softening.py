"""Softer distributions where a position may hold private content (swing distillation, arXiv 2212.08349).

The paper sets the temperature of each token's soft target by how likely the position holds private content, and adds noise.
Only its abstract was at hand, so the map and the law of the noise are our default, and so is dropping:

    tau = 1 + c s                                 the temperature, s in [0, 1] the likelihood, c `temperature_rise`
    q_i = p_i^(1/tau) / Z                         an exact entry
    q_R = R^(1 - 1/tau) P_R^(1/tau) / Z           the rest: R ids that are not exact, of mass P_R; Z makes the sum 1
    (1 - lam s) q + lam s u                       what is stored; lam is `noise`, u uniform on the simplex (Dirichlet(1) over
                                                  the vocabulary), summed over the rest
    s > drop_above                                the position is no target any more, and nothing of it is stored

With c and lam both 0 the other positions stay as they are.

The sum of p^(1/tau) over the rest is not known. The formula is that of R equal probabilities, the largest that it can be
(p^(1/tau) is concave), so the rest never gets less than softmax(z / tau) would give it. Noise over the stored entries alone
would give the mass back to a secret that is the only one.

Inside of the rest the shares stay as they are. So a draw's weight is multiplied by (new mass / old mass) of the rest, which
does not depend on the draws: an unbiased draw of p is an unbiased draw of what is stored. The actual token's log-probability
follows in the same way, exactly. Its rank, the entropy and log-sum-exps at other temperatures do not follow; they become
unknown.

A position cannot be softened where it has no exact entry, where nothing is left for the rest, or where the rest has mass and
no draw to carry it. There, too, nothing is stored.

Shapes: S rows, T tokens, N kept entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdata.format.kept import draw_mask, segment_sum
from kdata.format.measures import only
from kdata.format.sequences import Sequences


@dataclass(frozen=True)
class Law:
    """How much is softened; see the module. temperature_rise >= 0; noise, drop_above in [0, 1]."""

    temperature_rise: float
    noise: float
    drop_above: float


@dataclass(frozen=True)
class Softened:
    """Decoded sequences after softening; softened, dropped: bool [T], positions that changed and that are no target now."""

    sequences: Sequences
    softened: np.ndarray
    dropped: np.ndarray


def soften_sequences(
    sequences: Sequences,
    likelihood_T: np.ndarray,
    vocab_size: int,
    law: Law,
    generators: Sequence[np.random.Generator],
    *,
    draws: bool,
) -> Softened:
    """Soften the targets whose likelihood is above 0.

    Args:
        likelihood_T: float [T] in [0, 1], how likely each position holds private content.
        vocab_size: ids of the teacher.
        generators: one for each of the S rows, of its noise.
        draws: whether the dataset holds draws for the rest; otherwise the rest is one number.
    """
    num_exact_T, num_kept_T = sequences.num_exact, sequences.num_kept
    num_drawn_T = num_kept_T - num_exact_T
    s_T = np.where(sequences.target_mask, likelihood_T.astype(np.float64), 0.0)
    rest_T = np.exp(sequences.log_tail.astype(np.float64))
    fits_T = (num_exact_T > 0) & (rest_T > 0) & ((num_drawn_T > 0) | (not draws))
    to_soften_T = (s_T > 0) & (law.temperature_rise > 0 or law.noise > 0)
    dropped_T = (s_T > law.drop_above) | (to_soften_T & ~fits_T)
    soft_T = to_soften_T & ~dropped_T

    is_draw_N = draw_mask(num_exact_T, num_drawn_T)
    place_N = np.repeat(np.arange(len(s_T)), num_kept_T)
    exact_N = soft_T[place_N] & ~is_draw_N
    prob_N = np.where(exact_N, np.exp(sequences.entry_logprobs.astype(np.float64)), 0.0)
    noise_N, noise_rest_T = _noise(sequences, soft_T, exact_N, vocab_size, generators)
    soft_N, soft_rest_T = soften(
        prob_N, np.where(soft_T, rest_T, 1.0), num_exact_T, num_kept_T, s_T, vocab_size, law, noise_N, noise_rest_T
    )
    growth_T = np.log(soft_rest_T) - np.log(np.where(soft_T, rest_T, 1.0))

    logprobs_N = sequences.entry_logprobs.astype(np.float64)
    logprobs_N[exact_N] = np.log(soft_N[exact_N])
    drawn_N = soft_T[place_N] & is_draw_N
    logprobs_N[drawn_N] += growth_T[place_N[drawn_N]]
    logprob_T = np.where(soft_T, sequences.logprob + growth_T, sequences.logprob.astype(np.float64))
    own_N = exact_N & (sequences.entry_ids == sequences.token_ids[place_N])
    logprob_T[place_N[own_N]] = logprobs_N[own_N]

    ids_N, entries = sequences.entry_ids.copy(), np.flatnonzero(exact_N)
    order = entries[np.lexsort((-logprobs_N[entries], place_N[entries]))]  # the largest first, as exact entries are
    ids_N[entries], logprobs_N[entries] = ids_N[order], logprobs_N[order]

    stays_N, stays_T = ~dropped_T[place_N], ~dropped_T
    num_kept_T = np.where(stays_T, num_kept_T, 0).astype(np.int32)
    measures = {
        "logprob": logprob_T.astype(np.float32),
        "rank": np.where(soft_T, 0, sequences.rank).astype(np.int32),
        "log_tail": np.where(soft_T, np.log(soft_rest_T), sequences.log_tail).astype(np.float32),
        "entropy": np.where(soft_T, np.nan, sequences.entropy).astype(np.float32),
    }
    result = dataclasses.replace(
        sequences,
        target_mask=sequences.target_mask & stays_T,
        **{name: only(stays_T)(values) for name, values in measures.items()},
        log_z=None,
        num_exact=np.where(stays_T, num_exact_T, 0).astype(np.int32),
        num_kept=num_kept_T,
        entry_offsets=np.concatenate(([0], np.cumsum(num_kept_T, dtype=np.int64))),
        entry_ids=ids_N[stays_N],
        entry_logprobs=logprobs_N[stays_N].astype(np.float32),
        draw_logprobs=None,
    )
    return Softened(result, soft_T, dropped_T)


def soften(
    prob_N: np.ndarray,
    rest_T: np.ndarray,
    num_exact_T: np.ndarray,
    num_kept_T: np.ndarray,
    likelihood_T: np.ndarray,
    vocab_size: int,
    law: Law,
    noise_N: np.ndarray,
    noise_rest_T: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The formulas of the module, in float64.

    Args:
        prob_N: probabilities of exact entries, 0 for other entries. rest_T: mass of the rest, > 0.
        noise_N, noise_rest_T: u of the module, which sums to 1 at a position.
    Returns:
        The probabilities of exact entries [N] (0 for others) and of the rest [T]: at each position they sum to 1.
    """
    rate_T = 1.0 / (1.0 + law.temperature_rise * likelihood_T)
    share_T = law.noise * likelihood_T
    total_T = segment_sum(prob_N, num_kept_T) + rest_T  # 1 up to the rounding of what is stored
    counted_T = np.maximum(vocab_size - num_exact_T.astype(np.float64), 1.0)
    with np.errstate(divide="ignore"):
        log_N = np.log(prob_N) - np.repeat(np.log(total_T), num_kept_T)
    power_N = np.where(prob_N > 0, np.exp(log_N * np.repeat(rate_T, num_kept_T)), 0.0)
    power_rest_T = counted_T ** (1.0 - rate_T) * (rest_T / total_T) ** rate_T
    sum_T = segment_sum(power_N, num_kept_T) + power_rest_T
    share_N = np.repeat(share_T, num_kept_T)
    soft_N = (1.0 - share_N) * power_N / np.repeat(sum_T, num_kept_T) + share_N * noise_N
    return soft_N, (1.0 - share_T) * power_rest_T / sum_T + share_T * noise_rest_T


def _noise(
    sequences: Sequences,
    soft_T: np.ndarray,
    exact_N: np.ndarray,
    vocab_size: int,
    generators: Sequence[np.random.Generator],
) -> tuple[np.ndarray, np.ndarray]:
    """u of the module, float64 [N] (0 for other entries) and [T]: exponentials and a gamma, divided by their sum."""
    weight_N, weight_rest_T = np.zeros(len(exact_N)), np.ones(len(soft_T))
    ends = sequences.entry_offsets
    for generator, (begin, end) in zip(generators, sequences.spans(), strict=True):
        soft_L = soft_T[begin:end]
        if not soft_L.any():
            continue
        own_N = exact_N[ends[begin] : ends[end]]
        weight_N[ends[begin] : ends[end]][own_N] = generator.standard_exponential(int(own_N.sum()))
        counts = np.maximum(vocab_size - sequences.num_exact[begin:end][soft_L], 1)
        weight_rest_T[begin:end][soft_L] = generator.standard_gamma(counts.astype(np.float64))
    sum_T = segment_sum(weight_N, sequences.num_kept) + weight_rest_T
    return weight_N / np.repeat(sum_T, sequences.num_kept), weight_rest_T / sum_T

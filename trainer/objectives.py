"""What a student can minimize, as formulas over a few outcomes per position.

A position has J = K + 1 outcomes: the K kept entries and one bucket for the rest of the vocabulary. An objective is a
function of the teacher's and the student's log-probabilities of those outcomes, and of nothing else; two compare positions
of one document too (`kdata.trainer.windows`). `kdata.trainer.fused`
computes the student's side without a [positions, vocabulary] matrix, differentiates the formula by autograd on [C, J], and
carries the result back to hidden states and head. To add an objective, write one function, add a line to `OBJECTIVES` and
its name to `OBJECTIVE_NAMES`, and add an oracle to the tests.

What is exact: by the log-sum inequality, merging outcomes never increases an f-divergence. So every f-divergence below is,
with the ghost bucket, a lower bound of the full one; what holds for the other objectives is in their docstrings. Only the
cross-entropy of the actual token is exact. On draws (kinds
sampled, hybrid, threshold), a term that is linear in the teacher's probabilities is unbiased and any other is not. Students
that were trained on biased terms ended 12 to 19 % higher in NLL, worse than on the text alone (`trainer/README.md`). Those
objectives therefore use the exact entries (hybrid, threshold) and one bucket for everything else, draws included, which is
again a lower bound; on data of draws alone they are refused.

At a temperature T both sides are softmax(logits / T), and every divergence is multiplied by T^2, value and gradient alike
(Hinton et al., arXiv 1503.02531, section 2: the gradient of a soft target falls as 1/T^2, so a mix keeps its proportions
when T changes). The cross-entropy of the actual token stays at T = 1 and is not scaled.

Shapes: C positions, K kept entries, J = K + 1 outcomes (the last is the bucket). All values are nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdata.errors import ConfigError, ShapeError
from kdata.trainer.objective_config import ObjectiveConfig, Tail
from kdata.trainer.windows import Windows, distances, follows, shared_places, transported

# Stands for log 0: e^-100 is below float32's normal range, and a finite number keeps 0 * log 0 at 0 and every gradient free
# of NaN, without a mask in each formula.
LOG_ZERO = -100.0

FIRST_ENTRIES = 5  # of FIRST's authors


@dataclass(frozen=True)
class Matched:
    """Which tokens a student shares with a teacher of another tokenizer: is_own_V, bool [V], of the student's ids; share: of
    the teacher's ids, in [0, 1]."""

    is_own_V: Tensor
    share: float


@dataclass(frozen=True)
class Targets:
    """The teacher's side of C counted positions, and the actual tokens there.

    token_ids_C: int64 [C] in [0, V), the actual tokens. ids_CK: int64 [C, K] in [0, V), distinct within a position, padded
    with -1. logprobs_CK: float [C, K], nats, not renormalized, -inf where padded. log_tail_C: float [C], log of the exact
    probability outside the exact entries, -inf if there is none. temperature: that of logprobs_CK and log_tail_C.
    num_exact_C: int [C], how many entries, from the first, are exact; the others are draws. Only the tail mode draws reads
    it; None: not known. weights_C: float32 [C] > 0, how much each position counts; None: 1. chosen_C: bool [C], positions
    where the whole mix counts; at the others only the cross-entropy does (`ObjectiveConfig.cross_entropy_elsewhere`); they
    have weight 1 and no entries. None: all are chosen. actual_logprobs_C: float [C], the teacher's log-probabilities of the
    actual tokens, NaN where not known; `alm`, `gold` and `span_correlation` read them. chunk_C: int64 [C], rising, number of
    the chunk of each; only `alm` and `gold` read it.
    entropy_C: float [C], nats, of the teacher's whole distribution at temperature 1, NaN where it is not known; 0 where a
    position is not chosen. None: not known. rank_C: int64 [C], and matched: only `gold` reads them
    (`kdata.jobs.retokenize`). document_C: int64 [C], rising, number of the document of each position, and position_C: int64
    [C], place of the actual token in it; only objectives of windows read them. windows: set by the core, for a chunk.
    """

    token_ids_C: Tensor
    ids_CK: Tensor
    logprobs_CK: Tensor
    log_tail_C: Tensor
    temperature: float = 1.0
    num_exact_C: Tensor | None = None
    weights_C: Tensor | None = None
    chosen_C: Tensor | None = None
    actual_logprobs_C: Tensor | None = None
    chunk_C: Tensor | None = None
    entropy_C: Tensor | None = None
    rank_C: Tensor | None = None
    matched: Matched | None = None
    document_C: Tensor | None = None
    position_C: Tensor | None = None
    windows: Windows | None = None

    def __len__(self) -> int:
        return self.token_ids_C.shape[0]

    def to(self, device: torch.device) -> Targets:
        """The same targets on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, part: slice) -> Targets:
        """The same targets for a range of positions."""
        return self.each(lambda tensor: tensor[part])

    def within(self, num_ids: int) -> Targets:
        """The same targets over the ids below `num_ids`: other entries become padding, exact ones of them join the tail."""
        outside_CK = self.ids_CK >= num_ids
        if not outside_CK.any():
            return self
        exact_CK = outside_CK
        if self.num_exact_C is not None:
            places_K = torch.arange(outside_CK.shape[1], device=outside_CK.device)
            exact_CK = outside_CK & (places_K < self.num_exact_C[:, None])
        moved_CJ = torch.cat([self.logprobs_CK.masked_fill(~exact_CK, -torch.inf), self.log_tail_C[:, None]], dim=-1)
        return replace(
            self,
            ids_CK=self.ids_CK.masked_fill(outside_CK, -1),
            logprobs_CK=self.logprobs_CK.masked_fill(outside_CK, -torch.inf),
            log_tail_C=torch.logsumexp(moved_CJ, dim=-1).to(self.log_tail_C.dtype),
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """The same targets with every tensor changed."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    @property
    def total_weight(self) -> float:
        """Sum of the weights of all positions, without weights their number: what the sum of a loss is divided by."""
        return float(len(self)) if self.weights_C is None else float(self.weights_C.double().sum())

    @property
    def chosen_weight(self) -> float:
        """The same of the chosen positions: what the sums of `sums` are divided by."""
        return self.total_weight - self.num_elsewhere

    @property
    def num_elsewhere(self) -> int:
        """Positions at which only the cross-entropy counts."""
        return 0 if self.chosen_C is None else int((~self.chosen_C).sum())

    def sums(self, values_CO: Tensor) -> Tensor:
        """Weighted sums over the chosen positions of numbers of each position, [O]."""
        if self.weights_C is None and self.chosen_C is None:
            return values_CO.sum(0)
        share_C = torch.ones_like(values_CO[:, 0]) if self.weights_C is None else self.weights_C.to(values_CO)
        if self.chosen_C is not None:
            share_C = share_C * self.chosen_C.to(share_C)
        return share_C @ values_CO

    def check(self, num_positions: int, vocab_size: int) -> None:
        """Raise ShapeError if shapes disagree or an id is outside the vocabulary (-1 may pad kept ids)."""
        shapes = {name: tuple(t.shape) for name, t in vars(self).items() if isinstance(t, Tensor)}
        if any(shape[0] != num_positions for shape in shapes.values()):
            raise ShapeError(f"targets {shapes} do not fit {num_positions} hidden states")
        if self.ids_CK.shape != self.logprobs_CK.shape:
            raise ShapeError(f"ids {tuple(self.ids_CK.shape)} and logprobs {tuple(self.logprobs_CK.shape)} disagree")
        for name, ids, lowest in (("token", self.token_ids_C, 0), ("kept", self.ids_CK, -1)):
            if ids.numel() == 0:
                continue
            low, high = (int(x) for x in torch.aminmax(ids))
            if low < lowest or high >= vocab_size:
                raise ShapeError(f"{name} ids span [{low}, {high}], outside the student's [0, {vocab_size})")


class Outcomes(NamedTuple):
    """The input of an objective: log-probabilities of J outcomes, and what else is known of a position."""

    log_p_CJ: Tensor  # teacher at the temperature, constant; LOG_ZERO where 0
    log_q_CJ: Tensor  # student at the temperature, differentiable; LOG_ZERO where 0
    log_q_token_C: Tensor  # student at temperature 1, differentiable
    token_C: Tensor  # int64 in [0, J), the outcome that the actual token is part of
    doubt_C: Tensor | None = None  # teacher's entropy at temperature 1 over log V, in [0, 1]; None: not known
    log_q_top_CN: Tensor | None = None  # the student's largest of all its vocabulary, falling, min(K, V) of them
    log_q_window_CNK: Tensor | None = None  # student's of the entries of all places of the window, -inf where none is
    targets: Targets | None = None  # of the positions, for objectives of windows


def teacher_outcomes(targets: Targets, tail: Tail) -> Tensor:
    """Complete the kept entries to J outcomes: [C, K + 1] log-probabilities, LOG_ZERO for 0.

    ghost: the bucket holds `log_tail`. draws: the bucket is empty and the weights stay as they are. renormalise: the bucket
    is empty and the kept entries are scaled to sum to 1 (a position without kept entries stays empty).
    """
    kept_CK = targets.logprobs_CK
    empty_C = torch.full_like(targets.log_tail_C, -math.inf)
    if tail == "ghost":
        rest_C = targets.log_tail_C
    elif tail == "draws":
        rest_C = empty_C
    else:
        total_C = torch.logsumexp(kept_CK, dim=-1)
        kept_CK = kept_CK - total_C.masked_fill(torch.isneginf(total_C), 0.0)[:, None]
        rest_C = empty_C
    return torch.cat([kept_CK, rest_C[:, None]], dim=-1).clamp_min(LOG_ZERO)


def _kl(log_a_CJ: Tensor, log_b_CJ: Tensor) -> Tensor:
    return (log_a_CJ.exp() * (log_a_CJ - log_b_CJ)).sum(-1)


def _entropy(log_a_CJ: Tensor) -> Tensor:
    return -(log_a_CJ.exp() * log_a_CJ).sum(-1)


def _log_sum(a_CN: Tensor, live_CN: Tensor) -> Tensor:
    """Log-sum-exp of the live ones of N numbers, [C]; LOG_ZERO where none is."""
    some_C = live_CN.any(-1)
    counted_CN = live_CN | ~some_C[:, None]  # the log-sum-exp of nothing has no gradient
    return a_CN.masked_fill(~counted_CN, -torch.inf).logsumexp(-1).masked_fill(~some_C, LOG_ZERO)


def _falling(o: Outcomes) -> tuple[Tensor, Tensor]:
    """The teacher's probabilities of the entries without the bucket, by falling size, [C, K]; and their places."""
    return o.log_p_CJ[:, :-1].exp().sort(dim=-1, descending=True, stable=True)


def _kl_among(a_CN: Tensor, b_CN: Tensor, live_CN: Tensor) -> Tensor:
    """KL of two softmaxes over the live ones of N numbers, [C]; 0 where none is."""
    log_a_CN, log_b_CN = (x_CN - _log_sum(x_CN, live_CN)[:, None] for x_CN in (a_CN, b_CN))
    return (log_a_CN.masked_fill(~live_CN, LOG_ZERO).exp() * (log_a_CN - log_b_CN)).masked_fill(~live_CN, 0.0).sum(-1)


def _mix(log_a_CJ: Tensor, log_b_CJ: Tensor, share_of_a: float) -> Tensor:
    return torch.logaddexp(log_a_CJ + math.log(share_of_a), log_b_CJ + math.log1p(-share_of_a))


def cross_entropy(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """-log q(actual token), always at temperature 1. Exact: it needs nothing from the teacher."""
    return -o.log_q_token_C


def forward_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(p || q) = sum_j p_j (log p_j - log q_j); dz = (sum p) q - p.

    Source: Hinton et al., arXiv 1503.02531.

    ghost: a lower bound; the gradient moves the tail as one lump. draws: the gradient is unbiased (Random
    Sampling KD, arXiv 2503.16870), the value is shifted by the constant entropy of the weights. renormalise:
    biased towards the head.
    """
    return _kl(o.log_p_CJ, o.log_q_CJ)


def reverse_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(q || p) = sum_j q_j (log q_j - log p_j).

    Source: the direction of MiniLLM, arXiv 2306.08543, without its sampling.

    ghost: a lower bound that does not see where in the tail the student puts its probability. draws: the same, of the exact
    entries. Infinite without a bucket, so renormalise is refused.
    """
    return _kl(o.log_q_CJ, o.log_p_CJ)


def jsd(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """Generalised Jensen-Shannon: b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q.

    Source: GKD, arXiv 2306.13649.

    By definition it is 0 at both ends. As in TRL, b = 0 is forward KL instead, and b = 1 is reverse KL (refused without a
    bucket). ghost: a lower bound. draws: the same, of the exact entries. renormalise: biased.
    """
    beta = config.jsd_beta
    if beta == 0.0:
        return forward_kl(o, config)
    if beta == 1.0:
        return reverse_kl(o, config)
    log_m_CJ = _mix(o.log_p_CJ, o.log_q_CJ, beta)
    return beta * _kl(o.log_p_CJ, log_m_CJ) + (1 - beta) * _kl(o.log_q_CJ, log_m_CJ)


def skewed_forward_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(p || s p + (1 - s) q).

    Source: DistiLLM, arXiv 2402.03898.

    ghost: a lower bound. draws: the same, of the exact entries. renormalise: biased.
    """
    return _kl(o.log_p_CJ, _mix(o.log_p_CJ, o.log_q_CJ, config.skew))


def skewed_reverse_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(q || (1 - s) p + s q). Finite without a bucket: where p is 0 the log-ratio is -log s.

    Source: DistiLLM, arXiv 2402.03898.

    ghost: a lower bound. draws: the same, of the exact entries. renormalise: biased.
    """
    return _kl(o.log_q_CJ, _mix(o.log_q_CJ, o.log_p_CJ, config.skew))


def total_variation(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """0.5 sum_j |p_j - q_j|; 1 - E[TV] is the acceptance of speculative decoding.

    Source: DistillSpec, arXiv 2310.08461.

    ghost: a lower bound. draws: the same, of the exact entries. renormalise: biased. The gradient is a subgradient where
    p_j = q_j. It falls as 1/T, so at a T other than 1 the common factor T^2 makes it T times as heavy in a mix.
    """
    return 0.5 * (o.log_p_CJ.exp() - o.log_q_CJ.exp()).abs().sum(-1)


def balanced_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """w_f KL(p || q) + w_r KL(q || p); (w_f, w_r) = (delta, 1) where H(p) > H(q), else (1, delta); the weights are constants.

    Source: BD-KD, arXiv 2212.12965, for images, in which teacher and student learn together. Its abstract says that forward
    and reverse KL are weighted sample by sample to balance the student's confidence. We could not verify direction and
    constants: more of forward KL where the student is too certain, and delta = 2, are our defaults.

    Both entropies are those of the outcomes, so like is compared with like; where the bucket is heavy, the side that is
    larger may be another than over the vocabulary. ghost: at most delta times the full KL(p || q) + KL(q || p), because it
    is that of lower bounds. draws: the same, of the exact entries. Infinite without a bucket, so renormalise is refused.
    """
    unsure_C = _entropy(o.log_p_CJ) > _entropy(o.log_q_CJ)
    forward_C, reverse_C = forward_kl(o, config), reverse_kl(o, config)
    return torch.where(
        unsure_C, config.balanced_delta * forward_C + reverse_C, forward_C + config.balanced_delta * reverse_C
    )


def adaptive_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """a KL(p || q) + (1 - a) KL(q || p), where a is the head's share of sum_j |p_j - q_j|, a constant.

    The head: the most probable entries of the teacher while they sum to at most `adaptive_head`, and the first in any case.
    The rest, the bucket included, is the tail.

    Source: AKL, arXiv 2404.02657. Head, gaps, no gradient through them and the weights are as in the authors' code
    (wutaiqiang/LLM_KD_AKL, AKL.py), which we read.

    Inside the bucket differences cancel, so a is at least that of the whole vocabulary where the kept entries hold the head;
    where they sum to less than `adaptive_head`, the head ends with them. Not a bound. draws: the same, of the exact entries.
    Infinite without a bucket, so renormalise is refused.
    """
    gap_CJ = (o.log_p_CJ.exp() - o.log_q_CJ.detach().exp()).abs()
    p_CK, order_CK = _falling(o)
    within_CK = p_CK.cumsum(-1) <= config.adaptive_head
    within_CK[:, :1] = True
    share_C = (gap_CJ.gather(-1, order_CK) * within_CK).sum(-1) / gap_CJ.sum(-1).clamp_min(1e-30)
    return share_C * forward_kl(o, config) + (1 - share_C) * reverse_kl(o, config)


def tail_aware_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL over the kept entries, given that one of them comes, times their mass, + w KL of the masses of head and tail.

    By the chain rule this is KL(p || q) + (w - 1) KL((1 - m, m) || (1 - n, n)), with m and n the teacher's and the student's
    mass of the tail. At w = 1 it is forward KL. At every w > 0 its minimum is at p = q, which it would not be if the tail's
    term of forward KL were weighted alone.

    Source: the tail's mass as an outcome of its own is verl's `forward_kl_topk_tail` (verl #7856), which is w = 1 and which
    we read. A weight for the tail is that of "Don't Ignore the Tail", arXiv 2602.20816, of which we read the abstract only.
    It weights the divergence inside the tail, by what is known of it; stored entries do not hold that, so the weight on the
    mass is our form of it.

    ghost: the masses are exact, the rest a lower bound. draws: the same, of the exact entries, so head and tail are theirs.
    renormalise: biased, and m is 0.
    """
    live_CK = o.log_p_CJ[:, :-1] > LOG_ZERO
    masses = [torch.stack([_log_sum(x_CJ[:, :-1], live_CK), x_CJ[:, -1]], dim=-1) for x_CJ in (o.log_p_CJ, o.log_q_CJ)]
    return forward_kl(o, config) + (config.tail_weight - 1.0) * _kl(*masses)


def deviation_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """(H / log V)^gamma KL(p || q), H the entropy of the teacher's whole distribution at temperature 1, V the vocabulary.

    Source: deviation-aware distillation of DB-LLM, arXiv 2402.11960: more weight where the teacher is ambiguous. We could
    not verify its formula; this form and gamma = 1 are our defaults.

    H is the stored entropy, not that of the outcomes, so the weight is exact up to its rounding on disk whatever is kept, and
    a constant: the gradient is unbiased on draws, as that of forward KL, and with the bucket the value is a lower bound.
    renormalise: biased. Data without it (imported, combined of several teachers, read through a server) is refused.
    """
    if o.doubt_C is None:
        raise ConfigError("deviation_kl needs the teacher's entropy, but entropy_C of the targets is None; set it")
    return o.doubt_C**config.deviation_gamma * forward_kl(o, config)


def taid(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(p_t || q) with p_t = softmax((1 - t) log q + t log p), a constant; t is `taid_t`.

    Source: TAID, arXiv 2501.16937, and copies of the authors' code, whose value is the cross-entropy with p_t, of the same
    gradient. How t follows the loss: `kdata.trainer.interpolation`.

    p_t mixes the outcomes, so in the bucket it mixes sums of probabilities, and it is 0 where the teacher's is. The value
    rises with t to forward KL at t = 1, so with the bucket it is at most the full KL(p || q); it is no bound of its own full
    value. draws: the same, of the exact entries. renormalise: biased.
    """
    t = config.interpolation()
    never_CJ = o.log_p_CJ <= LOG_ZERO
    log_m_CJ = ((1 - t) * o.log_q_CJ.detach() + t * o.log_p_CJ).masked_fill(never_CJ, LOG_ZERO)
    log_sum_C = torch.logsumexp(log_m_CJ, dim=-1).masked_fill(never_CJ.all(-1), 0.0)
    return _kl((log_m_CJ - log_sum_C[:, None]).clamp_min(LOG_ZERO), o.log_q_CJ)


def plackett_luce(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """-sum_k p[pi_k] log(q[pi_k] / sum_{j >= k} q[pi_j]): the student is to choose the outcomes in the order pi.

    pi: first the outcome that the actual token is part of, then the kept entries by falling probability of the teacher, then
    the bucket.

    Source: PLD, arXiv 2506.12542: order and weights are those of its abstract. The paper orders the vocabulary, with the
    weights softmax(z_T / T) and the student at temperature 1; here, as in every objective, both are at T.

    The rest of the vocabulary is one item, and an actual token that is not kept is in it, so that the bucket comes first
    there. The order within the bucket is not learnt, and the value is no bound. draws: the same, of the exact entries.
    renormalise: biased, the bucket's weight is 0. It falls as 1/T, so at a T other than 1 the common factor T^2 makes it T
    times as heavy in a mix.
    """
    rank_CJ = torch.cat([o.log_p_CJ[:, :-1], torch.full_like(o.log_p_CJ[:, -1:], 2 * LOG_ZERO)], dim=-1)
    rank_CJ = rank_CJ.scatter(-1, o.token_C[:, None], torch.inf)
    order_CJ = rank_CJ.argsort(dim=-1, descending=True, stable=True)
    log_p_CJ, log_q_CJ = (x_CJ.gather(-1, order_CJ) for x_CJ in (o.log_p_CJ, o.log_q_CJ))
    padding_CJ = (log_p_CJ <= LOG_ZERO) & (log_q_CJ <= LOG_ZERO)  # far below an entry that the student gives e^-200
    log_left_CJ = log_q_CJ.masked_fill(padding_CJ, 1e3 * LOG_ZERO).flip(-1).logcumsumexp(-1).flip(-1)
    return (log_p_CJ.exp() * (log_left_CJ - log_q_CJ)).masked_fill(padding_CJ, 0.0).sum(-1)


def first(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(r || q among the five) over the teacher's five most probable entries, r = exp(p / c) scaled to sum to 1 over them.

    Source: FIRST, arXiv 2408.12168; the five and the recalibration. The student is renormalized over the five, which is the
    authors' code with `--use_norm linear`, read there; with that code's default both sides are softmax(p / temperature), so
    the student would be drawn to the teacher before its recalibration. The paper's own choice could not be verified.

    Exact where five entries are kept, in every tail mode but renormalise (p is larger there); with fewer, over those. It says
    nothing of the probability outside of the five. draws: the same, of the exact entries, of which threshold data may have
    fewer than five.
    """
    places_CN = _falling(o)[1][:, :FIRST_ENTRIES]
    log_p_CN, log_q_CN = (x_CJ.gather(-1, places_CN) for x_CJ in (o.log_p_CJ, o.log_q_CJ))
    live_CN = log_p_CN > LOG_ZERO
    return _kl_among(log_p_CN.exp() / config.first_c, log_q_CN, live_CN)


def dac_kl(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """KL(p || q) among the entries between two quantiles of the teacher, both sides scaled to sum to 1 over them.

    With b_k the sum of the probabilities before entry k, by falling probability: those with dac_lower <= b_k < dac_upper.

    Source: DAC-KL, arXiv 2407.10068, of which we read the abstract: a small network learns what to clip from the teacher's
    output. Here the bounds are fixed, quantiles of probability, and both they and the scaling are our defaults. Learned ones
    are not built: trained by this divergence they would close on one entry, and what holds them open we could not read.

    Exact where the kept entries reach the upper bound, in every tail mode but renormalise; otherwise they end before it, and
    what is not kept never counts. It says nothing of the probability outside of the bounds. draws: the same, of the exact
    entries.
    """
    p_CK, places_CK = _falling(o)
    log_p_CK, log_q_CK = (x_CJ.gather(-1, places_CK) for x_CJ in (o.log_p_CJ, o.log_q_CJ))
    before_CK = torch.cat([torch.zeros_like(p_CK[:, :1]), p_CK.cumsum(-1)[:, :-1]], dim=-1)
    live_CK = (before_CK >= config.dac_lower) & (before_CK < config.dac_upper) & (log_p_CK > LOG_ZERO)
    return _kl_among(log_p_CK, log_q_CK, live_CK)


def uld(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """sum_r |p_(r) - q_(r)|, the r-th largest probabilities of both, whatever their tokens; with it no ids are compared.

    Source: Universal Logit Distillation, arXiv 2402.12030, and the authors' code (Nicolas-BZRD/llm-recipes), which we read:
    both vocabularies sorted, the smaller one filled up with zeros, temperature 1, the sum over the vocabulary and the mean
    over positions; the loss is the cross-entropy + 1.5 times it. There the first token of an answer is compared with the
    first one, the second with the second, and so on; here those that begin at the same byte.

    Over the ranks of the kept entries, + |m - n|, the masses of teacher and student behind them: by the triangle inequality
    a lower bound, exact where all is kept. draws: the same, of the exact entries. renormalise: biased. The gradient is a
    subgradient where two values are equal. It falls as 1/T, so at a T other than 1 the common factor T^2 makes it T times as
    heavy in a mix.
    """
    assert o.log_q_top_CN is not None  # the core computes it for this objective
    p_CK = _falling(o)[0]
    live_CK = p_CK > math.exp(LOG_ZERO)
    q_CK = torch.nn.functional.pad(o.log_q_top_CN.exp(), (0, p_CK.shape[1] - o.log_q_top_CN.shape[1])) * live_CK
    gaps_CK = (p_CK - q_CK).masked_fill(~live_CK, 0.0).abs()
    return gaps_CK.sum(-1) + (o.log_p_CJ[:, -1].exp() - (1 - q_CK.sum(-1))).abs()


def sinkd(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """sum_i P_ij W_ij at position j of a window of `compared_tokens`: the students of all its i, moved to the teacher at j.

    So its gradient reaches the student at every i, and where a plan weighs positions, the weight of j is that of the
    teacher's column j, not of the student at j.

    W, P, source and what of it is ours: `kdata.trainer.windows`. The gradient goes through W and P, as in the authors' code.
    P blurs: it is no permutation where positions are alike, so that the value of a student that is the teacher is not 0.

    Each W is a lower bound, with the rest of the vocabulary as one item, and exact where all is kept; the value, whose P
    follows from W, is no bound. draws: the same, of the exact entries. renormalise: biased. The gradient is a subgradient
    where probabilities are equal. It falls as 1/T, so at a T other than 1 the common factor T^2 makes it T times as heavy
    in a mix.
    """
    assert o.targets is not None and o.targets.windows is not None and o.log_q_window_CNK is not None
    windows, p_CJ = o.targets.windows, o.log_p_CJ.exp() * (o.log_p_CJ > LOG_ZERO)
    p_CNJ = windows.of_all(p_CJ, 0.0)
    return transported(distances(o.log_q_window_CNK.exp() * (p_CNJ[..., :-1] > 0), p_CNJ), windows)


def span_correlation(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """sum of (p_t(v) p_t+1(w) - q_t(v) q_t+1(w))^2 over some pairs of ids at a position and the one before, in one window.

    Pairs: the two actual tokens, and v = w for every id that is kept at both, each once. 0 at the first position of a window.

    Source: DAC-KL, arXiv 2407.10068, at second hand; what is ours is in `kdata.trainer.windows`.

    Exact for these pairs, so a lower bound of the sum over all pairs of the vocabulary. draws: the same, of the exact
    entries. renormalise: biased. At temperature 1 only, where the teacher's probability of every actual token is known; data
    that holds it of chunks (another tokenizer) or not at all is refused.
    """
    assert o.targets is not None and o.targets.windows is not None and o.targets.actual_logprobs_C is not None
    assert o.targets.document_C is not None and o.targets.position_C is not None
    place = (o.targets.document_C, o.targets.position_C, o.targets.windows.counts_C)
    token_C, second_P = o.targets.token_ids_C, follows(*place, config.compared_tokens).nonzero()[:, 0]
    first_P = second_P - 1
    log_p_C, log_q_C = o.targets.actual_logprobs_C.to(o.log_q_token_C), o.log_q_token_C
    value_P = ((log_p_C[first_P] + log_p_C[second_P]).exp() - (log_q_C[first_P] + log_q_C[second_P]).exp()).square()
    ids_CK = o.targets.ids_CK.masked_fill(o.log_p_CJ[:, :-1] <= LOG_ZERO, -1)
    shared_PK, at_PK = shared_places(ids_CK[first_P], ids_CK[second_P])
    is_actual_PK = (ids_CK[first_P] == token_C[first_P][:, None]) & (token_C[first_P] == token_C[second_P])[:, None]
    products = [x_CJ[first_P, :-1] + x_CJ[second_P].gather(1, at_PK) for x_CJ in (o.log_p_CJ, o.log_q_CJ)]
    gap_PK = (products[0].exp() - products[1].exp()).masked_fill(~shared_PK | is_actual_PK, 0.0)
    return torch.zeros_like(log_q_C).index_add(0, second_P, value_P + gap_PK.square().sum(-1))


OBJECTIVES: dict[str, Callable[[Outcomes, ObjectiveConfig], Tensor]] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "balanced_kl": balanced_kl,
    "adaptive_kl": adaptive_kl,
    "tail_aware_kl": tail_aware_kl,
    "deviation_kl": deviation_kl,
    "taid": taid,
    "plackett_luce": plackett_luce,
    "first": first,
    "dac_kl": dac_kl,
    "uld": uld,
    "sinkd": sinkd,
    "span_correlation": span_correlation,
}

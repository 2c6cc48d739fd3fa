"""What a student is asked to minimise, written as formulas over a handful of outcomes per position.

A position has J = K + 1 outcomes: the K kept entries and one bucket for everything else. An objective is a
function of the teacher's and the student's log-probabilities over those outcomes, and nothing else:
`kdata.trainer.fused` computes the student's side without ever holding [positions, vocabulary], differentiates the
formula by autograd on [C, J], and carries the result back to hidden states and head. To add an objective: one
function, one line in `OBJECTIVES`, one oracle test.

By the log-sum inequality, lumping outcomes never increases an f-divergence, so every divergence below is,
with the ghost bucket, a lower bound of the full one; only the cross-entropy of the actual token is exact. On
draws (random sampling and hybrids) a term that is linear in the teacher's probabilities is unbiased, any
other is not: students that were trained so ended 12 to 19 % above in NLL, worse than on the text alone
(`trainer/README.md`). So those take the exact entries of a hybrid and one bucket for everything else, draws
included, which is a lower bound again, and data of draws alone is refused for them.

At a temperature T both sides are those of softmax(logits / T), and every divergence is multiplied by T^2, value and
gradient alike (Hinton et al., arXiv 1503.02531, section 2: the gradient of a soft target falls as 1/T^2, so a mix keeps
its proportions when T changes). The cross-entropy of the actual token stays at T = 1 and is not scaled.

Shapes: C positions, K kept entries, J = K + 1 outcomes (the last is the bucket). All values are nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdata.errors import ConfigError, ShapeError
from kdata.trainer.schedule import Ramp

Tail = Literal["ghost", "draws", "renormalise"]

# The logarithm that stands for probability 0: e^-100 is below float32's normal range, and a finite number
# keeps 0 * log 0 = 0 and every gradient free of NaN without a mask in each formula.
LOG_ZERO = -100.0


class ObjectiveConfig(BaseModel):
    """Which objectives, in which mix, and how the teacher's sparse distribution is completed."""

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, float | Ramp] = Field(
        default={"cross_entropy": 0.1, "forward_kl": 0.9},
        description="Objective name -> weight: a number, or {kind, start, end, steps} for one that moves with the step. "
        "The loss is the weighted sum; weights need not sum to 1. 0 computes an objective for the metrics only.",
    )
    tail: Literal["auto", "ghost", "draws", "renormalise"] = Field(
        default="auto",
        description="What stands for the mass outside the kept entries. auto: what the dataset holds (ghost "
        "or draws). ghost: one bucket with the exact remaining mass. draws: none, the kept weights are "
        "unbiased and sum to 1; objectives that are not linear in them (all but cross_entropy, forward_kl and jsd at "
        "beta 0) take the exact entries and one bucket. renormalise: none, the kept entries are scaled to sum to 1 (biased; "
        "for comparison).",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Temperature T of teacher and student in every objective but cross_entropy; their values are multiplied "
        "by T^2. 1, or one that the dataset was captured for (its setting `temperatures`).",
    )
    jsd_beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Teacher's share in the mixture of `jsd`. 0: forward KL, 1: reverse KL.",
    )
    skew: float = Field(default=0.1, gt=0, lt=1, description="s of the skewed divergences; 0.1 is the authors' choice.")

    def at(self, step: int, steps: int) -> ObjectiveConfig:
        """The same mix with the weights of step 0, 1, ... of `steps`, all of them numbers."""
        numbers = {n: w.at(step, steps) if isinstance(w, Ramp) else w for n, w in self.weights.items()}
        return self.model_copy(update={"weights": numbers})

    def numbers(self) -> dict[str, float]:
        """The weights. Raises ConfigError where one moves with the step, which `at` must decide first."""
        found = {name: weight for name, weight in self.weights.items() if not isinstance(weight, Ramp)}
        if len(found) < len(self.weights):
            raise ConfigError("objective.weights move with the step; take the mix of one step, config.at(step, steps)")
        return found


@dataclass(frozen=True)
class Targets:
    """The teacher's side of C counted positions, and the tokens that are really there.

    token_ids_C: int64 [C] in [0, V). ids_CK: int64 [C, K] in [0, V), no id twice in a row, -1 pads.
    logprobs_CK: float [C, K], nats, not renormalised, -inf at pads. log_tail_C: float [C], log of the exact
    mass outside the exact entries, -inf if none. temperature: that of logprobs_CK and log_tail_C. num_exact_C: int [C],
    how many of the entries, from the first, are exact; the others are draws. Tail draws alone reads it; None: not known.
    """

    token_ids_C: Tensor
    ids_CK: Tensor
    logprobs_CK: Tensor
    log_tail_C: Tensor
    temperature: float = 1.0
    num_exact_C: Tensor | None = None

    def __len__(self) -> int:
        return self.token_ids_C.shape[0]

    def to(self, device: torch.device) -> Targets:
        """The same targets on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, part: slice) -> Targets:
        """The same targets for a range of positions."""
        return self._each(lambda tensor: tensor[part])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        ids, logprobs = change(self.ids_CK), change(self.logprobs_CK)
        exact = None if self.num_exact_C is None else change(self.num_exact_C)
        return Targets(change(self.token_ids_C), ids, logprobs, change(self.log_tail_C), self.temperature, exact)

    def check(self, num_positions: int, vocab_size: int) -> None:
        """Raise ShapeError where shapes disagree or an id is outside the vocabulary (-1 may pad kept ids)."""
        others = (self.ids_CK, self.log_tail_C, *(() if self.num_exact_C is None else (self.num_exact_C,)))
        if any(count != num_positions for count in (len(self), *(other.shape[0] for other in others))):
            shapes = {name: tuple(t.shape) for name, t in vars(self).items() if isinstance(t, Tensor)}
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
    """What an objective sees: log-probabilities of J outcomes, and the student's of the actual token."""

    log_p_CJ: Tensor  # teacher at the temperature, constant; LOG_ZERO where 0
    log_q_CJ: Tensor  # student at the temperature, differentiable; LOG_ZERO where 0
    log_q_token_C: Tensor  # student at temperature 1, differentiable


def teacher_outcomes(targets: Targets, tail: Tail) -> Tensor:
    """Complete the kept entries to J outcomes: [C, K + 1] log-probabilities with LOG_ZERO for 0.

    ghost: the bucket holds `log_tail`. draws: the bucket is empty and the weights stand as they are.
    renormalise: the bucket is empty and the kept entries are scaled to sum to 1 (a position without kept
    entries stays empty).
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


def _mix(log_a_CJ: Tensor, log_b_CJ: Tensor, share_of_a: float) -> Tensor:
    return torch.logaddexp(log_a_CJ + math.log(share_of_a), log_b_CJ + math.log1p(-share_of_a))


def cross_entropy(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """-log q(actual token), at temperature 1 whatever the mix's. Exact: it needs nothing from the teacher."""
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

    ghost: a lower bound that is blind to where in the tail the student puts its mass; draws: the same, of the exact
    entries. Infinite without a bucket, so renormalise is refused.
    """
    return _kl(o.log_q_CJ, o.log_p_CJ)


def jsd(o: Outcomes, config: ObjectiveConfig) -> Tensor:
    """Generalised Jensen-Shannon: b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q.

    Source: GKD, arXiv 2306.13649.

    By definition it vanishes at both ends; as in TRL, b = 0 is forward KL and b = 1 reverse KL (refused
    without a bucket). ghost: a lower bound. draws: the same, of the exact entries. renormalise: biased.
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
    p_j = q_j. It falls as 1/T, so at T other than 1 the common T^2 gives it T times its share of a mix.
    """
    return 0.5 * (o.log_p_CJ.exp() - o.log_q_CJ.exp()).abs().sum(-1)


OBJECTIVES: dict[str, Callable[[Outcomes, ObjectiveConfig], Tensor]] = {
    "cross_entropy": cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
}

# Linear in the teacher's probabilities, up to a constant: what draws can serve.
LINEAR = frozenset({"cross_entropy", "forward_kl"})


def tail_of(name: str, config: ObjectiveConfig, tail: Tail) -> Tail:
    """The tail that an objective is computed with: on draws, ghost of the exact entries where it is not linear."""
    linear = name in LINEAR or (name == "jsd" and config.jsd_beta == 0.0)
    return tail if linear or tail != "draws" else "ghost"


def scale_of(name: str, temperature: float) -> float:
    """What an objective's value and gradient are multiplied by: T^2, and 1 for cross_entropy."""
    return 1.0 if name == "cross_entropy" else temperature**2


def resolve_tail(
    config: ObjectiveConfig,
    held: Literal["ghost", "draws", "absent"],
    temperatures: Sequence[float] = (),
    *,
    kind: str = "sampled",
) -> Tail:
    """Check an objective mix against what a dataset holds, and return the tail mode to train with.

    Args:
        config: the mix.
        held: the dataset's `tail`.
        temperatures: those other than 1 whose log-sum-exp the dataset holds.
        kind: the dataset's `codec.kind`; read where draws are held, of which hybrid alone has exact entries everywhere.

    Raises:
        ConfigError: an unknown objective, no positive weight, a negative or non-finite weight, a temperature
            that the dataset was not captured for, a tail mode or an objective that the data cannot serve, or an objective
            that is infinite under it.
    """
    unknown = sorted(set(config.weights) - set(OBJECTIVES))
    if unknown:
        raise ConfigError(f"objective.weights names {unknown}; known objectives: {', '.join(OBJECTIVES)}")
    _check_weights(config.weights)
    if config.temperature != 1.0 and config.temperature not in temperatures:
        raise ConfigError(
            f"objective.temperature is {config.temperature}, but the dataset holds the teacher's log-sum-exp at "
            f"{[1.0, *temperatures]} only, so any other temperature would be wrong in the tail; set it to one of these, or "
            f"capture the text again with --set temperatures=[{config.temperature}]"
        )
    if held == "absent":
        if config.tail != "renormalise":
            raise ConfigError(
                f"objective.tail is {config.tail!r}, but the dataset was imported from a format that does not hold the "
                "mass outside the kept entries; set objective.tail to renormalise (biased towards the kept entries), "
                "or capture the text again with `kdata capture`"
            )
        held = "ghost"
    tail: Tail = held if config.tail == "auto" else config.tail
    if (tail == "draws") != (held == "draws"):
        allowed = "draws" if held == "draws" else "ghost or renormalise"
        raise ConfigError(f"objective.tail is {tail!r}, but the dataset's kept entries are for {held!r}; use {allowed}")
    needs_bucket = [n for n in config.weights if n == "reverse_kl" or (n == "jsd" and config.jsd_beta == 1.0)]
    if needs_bucket and tail == "renormalise":
        raise ConfigError(
            f"{needs_bucket[0]} is infinite with tail {tail!r} (the student's mass outside the kept "
            "entries meets probability 0); use skewed_reverse_kl, or data with an exact tail (ghost)"
        )
    biased = [name for name in config.weights if tail_of(name, config, tail) != tail]
    if biased and kind != "hybrid":
        raise ConfigError(
            f"{biased[0]} is not linear in the teacher's probabilities, so draws bias it, and data of kind {kind!r} does not "
            "promise exact entries at every position; take it out (weight 0 measures it too), or use data of kind hybrid, "
            "topk or adaptive"
        )
    return tail


def _check_weights(weights: Mapping[str, float | Ramp]) -> None:
    """Raise ConfigError unless weights are finite, none is negative and not all are 0, at both ends of their ramps."""
    for place in ("start", "end"):
        values = [getattr(w, place) if isinstance(w, Ramp) else w for w in weights.values()]
        if any(not math.isfinite(w) or w < 0 for w in values) or not any(values):
            where = f" at the {place}" if any(isinstance(w, Ramp) for w in weights.values()) else ""
            raise ConfigError(f"objective.weights {weights} must be finite, >= 0 and not all 0{where}")

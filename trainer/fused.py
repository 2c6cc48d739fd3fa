"""The distillation loss without a full logits matrix: chunk by chunk, forward and backward.

Only [chunk, V] logits exist at a time, in one buffer that all chunks share. For each chunk the logits are computed once. The
logits of the kept entries and of the actual token are gathered; the rest of the vocabulary is summed with the kept entries
set to exactly 0, so the student's tail probability has no cancellation, however small it is. Autograd differentiates the
objective on those [C, K + 2] numbers, and the Jacobian turns the same buffer into d loss / d logits, which gives both
gradients. That is three matrix products, as in the naive version, and a fraction of its memory (`tests/benchmarks/loss.py`).

Trade-offs: the gradients are computed in the forward pass and returned in the backward pass, so the backward pass can run
once. A temperature other than 1 needs a second buffer of a chunk's size, for the softmax at temperature 1 that the
cross-entropy uses.

Shapes: M counted positions, C positions of a chunk, V vocabulary, D hidden, K kept entries, O objectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdata.errors import ConfigError, ShapeError
from kdata.trainer.chunks import chunk_loss, sums_of_chunks
from kdata.trainer.merged import MergedTargets, Tokens, gold, sides, with_scales
from kdata.trainer.objective_config import (
    CHUNK_OBJECTIVES,
    WINDOW_OBJECTIVES,
    ObjectiveConfig,
    Tail,
    scale_of,
    tail_of,
)
from kdata.trainer.objectives import LOG_ZERO, OBJECTIVES, Outcomes, Targets, teacher_outcomes
from kdata.trainer.windows import begins_of, follows, windows_of

# The logits buffer should stay in a CPU cache: at V = 8k, bf16, one thread, 4096 tokens take 0.14 s with 8 MiB and 0.27 s
# with 64 MiB. Large vocabularies need enough positions for the matrix products to run at full speed, and each chunk reads and
# writes the whole gradient of the head. More than 152 positions would use more than a tenth of the naive version's memory at
# V = 128k. Powers of two reduce over the vocabulary several times faster than other sizes.
# On a GPU the gradient of the head decides (computed, not measured): at V = 128k, D = 4,096 each chunk reads and writes 2 GiB
# of it, so 32k tokens move 512 GiB each way in chunks of 128, and 64 GiB in chunks of 1,024.
CHUNK_BYTES, CHUNK_MIN_POSITIONS = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}, 128


SLOPE = "slope"  # in place of an objective: the derivative of `gold` by log s


class Loss(NamedTuple):
    """The loss of a batch.

    total: scalar, nats per counted token, differentiable. values_MO: float [M, O], each objective at each
    position, detached, in the order of `names`; divergences at T include their factor T^2. elsewhere: scalar, detached, nats:
    the cross-entropy summed over the positions that are not chosen, 0 where all are.
    """

    total: Tensor
    values_MO: Tensor
    names: tuple[str, ...]
    elsewhere: Tensor


class Measured(NamedTuple):
    """values_MO as in Loss. top_ids_MN: int64 [M, N], the most likely tokens. confidence_M: probability of the first."""

    values_MO: Tensor
    top_ids_MN: Tensor
    confidence_M: Tensor


@dataclass(frozen=True)
class LossPlan:
    """How objectives become one loss. `scale` multiplies the sum over positions: 1 / the sum of their weights in the step.

    weights: of the objectives, by name, at chosen positions. elsewhere: the same at the others, or None where all are chosen.
    tokens: of `gold`, which has a pass of its own.
    """

    config: ObjectiveConfig
    tail: Tail
    weights: dict[str, float]
    elsewhere: dict[str, float] | None
    scale: float
    matmul_dtype: torch.dtype
    chunk_positions: int
    vocab_size: int
    tokens: Tokens | None = None

    def chunks(self, targets: Targets) -> list[slice]:
        """Ranges of positions whose logits exist at a time: whole windows, where an objective compares positions of one."""
        size = max(self.chunk_positions, 1)
        if WINDOW_OBJECTIVES.isdisjoint(self.weights):
            return [slice(start, min(start + size, len(targets))) for start in range(0, len(targets), size)]
        assert targets.document_C is not None and targets.position_C is not None
        begins_C = begins_of(targets.document_C, targets.position_C, self.config.compared_tokens)
        chunks: list[slice] = []
        start = stop = 0
        for end in [*begins_C.nonzero()[1:, 0].tolist(), len(targets)]:
            if end - start > size and stop > start:
                chunks.append(slice(start, stop))
                start = stop
            stop = end
        return [*chunks, slice(start, stop)] if stop else []

    def rows(self, targets: Targets, part: slice) -> Targets:
        """The targets of such a range, with their windows where an objective needs them."""
        chunk = targets.rows(part)
        if WINDOW_OBJECTIVES.isdisjoint(self.weights):
            return chunk
        assert chunk.document_C is not None and chunk.position_C is not None
        place = (chunk.document_C, chunk.position_C, _chosen(chunk))
        return replace(chunk, windows=windows_of(*place, self.config.compared_tokens))


def distillation_loss(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets: Targets,
    config: ObjectiveConfig,
    tail: Tail,
    *,
    counted_tokens: float | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk_positions: int | None = None,
) -> Loss:
    """Weighted sum of the objectives, per counted token, with gradients for hidden states and head.

    With weights of positions (`Targets.weights_C`) it is sum(w value) / sum(w).

    Args:
        hidden_MD: float [M, D], the hidden states that predict the targets, after the final norm.
        head_VD: float [V, D], the student's output embedding.
        targets: teacher's side of the same M positions, at the mix's temperature.
        config, tail: the mix of one step (`ObjectiveConfig.at`), and the tail mode from `resolve_tail`.
        counted_tokens: divisor of the sum; None: `targets.total_weight`, M without weights. With gradient accumulation it is
            that of the whole step, so that the parts add up to the loss of one large batch.
        matmul_dtype: dtype of the three matrix products; None: that of hidden_MD. Sums are float32 (float64 for float64).
        chunk_positions: positions whose logits exist at a time; None: chosen from the size of the vocabulary.
    Returns:
        Loss; `values_MO` includes objectives of weight 0. M = 0 gives 0 with zero gradients.
    Raises:
        ShapeError: shapes disagree, or an id is outside [0, V).
        ConfigError: a weight still depends on the step; the targets are at another temperature than the mix; an objective
            needs the exact entries, and the targets are draws that do not say which entries are exact; an objective needs
            the teacher's entropy, and the targets lack it; or not all positions are chosen, and the mix does not say what
            counts at the others.
    """
    _check(hidden_MD, head_VD, targets)
    dtype = matmul_dtype or hidden_MD.dtype
    loss_plan = _plan_of(targets, config, tail, counted_tokens, dtype, chunk_positions, head_VD.shape[0])
    return _loss(hidden_MD, head_VD, targets, loss_plan)


def distillation_loss_of_logits(
    logits_MV: Tensor,
    targets: Targets,
    config: ObjectiveConfig,
    tail: Tail,
    *,
    counted_tokens: float | None = None,
    chunk_positions: int | None = None,
) -> Loss:
    """The same loss from logits, for models whose logits are not head @ hidden.

    Args:
        logits_MV: float [M, V], the logits that predict the targets, as the model gives them. They exist already, and so does
            their gradient, so the memory is that of a dense loss.
        Others, returns and errors: see `distillation_loss`.
    """
    if logits_MV.ndim != 2:
        raise ShapeError(f"logits {tuple(logits_MV.shape)} must be [M, V]")
    targets.check(*logits_MV.shape)
    loss_plan = _plan_of(targets, config, tail, counted_tokens, _wide(logits_MV), chunk_positions, logits_MV.shape[1])
    return _loss(logits_MV, None, targets, loss_plan)


def _loss(hidden_MD: Tensor, head_VD: Tensor | None, targets: Targets, loss_plan: LossPlan) -> Loss:
    config = loss_plan.config
    alone = CHUNK_OBJECTIVES.issuperset(config.weights)  # then this pass is for the log-probabilities of actual tokens
    grad = torch.is_grad_enabled() and not alone
    total, values_MO = _SparseLoss.apply(hidden_MD, head_VD, targets, loss_plan, grad)
    columns = dict(zip(loss_plan.weights, values_MO.unbind(-1), strict=True))
    total = 0.0 if alone else total
    for name, loss_of in (("alm", _of_chunks), ("gold", _of_merged)):
        if name in config.weights:
            own, columns[name] = loss_of(hidden_MD, head_VD, targets, loss_plan, -columns["cross_entropy"])
            total = total + config.numbers()[name] * own
    elsewhere = values_MO.new_zeros(())
    if targets.chosen_C is not None:
        elsewhere = (~targets.chosen_C).to(values_MO) @ columns["cross_entropy"]
    # Without the cross-entropy where it was added for positions elsewhere, or for want of another objective.
    return Loss(total, torch.stack([columns[name] for name in config.weights], -1), tuple(config.weights), elsewhere)


def _of_chunks(
    hidden_MD: Tensor, head_VD: Tensor | None, targets: Targets, loss_plan: LossPlan, log_q_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss `alm` (`kdata.trainer.chunks`), scaled and differentiable; and its values, float [M].

    Its gradient is that of a cross-entropy in which each position weighs what the log-probabilities of the first pass say.

    Args:
        log_q_M: float [M], the student's log-probabilities of the actual tokens.
    """
    _refuse_weights("alm", targets)
    values_M, slope_M = chunk_loss(log_q_M, targets, loss_plan.config.alm_temperature)
    value = (values_M.sum() * loss_plan.scale).to(log_q_M.dtype)
    if not torch.is_grad_enabled():
        return value, values_M.to(log_q_M.dtype)
    own = _of_slopes(hidden_MD, head_VD, targets, loss_plan, slope_M)
    return value + (own - own.detach()), values_M.to(log_q_M.dtype)


def _of_slopes(
    hidden_MD: Tensor, head_VD: Tensor | None, targets: Targets, loss_plan: LossPlan, slope_M: Tensor
) -> Tensor:
    """A loss whose derivative by the log-probability of each actual token is `slope_M` times the scale; only that counts."""
    nothing = replace(targets, ids_CK=targets.ids_CK[:, :0], logprobs_CK=targets.logprobs_CK[:, :0], chosen_C=None)
    plain = replace(loss_plan, config=ObjectiveConfig(), weights={"cross_entropy": 1.0}, elsewhere=None)
    weighted = replace(nothing, weights_C=-slope_M.to(_wide(hidden_MD)))
    own: Tensor = _SparseLoss.apply(hidden_MD, head_VD, weighted, plain, True)[0]
    return own


def _of_merged(
    hidden_MD: Tensor, head_VD: Tensor | None, targets: Targets, loss_plan: LossPlan, log_q_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss `gold` (`kdata.trainer.merged`), scaled and differentiable; and its values, float [M].

    One pass over the chosen positions, and one over those whose chunks have several, for what other tokens multiply.

    Args:
        log_q_M: float [M], the student's log-probabilities of the actual tokens.
    """
    _refuse_weights("gold", targets)
    if loss_plan.config.temperature != 1.0:
        raise ConfigError(
            f"objective gold is at temperature 1, and objective.temperature is {loss_plan.config.temperature}, at which the "
            "probabilities of the teacher's other tokens of a chunk are not known; set it to 1"
        )
    tokens = Tokens.of(loss_plan.config, targets, loss_plan.vocab_size)
    within = with_scales(log_q_M, targets)
    merged = replace(loss_plan, weights={"gold": 1.0, SLOPE: 0.0}, elsewhere=None, tokens=tokens)
    grad = torch.is_grad_enabled()
    chosen_M = targets.token_ids_C >= 0 if targets.chosen_C is None else targets.chosen_C
    places = chosen_M.nonzero()[:, 0]
    some = replace(within.each(lambda x_M: x_M[places]), chosen_C=None)
    total, values_P2 = _SparseLoss.apply(hidden_MD[places], head_VD, some, merged, grad)
    values_M2 = log_q_M.new_zeros(len(targets), 2).index_copy_(0, places, values_P2)
    if grad and targets.chunk_C is not None:
        slope_M, chunk_M = values_M2[:, 1], targets.chunk_C - targets.chunk_C[:1]
        other_M = sums_of_chunks(slope_M, chunk_M)[chunk_M] - slope_M
        others = (torch.bincount(chunk_M)[chunk_M] > 1).nonzero()[:, 0]
        rest = targets.each(lambda x_M: x_M[others])
        own = _of_slopes(hidden_MD[others], head_VD, rest, replace(loss_plan, scale=1.0), other_M[others])
        total = total + (own - own.detach())
    return total, values_M2[:, 0]


def _refuse_weights(name: str, targets: Targets) -> None:
    if targets.weights_C is not None:
        raise ConfigError(
            f"objective {name} is of chunks, and the plan gives weights to single positions; use a plan without weights"
        )


def _plan_of(
    targets: Targets,
    config: ObjectiveConfig,
    tail: Tail,
    counted_tokens: float | None,
    matmul_dtype: torch.dtype,
    chunk_positions: int | None,
    vocab_size: int,
) -> LossPlan:
    if targets.temperature != config.temperature:
        raise ConfigError(
            f"the targets are at temperature {targets.temperature}, the objective at {config.temperature}; give the loader "
            "the objective's temperature"
        )
    if "deviation_kl" in config.weights and targets.entropy_C is not None and targets.entropy_C.isnan().any():
        raise ConfigError(
            "deviation_kl needs the teacher's entropy, which the targets do not hold at every position; remove the "
            "objective, or use data of a teacher whose whole distribution was seen"
        )
    _refuse_windows(targets, config)
    numbers, elsewhere = config.numbers(), None
    weights = {n: w for n, w in numbers.items() if n not in CHUNK_OBJECTIVES}
    if len(weights) < len(numbers):  # they need the log-probabilities of actual tokens
        weights = {**weights, "cross_entropy": weights.get("cross_entropy", 0.0)}
    if targets.chosen_C is not None:
        if not config.reads_all_targets:
            raise ConfigError(
                "the targets hold positions that are not chosen, and objective.cross_entropy_elsewhere is null; set it, or "
                "leave those positions out"
            )
        weights = {**weights, "cross_entropy": weights.get("cross_entropy", 0.0)}
        elsewhere = {n: (config.cross_entropy_elsewhere or 0.0) * (n == "cross_entropy") for n in weights}
    divisor = targets.total_weight if counted_tokens is None else counted_tokens
    return LossPlan(
        config=config,
        tail=tail,
        weights=weights,
        elsewhere=elsewhere,
        scale=1.0 / (divisor or 1),  # without a position the sum is 0
        matmul_dtype=matmul_dtype,
        chunk_positions=chunk_positions or _chunk_positions(vocab_size, matmul_dtype, targets.token_ids_C.device),
        vocab_size=vocab_size,
    )


def _chosen(targets: Targets) -> Tensor:
    """Positions where the whole mix counts, bool [C]."""
    return torch.ones_like(targets.token_ids_C, dtype=torch.bool) if targets.chosen_C is None else targets.chosen_C


def _refuse_windows(targets: Targets, config: ObjectiveConfig) -> None:
    """Raise ConfigError where an objective of windows lacks what it needs of the targets."""
    for name in WINDOW_OBJECTIVES.intersection(config.weights):
        if targets.document_C is None or targets.position_C is None:
            raise ConfigError(f"objective {name} needs document_C and position_C of the targets; set them")
        step_C = targets.document_C.diff()
        if bool(((step_C < 0) | ((step_C == 0) & (targets.position_C.diff() <= 0))).any()):
            raise ConfigError(
                f"objective {name} needs document_C that does not fall, and position_C that rises within a document, and the "
                "targets have others; join the targets of several rows with kdata.trainer.parts.collator.join, which "
                "numbers their documents"
            )
    if "span_correlation" not in config.weights:
        return
    assert targets.document_C is not None and targets.position_C is not None
    read_C = follows(targets.document_C, targets.position_C, _chosen(targets), config.compared_tokens)
    read_C[:-1] |= read_C.clone()[1:]
    logprobs_C = targets.actual_logprobs_C
    if logprobs_C is None or bool((logprobs_C.isnan() & read_C).any()):  # -inf is a probability of 0
        raise ConfigError(
            "objective span_correlation needs the teacher's log-probability of every actual token that it compares, and the "
            "targets do not hold that of some; imported data often lacks it. Remove the objective, or have a teacher read "
            "the text"
        )


@torch.no_grad()
def measure(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets: Targets,
    names: tuple[str, ...],
    tail: Tail,
    *,
    top: int = 5,
    chunk_positions: int | None = None,
) -> Measured:
    """Objectives and the `top` most likely tokens at each position, for evaluation: the same core, no gradient.

    Args:
        names: objectives; `kdata.trainer.objective_config.tail_of` says how each treats draws.
        top: number of most likely tokens.
        Others: see `distillation_loss`; temperature 1.
    """
    _check(hidden_MD, head_VD, targets)
    size = chunk_positions or _chunk_positions(head_VD.shape[0], head_VD.dtype, head_VD.device)
    loss_plan = LossPlan(
        ObjectiveConfig(), tail, dict.fromkeys(names, 1.0), None, 1.0, hidden_MD.dtype, size, head_VD.shape[0]
    )
    values, top_ids, confidence = [], [], []
    for part, logits_CV, _ in _logit_chunks(hidden_MD, head_VD.to(loss_plan.matmul_dtype), targets, loss_plan):
        top_logits_CN, top_ids_CN = logits_CV.topk(min(top, logits_CV.shape[1]), dim=-1)
        chunk = loss_plan.rows(targets, part)
        top_CN, _ = _top(logits_CV, chunk, loss_plan)
        student = _student(logits_CV, chunk, loss_plan)._replace(top_CN=top_CN)
        values.append(_values(student, chunk, loss_plan))
        top_ids.append(top_ids_CN)
        confidence.append((top_logits_CN[:, 0] - student.log_sum_C).exp())
    if not values:
        empty = hidden_MD.new_zeros(0)
        return Measured(empty.view(0, 1).expand(0, len(names)), empty.long().view(0, 1).expand(0, top), empty)
    return Measured(torch.cat(values), torch.cat(top_ids), torch.cat(confidence))


class _Student(NamedTuple):
    """The student's side of a chunk, [C] or [C, K] each.

    At the temperature: kept_CK, logits of the kept entries (-inf where padded), and rest_C, log-sum-exp of the rest of the
    vocabulary. At temperature 1: token_C, logit of the actual token, and log_sum_C, log-sum-exp of the vocabulary. top_CN, at
    the temperature, only for objectives that sort: the largest logits. In the pass for `gold`, top_CN is of the tokens that
    the teacher lacks, lacked_C is the log-sum-exp of those of them that are no entry, which rest_C leaves out, and log_s_C is
    that of the targets. window_CNK, at the temperature, only for `sinkd`: logits of the entries of every place of a window.
    """

    kept_CK: Tensor
    rest_C: Tensor
    token_C: Tensor
    log_sum_C: Tensor
    top_CN: Tensor | None = None
    lacked_C: Tensor | None = None
    log_s_C: Tensor | None = None
    window_CNK: Tensor | None = None


class _SparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor | None, targets: Targets, loss_plan: LossPlan, grad: bool
    ) -> Any:
        wide = _wide(hidden_MD)
        values_MO = torch.empty(len(targets), len(loss_plan.weights), dtype=wide, device=hidden_MD.device)
        weights_O = torch.tensor(list(loss_plan.weights.values()), dtype=wide).to(hidden_MD.device)
        grad_hidden_MD = torch.zeros_like(hidden_MD) if grad and ctx.needs_input_grad[0] else None
        grad_head_VD = None
        if head_VD is not None and grad and ctx.needs_input_grad[1]:
            grad_head_VD = torch.zeros_like(head_VD, dtype=wide)
        head_cast_VD = None if head_VD is None else head_VD.to(loss_plan.matmul_dtype)
        for part, logits_CV, spare_CV in _logit_chunks(hidden_MD, head_cast_VD, targets, loss_plan):
            chunk = loss_plan.rows(targets, part)
            top_CN, top_ids_CN = _top(logits_CV, chunk, loss_plan)
            student = _student(logits_CV, chunk, loss_plan, spare_CV)._replace(top_CN=top_CN)
            if grad_hidden_MD is None and grad_head_VD is None:
                values_MO[part] = _values(student, chunk, loss_plan)
                continue
            values_MO[part] = _to_logit_gradient_(logits_CV, spare_CV, student, top_ids_CN, chunk, loss_plan, weights_O)
            d_logits_CV = logits_CV.to(loss_plan.matmul_dtype)
            if head_cast_VD is None:
                assert grad_hidden_MD is not None  # the hidden states are the logits themselves
                grad_hidden_MD[part].copy_(d_logits_CV)
                continue
            if grad_hidden_MD is not None:
                grad_hidden_MD[part].copy_((head_cast_VD.T @ d_logits_CV.T).T)
            if grad_head_VD is not None:
                _add_head_gradient_(grad_head_VD, d_logits_CV, hidden_MD[part].to(loss_plan.matmul_dtype))
        if grad_head_VD is not None and head_VD is not None:
            grad_head_VD = grad_head_VD.to(head_VD.dtype)
        ctx.gradients = (grad_hidden_MD, grad_head_VD)
        ctx.mark_non_differentiable(values_MO)
        return _total(values_MO, targets, loss_plan, weights_O) * loss_plan.scale, values_MO

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "the sparse loss can be differentiated once; compute it again before a second backward pass"
            )
        gradients, ctx.gradients = ctx.gradients, None  # no second reference, so autograd need not copy them
        hidden, head = (None if g is None else g.mul_(grad_total) for g in gradients)
        return hidden, head, None, None, None


def _check(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> None:
    if hidden_MD.ndim != 2 or head_VD.ndim != 2 or hidden_MD.shape[1] != head_VD.shape[1]:
        raise ShapeError(f"hidden {tuple(hidden_MD.shape)} and head {tuple(head_VD.shape)} must be [M, D] and [V, D]")
    targets.check(hidden_MD.shape[0], head_VD.shape[0])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunk_positions(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    fitting = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (vocab_size * max(dtype.itemsize, 4))
    return max(CHUNK_MIN_POSITIONS, 1 << max(fitting.bit_length() - 1, 0))


def _logit_chunks(
    hidden_MD: Tensor, head_cast_VD: Tensor | None, targets: Targets, loss_plan: LossPlan
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield (range of positions, logits [C, V] in the wide dtype, a second buffer of that shape if T is not 1).

    All chunks share one buffer, laid out [V, C], so that BLAS splits and streams the long side of the products. At V = 128k,
    float32, AVX2, 152 positions, the product for the logits runs at 94 Gflop/s in this layout and 62 in [C, V]; the product
    for d hidden at 100 and 83. Without a head, `hidden_MD` are the logits, and a chunk is a copy of theirs.
    """
    chunks = loss_plan.chunks(targets)
    size = max((part.stop - part.start for part in chunks), default=0)
    vocab_size = hidden_MD.shape[1] if head_cast_VD is None else head_cast_VD.shape[0]
    wide_CV = hidden_MD.new_empty(vocab_size, size, dtype=_wide(hidden_MD)).T
    spare_CV = None if loss_plan.config.temperature == 1.0 else torch.empty_like(wide_CV)
    narrow_CV = wide_CV if loss_plan.matmul_dtype == wide_CV.dtype else wide_CV.to(loss_plan.matmul_dtype)
    for part in chunks:
        count = part.stop - part.start
        if head_cast_VD is None:
            wide_CV[:count].copy_(hidden_MD[part])
            yield part, wide_CV[:count], None if spare_CV is None else spare_CV[:count]
            continue
        torch.mm(hidden_MD[part].to(loss_plan.matmul_dtype), head_cast_VD.T, out=narrow_CV[:count])
        if narrow_CV is not wide_CV:
            wide_CV[:count].copy_(narrow_CV[:count])
        yield part, wide_CV[:count], None if spare_CV is None else spare_CV[:count]


def _top(logits_CV: Tensor, targets: Targets, loss_plan: LossPlan) -> tuple[Tensor | None, Tensor | None]:
    """The student's largest logits at the temperature, falling, [C, N], and their ids, for objectives that sort."""
    if loss_plan.tokens is not None:
        is_lacked_V = loss_plan.tokens.is_lacked_V
        logits_CV, most = logits_CV.masked_fill(~is_lacked_V, -torch.inf), int(is_lacked_V.sum())
    elif "uld" in loss_plan.weights:
        most = logits_CV.shape[1]
    else:
        return None, None
    top_CN, ids_CN = logits_CV.topk(min(targets.ids_CK.shape[1], most), dim=-1)
    return top_CN / loss_plan.config.temperature, ids_CN


def _student(logits_CV: Tensor, targets: Targets, loss_plan: LossPlan, spare_CV: Tensor | None = None) -> _Student:
    """Gather what objectives need; afterwards `logits_CV` holds exp((logits - row maximum) / T), 0 at the kept entries.

    If T is not 1, `spare_CV` holds exp(logits - row maximum) afterwards.
    """
    temperature = loss_plan.config.temperature
    pad_CK = targets.ids_CK < 0
    ids_CK = targets.ids_CK.clamp_min(0)
    kept_CK = logits_CV.gather(1, ids_CK).div_(temperature).masked_fill_(pad_CK, -torch.inf)
    token_C = logits_CV.gather(1, targets.token_ids_C[:, None])[:, 0]
    window_CNK = _of_windows(logits_CV, targets, loss_plan)
    peak_C = logits_CV.amax(-1)
    logits_CV.sub_(peak_C[:, None])
    if spare_CV is not None:
        torch.exp(logits_CV, out=spare_CV)
        logits_CV.div_(temperature)
    logits_CV.exp_()
    # A float plus its negative is exactly 0. Padding adds 0 to entry 0.
    kept_mass_CK = logits_CV.gather(1, ids_CK).masked_fill_(pad_CK, 0.0)
    logits_CV.scatter_add_(1, ids_CK, kept_mass_CK.neg_())
    if loss_plan.tokens is not None:
        assert isinstance(targets, MergedTargets)
        rest_C2 = _by_match(logits_CV, loss_plan.tokens).log() + peak_C[:, None]
        log_sum_C = torch.logsumexp(torch.cat([kept_CK, rest_C2], dim=-1), dim=-1)
        return _Student(kept_CK, rest_C2[:, 0], token_C, log_sum_C, lacked_C=rest_C2[:, 1], log_s_C=targets.log_s_C)
    rest_C = logits_CV.sum(-1).log().add_(peak_C / temperature)
    log_sum_C = _log_sum(kept_CK, rest_C) if spare_CV is None else spare_CV.sum(-1).log().add_(peak_C)
    return _Student(kept_CK, rest_C, token_C, log_sum_C, window_CNK=window_CNK)


def _of_windows(logits_CV: Tensor, targets: Targets, loss_plan: LossPlan) -> Tensor | None:
    """The student's logits, at the temperature, of the entries of every place of a position's window, -inf where none is."""
    if "sinkd" not in loss_plan.weights:
        return None
    assert targets.windows is not None
    ids_CNK = targets.windows.of_all(targets.ids_CK, -1)
    window_CNK = logits_CV.gather(1, ids_CNK.clamp_min(0).flatten(1)).view(ids_CNK.shape)
    return window_CNK.div_(loss_plan.config.temperature).masked_fill_(ids_CNK < 0, -torch.inf)


def _by_match(exp_CV: Tensor, tokens: Tokens) -> Tensor:
    """Sums over the tokens that the teacher has, and over those that it lacks, [C, 2]."""
    return exp_CV @ torch.stack([~tokens.is_lacked_V, tokens.is_lacked_V], dim=-1).to(exp_CV.dtype)


def _log_sum(kept_CK: Tensor, rest_C: Tensor) -> Tensor:
    """Log-sum-exp of all outcomes, [C]."""
    return torch.logsumexp(torch.cat([kept_CK, rest_C[:, None]], dim=-1), dim=-1)


def _exact_only(student: _Student, targets: Targets) -> tuple[_Student, Targets]:
    """The same positions with the draws moved into the bucket: exact entries, and the exact probability of the rest."""
    if targets.num_exact_C is None:
        raise ConfigError("an objective needs exact entries, but num_exact_C of the targets is None; set it")
    exact_CK = torch.arange(student.kept_CK.shape[1], device=student.kept_CK.device) < targets.num_exact_C[:, None]
    moved_CJ = torch.cat([student.kept_CK.masked_fill(exact_CK, -torch.inf), student.rest_C[:, None]], dim=-1)
    empty_C = torch.isneginf(moved_CJ).all(-1)  # the log-sum-exp of nothing has no gradient
    rest_C = torch.logsumexp(moved_CJ.masked_fill(empty_C[:, None], 0.0), -1).masked_fill(empty_C, -torch.inf)
    exact = replace(targets, logprobs_CK=targets.logprobs_CK.masked_fill(~exact_CK, -torch.inf))
    return student._replace(kept_CK=student.kept_CK.masked_fill(~exact_CK, -torch.inf), rest_C=rest_C), exact


def _outcomes(student: _Student, targets: Targets, loss_plan: LossPlan, tail: Tail) -> Outcomes:
    """The outcomes that an objective sees with a tail mode: the plan's own, or ghost of the exact entries."""
    if tail != loss_plan.tail:
        student, targets = _exact_only(student, targets)
    log_sum_C = _log_sum(student.kept_CK, student.rest_C)
    log_q_CJ = torch.cat([student.kept_CK, student.rest_C[:, None]], dim=-1) - log_sum_C[:, None]
    return Outcomes(
        log_p_CJ=teacher_outcomes(targets, tail).to(log_q_CJ.dtype),
        log_q_CJ=log_q_CJ.masked_fill(torch.isneginf(log_q_CJ), LOG_ZERO),
        log_q_token_C=student.token_C - (log_sum_C if loss_plan.config.temperature == 1.0 else student.log_sum_C),
        token_C=_outcome_of_token(targets),
        doubt_C=None if targets.entropy_C is None else targets.entropy_C.to(log_q_CJ) / math.log(loss_plan.vocab_size),
        log_q_top_CN=None if student.top_CN is None else student.top_CN - log_sum_C[:, None],
        log_q_window_CNK=None if student.window_CNK is None else student.window_CNK - log_sum_C[:, None, None],
        targets=targets,
    )


def _outcome_of_token(targets: Targets) -> Tensor:
    """The outcome that the actual token is part of, int64 [C]: its entry, or the bucket."""
    is_own_CK = (targets.ids_CK == targets.token_ids_C[:, None]) & ~torch.isneginf(targets.logprobs_CK)
    return torch.cat([is_own_CK, targets.token_ids_C[:, None] >= 0], dim=-1).int().argmax(-1)


def _values(student: _Student, targets: Targets, loss_plan: LossPlan) -> Tensor:
    """[C, O]: every objective at every position of a chunk, differentiable in `student`."""
    config = loss_plan.config
    if loss_plan.tokens is not None:
        value_C = _gold(student, targets, config, loss_plan.tokens)
        return torch.stack([value_C, torch.zeros_like(value_C)], dim=-1)
    tails = {name: tail_of(name, config, loss_plan.tail) for name in loss_plan.weights}
    outcomes = {tail: _outcomes(student, targets, loss_plan, tail) for tail in dict.fromkeys(tails.values())}
    values = [OBJECTIVES[n](outcomes[t], config) * scale_of(n, config.temperature) for n, t in tails.items()]
    return torch.stack(values, dim=-1)


def _gold(student: _Student, targets: Targets, config: ObjectiveConfig, tokens: Tokens) -> Tensor:
    """[C]: `gold` at every position of a chunk, differentiable in `student`."""
    assert isinstance(targets, MergedTargets) and student.top_CN is not None
    assert student.lacked_C is not None and student.log_s_C is not None
    rest_C2 = torch.stack([student.rest_C, student.lacked_C], dim=-1)
    log_sum_C1 = torch.logsumexp(torch.cat([student.kept_CK, rest_C2], dim=-1), dim=-1, keepdim=True)
    log_q_CK, log_top_CN, log_rest_C2 = (x - log_sum_C1 for x in (student.kept_CK, student.top_CN, rest_C2))
    compared = sides(log_q_CK, log_top_CN, log_rest_C2, student.log_s_C, targets, tokens)
    return gold(compared, tokens.weights, config.gold_beta)


def _total(values_CO: Tensor, targets: Targets, loss_plan: LossPlan, weights_O: Tensor) -> Tensor:
    """The sum over positions of their weighted objectives, each position by its own weight; scalar, differentiable."""
    if targets.weights_C is None and targets.chosen_C is None:
        return values_CO.sum(0) @ weights_O
    value_C = values_CO @ weights_O
    if targets.chosen_C is not None and loss_plan.elsewhere is not None:
        elsewhere_O = torch.tensor(list(loss_plan.elsewhere.values()), dtype=weights_O.dtype).to(weights_O.device)
        value_C = torch.where(targets.chosen_C, value_C, values_CO @ elsewhere_O)
    return value_C.sum() if targets.weights_C is None else value_C @ targets.weights_C.to(value_C.dtype)


def _to_logit_gradient_(
    exp_CV: Tensor,
    spare_CV: Tensor | None,
    student: _Student,
    top_ids_CN: Tensor | None,
    targets: Targets,
    loss_plan: LossPlan,
    weights_O: Tensor,
) -> Tensor:
    """Turn the buffers that `_student` filled into d loss / d logits, in place; return the values [C, O].

    With r = log-sum-exp of the rest at T, d loss / d z_v is (d loss / d r) exp(z_v / T - r) / T for the rest. The derivatives
    of the gathered logits are added at their ids, divided by T for those at T. If T is not 1, the log-sum-exp at 1 adds
    (d loss / d log_sum) softmax(z)_v.
    """
    leaves = _Student._make(None if t is None else t.detach().requires_grad_() for t in student)
    with torch.enable_grad():
        values_CO = _values(leaves, targets, loss_plan)
        (_total(values_CO, targets, loss_plan, weights_O) * loss_plan.scale).backward()
    d = _Student._make(None if x is None else torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    temperature, tokens = loss_plan.config.temperature, loss_plan.tokens
    if tokens is None:
        exp_CV.mul_(_rate(d.rest_C, exp_CV.sum(-1), temperature)[:, None])
    else:
        mass_C2 = _by_match(exp_CV, tokens)
        assert d.lacked_C is not None
        matched_C, lacked_C = mass_C2.unbind(-1)
        rates = (_rate(d.lacked_C, lacked_C, 1.0)[:, None], _rate(d.rest_C, matched_C, 1.0)[:, None])
        exp_CV.mul_(torch.where(tokens.is_lacked_V, *rates))
    if top_ids_CN is not None and d.top_CN is not None:
        exp_CV.scatter_add_(1, top_ids_CN, d.top_CN / temperature)
    if targets.windows is not None and d.window_CNK is not None:
        ids_CNK = targets.windows.of_all(targets.ids_CK, -1)
        d_window_CNK = (d.window_CNK / temperature).masked_fill(ids_CNK < 0, 0.0)
        exp_CV.scatter_add_(1, ids_CNK.clamp_min(0).flatten(1), d_window_CNK.flatten(1))
    d_kept_CK = (d.kept_CK / temperature).masked_fill(targets.ids_CK < 0, 0.0)
    exp_CV.scatter_add_(1, targets.ids_CK.clamp_min(0), d_kept_CK)
    if spare_CV is not None:
        exp_CV.addcmul_(spare_CV, (d.log_sum_C / spare_CV.sum(-1))[:, None])
    exp_CV.scatter_add_(1, targets.token_ids_C[:, None], d.token_C[:, None])
    values_CO = values_CO.detach()
    if d.log_s_C is not None:
        values_CO[:, list(loss_plan.weights).index(SLOPE)] = d.log_s_C
    return values_CO


def _rate(d_C: Tensor, mass_C: Tensor, temperature: float) -> Tensor:
    """What a log-sum-exp's derivative makes of each exponential in it, [C], finite."""
    largest = torch.finfo(mass_C.dtype).max  # a mass of e^-100 is below float32's normal range, its inverse above all
    return (d_C / mass_C / temperature).masked_fill(mass_C == 0, 0.0).clamp(-largest, largest)


def _add_head_gradient_(grad_head_VD: Tensor, d_logits_CV: Tensor, hidden_CD: Tensor) -> None:
    if grad_head_VD.dtype == d_logits_CV.dtype:
        grad_head_VD.addmm_(d_logits_CV.T, hidden_CD)
        return
    # A low-precision product has no wide accumulator, so add it tile by tile instead of building a second [V, D].
    tile = 16_384
    for start in range(0, grad_head_VD.shape[0], tile):
        grad_head_VD[start : start + tile] += d_logits_CV[:, start : start + tile].T @ hidden_CD

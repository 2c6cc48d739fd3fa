"""The sparse loss without logits: head, log-sum-exp and gather, forward and backward, chunk by chunk.

Never more than [chunk, V] logits exist, in one buffer that all chunks share. For each chunk the logits are
computed once; the kept entries' and the actual token's logits are gathered; the rest of the vocabulary is
summed with the kept entries set to exactly 0, so the student's tail mass has no cancellation however small it
is. The objective is differentiated on those [C, K + 2] numbers by autograd, and its Jacobian turns the same
buffer into d loss / d logits, from which both gradients follow. Three matrix products in all, as in the naive
version, and a fraction of its memory (`tests/benchmarks/loss.py`). Gradients are computed in the forward pass
and handed out in the backward pass, which can therefore run once.

Shapes: M counted positions, C positions of a chunk, V vocabulary, D hidden, K kept entries, O objectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdata.errors import ShapeError
from trainer.objectives import (
    LOG_ZERO,
    OBJECTIVES,
    ObjectiveConfig,
    Outcomes,
    Tail,
    Targets,
    teacher_outcomes,
)

# A logits buffer that stays in a CPU cache: at V = 8k, bf16, one thread, 8 MiB take 0.14 s for 4096 tokens
# and 64 MiB 0.27 s. Large vocabularies need enough positions for the matrix products to run at full speed.
CHUNK_BYTES, CHUNK_MIN_POSITIONS = 8 * 2**20, 96


class Loss(NamedTuple):
    """What a batch costs.

    total: scalar, nats per counted token, differentiable. values_MO: float [M, O], each objective at each
    position, detached, in the order of `names`.
    """

    total: Tensor
    values_MO: Tensor
    names: tuple[str, ...]


class Measured(NamedTuple):
    """values_MO as in Loss; top_ids_MN: int64 [M, N] likeliest tokens; confidence_M: the top probability."""

    values_MO: Tensor
    top_ids_MN: Tensor
    confidence_M: Tensor


@dataclass(frozen=True)
class Recipe:
    """How values become a loss. `scale` multiplies the sum over positions: 1 / counted tokens of the step."""

    config: ObjectiveConfig
    tail: Tail
    names: tuple[str, ...]
    scale: float
    matmul_dtype: torch.dtype
    chunk_positions: int


def distillation_loss(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets: Targets,
    config: ObjectiveConfig,
    tail: Tail,
    *,
    counted_tokens: int | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk_positions: int | None = None,
) -> Loss:
    """Weighted sum of the objectives, per counted token, with gradients for hidden states and head.

    Args:
        hidden_MD: float [M, D], the hidden states that predict the targets, after the final norm.
        head_VD: float [V, D], the student's output embedding.
        targets: teacher's side of the same M positions.
        config, tail: the mix, and the tail mode from `resolve_tail`.
        counted_tokens: divisor of the sum; M when None. Under accumulation it is the whole step's count, so
            that the parts add up to the loss of one large batch.
        matmul_dtype: dtype of the three matrix products; None: hidden_MD's. Sums are float32 (float64 for
            float64).
        chunk_positions: positions whose logits exist at a time; None chooses by the vocabulary.
    Returns:
        Loss; `values_MO` also holds objectives of weight 0. M = 0 gives 0 with zero gradients.
    Raises:
        ShapeError: shapes disagree, or an id is outside [0, V).
    """
    _check(hidden_MD, head_VD, targets)
    recipe = Recipe(
        config=config,
        tail=tail,
        names=tuple(config.weights),
        scale=1.0 / max(len(targets) if counted_tokens is None else counted_tokens, 1),
        matmul_dtype=matmul_dtype or hidden_MD.dtype,
        chunk_positions=chunk_positions or _chunk_positions(head_VD),
    )
    total, values_MO = _SparseLoss.apply(hidden_MD, head_VD, targets, recipe, torch.is_grad_enabled())
    return Loss(total, values_MO, recipe.names)


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
    """Objectives and the `top` likeliest tokens at each position, for evaluation: same core, no gradient."""
    _check(hidden_MD, head_VD, targets)
    recipe = Recipe(ObjectiveConfig(), tail, names, 1.0, hidden_MD.dtype, chunk_positions or _chunk_positions(head_VD))
    values, top_ids, confidence = [], [], []
    for part, logits_CV in _logit_chunks(hidden_MD, head_VD.to(recipe.matmul_dtype), recipe):
        top_logits_CN, top_ids_CN = logits_CV.topk(min(top, logits_CV.shape[1]), dim=-1)
        student = _student(logits_CV, targets.rows(part))
        values.append(_values(student, targets.rows(part), recipe))
        log_sum_C = torch.logaddexp(torch.logsumexp(student.kept_CK, -1), student.rest_C)
        top_ids.append(top_ids_CN)
        confidence.append((top_logits_CN[:, 0] - log_sum_C).exp())
    if not values:
        empty = hidden_MD.new_zeros(0)
        return Measured(empty.view(0, 1).expand(0, len(names)), empty.long().view(0, 1).expand(0, top), empty)
    return Measured(torch.cat(values), torch.cat(top_ids), torch.cat(confidence))


class _Student(NamedTuple):
    """A chunk's gathered logits: kept (-inf at pads), log-sum-exp of everything else, actual token."""

    kept_CK: Tensor
    rest_C: Tensor
    token_C: Tensor


class _SparseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, head_VD: Tensor, targets: Targets, recipe: Recipe, grad: bool) -> Any:
        wide = _wide(hidden_MD)
        values_MO = torch.empty(len(targets), len(recipe.names), dtype=wide, device=hidden_MD.device)
        weights_O = torch.tensor([recipe.config.weights[n] for n in recipe.names], dtype=wide).to(hidden_MD.device)
        grad_hidden_MD = torch.zeros_like(hidden_MD) if grad and ctx.needs_input_grad[0] else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=wide) if grad and ctx.needs_input_grad[1] else None
        head_cast_VD = head_VD.to(recipe.matmul_dtype)
        for part, logits_CV in _logit_chunks(hidden_MD, head_cast_VD, recipe):
            chunk = targets.rows(part)
            student = _student(logits_CV, chunk)
            if grad_hidden_MD is None and grad_head_VD is None:
                values_MO[part] = _values(student, chunk, recipe)
                continue
            values_MO[part] = _to_logit_gradient_(logits_CV, student, chunk, recipe, weights_O)
            d_logits_CV = logits_CV.to(recipe.matmul_dtype)
            if grad_hidden_MD is not None:
                grad_hidden_MD[part] = (d_logits_CV @ head_cast_VD).to(hidden_MD.dtype)
            if grad_head_VD is not None:
                _add_head_gradient_(grad_head_VD, d_logits_CV, hidden_MD[part].to(recipe.matmul_dtype))
        ctx.gradients = (grad_hidden_MD, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(values_MO)
        return (values_MO.sum(0) @ weights_O) * recipe.scale, values_MO

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the sparse loss was differentiated twice; compute it again before a second backward")
        gradients, ctx.gradients = (
            ctx.gradients,
            None,
        )  # handed over, so that autograd takes them without a copy
        hidden, head = (None if g is None else g.mul_(grad_total) for g in gradients)
        return hidden, head, None, None, None


def _check(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> None:
    if hidden_MD.ndim != 2 or head_VD.ndim != 2 or hidden_MD.shape[1] != head_VD.shape[1]:
        raise ShapeError(f"hidden {tuple(hidden_MD.shape)} and head {tuple(head_VD.shape)} must be [M, D] and [V, D]")
    targets.check(hidden_MD.shape[0], head_VD.shape[0])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunk_positions(head_VD: Tensor) -> int:
    return max(CHUNK_MIN_POSITIONS, CHUNK_BYTES // (head_VD.shape[0] * _wide(head_VD).itemsize))


def _logit_chunks(hidden_MD: Tensor, head_cast_VD: Tensor, recipe: Recipe) -> Iterator[tuple[slice, Tensor]]:
    """Yield (range of positions, logits [C, V] in the wide dtype); every chunk is the same memory."""
    num_positions, size = hidden_MD.shape[0], min(recipe.chunk_positions, hidden_MD.shape[0])
    wide_CV = hidden_MD.new_empty(size, head_cast_VD.shape[0], dtype=_wide(hidden_MD))
    narrow_CV = wide_CV if recipe.matmul_dtype == wide_CV.dtype else wide_CV.to(recipe.matmul_dtype)
    for start in range(0, num_positions, max(size, 1)):
        part = slice(start, min(start + size, num_positions))
        count = part.stop - start
        torch.mm(hidden_MD[part].to(recipe.matmul_dtype), head_cast_VD.T, out=narrow_CV[:count])
        if narrow_CV is not wide_CV:
            wide_CV[:count].copy_(narrow_CV[:count])
        yield part, wide_CV[:count]


def _student(logits_CV: Tensor, targets: Targets) -> _Student:
    """Gather what objectives need; leave exp(logits - row maximum) in `logits_CV`, 0 at the kept entries."""
    pad_CK = targets.ids_CK < 0
    ids_CK = targets.ids_CK.clamp_min(0)
    kept_CK = logits_CV.gather(1, ids_CK).masked_fill_(pad_CK, -torch.inf)
    token_C = logits_CV.gather(1, targets.token_ids_C[:, None])[:, 0]
    peak_C = logits_CV.amax(-1)
    logits_CV.sub_(peak_C[:, None]).exp_()
    # Adding the negative of a float to itself is exactly 0; a pad adds 0 to entry 0.
    kept_mass_CK = logits_CV.gather(1, ids_CK).masked_fill_(pad_CK, 0.0)
    logits_CV.scatter_add_(1, ids_CK, kept_mass_CK.neg_())
    rest_C = logits_CV.sum(-1).log().add_(peak_C)
    return _Student(kept_CK, rest_C, token_C)


def _values(student: _Student, targets: Targets, recipe: Recipe) -> Tensor:
    """[C, O]: every objective at every position of a chunk, differentiable in `student`."""
    log_sum_C = torch.logsumexp(torch.cat([student.kept_CK, student.rest_C[:, None]], dim=-1), dim=-1)
    log_q_CJ = torch.cat([student.kept_CK, student.rest_C[:, None]], dim=-1) - log_sum_C[:, None]
    outcomes = Outcomes(
        log_p_CJ=teacher_outcomes(targets, recipe.tail).to(log_q_CJ.dtype),
        log_q_CJ=log_q_CJ.masked_fill(torch.isneginf(log_q_CJ), LOG_ZERO),
        log_q_token_C=student.token_C - log_sum_C,
    )
    return torch.stack([OBJECTIVES[name](outcomes, recipe.config) for name in recipe.names], dim=-1)


def _to_logit_gradient_(
    exp_CV: Tensor, student: _Student, targets: Targets, recipe: Recipe, weights_O: Tensor
) -> Tensor:
    """Turn what `_student` left into d loss / d logits, in place; return the values [C, O].

    With r = log-sum-exp of the rest, d loss / d z_v is (d loss / d r) exp(z_v - r) for the rest, and the
    gathered logits' own derivatives are added at their ids.
    """
    leaves = _Student(*(t.detach().requires_grad_() for t in student))
    with torch.enable_grad():
        values_CO = _values(leaves, targets, recipe)
        (values_CO.sum(0) @ weights_O * recipe.scale).backward()
    d_kept_CK, d_rest_C, d_token_C = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    mass_C = exp_CV.sum(-1)
    exp_CV.mul_((d_rest_C / mass_C).masked_fill(mass_C == 0, 0.0)[:, None])
    exp_CV.scatter_add_(1, targets.ids_CK.clamp_min(0), d_kept_CK.masked_fill(targets.ids_CK < 0, 0.0))
    exp_CV.scatter_add_(1, targets.token_ids_C[:, None], d_token_C[:, None])
    return values_CO.detach()


def _add_head_gradient_(grad_head_VD: Tensor, d_logits_CV: Tensor, hidden_CD: Tensor) -> None:
    if grad_head_VD.dtype == d_logits_CV.dtype:
        grad_head_VD.addmm_(d_logits_CV.T, hidden_CD)
        return
    # A low-precision product has no wide accumulator: add it tile by tile, so that no second [V, D] exists.
    tile = 16_384
    for start in range(0, grad_head_VD.shape[0], tile):
        grad_head_VD[start : start + tile] += d_logits_CV[:, start : start + tile].T @ hidden_CD

"""The sparse loss as modules: over hidden states and head, and over logits. Formulas and gradients are `kdata.trainer.fused`.

Both leave the caller's autocast region, because the loss chooses its own precision: matrix products in the region's dtype,
sums in float32. Both break a graph that torch.compile traces; the model before them is compiled.

Shapes: M counted positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdata.calls import validated
from kdata.trainer.fused import Loss, distillation_loss, distillation_loss_of_logits
from kdata.trainer.objective_config import ObjectiveConfig, Tail
from kdata.trainer.objectives import Targets
from kdata.trainer.parts.data import Source


class _SparseLossModule(nn.Module):
    """Settings of a loss, and the mix of the current step.

    Args:
        objective, tail: settings, and the tail mode from `resolve_tail`.
        chunk_positions: positions whose logits exist at a time; None: chosen from the size of the vocabulary.
    """

    @validated
    def __init__(self, objective: ObjectiveConfig, tail: Tail, *, chunk_positions: int | None = None) -> None:
        super().__init__()
        self.objective, self.tail, self.chunk_positions = objective, tail, chunk_positions
        self.mix = objective

    @classmethod
    @validated
    def of(cls, data: Source) -> Self:
        """The loss with the objective of a dataset."""
        return cls(data.objective, data.tail)

    def set_step(self, step: int, steps: int) -> None:
        """Have weights that change with the step those of step 0, 1, ... of `steps`."""
        self.mix = self.objective.at(step, steps)


class DistillationLoss(_SparseLossModule):
    """The loss over hidden states and head. It never holds [M, V] logits."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, hidden_MD: Tensor, head_VD: Tensor, targets: Targets, counted_tokens: Tensor | float | None = None
    ) -> Loss:
        """See `kdata.trainer.fused.distillation_loss`, also for the errors.

        Args:
            hidden_MD: float [M, D], the hidden states that predict the targets, after the final norm.
            head_VD: float [V, D], the output embedding; a DTensor is gathered.
            targets: on any device.
            counted_tokens: divisor of the sum, `targets.total_weight` of the whole step (its number of counted tokens where
                there are no weights); None: that of these targets.
        """
        if isinstance(head_VD, DTensor):
            head_VD = head_VD.full_tensor()
        level, mean = _level(targets.to(hidden_MD.device))
        with torch.autocast(hidden_MD.device.type, enabled=False):
            loss = distillation_loss(
                hidden_MD,
                head_VD,
                level,
                self.mix,
                self.tail,
                counted_tokens=1,
                matmul_dtype=self._matmul_dtype(hidden_MD),
                chunk_positions=self.chunk_positions,
            )
        return _divided(loss, counted_tokens, targets, mean)

    @staticmethod
    def _matmul_dtype(hidden_MD: Tensor) -> torch.dtype:
        device = hidden_MD.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype


class LogitsLoss(_SparseLossModule):
    """The loss over logits, for models that change them after the head. It needs their memory, [M, V]."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, logits_MV: Tensor, targets: Targets, counted_tokens: Tensor | float | None = None) -> Loss:
        """See `kdata.trainer.fused.distillation_loss_of_logits`, also for the errors.

        Args:
            logits_MV: float [M, V], the logits that predict the targets.
            targets, counted_tokens: see `DistillationLoss.forward`.
        """
        level, mean = _level(targets.to(logits_MV.device))
        with torch.autocast(logits_MV.device.type, enabled=False):
            loss = distillation_loss_of_logits(
                logits_MV, level, self.mix, self.tail, counted_tokens=1, chunk_positions=self.chunk_positions
            )
        return _divided(loss, counted_tokens, targets, mean)


def _level(targets: Targets) -> tuple[Targets, Tensor | None]:
    """Targets whose weights have a mean of 1, and that mean: gradients of tiny weights would be 0 in float16."""
    if targets.weights_C is None or not len(targets):
        return targets, None
    weights_C = targets.weights_C.double()
    mean = weights_C.mean()
    return replace(targets, weights_C=(weights_C / mean).to(targets.weights_C.dtype)), mean


def _divided(loss: Loss, counted_tokens: Tensor | float | None, targets: Targets, mean: Tensor | None) -> Loss:
    """The sum, times the mean of the weights, as a mean. Dividing here takes a count on the device without waiting for it."""
    if mean is not None:
        divisor = targets.total_weight if counted_tokens is None else counted_tokens
        share = mean / torch.as_tensor(divisor, dtype=torch.float64, device=mean.device)
        return loss._replace(total=loss.total * share.to(loss.total.dtype))
    divisor = targets.total_weight if counted_tokens is None else counted_tokens
    if isinstance(divisor, Tensor):
        on_device = divisor.to(loss.total.device)
        return loss._replace(total=loss.total / torch.where(on_device > 0, on_device, 1))
    return loss._replace(total=loss.total / (divisor or 1))

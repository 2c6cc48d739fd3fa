"""Student and loss as one module: forward pass, head, sparse loss.

They are one module because DDP and FSDP2 act on a module's call. Only the loss reads the head, so a loss outside of that call
would see an empty head (FSDP2) or gradients that DDP does not expect.

Shapes: B rows, L context, D hidden, M counted positions, O objectives.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdata.trainer.config import Precision
from kdata.trainer.forward import predicting_states
from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Batch
from kdata.trainer.objective_config import ObjectiveConfig, Tail
from kdata.trainer.student import fitting_targets, head_of


def resolve_precision(precision: Literal["fp32", "bf16", "auto"], device_type: str) -> Precision:
    """The precision that `auto` means on this machine; others unchanged."""
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return (
        "bf16" if any(present for name, present in torch.cpu.get_capabilities().items() if "bf16" in name) else "fp32"
    )


class Learner(nn.Module):
    """A student that takes a batch and returns its loss.

    Args:
        student: a model that `kdata.trainer.student` accepts.
        precision: bf16 computes matrix products in bfloat16; weights and sums stay float32.
    """

    def __init__(self, student: PreTrainedModel, precision: Precision = "fp32") -> None:
        super().__init__()
        self.student, self.precision = student, precision

    @property
    def layers(self) -> list[nn.Module]:
        """The student's transformer layers: the modules that transformers says must not be split."""
        names = self.student._no_split_modules or ()
        return [module for module in self.student.modules() if type(module).__name__ in names]

    def forward(
        self, batch: Batch, objective: ObjectiveConfig, tail: Tail, counted_tokens: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch and the objectives behind it.

        Args:
            objective: the mix of this step.
            counted_tokens: the divisor of sums: weight of the counted tokens of the whole step, over all micro-batches and
                ranks; without weights their number.
        Returns:
            Scalar loss, differentiable; and float [M, O], detached, see `kdata.trainer.fused.Loss`.
        """
        device = head_of(self.student).device
        half = self.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            hidden_MD = predicting_states(self.student, batch)
        loss = distillation_loss(
            hidden_MD,
            head_of(self.student),
            fitting_targets(self.student, batch.targets).to(device),
            objective,
            tail,
            counted_tokens=counted_tokens,
            matmul_dtype=torch.bfloat16 if half else None,
        )
        return loss.total, loss.values_MO

"""Student and loss as one module: forward pass, head, sparse loss.

One module, because DDP and FSDP2 act on a module's call: the head is read by the loss and by nothing else, so a loss
outside of the call would meet an empty head (FSDP2) or gradients that nobody expects (DDP).

Shapes: B rows, L context, D hidden, M counted positions, O objectives.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Batch
from kdata.trainer.objectives import ObjectiveConfig, Tail
from kdata.trainer.student import head_of, hidden_states

Precision = Literal["fp32", "bf16"]


def resolve_precision(asked: Literal["fp32", "bf16", "auto"], device_type: str) -> Precision:
    """The precision that `auto` stands for on this machine; others as they are."""
    if asked != "auto":
        return asked
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name) else "fp32"


class Learner(nn.Module):
    """A student that is called with a batch and answers with its loss.

    Args:
        student: any model that `kdata.trainer.student` accepts.
        precision: bf16 computes matrix products in bfloat16; weights and sums stay float32.
    """

    def __init__(self, student: PreTrainedModel, precision: Precision = "fp32") -> None:
        super().__init__()
        self.student, self.precision = student, precision

    @property
    def layers(self) -> list[nn.Module]:
        """The student's blocks, as transformers names what must not be cut in two."""
        names = self.student._no_split_modules or ()
        return [module for module in self.student.modules() if type(module).__name__ in names]

    def forward(
        self, batch: Batch, objective: ObjectiveConfig, tail: Tail, counted_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch and the values behind it.

        Args:
            objective: the mix of this step.
            counted_tokens: of the whole step, all micro-batches and ranks: what sums are divided by.
        Returns:
            Scalar loss, differentiable; and float [M, O], detached, see `kdata.trainer.fused.Loss`.
        """
        device = head_of(self.student).device
        half = self.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            hidden_BLD = hidden_states(self.student, batch.input_ids.to(device), batch.position_ids.to(device))
        hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, batch.predictor_M.to(device))
        loss = distillation_loss(
            hidden_MD,
            head_of(self.student),
            batch.targets.to(device),
            objective,
            tail,
            counted_tokens=counted_tokens,
            matmul_dtype=torch.bfloat16 if half else None,
        )
        return loss.total, loss.values_MO

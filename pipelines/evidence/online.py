"""Full distillation, the reference: forward KL over the whole vocabulary, computed during training.

The teacher's distribution at every position is head times state in float32. The states were computed once, so this gives what
a forward pass of the teacher during training would give, in a fraction of the time. Nothing is left out, rounded or sampled.

Shapes: M counted positions, C of them in a chunk, D student's hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kdata
from kdata.pipelines.evidence.data import States
from kdata.trainer.config import Precision
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Batch
from kdata.trainer.objective_config import ObjectiveConfig, Tail
from kdata.trainer.student import head_of, hidden_states

CHUNK_POSITIONS = 256  # 8 MiB of float32 logits at V = 8,192: they stay in a CPU's cache


class OnlineLearner(Learner):
    """A student that learns the teacher's whole distribution: forward KL alone, whatever the weights of the objective."""

    def __init__(self, student: PreTrainedModel, precision: Precision, states: States, dataset: kdata.Dataset) -> None:
        super().__init__(student, precision)
        self._states, self._starts = states, torch.from_numpy(states.starts(dataset))

    def forward(
        self, batch: Batch, objective: ObjectiveConfig, tail: Tail, counted_tokens: float
    ) -> tuple[Tensor, Tensor]:
        """See `Learner.forward`; the values are cross-entropy and KL(teacher || student), [M, 2]."""
        assert list(objective.weights) == ["cross_entropy", "forward_kl"]
        assert batch.targets.weights_C is None and batch.targets.chosen_C is None  # every target counts the same here
        half = self.precision == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            hidden_BLD = hidden_states(self.student, batch.input_ids, batch.position_ids)
        hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, batch.predictor_M)
        row_M = torch.from_numpy(batch.rows)[batch.document_M]
        place_M = self._starts[row_M] + batch.position_ids.flatten()[batch.predictor_M]
        teacher_MD = torch.from_numpy(self._states.states_TD[place_M.numpy()])
        dtype = torch.bfloat16 if half else hidden_MD.dtype
        loss: tuple[Tensor, Tensor] = _DenseKL.apply(
            hidden_MD,
            head_of(self.student),
            teacher_MD,
            batch.targets.token_ids_C,
            self._states,
            1.0 / counted_tokens,
            dtype,
        )
        return loss


class _DenseKL(torch.autograd.Function):
    """sum_M KL(p || q) * scale, chunk by chunk; d KL / d logits = q - p. Matrix products of the student in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        head_VD: Tensor,
        teacher_MD: Tensor,
        token_M: Tensor,
        states: States,
        scale: float,
        dtype: Any,
    ) -> Any:
        head_cast_VD = head_VD.to(dtype)
        values_M2 = torch.empty(len(hidden_MD), 2)
        grad_hidden_MD, grad_head_VD = torch.empty_like(hidden_MD), torch.zeros_like(head_VD)
        for start in range(0, len(hidden_MD), CHUNK_POSITIONS):
            part = slice(start, start + CHUNK_POSITIONS)
            hidden_CD = hidden_MD[part].to(dtype)
            log_q_CV = torch.log_softmax((hidden_CD @ head_cast_VD.T).float(), -1)
            log_p_CV = torch.log_softmax(states.head.logits(teacher_MD[part]), -1)
            p_CV = log_p_CV.exp()
            values_M2[part, 0] = -log_q_CV.gather(1, token_M[part, None])[:, 0]
            values_M2[part, 1] = torch.linalg.vecdot(p_CV, log_p_CV - log_q_CV)
            d_logits_CV = log_q_CV.exp_().sub_(p_CV).mul_(scale).to(dtype)
            grad_hidden_MD[part] = (d_logits_CV @ head_cast_VD).to(hidden_MD.dtype)
            grad_head_VD += (d_logits_CV.T @ hidden_CD).to(head_VD.dtype)
        ctx.save_for_backward(grad_hidden_MD, grad_head_VD)
        ctx.mark_non_differentiable(values_M2)
        return values_M2[:, 1].sum() * scale, values_M2

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> Any:
        hidden_MD, head_VD = ctx.saved_tensors
        return hidden_MD * grad_total, head_VD * grad_total, None, None, None, None, None

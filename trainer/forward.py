"""What the loss reads of a student: its last hidden states and its head, and the targets that fit the head.

Shapes: B rows, L context, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from kdata.trainer import encoder_decoder
from kdata.trainer.acceleration import VARLEN, bounds_of
from kdata.trainer.documents import carries_state, states_by_document
from kdata.trainer.objectives import Targets

if TYPE_CHECKING:
    from kdata.trainer.loader import Batch

ROWS = "kdata_rows"  # attribute of a student: rows of its head that count; absent: all


def hidden_states(model: PreTrainedModel, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
    """Last hidden states after the final norm, [B, L, D]; documents packed in a row do not see each other.

    No attention mask is passed. From positions that restart, transformers builds a block-causal mask itself
    (masking_utils.find_packed_sequence_indices), and no mask if each row is one document. With the attention varlen the rows
    are laid end to end, and the documents' bounds are passed. A model that carries a state reads each document by itself.
    """
    backbone = getattr(model, model.base_model_prefix)
    if carries_state(model):
        return states_by_document(
            lambda ids_SN: backbone(input_ids=ids_SN, use_cache=False).last_hidden_state, input_ids_BL, position_ids_BL
        )
    if model.config._attn_implementation == VARLEN:
        hidden_TD: Tensor = backbone(
            input_ids=input_ids_BL.reshape(1, -1),
            position_ids=position_ids_BL.reshape(1, -1),
            use_cache=False,
            **bounds_of(position_ids_BL),
        ).last_hidden_state[0]
        return hidden_TD.view(*input_ids_BL.shape, -1)
    hidden_BLD: Tensor = backbone(
        input_ids=input_ids_BL, position_ids=position_ids_BL, use_cache=False
    ).last_hidden_state
    return hidden_BLD


def predicting_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The last hidden states that predict the counted tokens of a batch, [M, D].

    Args:
        batch: where the model has an encoder, as `kdata.trainer.encoder_decoder.with_prompts` returns it.
    """
    device = head_of(model).device
    if encoder_decoder.is_encoder_decoder(model):
        return encoder_decoder.predicting_states(model, batch, device)
    hidden_BLD = hidden_states(model, batch.input_ids.to(device), batch.position_ids.to(device))
    return hidden_BLD.flatten(0, 1).index_select(0, batch.predictor_M.to(device))


def head_of(model: PreTrainedModel) -> Tensor:
    """The output embedding [V, D]: the parameter itself, or its rows of ids that a token has (`fit_vocabulary`)."""
    weight: Tensor = model.get_output_embeddings().weight
    rows: int | None = getattr(model, ROWS, None)
    return weight if rows is None else weight[:rows]


def fitting_targets(model: PreTrainedModel, targets: Targets) -> Targets:
    """The targets over the rows of `head_of`."""
    rows = getattr(model, ROWS, None)
    return targets if rows is None else targets.within(rows)

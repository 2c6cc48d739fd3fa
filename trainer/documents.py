"""Students that read each document as a row of its own, because a packed row would carry something across its documents.

A state-space model (Mamba and others that transformers calls stateful) carries a state through the row, and transformers has
no way to set it back inside of one: its kernels for that (`seq_idx`) need a GPU, and its own code ignores positions. So the
packed rows of a batch are taken apart, and the results are laid out as the rows were. Packing, order and targets of the batch
stay what they are. A padded end comes after its document and reaches nothing in it, as these models read from left to right.

Documents of like length are read together: those of 2^(n-1) to 2^n - 1 tokens, so at most half of what is read is padding.

Shapes: B rows, L context, T = B * L cells, S documents, N tokens of the longest document of a group, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdata.errors import ConfigError
from kdata.trainer.config import TrainConfig


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a model carries a state through a row: what transformers calls stateful. Hybrids with attention are too."""
    return bool(model._is_stateful)


def document_bounds(position_ids_BL: Tensor) -> Tensor:
    """Where documents begin among the cells of all rows, and the end of the last, int64 [S+1]. Padding is a document too.

    A document begins where a position is not the one before it plus 1, and at the start of each row.
    """
    begins_BL = torch.ones_like(position_ids_BL, dtype=torch.bool)
    begins_BL[:, 1:] = position_ids_BL[:, 1:] != position_ids_BL[:, :-1] + 1
    starts_S = begins_BL.flatten().nonzero()[:, 0]
    return torch.cat([starts_S, starts_S.new_tensor([position_ids_BL.numel()])])


def groups_of(lengths_S: Tensor) -> Iterator[Tensor]:
    """Indices of the documents of like length, int64, group by group."""
    exponents_S = torch.frexp(lengths_S.double()).exponent
    for exponent in exponents_S.unique():
        yield (exponents_S == exponent).nonzero()[:, 0]


def cells_of(starts_S: Tensor, lengths_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of documents as rows, int64 [S, N], and which of these belong to them, bool [S, N]; others repeat the first."""
    offsets_N = torch.arange(int(lengths_S.max()), device=starts_S.device)
    live_SN = offsets_N < lengths_S[:, None]
    return torch.where(live_SN, starts_S[:, None] + offsets_N, starts_S[:, None]), live_SN


def states_by_document(read: Callable[[Tensor], Tensor], input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
    """Hidden states [B, L, D] of packed rows, by a function from ids [S, N] to hidden states [S, N, D]."""
    ids_T, bounds = input_ids_BL.flatten(), document_bounds(position_ids_BL)
    cells, states = [], []
    for group in groups_of(bounds.diff()):
        cells_SN, live_SN = cells_of(bounds[:-1][group], bounds.diff()[group])
        cells.append(cells_SN[live_SN])
        states.append(read(ids_T[cells_SN])[live_SN])
    hidden_TD = torch.cat(states).index_select(0, torch.cat(cells).argsort())
    return hidden_TD.view(*input_ids_BL.shape, -1)


def refuse_unfit(model: PreTrainedModel, config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError where settings of a run do not go with a model that reads each document by itself."""
    name, encodes = type(model).__name__, bool(getattr(model.config, "is_encoder_decoder", False))
    if (carries_state(model) or encodes) and config.parallel == "fsdp" and world_size > 1:
        raise ConfigError(
            f"parallel=fsdp on {world_size} ranks does not go with {name}, which reads documents of like length together: "
            "ranks have other numbers of such groups and would wait for each other for ever; use parallel=ddp"
        )
    if carries_state(model) and config.compile:
        raise ConfigError(
            f"compile=true does not go with {name}: torch cannot compile its scan over rows of changing length; use "
            "compile=false"
        )

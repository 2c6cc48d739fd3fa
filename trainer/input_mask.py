"""Inputs of which a share is replaced by a mask token, while every target stays what the teacher believed of the clean text.

Source: MEAP, arXiv 2502.07490, in pre-training: 15 % of the input ids become a mask token, labels are the clean next tokens
at all positions, attention is unchanged. There a number of positions is chosen once for all rows of a batch; here each token
is chosen by itself, document by document, which is our choice: no document depends on its neighbors. That the targets are a
teacher's stored beliefs is ours too.

What is masked follows from the run's seed, the step, the row of the dataset and the position in it. So it is the same after a
resume, on any number of ranks and however a step is split, and another one when a document is read again in another step;
where a step holds a document twice, both have the same mask.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from kdata.errors import ConfigError
from kdata.trainer.config import InputMask
from kdata.trainer.loader import Batch


def masked(batch: Batch, config: InputMask, seed: int, step: int) -> Batch:
    """The same batch with other `input_ids`: some of the documents' tokens are `config.token_id`; padding stays.

    Args:
        seed, step: the run's seed, and the step of the run; both >= 0.
    """
    live_BL = batch.segment_ids >= 0
    documents_B = batch.segment_ids.amax(1) + 1
    first_B = documents_B.cumsum(0) - documents_B
    lengths = torch.bincount((batch.segment_ids + first_B[:, None])[live_BL], minlength=len(batch.rows)).tolist()
    draws = [
        np.random.default_rng([seed, step, row]).random(length)
        for row, length in zip(batch.rows.tolist(), lengths, strict=True)
    ]
    chosen_BL = torch.zeros_like(live_BL)
    chosen_BL[live_BL] = torch.from_numpy(np.concatenate(draws) < config.share)
    return replace(batch, input_ids=batch.input_ids.masked_fill(chosen_BL, config.token_id))


def check_mask(config: InputMask | None, student: PreTrainedModel) -> None:
    """Raise ConfigError if the mask token is not in the student's vocabulary."""
    table = student.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    if config is not None and config.token_id >= table.shape[0]:
        raise ConfigError(
            f"input_mask.token_id is {config.token_id}, but the student has embeddings for ids below {table.shape[0]}; "
            "choose a token of its vocabulary, best one that the text does not use"
        )

"""Encoder-decoder students of a decoder teacher: the encoder reads the prompt, the decoder learns the beliefs about the rest.

Of each document the encoder reads the tokens before the first target, in both directions. The decoder reads its start token
and the tokens from there on, and predicts the next. So at every target it knows what the teacher knew, and the stored beliefs
are the targets as they are:

    document      x0 x1 x2 x3 x4 x5        x3 is the first target
    encoder       x0 x1 x2
    decoder       start x3 x4              its hidden states predict x3 x4 x5

What is no target behind the first one, such as a later question in a chat, is read by the decoder and not learned.

Plain text has no prompt: its first target is its second token. Of such a document the encoder reads a share of the tokens
(`prompt_share`), and the targets among these do not count, because an encoder sees what comes after each. That, and the half
that is its default, are our choice. The share stands in the config.json of the student, where evaluation reads it.

Documents are read as rows of their own, as in `kdata.trainer.documents`, with masks for what is padding.

Shapes: B rows, L context, T = B * L cells, S documents, N and P tokens of the longest rest and prompt of a group, M counted
positions, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from kdata.errors import ConfigError, DataError
from kdata.format.positions import ChosenPositions
from kdata.loader.batches import first_targets
from kdata.store.checkpoint_kind import refuse_kernels_of
from kdata.store.dataset import Dataset
from kdata.store.token_columns import COUNTS, has_entries, token_columns
from kdata.trainer.config import CheckpointStudent, TrainConfig
from kdata.trainer.documents import cells_of, document_bounds, groups_of
from kdata.trainer.domain_weights import DDKMixture
from kdata.trainer.loader import Batch
from kdata.trainer.objective_config import CHUNK_OBJECTIVES

PROMPT_SHARE = "kdata_prompt_share"  # in config.json


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model has an encoder for what it reads and a decoder for what it predicts."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def auto_class(folder: str, revision: str | None = None) -> Any:
    """The class of transformers that opens a model with a next-token head, of either kind."""
    refuse_kernels_of(folder, revision)
    config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def start_token(model: PreTrainedModel) -> int:
    """The token that the decoder begins with, as `generate` of transformers chooses it. Raises ConfigError without one."""
    generation: Any = model.generation_config
    for owner, name in ((generation, "decoder_start_token_id"), (model.config, "decoder_start_token_id"),
                        (generation, "bos_token_id"), (model.config, "bos_token_id")):  # fmt: skip
        token = getattr(owner, name, None)
        if isinstance(token, int):
            return token
    raise ConfigError(
        f"{type(model).__name__} does not say which token its decoder begins with; set decoder_start_token_id in its "
        "generation_config.json"
    )


def with_prompts(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch without the targets that an encoder reads; unchanged for a model without an encoder.

    Raises ConfigError where a document has no prompt, and the model has no share to read of it.
    """
    if not is_encoder_decoder(model):
        return batch
    document_M, position_M = _places(batch)
    stays_M = position_M >= _prompts(model, batch)[document_M]
    kept_M = stays_M.numpy()
    return replace(
        batch,
        predictor_M=batch.predictor_M[stays_M],
        targets=batch.targets.each(lambda tensor: tensor[stays_M]),
        logprob_M=batch.logprob_M[kept_M],
        rank_M=batch.rank_M[kept_M],
        entropy_M=batch.entropy_M[kept_M],
        document_M=batch.document_M[kept_M],
    )


def predicting_states(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """The decoder's last hidden states that predict the counted tokens, [M, D]."""
    bounds = document_bounds(batch.position_ids)
    lengths_S, prompts_S = bounds.diff(), _prompts(model, batch)
    read_S = torch.zeros(len(lengths_S), dtype=torch.bool)
    read_S[_places(batch)[0]] = True  # documents of which a token counts
    if not bool(read_S.any()):
        read_S[0] = True  # so that every parameter takes part
    cells, states = [], []
    documents = read_S.nonzero()[:, 0]
    for group in groups_of(lengths_S[documents]):
        own = documents[group]
        starts, lengths, prompts = bounds[:-1][own], lengths_S[own], prompts_S[own]
        rest_cells, hidden = read_documents(model, batch.input_ids.flatten(), starts, lengths, prompts, device)
        cells.append(rest_cells)
        states.append(hidden)
    all_cells, order = torch.cat(cells).sort()
    place_M = torch.searchsorted(all_cells, batch.predictor_M)
    return torch.cat(states).index_select(0, order[place_M].to(device))


def read_documents(
    model: PreTrainedModel, ids_T: Tensor, starts_S: Tensor, lengths_S: Tensor, prompts_S: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Read documents of one group.

    Args:
        starts_S, lengths_S, prompts_S: int64 [S], first cell of each document in `ids_T`, its tokens, those of its prompt.
    Returns:
        int64 [N]: cells of the tokens before those that are predicted, and float [N, D]: the hidden states that predict.
    """
    prompt_SP, prompt_live_SP = cells_of(starts_S, prompts_S)
    # A hidden state stands in the cell before the token that it predicts, so the rest begins with the prompt's last cell.
    cells_SN, live_SN = cells_of(starts_S + prompts_S - 1, (lengths_S - prompts_S).clamp_min(1))
    decoder_SN = ids_T[cells_SN]
    decoder_SN[:, 0] = start_token(model)
    prompt_mask_SP = prompt_live_SP.long().to(device)
    encoder, decoder = cast(Any, model).get_encoder(), cast(Any, model).get_decoder()
    encoded_SPD = encoder(input_ids=ids_T[prompt_SP].to(device), attention_mask=prompt_mask_SP).last_hidden_state
    hidden_SND: Tensor = decoder(
        input_ids=decoder_SN.to(device),
        attention_mask=live_SN.long().to(device),
        encoder_hidden_states=encoded_SPD,
        encoder_attention_mask=prompt_mask_SP,
        use_cache=False,
    ).last_hidden_state
    return cells_SN[live_SN], hidden_SND[live_SN.to(device)]


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each counted token its document among those of `document_bounds`, and its position in it, int64 [M]."""
    begins_T = torch.zeros(batch.position_ids.numel(), dtype=torch.int64)
    begins_T[document_bounds(batch.position_ids)[:-1]] = 1
    document_T = begins_T.cumsum(0) - 1
    return document_T[batch.predictor_M], batch.position_ids.flatten()[batch.predictor_M] + 1


def _prompts(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Tokens that the encoder reads of each document among those of `document_bounds`, int64 [S]; of padding all.

    They follow from the targets of the document, so they are the same in training and evaluation, whatever counts.
    Raises ConfigError where a document has no prompt, and the model has no share to read of it.
    """
    bounds = document_bounds(batch.position_ids)
    prompts_S, live_S = bounds.diff(), batch.segment_ids.flatten()[bounds[:-1]] >= 0
    lengths_S = prompts_S[live_S].numpy()
    share = getattr(model.config, PROMPT_SHARE, None)
    if share is None and _is_bare(batch.first_target_S, lengths_S).any():
        raise ConfigError(_no_prompt("a document of the batch"))
    prompts_S[live_S] = torch.from_numpy(_prompt_lengths(batch.first_target_S, lengths_S, share))
    return prompts_S


def _is_bare(first_S: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Which documents have no prompt, bool [S]: their second token is a target."""
    bare_S: np.ndarray = (first_S <= 1) & (lengths_S > 1)
    return bare_S


def _prompt_lengths(first_S: np.ndarray, lengths_S: np.ndarray, share: float | None) -> np.ndarray:
    """Tokens of the prompts, int64 [S]: all before the first target, or a share of a document without any.

    Args:
        first_S: see `kdata.loader.batches.first_targets`. share: None: no document is without.
    """
    if share is None:
        return first_S
    own_S = np.maximum(np.ceil(lengths_S * share), 1).astype(np.int64)
    return np.where(_is_bare(first_S, lengths_S), own_S, first_S)


def _no_prompt(owner: str) -> str:
    return (
        f"{owner} has no prompt for the encoder: its second token counts already; set prompt_share, such as 0.5, so that the "
        "encoder reads a share of such documents, or train on chats (`kdata capture` with targets=assistant)"
    )


def refuse_checkpoint(config: CheckpointStudent, model: PreTrainedModel) -> None:
    """Raise ConfigError where a student is to be changed in a way that is not known for an encoder and a decoder."""
    own = [name for name in ("keep_layers", "lora", "quantize") if getattr(config, name) is not None]
    if own and is_encoder_decoder(model):
        raise ConfigError(
            f"student.{own[0]} does not go with {type(model).__name__}, an encoder-decoder; leave it at null"
        )


def refuse_settings(name: str, config: TrainConfig) -> None:
    """Raise ConfigError where an objective or a mixture of a run does not go with an encoder-decoder of this name."""
    for phase in config.resolved_phases():
        if of_chunks := sorted(CHUNK_OBJECTIVES.intersection(phase.objective.weights)):
            raise ConfigError(
                f"objective {of_chunks[0]} does not go with {name}: a prompt would cut chunks; use another"
            )
        if isinstance(phase.mixture, DDKMixture):
            raise ConfigError(
                f"mixture ddk does not go with {name}: the teacher's losses are of whole texts, the student's of what is "
                "behind the prompts; use a fixed mixture"
            )


def prepare(
    student: PreTrainedModel, config: TrainConfig, data: list[tuple[Dataset, np.ndarray, ChosenPositions | None]]
) -> None:
    """Check a run of an encoder-decoder against its settings and data, and write the share of prompts into its config.

    Args:
        data: a dataset, its planned rows, int64, and the positions that its plan chooses, for each phase.
    Raises:
        ConfigError: an objective, a mixture or a way to compute does not fit, or a row has no prompt and `prompt_share` is
            null.
        DataError: no position that counts is left behind the prompts.
    """
    if not is_encoder_decoder(student):
        return
    refuse_settings(type(student).__name__, config)
    setattr(student.config, PROMPT_SHARE, config.prompt_share)
    for dataset, rows, positions in data:
        check_prompts(student, dataset, rows, positions)


def check_prompts(
    model: PreTrainedModel, dataset: Dataset, rows: np.ndarray, positions: ChosenPositions | None = None
) -> np.ndarray:
    """Find out which rows, int64, have a token behind their prompt that counts, before they are read.

    Args:
        positions: those that a plan chooses among `rows`. Else every target counts, or every one that keeps a distribution.
    Returns:
        bool [R], of all rows of the dataset. Of a model without an encoder nothing is read, and every row has one.
    Raises:
        ConfigError: a row has no prompt, and the model has no share to read of it; it names the row.
        DataError: no row has a token behind its prompt that counts.
    """
    if not is_encoder_decoder(model):
        return np.ones(dataset.num_rows, bool)
    share = getattr(model.config, PROMPT_SHARE, None)
    wanted_R, counts_R = np.zeros((2, dataset.num_rows), bool)
    wanted_R[rows] = True
    kept = COUNTS if dataset.info.codec.keeps_some_positions else ()
    for read in token_columns(dataset, ["target_mask", *kept], wanted_R):
        lengths_S = np.diff(read.offsets)
        own_S = wanted_R[read.first_row : read.first_row + len(lengths_S)]
        position_T = np.arange(read.offsets[-1]) - np.repeat(read.offsets[:-1], lengths_S)
        target_T = read.values["target_mask"].astype(bool) & (position_T > 0)
        first_S = first_targets(target_T, read.offsets)
        if share is None and len(bare := np.flatnonzero(own_S & _is_bare(first_S, lengths_S))):
            row_id = dataset.index(["id"])["id"][int(read.first_row + bare[0])].as_py()
            raise ConfigError(_no_prompt(f"row {row_id!r} of {dataset.place}"))
        if positions is not None:
            own = np.flatnonzero(own_S)
            target_T = np.zeros_like(target_T)
            target_T[positions.tokens(own + read.first_row, np.append(read.offsets[own], 0))[0]] = True
        elif kept:
            target_T &= has_entries(read)
        behind_T = target_T & (position_T >= np.repeat(_prompt_lengths(first_S, lengths_S, share), lengths_S))
        document_T = np.repeat(np.arange(len(lengths_S)), lengths_S)
        counts_R[read.first_row + document_T[behind_T]] = True
    counts_R &= wanted_R
    if not counts_R.any():
        raise DataError(
            f"{dataset.place}: no token that counts is left behind the prompts (prompt_share={share}), so there is nothing "
            "to learn or to measure; lower prompt_share, use longer texts, or keep or choose later positions"
        )
    return counts_R


@torch.no_grad()
def probe(model: PreTrainedModel) -> None:
    """Raise ConfigError unless logits are head @ hidden, and a document is the same alone and beside a longer one."""
    ids_T, device = torch.arange(18) * 7 % model.get_output_embeddings().weight.shape[0], torch.device("cpu")
    starts, lengths, prompts = torch.tensor([0, 7]), torch.tensor([7, 11]), torch.tensor([3, 6])
    _, together = read_documents(model, ids_T, starts, lengths, prompts, device)
    _, alone = read_documents(model, ids_T, starts[:1], lengths[:1], prompts[:1], device)
    if not torch.allclose(together[:4], alone, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} lets documents of one batch see each other or their padding (hidden states differ by "
            f"{float((together[:4] - alone).abs().max()):.2g}); choose a student that follows its attention masks"
        )
    decoder_ids = torch.cat([torch.tensor([start_token(model)]), ids_T[3:6]])[None]
    theirs = model(input_ids=ids_T[None, :3], decoder_input_ids=decoder_ids, use_cache=False,
                   attention_mask=torch.ones(1, 3, dtype=torch.long),
                   decoder_attention_mask=torch.ones(1, 4, dtype=torch.long)).logits[0]  # fmt: skip
    ours = alone @ model.get_output_embeddings().weight.T
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"{type(model).__name__}'s logits are not head @ hidden (off by {float((theirs - ours).abs().max()):.2g}): it "
            "has a bias, logit scaling (as T5 with tied embeddings has) or soft-capping, which the sparse loss does not "
            "support; choose a student without it"
        )

"""The model that is trained: random weights of given sizes, or a checkpoint.

Any Hugging Face causal language model works if its logits are `head @ hidden` and its attention keeps packed documents
apart. Both are tested on a few tokens before training: a student that breaks either would train without complaint, on the
wrong thing. What other kinds of students need stands in a file each: `kdata.trainer.documents` (state-space models),
`kdata.trainer.encoder_decoder`, `kdata.trainer.quantization`, `kdata.trainer.adapters`, `kdata.trainer.pruning`.

A head may have rows that no token has: checkpoints pad their vocabulary to a round number, and a teacher and a student of
one tokenizer may be padded differently. Where the sizes differ, the loss is over the ids that tokens have, on both sides. The
student's probabilities are those of its logits at these ids alone: the log-sum-exp leaves the other rows out, and they get no
gradient. The teacher's entries at other ids leave the targets. An exact one moves its mass to the tail, so the bucket still
holds all that is not kept. A draw is dropped: the other draws are unbiased for the teacher's probabilities of the ids that
tokens have, which are not scaled up, so a position counts by the mass that the teacher gives them. (Draws are part of the
tail's mass already.) Where the sizes are equal nothing is left out.

Shapes: B rows, L context, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from kdata.errors import ConfigError, DataError, KdataError, MismatchError, MissingError, first_line
from kdata.store.checkpoint_kind import refuse_other_kind, use_exact_attention
from kdata.store.dataset import Dataset
from kdata.store.gguf import is_gguf, model_folder
from kdata.store.pretrained import model_files, without_bars
from kdata.store.vocabulary import Vocabulary, num_ids, refuse_other_ids
from kdata.trainer import encoder_decoder
from kdata.trainer.acceleration import use_varlen
from kdata.trainer.adapters import add_adapters, check_peft, is_adapter, open_adapter
from kdata.trainer.architectures import from_scratch
from kdata.trainer.config import CheckpointStudent, PrunedStudent, ScratchStudent
from kdata.trainer.distributed import Ranks
from kdata.trainer.forward import ROWS, fitting_targets, head_of, hidden_states
from kdata.trainer.importance import Calibration, Importance, calibration_of, importance_of
from kdata.trainer.pruning import prune, prune_layers, refuse_unfit
from kdata.trainer.quantization import (
    add_fake_quantization,
    check_folder,
    check_torchao,
    is_quantized,
    refuse_quantized,
)

__all__ = [
    "ROWS", "attend_by_documents", "build_student", "check_positions", "fit_vocabulary", "fitting_targets", "head_of",
    "hidden_states", "importance_in", "num_parameters", "positions_of", "probe", "probe_head", "probe_isolation",
    "refuse_other_tokenizer",
]  # fmt: skip

IMPORTANCE = "kdata_importance"  # attribute of a student that was pruned: its Importance


def build_student(
    config: ScratchStudent | CheckpointStudent | PrunedStudent,
    dataset: Dataset,
    seed: int,
    others: Sequence[Dataset] = (),
    *,
    rows: np.ndarray | None = None,
    ranks: Ranks | None = None,
    importance: Path | None = None,
) -> PreTrainedModel:
    """Build the student in float32, check it against the dataset, and probe it.

    Args:
        others: further datasets that it reads, with the same tokenizer.
        rows: of a pruned student, int64, global rows of the dataset that its parts are chosen by; None: all.
        ranks: where that is computed; None: on the CPU.
        importance: file of an earlier start, which is read instead (`kdata.trainer.importance`); None: none.

    Raises:
        ConfigError: sizes do not fit, or the sparse loss or packing would train this model wrongly.
        MismatchError: the vocabulary or the tokenizer is not the dataset's.
        MissingError: the checkpoint does not exist or cannot be loaded.
        CorruptError: files of the checkpoint, or the file `importance`, are damaged.
        DependencyError: adapters are asked for, and peft is not installed, or quantized weights, and torchao is not.
    """
    datasets = [dataset, *others]
    if isinstance(config, PrunedStudent):
        calibration = calibration_of(dataset, rows, config.importance_rows, seed, ranks)
        return _pruned(config, datasets, calibration, importance)
    with nullcontext() if isinstance(config, ScratchStudent) else model_files(config.model, "a file"):
        model = (
            from_scratch(config, dataset.info, seed)
            if isinstance(config, ScratchStudent)
            else _from_checkpoint(config, dataset)
        )
        _check(model, datasets)
        if isinstance(config, CheckpointStudent) and config.lora is not None:
            add_adapters(model, config.lora, config.model, config.revision, seed)
        if isinstance(config, CheckpointStudent) and config.quantize is not None:
            add_fake_quantization(model, config.quantize)  # after the probes, which are of the model itself
    return model


def _check(model: PreTrainedModel, datasets: Sequence[Dataset]) -> None:
    fit_vocabulary(model, datasets)
    probe(model)


def importance_in(student: PreTrainedModel) -> Importance | None:
    """Why a pruned student has the parts that it has; None for other students."""
    found: Importance | None = getattr(student, IMPORTANCE, None)
    return found


def num_parameters(model: PreTrainedModel) -> int:
    """Trainable parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit_vocabulary(model: PreTrainedModel, datasets: Sequence[Dataset]) -> None:
    """Have `head_of` leave out rows that no token has, where head and datasets have different sizes.

    Raises MismatchError where a size is less than the number of ids that tokens have, or that number is not known.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    sizes = [rows, *(dataset.info.vocab_size for dataset in datasets)]
    if len(set(sizes)) == 1:
        return
    tokenizers = [Vocabulary.of_dataset(dataset).tokenizer for dataset in datasets]
    counts = [num_ids(tokenizer) for tokenizer in tokenizers if tokenizer is not None]
    if len(counts) == len(tokenizers) and max(counts) <= min(sizes):
        setattr(model, ROWS, max(counts))
        return
    known = (
        f"its tokens have ids below {max(counts):,}"
        if counts
        else "it carries no tokenizer that says which ids have a token"
    )
    raise MismatchError(
        f"the student's head has {rows:,} rows, the dataset's vocabulary {datasets[0].info.vocab_size:,} ids, and {known}; "
        f"resize the head with model.resize_token_embeddings({datasets[0].info.vocab_size}) and save it, or choose another "
        "student"
    )


def refuse_other_tokenizer(owner: str, tokenizer: Any, dataset: Dataset) -> None:
    """Raise MismatchError unless the dataset's ids mean the same tokens to a model."""
    remedy = (
        "choose a student with the dataset's tokenizer, or make a dataset for the student's: `kdata retokenize`, or "
        "`kdata train --tokenizer`"
    )
    refuse_other_ids(Vocabulary.of_dataset(dataset), Vocabulary.of_model(owner, tokenizer), remedy)


def positions_of(model: PreTrainedModel) -> int | None:
    """Positions that a model has, of a multimodal model its text part; None where it does not say."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return known if isinstance(known, int) else None


def check_positions(model: PreTrainedModel, longest_tokens: int) -> None:
    """Raise DataError if a document has more tokens than the student has positions (they restart in each document)."""
    known = positions_of(model)
    if known is not None and longest_tokens > known:
        raise DataError(
            f"a document has {longest_tokens} tokens, the student has {known} positions; leave longer documents out with a "
            f"plan (kdata select --sql 'select id from rows where num_tokens <= {known}'), capture the text with "
            f"max_tokens={known}, or use another student"
        )


def probe(model: PreTrainedModel) -> None:
    """Raise ConfigError unless logits are head @ hidden, and documents are kept apart."""
    if encoder_decoder.is_encoder_decoder(model):
        return encoder_decoder.probe(model)
    probe_head(model)
    probe_isolation(model)


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> None:
    """Raise ConfigError unless the model's logits are head @ hidden (no bias, scaling or soft-capping)."""
    ids_BL, positions_BL = _probe_tokens(model, 6), torch.arange(6)[None]
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    ours_BLV = hidden_states(model, ids_BL, positions_BL) @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits_BLV, ours_BLV, rtol=1e-3, atol=1e-4):
        raise ConfigError(
            f"{type(model).__name__}'s logits are not head @ hidden (off by "
            f"{float((logits_BLV - ours_BLV).abs().max()):.2g}): it has a bias, logit scaling or "
            "soft-capping, which the sparse loss does not support; choose a student without it"
        )


@torch.no_grad()
def probe_isolation(model: PreTrainedModel) -> None:
    """Raise ConfigError unless a document has the same hidden states alone and packed behind another document."""
    ids_BL = _probe_tokens(model, 12)
    positions_BL = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed_LD = hidden_states(model, ids_BL, positions_BL)[0, 5:]
    alone_LD = hidden_states(model, ids_BL[:, 5:], positions_BL[:, 5:])[0]
    # Rounded inputs turn a difference in the last bit into one of a whole step; a leak changes more than a tenth.
    rounded = is_quantized(model) and float((packed_LD - alone_LD).norm() / alone_LD.norm()) < 0.02
    if not rounded and not torch.allclose(packed_LD, alone_LD, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} lets packed documents see each other (hidden states differ by "
            f"{float((packed_LD - alone_LD).abs().max()):.2g}); choose a student whose attention "
            "follows position_ids"
        )


@torch.no_grad()
def attend_by_documents(model: PreTrainedModel) -> None:
    """Have a model on a GPU compute attention as FlashAttention over documents (`attention: varlen`), and test it.

    Raises ConfigError where its attention has what varlen leaves out, or its hidden states are others than before.
    """
    if encoder_decoder.is_encoder_decoder(model):
        raise ConfigError(
            f"attention=varlen does not fit {type(model).__name__}, an encoder-decoder; use attention=default"
        )
    device = head_of(model).device
    ids_BL = _probe_tokens(model, 24).view(2, 12).to(device)
    positions_BL = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)]).to(device)
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        before_BLD = hidden_states(model, ids_BL, positions_BL).float()
        use_varlen(model)
        after_BLD = hidden_states(model, ids_BL, positions_BL).float()
    model.train(was_training)
    difference = float((after_BLD - before_BLD).norm() / before_BLD.norm())
    if not difference < 0.02:  # bf16 has 8 bits; documents that see each other differ by more than a tenth
        raise ConfigError(
            f"attention=varlen changes the hidden states of {type(model).__name__} by {difference:.1%}, more than bf16 "
            "explains; use attention=default"
        )


def _probe_tokens(model: PreTrainedModel, count: int) -> Tensor:
    return (torch.arange(count) * 7 % head_of(model).shape[0])[None]


def _from_checkpoint(config: CheckpointStudent, dataset: Dataset) -> PreTrainedModel:
    adapter = is_adapter(Path(config.model))
    if config.quantize is not None:
        check_torchao()
    if config.lora is not None:
        check_peft()
        if adapter:
            raise ConfigError(
                f"student.lora: {config.model} is an adapter itself, and a new adapter needs a whole model as its base; "
                "merge it into its model first (PEFT's merge_and_unload), and name that folder"
            )
    if Path(config.model).is_dir() and not adapter:
        refuse_other_kind(Path(config.model), encoder_decoder=True)
    with _loading(config.model):
        folder = model_folder(config.model)
    _check_tokenizer(config, folder, dataset)  # before the weights, which take longer
    check_folder(Path(folder))
    model = _load(config, folder) if not adapter else _load_adapter(config.model)
    encoder_decoder.refuse_checkpoint(config, model)
    if config.lora is None:
        refuse_quantized(config.model, model)
    return model if config.keep_layers is None else prune_layers(model, config.keep_layers)


def encoder_decoder_of(config: ScratchStudent | CheckpointStudent | PrunedStudent) -> str | None:
    """What settings and config.json of an encoder-decoder call it, before it is built; None: it has no encoder.

    Raises MissingError where there is no model of the name.
    """
    if isinstance(config, ScratchStudent):
        return "t5gemma" if config.architecture == "t5gemma" else None
    if is_gguf(config.model) or is_adapter(Path(config.model)):  # of decoders alone
        return None
    with _loading(config.model):
        own = AutoConfig.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
    return str(own.model_type) if getattr(own, "is_encoder_decoder", False) else None


def _pruned(
    config: PrunedStudent, datasets: Sequence[Dataset], calibration: Calibration, importance: Path | None
) -> PreTrainedModel:
    with model_files(config.model, "a file"):
        if Path(config.model).is_dir():
            refuse_other_kind(Path(config.model))
        with _loading(config.model):
            folder = model_folder(config.model)
            own = AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
        sizes = refuse_unfit(config.model, own, config)
        _check_tokenizer(config, folder, datasets[0])
        whole = _load(config, folder)
        _check(whole, datasets)
    check_positions(whole, calibration.longest_tokens)
    chosen = importance_of(whole, config, sizes, calibration, importance)
    model = prune(whole, chosen.kept)
    _check(model, datasets)
    setattr(model, IMPORTANCE, chosen)
    return model


def _check_tokenizer(config: CheckpointStudent | PrunedStudent, folder: str, dataset: Dataset) -> None:
    with _loading(config.model):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=config.revision, trust_remote_code=False)
    refuse_other_tokenizer(f"the student {config.model}", tokenizer, dataset)


def _load(config: CheckpointStudent | PrunedStudent, folder: str) -> PreTrainedModel:
    """A whole model in float32."""
    with _loading(config.model), without_bars():
        model: PreTrainedModel = encoder_decoder.auto_class(folder, config.revision).from_pretrained(
            folder, revision=config.revision, dtype=torch.float32, trust_remote_code=False
        )
    use_exact_attention(model)
    return model


def _load_adapter(name: str) -> PreTrainedModel:
    with _loading(name):
        model = open_adapter(Path(name))
    use_exact_attention(model)
    return model


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load into one MissingError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, KdataError):
            raise
        raise MissingError(
            f"student.model {name!r} cannot be loaded: {first_line(error)}; name a folder in Hugging Face "
            "format (config.json, weights, tokenizer.json) or a model on the Hub"
        ) from error

"""The model that is trained: random weights of given sizes, or a checkpoint.

Any Hugging Face causal language model works if its logits are `head @ hidden` and its attention keeps packed documents
apart. Both are tested on a few tokens before training: a student that breaks either would train without complaint, on the
wrong thing.

Shapes: B rows, L context, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdata.errors import ConfigError, DataError, MismatchError, MissingError
from kdata.store.dataset import Dataset
from kdata.store.gguf import model_folder
from kdata.trainer.config import CheckpointStudent, ScratchStudent


def build_student(config: ScratchStudent | CheckpointStudent, dataset: Dataset, seed: int) -> PreTrainedModel:
    """Build the student in float32, check it against the dataset, and probe it.

    Raises:
        ConfigError: sizes do not fit, or the sparse loss or packing would train this model wrongly.
        MismatchError: the vocabulary or the tokenizer is not the dataset's.
        MissingError: the checkpoint does not exist or cannot be loaded.
    """
    model = (
        _from_scratch(config, dataset, seed)
        if isinstance(config, ScratchStudent)
        else _from_checkpoint(config, dataset)
    )
    check_vocabulary(model, dataset)
    probe_head(model)
    probe_isolation(model)
    return model


def hidden_states(model: PreTrainedModel, input_ids_BL: Tensor, position_ids_BL: Tensor) -> Tensor:
    """Last hidden states after the final norm, [B, L, D]; documents packed in a row do not see each other.

    No attention mask is passed. From positions that restart, transformers builds a block-causal mask itself
    (masking_utils.find_packed_sequence_indices), and no mask if each row is one document.
    """
    backbone = getattr(model, model.base_model_prefix)
    return backbone(input_ids=input_ids_BL, position_ids=position_ids_BL, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> Tensor:
    """The output embedding [V, D], the parameter itself."""
    return model.get_output_embeddings().weight


def num_parameters(model: PreTrainedModel) -> int:
    """Trainable parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tokenizer_hash(folder: Path | str, revision: str | None = None) -> str:
    """SHA-256 (hex) of a fast tokenizer's JSON without truncation and padding: the hash that datasets store."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(folder), revision=revision, trust_remote_code=False)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_vocabulary(model: PreTrainedModel, dataset: Dataset) -> None:
    """Raise MismatchError unless the student's head has exactly one row per id of the dataset."""
    have, want = head_of(model).shape[0], dataset.info.vocab_size
    if have != want:
        raise MismatchError(
            f"the student's head has {have} rows, the dataset's vocabulary {want} ids; "
            f"resize it with model.resize_token_embeddings({want}) and save it, or choose another student"
        )


def check_positions(model: PreTrainedModel, longest_tokens: int) -> None:
    """Raise DataError if a document has more tokens than the student has positions (they restart in each document)."""
    known = getattr(model.config, "max_position_embeddings", None)
    if isinstance(known, int) and longest_tokens > known:
        raise DataError(
            f"a document has {longest_tokens} tokens, the student has {known} positions; leave longer documents out with a "
            f"plan (kdata select --sql 'select id from rows where num_tokens <= {known}'), capture the text with "
            f"max_tokens={known}, or use another student"
        )


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> None:
    """Raise ConfigError unless the model's logits are head @ hidden (no bias, scaling or soft-capping)."""
    ids_BL, positions_BL = _probe_tokens(model, 6), torch.arange(6)[None]
    logits_BLV = model(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).logits
    ours_BLV = hidden_states(model, ids_BL, positions_BL) @ head_of(model).T
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
    if not torch.allclose(packed_LD, alone_LD, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} lets packed documents see each other (hidden states differ by "
            f"{float((packed_LD - alone_LD).abs().max()):.2g}); choose a student whose attention "
            "follows position_ids"
        )


def _probe_tokens(model: PreTrainedModel, count: int) -> Tensor:
    return (torch.arange(count) * 7 % head_of(model).shape[0])[None]


def _from_scratch(config: ScratchStudent, dataset: Dataset, seed: int) -> PreTrainedModel:
    head_width, odd = divmod(config.hidden_size, config.num_heads)
    if odd or head_width % 2:
        raise ConfigError(
            f"student.hidden_size={config.hidden_size} over num_heads={config.num_heads} does not give an even "
            "head width; choose a hidden_size that is a multiple of 2 * num_heads"
        )
    kv_heads = config.num_kv_heads or config.num_heads
    if config.num_heads % kv_heads:
        raise ConfigError(f"student.num_kv_heads={kv_heads} does not divide num_heads={config.num_heads}")
    inner = config.intermediate_size or -(-config.hidden_size * 8 // 3 // 32) * 32
    tokenizer = dataset.info.tokenizer
    llama = LlamaConfig(
        vocab_size=dataset.info.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=inner,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tied_embeddings,
        initializer_range=config.init_std,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama).float()


def _from_checkpoint(config: CheckpointStudent, dataset: Dataset) -> PreTrainedModel:
    try:
        digest = tokenizer_hash(config.model, config.revision)
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(config.model), revision=config.revision, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise MissingError(
            f"student.model {config.model!r} cannot be loaded: {str(error).splitlines()[0]}; name a folder in Hugging Face "
            "format (config.json, weights, tokenizer.json) or a model on the Hub"
        ) from error
    if digest != dataset.info.tokenizer.hash:
        raise MismatchError(
            f"the tokenizer of the student {config.model!r} ({digest[:12]}) is not the dataset's "
            f"({dataset.info.tokenizer.hash[:12]}), so the stored token ids would mean other tokens; choose a student with "
            "the teacher's tokenizer"
        )
    return model if config.keep_layers is None else prune_layers(model, config.keep_layers)


def prune_layers(model: PreTrainedModel, keep: int | list[int]) -> PreTrainedModel:
    """A model with some of the layers of another, and all its other weights.

    Args:
        keep: how many layers, evenly spaced with the first and the last; or their numbers from 0, rising.
    Raises:
        ConfigError: there are no such layers, or the model keeps its layers in a way that is not known here.
    """
    total = int(model.config.num_hidden_layers)
    if isinstance(keep, int):
        numbers = [round(n * (total - 1) / max(keep - 1, 1)) for n in range(min(keep, total + 1))]
    else:
        numbers = keep
    if not numbers or sorted(set(numbers)) != numbers or not 0 <= numbers[0] <= numbers[-1] < total:
        raise ConfigError(
            f"student.keep_layers={keep} does not fit a model of {total} layers; give a number from 1 to {total}, or rising "
            f"numbers of layers from 0 to {total - 1}"
        )
    stacks = [
        name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) == total
    ]
    if len(stacks) != 1:
        raise ConfigError(
            f"student.keep_layers: {type(model).__name__} has no single list of its {total} layers; use null"
        )
    config = copy.deepcopy(model.config)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # a setting of each layer, such as its kind of attention
            setattr(config, key, [value[number] for number in numbers])
    config.num_hidden_layers = len(numbers)
    places = {f"{stacks[0]}.{number}.": f"{stacks[0]}.{place}." for place, number in enumerate(numbers)}
    weights = {}
    for name, weight in model.state_dict().items():
        stem = ".".join(name.split(".")[: stacks[0].count(".") + 2]) + "."
        if not name.startswith(f"{stacks[0]}."):
            weights[name] = weight
        elif stem in places:
            weights[places[stem] + name.removeprefix(stem)] = weight
    pruned: Any = type(model)(config)
    pruned.to(model.dtype)
    pruned.load_state_dict(weights)
    pruned.train(model.training)
    return pruned

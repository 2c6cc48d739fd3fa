"""The model that learns: from a small configuration, or from a checkpoint.

Any Hugging Face causal language model whose logits are `head @ hidden` and whose attention keeps packed
documents apart. Both are probed on a few tokens before training rather than trusted, because a student that
breaks either trains without complaint on the wrong thing.

Shapes: B rows, L context, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdata.errors import ConfigError, DataError, MismatchError, MissingError
from kdata.store.dataset import Dataset


class ScratchStudent(BaseModel):
    """A Llama-type student at random initialisation; its vocabulary is the dataset's."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["scratch"] = "scratch"
    hidden_size: int = Field(default=128, ge=2, description="Width D of the hidden states.")
    num_layers: int = Field(default=4, ge=1, description="Transformer layers.")
    num_heads: int = Field(default=4, ge=1, description="Attention heads; must divide hidden_size into even widths.")
    num_kv_heads: int | None = Field(
        default=None, ge=1, description="Key-value heads (grouped attention); None: num_heads."
    )
    intermediate_size: int | None = Field(
        default=None,
        ge=1,
        description="Width of the feed-forward layers; None: 8/3 of hidden_size, rounded up to 32.",
    )
    max_positions: int = Field(default=2048, ge=2, description="Longest document that the student can read.")
    tied_embeddings: bool = Field(default=True, description="One matrix for input and output embeddings.")
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")


class CheckpointStudent(BaseModel):
    """A student that goes on from trained weights."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["checkpoint"] = "checkpoint"
    path: str = Field(description="Directory in Hugging Face format, or a model name on the Hub.")
    revision: str | None = Field(
        default=None, description="Commit, tag or branch on the Hub; None: the default branch."
    )


StudentConfig = Annotated[ScratchStudent | CheckpointStudent, Field(discriminator="kind")]


def build_student(config: ScratchStudent | CheckpointStudent, dataset: Dataset, seed: int) -> PreTrainedModel:
    """Make the student, in float32, checked against the dataset and probed.

    Raises:
        ConfigError: sizes that do not fit, or a model that the sparse loss or packing would train wrongly.
        MismatchError: vocabulary or tokenizer differ from the dataset's.
        MissingError: there is no such checkpoint.
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

    No attention mask is passed: from positions that restart, transformers builds a block-causal mask by
    itself (masking_utils.find_packed_sequence_indices), and none at all where each row is one document.
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
    """SHA-256 (hex) of a fast tokenizer's canonical JSON without truncation and padding, as kdata does it."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), revision=revision, trust_remote_code=False)
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
    """Raise DataError where a document has more tokens than the student knows positions (those of a pack begin anew)."""
    known = getattr(model.config, "max_position_embeddings", None)
    if isinstance(known, int) and longest_tokens > known:
        raise DataError(
            f"a document has {longest_tokens} tokens, the student knows {known} positions; leave longer ones out by a plan "
            f"(kdata select --sql 'select id from rows where num_tokens <= {known}'), read the text with max_tokens={known}, "
            "or take another student"
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
            f"{float((logits_BLV - ours_BLV).abs().max()):.2g}): a bias, logit scaling or soft-capping that "
            "the sparse loss does not know; choose a student without it"
        )


@torch.no_grad()
def probe_isolation(model: PreTrainedModel) -> None:
    """Raise ConfigError unless a document's hidden states are the same alone and packed behind another."""
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
            f"student.hidden_size={config.hidden_size} over num_heads={config.num_heads} gives no even head "
            "width; choose a hidden_size that 2 * num_heads divides"
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
        found = tokenizer_hash(config.path, config.revision)
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.path, revision=config.revision, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise MissingError(f"student.path {config.path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if found != dataset.info.tokenizer.hash:
        raise MismatchError(
            f"the student's tokenizer ({found[:12]}) is not the dataset's "
            f"({dataset.info.tokenizer.hash[:12]}), "
            "so the stored ids would mean other tokens; choose a student with the teacher's tokenizer"
        )
    return model

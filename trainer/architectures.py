"""Students with random weights, by their architecture: models of transformers of the sizes that are asked for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from kdata.errors import ConfigError
from kdata.format.schema import DatasetInfo
from kdata.trainer.config import ScratchStudent


def from_scratch(config: ScratchStudent, info: DatasetInfo, seed: int) -> PreTrainedModel:
    """A model in float32, its vocabulary that of a dataset. Raises ConfigError where its sizes do not fit each other."""
    of, settings = {"llama": _llama, "mamba": _mamba, "t5gemma": _t5gemma}[config.architecture](config, info)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = of(settings).float()
    return model


def _common(config: ScratchStudent, info: DatasetInfo) -> dict[str, Any]:
    """Settings that every architecture has by these names."""
    return {
        "vocab_size": info.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": info.tokenizer.bos_id,
        "eos_token_id": info.tokenizer.eos_id,
    }


def _heads(config: ScratchStudent) -> dict[str, Any]:
    """Sizes of attention and feed-forward layers."""
    head_width, odd = divmod(config.hidden_size, config.num_heads)
    if odd or head_width % 2:
        raise ConfigError(
            f"student.hidden_size={config.hidden_size} over num_heads={config.num_heads} does not give an even "
            "head width; choose a hidden_size that is a multiple of 2 * num_heads"
        )
    kv_heads = config.num_kv_heads or config.num_heads
    if config.num_heads % kv_heads:
        raise ConfigError(f"student.num_kv_heads={kv_heads} does not divide num_heads={config.num_heads}")
    return {
        "intermediate_size": config.intermediate_size or -(-config.hidden_size * 8 // 3 // 32) * 32,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": config.max_positions,
    }


def _llama(config: ScratchStudent, info: DatasetInfo) -> tuple[Any, Any]:
    return LlamaForCausalLM, LlamaConfig(**_common(config, info), **_heads(config))


def _mamba(config: ScratchStudent, info: DatasetInfo) -> tuple[Any, Any]:
    """Mamba (arXiv 2312.00752): channels of twice the width, states of 16 numbers, as its authors have them."""
    return MambaForCausalLM, MambaConfig(**_common(config, info), pad_token_id=None)


def _t5gemma(config: ScratchStudent, info: DatasetInfo) -> tuple[Any, Any]:
    """T5Gemma (arXiv 2504.06225) without soft-caps, which the sparse loss has not, and with full attention in every layer.

    The decoder begins with the token that begins a text, or where the tokenizer has none, with the one that ends it.
    """
    width = config.hidden_size // config.num_heads
    own = {
        "head_dim": width, "query_pre_attn_scalar": width, "layer_types": ["full_attention"] * config.num_layers,
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "pad_token_id": None,
    }  # fmt: skip
    sizes = {**_common(config, info), **_heads(config), **own}
    parts = [T5GemmaModuleConfig(**sizes) for _ in range(2)]
    tokenizer = info.tokenizer
    start = next((token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None), None)
    whole: dict[str, Any] = {
        "vocab_size": info.vocab_size, "tie_word_embeddings": config.tied_embeddings, "initializer_range": config.init_std,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None,
        "decoder_start_token_id": start,
    }  # fmt: skip
    return T5GemmaForConditionalGeneration, T5GemmaConfig(encoder=parts[0], decoder=parts[1], **whole)

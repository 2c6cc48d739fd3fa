"""GGUF files of tiny models, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(
    model: Path,
    path: Path,
    *,
    values: Mapping[str, Any] | None = None,
    leave_out: str = "",
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a tiny Llama or Gemma 3 of a folder, with its byte-level tokenizer, as float32 GGUF.

    Args:
        values: further metadata; a value that is None takes the key away.
        leave_out: a tensor that the file lacks.
        tensors: further tensors.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    architecture = {"llama": "llama", "gemma3_text": "gemma3"}[config["model_type"]]
    metadata = {**_settings(config, architecture), **_tokenizer(model), **(values or {})}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    for name, weight in load_file(model / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        target = f"{names.get_name(stem)}.{suffix}"
        if target != leave_out:
            writer.add_tensor(target, np.ascontiguousarray(_as_stored(target, weight, config, architecture)))
    for name, values_of in (tensors or {}).items():
        writer.add_tensor(name, values_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    values = {
        "general.name": "tiny",
        "context_length": config["max_position_embeddings"],
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if architecture == "gemma3":
        values |= {"attention.key_length": config["head_dim"], "attention.sliding_window": config["sliding_window"]}
    else:
        values |= {"rope.dimension_count": config["head_dim"]}
    return {key if key.startswith("general.") else f"{architecture}.{key}": value for key, value in values.items()}


def _tokenizer(model: Path) -> dict[str, Any]:
    backend = json.loads((model / "tokenizer.json").read_text())
    vocabulary = {**backend["model"]["vocab"], **{t["content"]: t["id"] for t in backend["added_tokens"]}}
    special = {t["content"] for t in backend["added_tokens"] if t["special"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],  # 3: control
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary["<s>"],
        "tokenizer.ggml.eos_token_id": vocabulary["</s>"],
        "tokenizer.ggml.unknown_token_id": vocabulary["<s>"],  # never needed: every byte has a token
        "tokenizer.ggml.add_bos_token": True,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)


def _as_stored(name: str, weight: np.ndarray, config: dict[str, Any], architecture: str) -> np.ndarray:
    """A weight as the file has it: Gemma's norms plus one, and rows of Llama's heads in the order of interleaved rotation."""
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return weight + np.float32(1)
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight

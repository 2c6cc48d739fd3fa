"""Ways to compute a student faster, each refused where it cannot run: torch.compile, and attention without a mask.

`varlen` is the FlashAttention of torch (`torch.nn.attention.varlen`) over the documents of a batch: it takes their bounds
instead of a mask, so its time and memory grow with the documents, not with the square of the row. The flash_attention_2 of
transformers is not used: it sees bounds of packed documents only in batches of one row, and in others lets them see each
other without a word (5.19, modeling_flash_attention_utils._is_packed_sequence).

Shapes: B rows, L context, T = B * L tokens, H heads, E size of a head, S documents.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kdata.errors import ConfigError
from kdata.trainer.config import Attention, Precision
from kdata.trainer.documents import carries_state, document_bounds

VARLEN = "kdata_varlen"  # name of the attention in transformers


def check_acceleration(attention: Attention, compile: bool, device: torch.device, precision: Precision) -> None:
    """Raise ConfigError where attention or compilation cannot run on this machine."""
    if attention == "varlen":
        remedy = "use attention=default"
        if device.type != "cuda":
            raise ConfigError(
                f"attention=varlen is FlashAttention, which needs a CUDA GPU, not {device.type}; {remedy}"
            )
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise ConfigError(f"attention=varlen needs a GPU of compute capability 8.0 or higher; {remedy}")
        if precision != "bf16":
            raise ConfigError(
                f"attention=varlen computes in bf16, and precision is {precision}; set precision=bf16, or {remedy}"
            )
    if compile:
        if device.type == "cuda" and not torch.utils._triton.has_triton():
            raise ConfigError("compile=true needs Triton, which does not work here; install it, or use compile=false")
        compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
        if device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
            raise ConfigError("compile=true needs a C++ compiler (g++) on a CPU, and there is none; use compile=false")


def compile_layers(layers: list[nn.Module]) -> None:
    """Compile each layer in place; the code of the first serves all of its kind. Raises ConfigError without layers."""
    if not layers:
        raise ConfigError(
            "compile=true: transformers does not say which modules are this student's layers; use compile=false"
        )
    for layer in layers:
        layer.compile()


def use_varlen(model: PreTrainedModel) -> None:
    """Have a model compute attention over documents. Raises ConfigError where its attention has what varlen leaves out."""
    config = model.config.get_text_config()
    if carries_state(model):
        raise ConfigError(
            f"attention=varlen does not fit {type(model).__name__}, which carries a state through a row and reads each "
            "document by itself; use attention=default"
        )
    for name in ("attn_logit_softcapping", "attention_dropout"):
        if getattr(config, name, None):
            raise ConfigError(
                f"attention=varlen does not compute {name} ({getattr(config, name)}) of {type(model).__name__}; use "
                "attention=default"
            )
    AttentionInterface.register(VARLEN, _attend)
    AttentionMaskInterface.register(VARLEN, _no_mask)
    try:
        model.set_attn_implementation(VARLEN)
    except ValueError as error:
        raise ConfigError(
            f"attention=varlen: transformers cannot change the attention of {type(model).__name__}; use attention=default"
        ) from error


def bounds_of(position_ids_BL: Tensor) -> dict[str, Any]:
    """Arguments of the backbone that say where documents begin and end, for rows laid end to end."""
    bounds = document_bounds(position_ids_BL).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _no_mask(*arguments: Any, **options: Any) -> None:
    """No mask: the documents' bounds take its place."""


def _attend(
    module: nn.Module,
    query_BHLE: Tensor,
    key_BHLE: Tensor,
    value_BHLE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, in the form that transformers calls. Returns [B, L, H, E]."""
    odd = {"a mask": attention_mask, "dropout": dropout or None, **{k: options.get(k) for k in ("softcap", "s_aux")}}
    present = [name for name, value in odd.items() if value is not None]
    if present or cu_seq_lens_q is None or max_length_q is None or query_BHLE.shape[0] != 1:
        raise ConfigError(
            f"attention=varlen does not fit {type(module).__name__}: "
            + (f"it has {', '.join(present)}" if present else "it does not pass the bounds of documents on")
            + "; use attention=default"
        )
    device = query_BHLE.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value_BHLE.dtype
    # Rotary positions are in float32, which FlashAttention does not take.
    q_THE, k_THE, v_THE = (t[0].transpose(0, 1).to(dtype) for t in (query_BHLE, key_BHLE, value_BHLE))
    attended_THE = varlen_attn(
        q_THE,
        k_THE,
        v_THE,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q_THE.shape[1] != k_THE.shape[1],
    )
    assert isinstance(attended_THE, Tensor)
    return attended_THE[None], None

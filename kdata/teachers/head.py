"""The output head of a checkpoint, read from its files: hidden states to logits, without building [tokens, V].

vLLM's pooling runner returns the states after the final norm; kdata applies the head. Known heads are tied or untied
embeddings, with or without bias, with Gemma's soft-cap or a constant logit scale. Any other architecture is refused: if
its logits needed more than that, the capture would be silently wrong.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kdata.errors import TeacherError
from kdata.store.checkpoint_kind import read_config
from kdata.store.pretrained import model_files
from kdata.teachers.model import HEADS

TIED = ("Gemma", "Cohere", "GPT2", "Bloom", "Mamba")  # heads that are the embedding unless config.json says otherwise
EMBEDDINGS = (
    "model.embed_tokens.weight", "embed_tokens.weight", "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight", "transformer.wte.weight", "wte.weight",
    "transformer.word_embeddings.weight", "word_embeddings.weight", "backbone.embeddings.weight",
)  # fmt: skip
# Architectures whose logits are `head @ hidden`, with at most the options of `Head`.
KNOWN = {
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration", "PhiForCausalLM", "Phi3ForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM",
    "CohereForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM", "GPTNeoXForCausalLM",
    "GPT2LMHeadModel", "BloomForCausalLM", "MambaForCausalLM",
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """weight_VD float [V, D], on a CPU in oneDNN's form (see `load_head`); bias_V or None.

    logits = cap * tanh(scale * (h W^T + b) / cap); cap None: no cap.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    cap: float | None

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Float32 logits [C, V]."""
        hidden_CD = hidden_CD.to(self.weight_VD.dtype)
        if self.weight_VD.is_mkldnn:
            logits_CV: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                hidden_CD, self.weight_VD, None, "none", [], ""
            ).float()
        else:
            logits_CV = (hidden_CD @ self.weight_VD.T).float()
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.scale != 1.0:
            logits_CV *= self.scale
        if self.cap is not None:
            logits_CV = self.cap * torch.tanh(logits_CV / self.cap)
        return logits_CV


def load_head(folder: Path, vocab_size: int | None, dtype: torch.dtype, device: str) -> Head:
    """Read the head of a model folder.

    Args:
        folder: with config.json and *.safetensors.
        vocab_size: rows that the engine has; the checkpoint must have as many. None takes those of the checkpoint.
        dtype: of the matrix product; the forward pass's.
    Raises:
        TeacherError: an architecture or option that is not known, or no head in the files.
    """
    weight, bias, scale, cap = _stored(folder)
    if vocab_size not in (None, len(weight)):
        raise TeacherError(f"the head in {folder} has {len(weight)} rows, the engine says {vocab_size}")
    weight = weight.to(device, dtype)
    if device == "cpu" and torch.backends.mkldnn.is_available() and _onednn_multiplies(dtype):
        # oneDNN, with the weight laid out once as its kernel reads it: 1.5 to 2.3 times as fast as torch's own product (MKL)
        # on the AMD it was measured on, and safe to call from several threads, which vLLM's kernel is not.
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return Head(
        weight,
        None if bias is None else bias.to(device, torch.float32),
        scale,
        cap,
    )


def _stored(folder: Path) -> tuple[torch.Tensor, torch.Tensor | None, float, float | None]:
    """The head as the files have it: weight [V, D], bias [V] or None, scale, cap. Raises as `load_head`."""
    config = read_config(folder)
    architecture = _architecture(config)
    if architecture not in KNOWN:
        raise TeacherError(
            f"path=hidden does not know the head of {architecture}; use path=logprobs, or backend transformers"
        )
    text = config.get("text_config") or {}  # of a multimodal model
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", architecture.startswith(TIED))))
    weight = None if tied else _tensor(folder, HEADS)
    if weight is None:
        weight = _tensor(folder, EMBEDDINGS)
    if weight is None:
        raise TeacherError(
            f"{folder} holds neither a head nor an embedding under a name that is known; use path=logprobs, "
            "or backend transformers"
        )
    cap = config.get("final_logit_softcapping", text.get("final_logit_softcapping"))
    return weight, _tensor(folder, ("lm_head.bias",)), _scale(config), cap


def head_digest(folder: Path) -> str:
    """SHA-256 (hex) of the head of a model folder: shape, scale and cap, then weight and bias as little-endian float32.

    Raises TeacherError as `load_head`.
    """
    weight, bias, scale, cap = _stored(folder)
    digest = hashlib.sha256(f"{list(weight.shape)} {float(scale)!r} {cap if cap is None else float(cap)!r}\n".encode())
    for tensor in (weight, bias):
        for rows in () if tensor is None else tensor.split(4096):  # no second copy of a large head
            digest.update(rows.float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a product of this type on this processor: of 16-bit types only some have."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def is_known(folder: Path) -> bool:
    """True where the head of a model folder is of a known architecture."""
    return _architecture(read_config(folder)) in KNOWN


def _architecture(config: dict[str, Any]) -> str:
    name: str = (config.get("architectures") or ["none"])[0]
    return name


def _scale(config: dict[str, Any]) -> float:
    """Constant factor on the logits: Cohere's logit_scale, Granite's 1 / logits_scaling."""
    if config.get("logits_scaling"):
        return 1.0 / float(config["logits_scaling"])
    return float(config.get("logit_scale") or 1.0)


def _tensor(folder: Path, names: tuple[str, ...]) -> torch.Tensor | None:
    for file in sorted(folder.glob("*.safetensors")):
        with model_files(file, "the weights"), safe_open(file, framework="pt") as tensors:
            for name in names:
                if name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
                    tensor: torch.Tensor = tensors.get_tensor(name)
                    return tensor
    return None

"""Students that learn with the rounding of a quantized model (QAT), by torchao, and are written as one (extra `torchao`).

Inside of the student every linear layer but the head computes with weights, and perhaps inputs, that are rounded as the
quantized model will round them, and the gradient passes as if they were not (fake quantization; the straight-through
estimator of arXiv 1308.3432). Trained and kept in checkpoints are the weights in float32. With a teacher's stored beliefs as
the target this is quantization-aware distillation (QAD); with the cross-entropy alone it is plain QAT.

Embeddings, head and norms stay as they are: the sparse loss reads the head as a matrix.

What is written, from the same weights:

    OUT/model         torchao's own form, which transformers opens where torchao is installed: it computes what was trained
    OUT/dequantized   the rounded weights as an ordinary model in float32, for everything else; its inputs are not rounded
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig

from kdata.errors import ConfigError, DependencyError
from kdata.store.checkpoint_kind import read_config
from kdata.trainer.config import QuantizeConfig
from kdata.trainer.forward import head_of, hidden_states


@contextmanager
def _torchao() -> Iterator[Any]:
    """The package, without what it logs of kernels that this machine does not have.

    Raises DependencyError, which names the extra, where it is not installed.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        import torchao.quantization.qat

        yield torchao.quantization
    except ImportError as error:
        raise DependencyError(f"quantized students need torchao ({error}): pip install 'kdata[torchao]'") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_torchao() -> None:
    """Raise DependencyError, which names the extra, where torchao is not installed."""
    with _torchao():
        pass


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a model was opened from quantized weights."""
    return getattr(model.config, "quantization_config", None) is not None


def check_folder(folder: Path) -> None:
    """Raise DependencyError where a folder holds weights in torchao's form, and torchao is not installed."""
    if (folder / "config.json").is_file() and _method(read_config(folder)) == "torchao":
        check_torchao()


def _method(config: dict[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else None


def refuse_quantized(name: str, model: PreTrainedModel) -> None:
    """Raise ConfigError where a student would start from quantized weights, which have no gradient."""
    if is_quantized(model):
        raise ConfigError(
            f"student.model: the weights of {name} are quantized, and rounded numbers cannot be trained; name the model "
            "before it was quantized (of a student of kdata OUT/dequantized opens too), with student.quantize to train it "
            "for the rounding"
        )


def add_fake_quantization(student: PreTrainedModel, config: QuantizeConfig) -> None:
    """Have the linear layers of a student compute with rounded weights and inputs, in place.

    Raises:
        ConfigError: the inputs of a layer are no multiple of the group's size, the student has no such layer, it has weights
            in none, or the quantized model would compute something else than the student.
        DependencyError: torchao is not installed.
    """
    layers = _linear_layers(student)
    if not layers:
        raise ConfigError(
            f"student.quantize: {type(student).__name__} has no linear layer but its head; use quantize: null"
        )
    for name, layer in layers.items():
        if config.group_size is not None and layer.in_features % config.group_size:
            raise ConfigError(
                f"student.quantize.group_size={config.group_size} does not divide the {layer.in_features} inputs of {name}; "
                "give a number that divides those of every layer, or null for one scale per output"
            )
    with _torchao() as quantization:
        prepare = quantization.qat.QATConfig(_rounding(quantization, config), step="prepare")
        quantization.quantize_(student, prepare, filter_fn=lambda module, _: any(module is x for x in layers.values()))
    _probe_rounding(student, config)
    _refuse_others(student)


@torch.no_grad()
def _probe_rounding(student: PreTrainedModel, config: QuantizeConfig) -> None:
    """Raise ConfigError unless the student and the quantized model have the same hidden states."""
    written, mode = quantized(student, config, student.state_dict()), student.training
    ids_BL = torch.arange(12)[None] * 7 % head_of(student).shape[0]
    ours_BLD = hidden_states(student.eval(), ids_BL, torch.arange(12)[None])
    student.train(mode)
    try:
        theirs_BLD = hidden_states(written, ids_BL, torch.arange(12)[None])
        difference = float((ours_BLD - theirs_BLD).norm() / theirs_BLD.norm())
    except NotImplementedError:  # torchao has no such operation on its weights
        difference = math.inf
    if not difference < 0.02:  # a rounded input can move by a step where sums are in another order
        raise ConfigError(
            f"student.quantize: {type(student).__name__} reads weights of its linear layers in a way of its own, so that the "
            f"quantized model would not compute what was trained (it is off by {difference:.1%}); use quantize: null"
        )


def quantized(student: PreTrainedModel, config: QuantizeConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model in torchao's form that computes what a student with fake quantization computes, ready to be saved.

    Args:
        weights: the student's, whole, in float32, by name.
    """
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer  # it imports torchao, which takes seconds

    model = _plain(student, weights)
    layers = list(_linear_layers(model).values())
    with _torchao() as quantization:
        rounding = _rounding(quantization, config)
        quantization.quantize_(model, rounding, filter_fn=lambda module, _: any(module is layer for layer in layers))
        written = TorchAoConfig(rounding)
    model.config.quantization_config = written
    of_saving: Any = model
    of_saving.hf_quantizer = TorchAoHfQuantizer(written, pre_quantized=False)  # what save_pretrained asks
    return model


def dequantized(student: PreTrainedModel, config: QuantizeConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The same weights, rounded, as an ordinary model in float32. Its inputs are not rounded."""
    rounded, model = quantized(student, config, weights), _plain(student, weights)
    with torch.no_grad():
        for name, layer in _linear_layers(model).items():
            weight: Any = rounded.get_submodule(name).weight
            layer.weight.copy_(weight.dequantize())
    return model


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of a model but for its head, by name."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def _refuse_others(model: PreTrainedModel) -> None:
    """Raise ConfigError where weights lie in no linear layer, as experts do in transformers 5: they would not be rounded.

    Vectors, embeddings, the head, norms and convolutions stay as they are.
    """
    stay = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    others = {
        f"{name}.{own}".removeprefix("."): tuple(parameter.shape)
        for name, module in model.named_modules()
        if not isinstance(module, stay) and "norm" not in type(module).__name__.lower()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }
    if others:
        share = sum(map(math.prod, others.values())) / sum(p.numel() for p in model.parameters())
        name, shape = max(others.items(), key=lambda item: math.prod(item[1]))
        raise ConfigError(
            f"student.quantize: {name} {list(shape)} of {type(model).__name__} is in no linear layer, and is not rounded; "
            f"{len(others)} tensors are in none, {share:.0%} of all weights (experts often are); use quantize: null, or a "
            "model without experts"
        )


def _rounding(quantization: Any, config: QuantizeConfig) -> Any:
    """The settings of torchao: weights symmetric around 0, inputs with a scale and a zero of each token."""
    granularity = quantization.PerAxis(0) if config.group_size is None else quantization.PerGroup(config.group_size)
    dtype = getattr(torch, config.weights)
    if config.inputs is None:
        return quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    return quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)


def _plain(student: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of the student's class with ordinary layers, on the CPU."""
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
        model: PreTrainedModel = type(student)(copy.deepcopy(student.config))
    model.load_state_dict({name: weight.cpu() for name, weight in weights.items()})
    model.eval()
    return model

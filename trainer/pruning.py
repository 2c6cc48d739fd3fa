"""A smaller model cut out of another: whole layers, or the most important parts by their scores.

Every layer keeps equal numbers of feed-forward channels and heads, and all keep the same hidden dimensions, so the result is
an ordinary model of its class. The size of a head is never cut, so the pairs of dimensions that rotary positions turn stay
together, and norms inside of a head stay as they are. Vocabulary and tied embeddings stay too.

Dropping a hidden dimension that is always 0 changes nothing but the mean that a norm takes over the dimensions, so the norms'
weights are multiplied by sqrt(D before / D after). Gemma's embeddings are too, because the model multiplies them by sqrt(D).
That is our addition: the source slices.

Source: Minitron (arXiv 2407.14679), as NVIDIA's Model Optimizer computes it.

Shapes: N layers, D hidden, I feed-forward channels, H heads.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdata.errors import ConfigError
from kdata.trainer.config import PruneConfig, PrunedSizes

PRUNABLE = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")  # model types of transformers
# What a size is called in the config of such a model, in the order of `Sizes`.
CONFIG_NAMES = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}  # fmt: skip
# Lists of a config that may be as long as it has layers, and are not of layers.
NOT_OF_LAYERS = re.compile(r"(_token_ids?|_section|_factors?)$|^(architectures|keys_to_ignore_at_inference)$")
MOST_DIFFERENCE = 0.1  # of the parameters of two candidates, as a share of the larger; our default
# The dimensions of each weight by what they count. A bias has the first of its weight's.
OUTER = {"embed_tokens": ("id", "hidden"), "norm": ("hidden",), "lm_head": ("id", "hidden")}
OF_LAYER = {
    "self_attn.q_proj": ("query", "hidden"), "self_attn.k_proj": ("key", "hidden"), "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"), "self_attn.q_norm": ("head",), "self_attn.k_norm": ("head",),
    "mlp.gate_proj": ("channel", "hidden"), "mlp.up_proj": ("channel", "hidden"), "mlp.down_proj": ("hidden", "channel"),
    "input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",), "pre_feedforward_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """All sizes of a model that may be cut."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Those of a model, by its config."""
        return cls(**{name: int(getattr(config, own)) for name, own in CONFIG_NAMES.items()})


@dataclass(frozen=True)
class Scores:
    """How important the parts of a model are, float64: hidden_D, channels_NI, heads_NH, layers_N. More is more important."""

    hidden_D: np.ndarray
    channels_NI: np.ndarray
    heads_NH: np.ndarray
    layers_N: np.ndarray


@dataclass(frozen=True)
class Kept:
    """The parts that stay, int64, rising: hidden_D and layers_N; channels_NI and heads_NH of all layers of the model."""

    hidden_D: np.ndarray
    channels_NI: np.ndarray
    heads_NH: np.ndarray
    layers_N: np.ndarray


def refuse_unfit(name: str, config: Any, prune: PruneConfig) -> list[Sizes]:
    """Check a model's config against the sizes that are asked for, before its weights are read.

    Args:
        name: the model's, for messages. config: of transformers.
    Returns:
        The sizes of each candidate; without candidates those of the student, alone.
    Raises:
        ConfigError: the model is of another type or quantized, a size does not fit it, or candidates are not of equal size.
    """
    if config.model_type not in PRUNABLE:
        raise ConfigError(
            f"student.kind=pruned: {name} is of the type {config.model_type!r}, and the parts of {', '.join(PRUNABLE)} are "
            "known; name one of these, or keep some of its layers (kind checkpoint, keep_layers)"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"student.kind=pruned: the weights of {name} are quantized, and their parts cannot be cut out; name the model "
            "before it was quantized"
        )
    sizes = [_sizes(name, config, one) for one in prune.candidates or [prune]]
    counts = [num_weights(config, one) for one in sizes]
    if max(counts) - min(counts) > MOST_DIFFERENCE * max(counts):
        raise ConfigError(
            f"student.candidates have {min(counts):,} to {max(counts):,} parameters, and the largest would win for its size; "
            f"choose sizes with at most {MOST_DIFFERENCE:.0%} between the smallest and the largest"
        )
    return sizes


def _sizes(name: str, config: Any, wanted: PrunedSizes) -> Sizes:
    """The sizes that are asked for, and the model's own where none is. Raises ConfigError where one does not fit."""
    whole = Sizes.of(config)
    for size, value in wanted.sizes.items():
        if value > (most := getattr(whole, size)):
            raise ConfigError(f"student.{size}={value} is more than the {most} of {name}; give at most {most}")
    sizes = Sizes(**{**asdict(whole), **wanted.sizes})
    kv_heads = _kv_heads(config)
    if sizes.num_heads % kv_heads and kv_heads < whole.num_heads:
        raise ConfigError(
            f"student.num_heads={sizes.num_heads} is no multiple of the {kv_heads} key-value heads of {name}, which all stay "
            f"and keep as many heads each; give a multiple of {kv_heads}"
        )
    if sizes.hidden_size % sizes.num_heads and hasattr(config, "validate_architecture"):
        raise ConfigError(
            f"student.hidden_size={sizes.hidden_size} is no multiple of num_heads={sizes.num_heads}, and transformers opens "
            f"no model of the type {config.model_type!r} with such sizes; change one of both"
        )
    return sizes


def _kv_heads(config: Any) -> int:
    return int(config.num_key_value_heads or config.num_attention_heads)


def _head_size(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def num_weights(config: Any, sizes: Sizes) -> int:
    """Parameters of a model of these sizes, tied ones counted once."""
    kept = largest_parts(config, _equal_scores(config), sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pruned_config(config, kept), trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _equal_scores(config: Any) -> Scores:
    whole = Sizes.of(config)
    shapes = ((whole.num_layers, whole.intermediate_size), (whole.num_layers, whole.num_heads))
    return Scores(np.zeros(whole.hidden_size), np.zeros(shapes[0]), np.zeros(shapes[1]), np.zeros(whole.num_layers))


def largest_parts(config: Any, scores: Scores, sizes: Sizes) -> Kept:
    """The parts with the largest scores; of equal ones the first. Heads are ranked among those of one key-value head.

    Args:
        config: of the whole model.
    """
    num_layers, num_heads = scores.heads_NH.shape
    kv_heads = _kv_heads(config)
    groups = 1 if kv_heads == num_heads else kv_heads  # one key-value head for each head: they go together
    heads = _largest(scores.heads_NH.reshape(num_layers, groups, -1), sizes.num_heads // groups)
    heads += (np.arange(groups) * (num_heads // groups))[:, None]
    return Kept(
        _largest(scores.hidden_D, sizes.hidden_size),
        _largest(scores.channels_NI, sizes.intermediate_size),
        heads.reshape(num_layers, -1),
        _largest(scores.layers_N, sizes.num_layers),
    )


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest numbers along the last axis, int64, rising."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1).astype(np.int64)


def pruned_config(config: Any, kept: Kept) -> Any:
    """The config of the model that keeps these parts."""
    pruned = with_layers(config, kept.layers_N.tolist())
    kv_heads, num_heads = _kv_heads(config), kept.heads_NH.shape[1]
    pruned.head_dim = _head_size(config)
    pruned.num_key_value_heads = num_heads if kv_heads == config.num_attention_heads else kv_heads
    pruned.num_attention_heads = num_heads
    pruned.hidden_size, pruned.intermediate_size = len(kept.hidden_D), kept.channels_NI.shape[1]
    return pruned


def prune(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A model of the parts of another that are kept, with copies of their weights. The other stays as it is.

    Args:
        model: of a type in `PRUNABLE`.
    """
    config = model.config
    head, kv_heads = _head_size(config), _kv_heads(config)
    both = kv_heads == config.num_attention_heads
    hidden = torch.from_numpy(kept.hidden_D)
    place_of = {int(number): place for place, number in enumerate(kept.layers_N)}
    weights = {}
    for name, weight in model.state_dict().items():
        part, number, dimensions = _dimensions(name)
        if number is not None and number not in place_of:
            continue
        layer = number or 0
        queries = _of_heads(kept.heads_NH[layer], head)
        kept_parts = {
            "hidden": hidden,
            "channel": torch.from_numpy(kept.channels_NI[layer]),
            "query": queries,
            "key": queries if both else None,
        }
        for axis, dimension in enumerate(dimensions):
            if (index := kept_parts.get(dimension)) is not None:
                weight = weight.index_select(axis, index.to(weight.device))
        if number is not None:
            name = name.replace(f".layers.{number}.", f".layers.{place_of[number]}.", 1)
        weights[name] = _scaled(weight, part, dimensions, config, len(hidden))
    return _model_like(model, pruned_config(config, kept), weights)


def _dimensions(name: str) -> tuple[str, int | None, tuple[str, ...]]:
    """Name of the module, number of the layer (None outside of layers) and dimensions of a weight."""
    stem, _, kind = name.rpartition(".")
    _, in_layer, inner = stem.partition(".layers.")
    number, _, part = inner.partition(".") if in_layer else ("", "", stem.rpartition(".")[2])
    dimensions = (OF_LAYER if in_layer else OUTER)[part]
    return part, int(number) if in_layer else None, dimensions if kind == "weight" else dimensions[:1]


def _of_heads(heads_H: np.ndarray, size: int) -> Tensor:
    """Rows of the heads in a projection, int64."""
    return torch.from_numpy((heads_H[:, None] * size + np.arange(size)).reshape(-1))


def _scaled(weight: Tensor, part: str, dimensions: tuple[str, ...], config: Any, hidden_size: int) -> Tensor:
    """A weight such that hidden dimensions which were 0 can be missing; see the first lines of this file."""
    factor = math.sqrt(config.hidden_size / hidden_size)
    is_gemma = config.model_type == "gemma3_text"
    if is_gemma and config.tie_word_embeddings and part == "norm":
        return weight  # what it lacks, the head has
    if part.endswith("norm") and dimensions == ("hidden",):
        return (1 + weight) * factor - 1 if is_gemma else weight * factor
    scales = is_gemma and (part == "embed_tokens" or (part == "lm_head" and config.tie_word_embeddings))
    return weight * factor if scales else weight


def with_layers(config: Any, numbers: list[int]) -> Any:
    """A copy of a config for some of the layers; settings of each layer, such as its kind of attention, follow.

    Raises:
        ConfigError: a setting names layers by their numbers, which would be other layers now.
    """
    total = int(config.num_hidden_layers)
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if not isinstance(value, list) or not value or NOT_OF_LAYERS.search(key):
            continue
        if len(value) == total:
            setattr(config, key, [value[number] for number in numbers])
        elif "layer" in key and all(type(number) is int for number in value):
            raise ConfigError(
                f"layers cannot be left out: {key} of the model's config names layers by their numbers ({value[:8]}), which "
                "would be others then; name a model without it"
            )
    config.num_hidden_layers = len(numbers)
    return config


def _model_like(model: PreTrainedModel, config: Any, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model of the class of another."""
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and replaced
        pruned: PreTrainedModel = type(model)(config)
    pruned.to(model.dtype)  # type: ignore[arg-type]  # transformers wraps Module.to
    pruned.load_state_dict(weights)
    pruned.train(model.training)
    return pruned


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
    places = {f"{stacks[0]}.{number}.": f"{stacks[0]}.{place}." for place, number in enumerate(numbers)}
    weights = {}
    for name, weight in model.state_dict().items():
        stem = ".".join(name.split(".")[: stacks[0].count(".") + 2]) + "."
        if not name.startswith(f"{stacks[0]}."):
            weights[name] = weight
        elif stem in places:
            weights[places[stem] + name.removeprefix(stem)] = weight
    return _model_like(model, with_layers(model.config, numbers), weights)

"""What a model folder holds, by its small files: refused here is what is not a language model that can be loaded.

Each refusal says what the folder is and what to do. Weights in pickle files and code from a model's folder are never run.
`use_exact_attention` is for whoever loads one with transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, MissingError
from kdata.format.json_text import read_json
from kdata.format.plain import GET_FILES, is_pointer

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OWN_NAME = re.compile("[A-Za-z0-9_|]*")  # of an implementation that transformers has itself: sdpa, paged|sdpa
# Architectures without a next-token head.
OTHER_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def refuse_other_kind(folder: Path, *, needs_weights: bool = True, encoder_decoder: bool = False) -> None:
    """Raise ConfigError or MissingError where a folder holds something else than a language model with its weights.

    A folder that is none of the known kinds passes, and so does one without config.json: the caller says what it lacks.

    Args:
        needs_weights: false where only the tokenizer and config.json are read (a served model).
        encoder_decoder: whether a model with an encoder may pass, as a student may be.
    """
    try:
        _refuse_parts(folder)
        config = _read(folder / "config.json")
        if config:
            _refuse_config(folder, config, encoder_decoder)
        if needs_weights:
            _refuse_weights(folder, has_config=bool(config))
            _refuse_sizes(folder, config)
    except (TypeError, LookupError, AttributeError) as error:  # a value of another kind than the name says
        raise ConfigError(f"a JSON file of {folder} is damaged ({error!r}); copy the model's folder again") from error


def use_exact_attention(model: Any) -> None:
    """Have a model of transformers compute the soft-cap of its attention, as Gemma 2's.

    The default attention (sdpa, transformers 5.19) leaves `attn_logit_softcapping` out without a word: with a cap of 5,
    log-probabilities of a tiny model were off by one nat. vLLM computes it.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def _refuse_parts(folder: Path) -> None:
    """What stands beside a model, or is made of one."""
    weights = {path.name for path in folder.glob("*.safetensors")} - {"adapter_model.safetensors"}
    if (folder / "adapter_config.json").is_file() and not weights:
        base = _read(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise ConfigError(
            f"{folder} is a LoRA adapter of {base}, not a model: merge it into that model first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)), save the "
            "tokenizer beside it, and name that folder"
        )
    if (folder / "model_index.json").is_file():
        kind = _read(folder / "model_index.json").get("_class_name", "a pipeline")
        raise ConfigError(
            f"{folder} is a diffusers pipeline ({kind}), which makes images or sound and predicts no tokens; name the folder "
            "of a language model"
        )
    if (folder / "modules.json").is_file() and (folder / "config_sentence_transformers.json").is_file():
        raise ConfigError(
            f"{folder} is a model of sentence embeddings, which predicts no tokens; name a language model"
        )


def _refuse_config(folder: Path, config: dict[str, Any], encoder_decoder: bool) -> None:
    """Models that do not predict the next token from the ones before it, or that need code of their own."""
    architecture = str((config.get("architectures") or ["?"])[0])
    if config.get("is_encoder_decoder") and not encoder_decoder:
        raise ConfigError(
            f"{folder} holds {architecture}, an encoder-decoder: it predicts a second text, not the next token of a text; "
            "name a decoder-only language model"
        )
    if architecture.endswith(OTHER_TASKS):
        raise ConfigError(
            f"{folder} holds {architecture}, which does not predict the next token; name a language model"
        )
    refuse_kernels(folder, config)
    if config.get("auto_map") and not _is_native(str(config.get("model_type"))):
        raise ConfigError(
            f"{folder} holds {architecture}, which needs Python code of its own (auto_map in config.json); kdata never runs "
            "code from a model, on purpose. Name a model of an architecture that transformers has, or convert this one"
        )


def refuse_kernels_of(model: str | Path, revision: str | None = None) -> None:
    """`refuse_kernels` of a model that may be on the Hub. Raises OSError where there is none."""
    from transformers import PreTrainedConfig

    refuse_kernels(model, PreTrainedConfig.get_config_dict(str(model), revision=revision)[0])


def refuse_kernels(place: str | Path, config: dict[str, Any]) -> None:
    """Raise ConfigError where config.json names an attention, or experts, of the Hub.

    transformers takes `"_attn_implementation": "OWNER/NAME"` for a kernel, which it downloads and runs where the package
    `kernels` is installed; `trust_remote_code=False` does not prevent it.
    """
    for key, value in config.items():
        if "implementation" in key:
            names = [*value.values()] if isinstance(value, dict) else [value]
            if other := next((name for name in names if isinstance(name, str) and not OWN_NAME.fullmatch(name)), None):
                raise ConfigError(
                    f"{place}: config.json has {key} {other[:80]!r}, code that transformers would download and run; kdata "
                    "never runs code from a model, on purpose. Remove that line from config.json"
                )
        elif isinstance(value, dict):
            refuse_kernels(place, value)


def _is_native(model_type: str) -> bool:
    """Whether the installed transformers has a model type without code from elsewhere."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ModuleNotFoundError:
        return True  # whoever loads it says what is missing
    return model_type in CONFIG_MAPPING


def _refuse_weights(folder: Path, *, has_config: bool) -> None:
    """Weights in other formats, or not all here."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if is_pointer(file):
            raise MissingError(f"{file} {GET_FILES}")
    index = _read(folder / "model.safetensors.index.json").get("weight_map")
    needed = set(index.values()) if isinstance(index, dict) else set()
    if absent := sorted(str(name) for name in needed - {file.name for file in files}):
        raise MissingError(
            f"{folder} lacks {len(absent)} of the {len(needed)} weight files that model.safetensors.index.json names, for "
            f"instance {absent[0]}; download the model again"
        )
    if files:
        return
    if gguf := sorted(folder.glob("*.gguf")):
        raise MissingError(f"{folder} holds GGUF files; name the file itself, for instance {gguf[0]}")
    pickles = sorted(file for pattern in PICKLES for file in folder.glob(pattern))
    if pickles and has_config:
        raise ConfigError(
            f"{folder} has its weights in {pickles[0].name}, a pickle file: reading it can run code, so kdata does not. "
            "Convert it once, if you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) and "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW) of transformers write *.safetensors; name NEW"
        )
    others = [name for name in ("tf_model.h5", "flax_model.msgpack") if (folder / name).is_file()]
    if others:
        raise ConfigError(
            f"{folder} has its weights in {others[0]}, which only TensorFlow or Flax read; take a version of the model with "
            "*.safetensors"
        )


def _refuse_sizes(folder: Path, config: dict[str, Any]) -> None:
    """A model that would be far larger than its weights: config.json alone decides how much memory is taken."""
    stored = 8 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # elements, of one bit at least
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        sizes = {
            name: value
            for name, value in values.items()
            if type(value) is int and name.endswith(("_size", "_layers", "_layer", "_heads", "_head", "_dim", "_embd"))
        }
        width = max(sizes.get("hidden_size", 1), sizes.get("n_embd", 1))
        largest = max(sizes.items(), key=lambda item: item[1], default=("", 0))
        product = max(width * sizes.get(name, 0) for name in ("vocab_size", "intermediate_size", "num_hidden_layers"))
        if stored and max(largest[1], product) > stored:
            raise ConfigError(
                f"{folder / 'config.json'} describes a model that is larger than its weights ({largest[0]}={largest[1]:,}); "
                "copy the model's folder again"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ConfigError where it cannot be read."""
    path = folder / "config.json"
    try:
        return read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); copy the model's folder again, or name another one") from error


def _read(path: Path) -> dict[str, Any]:
    """A small JSON file; empty where it is absent or not an object (the caller reports a damaged config.json)."""
    try:
        return read_json(path, finite=False)
    except (OSError, ValueError):
        return {}

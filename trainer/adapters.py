"""Low-rank adapters: put into a student, written as PEFT writes them, and opened again as a whole model.

A student with adapters stays the class that it was: PEFT replaces linear layers inside of it, the weights of the base are
frozen, and only the factors of the adapters are trained. The sparse loss reads the head as a matrix, so the head and the
embeddings that may be tied to it have no adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdata.errors import ConfigError, CorruptError, DependencyError, MissingError, first_line
from kdata.format.json_text import read_json
from kdata.store.checkpoint_kind import refuse_kernels_of, refuse_other_kind
from kdata.store.gguf import model_folder
from kdata.store.pretrained import model_files, without_bars
from kdata.trainer.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_peft() -> Any:
    """The package peft. Raises DependencyError, which names the extra, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise DependencyError("LoRA adapters (student.lora) need peft: pip install 'kdata[peft]'") from error
    return peft


def add_adapters(student: PreTrainedModel, config: LoraConfig, base: str, revision: str | None, seed: int) -> None:
    """Put adapters into a student, which then computes what it computed before, and freeze everything else.

    Args:
        base, revision: the student's name and its commit, tag or branch on the Hub, for adapter_config.json.
        seed: of the first factors; the second ones are 0.
    Raises:
        ConfigError: no layer has such a name, or a target is no layer that can have an adapter, or is the head.
        DependencyError: peft is not installed.
    """
    peft = check_peft()
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=config.dropout, bias="none",
        task_type="CAUSAL_LM", revision=revision,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            student.add_adapter(settings)
        except ValueError as error:
            raise ConfigError(
                f"student.lora.targets={config.targets} cannot have adapters: {first_line(error)}; name linear layers of "
                f"{type(student).__name__} by the last parts of their names, or use all-linear"
            ) from error
    settings.base_model_name_or_path = base
    outer = {"embeddings": student.get_input_embeddings(), "head": student.get_output_embeddings()}
    for name, module in outer.items():
        if any(p.requires_grad for p in module.parameters()):
            raise ConfigError(
                f"student.lora.targets={config.targets} puts an adapter on the {name} of {type(student).__name__}, which the "
                "sparse loss reads as a matrix; leave it out"
            )


def has_adapters(student: PreTrainedModel) -> bool:
    """Whether `add_adapters` was called for a student."""
    return bool(getattr(student, "peft_config", None))


def frozen_digest(student: PreTrainedModel) -> str:
    """SHA-256 (hex) of the names and values of the parameters that are not trained."""
    return parameters_digest((name, p) for name, p in student.named_parameters() if not p.requires_grad)


def parameters_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of names and values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=itemgetter(0)):
        digest.update(name.encode() + b"\0")
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(student: PreTrainedModel, trained: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT reads, into a folder that exists.

    Args:
        trained: the parameters that are trained, whole, by their names in the student.
    """
    peft = check_peft()
    settings: Any = student.peft_config["default"]
    tensors = peft.get_peft_model_state_dict(student, state_dict=trained, save_embedding_layers=False)
    assert len(tensors) == len(trained), "only adapters are trained"
    named = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    written: Any = replace(settings, inference_mode=True)
    if not isinstance(written.target_modules, str):
        written.target_modules = sorted(written.target_modules)  # a set has another order in each process
    written.save_pretrained(str(folder))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no whole model."""
    weights = {path.name for path in folder.glob("*.safetensors")} - {WEIGHTS}
    return (folder / CONFIG).is_file() and not weights


def open_adapter(folder: Path) -> PreTrainedModel:
    """The base model of an adapter in float32, with the adapter merged into its weights.

    Raises:
        DependencyError: peft is not installed.
        MissingError: the weights of the adapter or the base model are not there.
        ConfigError: it is another kind of adapter than LoRA, or adapter_config.json names no base model.
        CorruptError: the files are damaged, or do not belong to this base model.
    """
    peft = check_peft()
    if not (folder / WEIGHTS).is_file():
        raise MissingError(
            f"{folder} has {CONFIG} and no {WEIGHTS}; copy the adapter again (weights in a pickle are not read)"
        )
    base, revision = _base_of(folder)
    if Path(base).is_dir():
        refuse_other_kind(Path(base))
    try:
        with model_files(base, "a file"), without_bars():
            refuse_kernels_of(model_folder(base), revision)
            load: Any = AutoModelForCausalLM
            model = load.from_pretrained(
                model_folder(base), revision=revision, dtype=torch.float32, trust_remote_code=False
            )
    except MissingError as error:
        raise MissingError(_no_base(folder, base, error)) from error
    except CorruptError as error:
        if isinstance(error.__cause__, OSError | ValueError):
            raise MissingError(_no_base(folder, base, error.__cause__)) from error
        raise
    with model_files(folder, "an adapter file"):
        merged = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        asked = {f"base_model.model.{n}" for n in _adapter_names(peft, merged)}
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
    if asked != stored:
        odd = sorted(asked ^ stored)[0]
        raise CorruptError(
            f"{folder} does not fit its base model {base!r}: {odd} is only in {'the model' if odd in asked else 'the file'}; "
            f"copy the adapter again, or name its own base model in {CONFIG}"
        )
    whole: PreTrainedModel = merged.merge_and_unload(safe_merge=True)
    return whole.requires_grad_(True)


def _adapter_names(peft: Any, model: Any) -> set[str]:
    """Names of the adapter's tensors as a file has them, without the prefix of all."""
    return {
        n.removeprefix("base_model.model.") for n in peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    }


def _base_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the base model in adapter_config.json."""
    path = folder / CONFIG
    try:
        settings = read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read ({first_line(error)}); copy the adapter again") from error
    kind, base, revision = (settings.get(key) for key in ("peft_type", "base_model_name_or_path", "revision"))
    if kind != "LORA":
        raise ConfigError(
            f"{folder} is an adapter of the kind {kind!r}; kdata opens LoRA adapters, so merge it with PEFT first"
        )
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{path} does not name the model that the adapter belongs to; set base_model_name_or_path in it"
        )
    return base, revision if isinstance(revision, str) else None


def _no_base(folder: Path, base: str, error: BaseException) -> str:
    return (
        f"{folder} is a LoRA adapter of {base!r}, which cannot be loaded: {first_line(error)}; put that model there, or set "
        f"base_model_name_or_path in {CONFIG} to where it is"
    )

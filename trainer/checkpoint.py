"""Checkpoints that survive a kill at any moment: safetensors and JSON, no pickle; written aside, then renamed.

    OUT/checkpoints/step-00000100/tensors.safetensors   parameters, AdamW moments and counts, random state of each rank
                                  state.json            step, counts, state of loader and domain weights, settings

Tensors are stored whole, however ranks divide them during training, so a run can resume on another number of ranks, or with
fsdp instead of ddp. Only the newest checkpoint is kept: it is complete on disk before the older one is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdata.errors import CorruptError, MismatchError, settings_difference
from kdata.format.files import storage_errors, sync_directory
from kdata.format.json_text import read_json
from kdata.trainer.distributed import Ranks, cut_like, whole

MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# Why not torch.distributed.checkpoint (torch 2.13): its default writer pickles the metadata, and its safetensors writer
# (HuggingFaceStorageWriter) leaves one file per rank, which only torch.distributed reads back. Whole tensors are one file
# that any number of ranks and any tool can read. The price: rank 0 holds 12 bytes per parameter in CPU memory while it
# writes (12 GB for 1B parameters). For larger students, use that writer with save_distributed=True.


@contextmanager
def writing(out_dir: Path) -> Iterator[None]:
    """Turn what the disk refuses into a StorageError that names cause and remedy; safetensors has an error of its own."""
    with storage_errors(out_dir):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_checkpoint(
    root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], ranks: Ranks
) -> Path:
    """Write everything that the next step depends on; return the checkpoint's folder. Every rank must call it.

    Args:
        root: OUT/checkpoints, on a file system that all ranks see.
        state: JSON values, with at least `step`; a checkpoint of this step must not exist yet.
    """
    final = root / f"step-{state['step']:08d}"
    tensors = _gathered(model, optimizer, ranks)
    if ranks.is_main:
        aside = root / f".{final.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(tensors, aside / "tensors.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
        for path in (*aside.iterdir(), aside):  # files too: it syncs whatever a path names
            sync_directory(path)
        os.rename(aside, final)
        sync_directory(root)
        for old in root.glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    ranks.wait()
    return final


def load_checkpoint(
    root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], ranks: Ranks
) -> dict[str, Any] | None:
    """Restore the newest checkpoint into model, optimizer and random state. Every rank must call it.

    A rank without a random state in the checkpoint (there were fewer ranks) keeps its own.

    Returns:
        The checkpoint's `state`; None if there is no checkpoint.
    Raises:
        MismatchError: it was written with other settings; the message lists them.
        CorruptError: its files cannot be read.
    """
    paths = sorted(root.glob("step-*"))
    if not paths:
        return None
    path = paths[-1]
    try:
        state = read_json(path / "state.json", finite=False)
        difference = settings_difference(state["settings"], settings)
        if difference:
            raise MismatchError(
                f"{root.parent} was begun with other settings (before -> now):\n{difference}\n"
                "Use the earlier settings to resume, or another output folder for the new ones."
            )
        with safe_open(path / "tensors.safetensors", framework="pt") as tensors:
            _restore(model, optimizer, tensors, ranks)
    except MismatchError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CorruptError(f"checkpoint {path} cannot be read: {error}; remove it to train from the start") from error
    return state


def _gathered(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole and on the CPU of the main rank; empty on other ranks."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        complete = whole(tensor)  # all ranks take part
        if ranks.is_main:
            tensors[name] = complete.cpu().contiguous()

    for name, parameter in model.named_parameters():  # tied parameters appear once
        keep(f"model.{name}", parameter)
        for moment in MOMENTS:
            if parameter in optimizer.state:
                keep(f"{moment}.{name}", optimizer.state[parameter][moment])
    for kind, own in _random_state(ranks).items():
        for rank, values in enumerate(ranks.gather(own.numpy())):
            keep(f"rng.{kind}.{rank}", torch.from_numpy(values))
    return tensors


@torch.no_grad()
def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Any, ranks: Ranks) -> None:
    names = set(tensors.keys())
    for name, parameter in model.named_parameters():
        parameter.copy_(cut_like(tensors.get_tensor(f"model.{name}"), parameter))
        if f"step.{name}" in names:
            own = {moment: tensors.get_tensor(f"{moment}.{name}").clone() for moment in MOMENTS}
            own = {moment: cut_like(t, parameter) if t.ndim else t.to(parameter.device) for moment, t in own.items()}
            optimizer.state[parameter] = own
    for kind in _random_state(ranks):
        if f"rng.{kind}.{ranks.rank}" in names:
            own = tensors.get_tensor(f"rng.{kind}.{ranks.rank}")
            torch.cuda.set_rng_state(own, ranks.device) if kind == "cuda" else torch.set_rng_state(own)


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state

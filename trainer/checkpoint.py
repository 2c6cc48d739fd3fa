"""Checkpoints that survive a kill at any moment: safetensors and JSON, no pickle; written aside and renamed.

    OUT/checkpoints/step-00000100/tensors.safetensors   parameters, AdamW moments and counts, random state
                                  state.json            step, counts, loader state, settings

Only the newest is kept: a new one is complete on disk before the old one goes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdata.errors import CorruptError, MismatchError, settings_difference

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write everything that the next step depends on; return the checkpoint's directory.

    Args:
        root: OUT/checkpoints.
        state: JSON values; holds at least `step`.
    """
    final = root / f"step-{state['step']:08d}"
    aside = root / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {f"rng.{name}": t for name, t in _random_state().items()}
    for name, parameter in model.named_parameters():  # tied parameters come once
        tensors[f"model.{name}"] = parameter.detach()
        for moment in MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    save_file({k: t.contiguous() for k, t in tensors.items()}, aside / "tensors.safetensors")
    (aside / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
    for path in (*aside.iterdir(), aside):
        _flush(path)
    if final.exists():  # the run was resumed at its last step
        shutil.rmtree(final)
    os.rename(aside, final)
    _flush(root)
    for old in root.glob("step-*"):
        if old != final:
            shutil.rmtree(old)
    return final


def load_checkpoint(
    root: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Restore the newest checkpoint into model, optimizer and random state.

    Returns:
        Its `state`; None without a checkpoint.

    Raises:
        MismatchError: it was written under other settings; the message lists them.
        CorruptError: its files cannot be read.
    """
    found = sorted(root.glob("step-*"))
    if not found:
        return None
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        tensors = load_file(path / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptError(f"checkpoint {path} cannot be read: {error}; remove it to train from the start") from error
    difference = settings_difference(state["settings"], settings)
    if difference:
        raise MismatchError(
            f"{root.parent} was begun with other settings (before -> now):\n{difference}\n"
            "Use the former settings to go on, or another output folder for the new ones."
        )
    _restore(model, optimizer, tensors)
    return state


@torch.no_grad()
def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
        if f"step.{name}" in tensors:
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}.{name}"].to("cpu" if moment == "step" else parameter.device)
                for moment in MOMENTS
            }
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _flush(path: Path) -> None:
    """Force a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

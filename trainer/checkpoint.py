"""Checkpoints that survive a kill at any moment: safetensors and JSON, no pickle; written aside, then renamed.

    OUT/checkpoints/step-00000100/tensors.safetensors   trained parameters, the optimizer's state, random state of each rank
                                  state.json            step, counts, state of loader and domain weights, settings, digests

Tensors are stored whole, however ranks divide them during training, so a run can resume on another number of ranks, or with
fsdp instead of ddp. Only the newest checkpoint is kept: it is complete on disk before the older one is removed.

Nothing of a checkpoint is used before all of it is checked: the digests of both files, and that each tensor has the name,
shape and type that the student asks for. A damaged one is refused. Where a kill left the checkpoint before it, that one is
used, and a line on the terminal says so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdata.config import first_problem
from kdata.errors import CorruptError, MismatchError, settings_difference
from kdata.format.files import file_info, matches, new_file, rust_errors, storage_errors, sync_directory, sync_tree
from kdata.format.json_text import MAX_DOCUMENT_BYTES, parse_object
from kdata.format.manifest import digest_of, json_bytes
from kdata.format.plain import open_plain, refuse_special
from kdata.format.schema import FileInfo
from kdata.observe.progress import console
from kdata.trainer.distributed import Ranks, cut_like, whole
from kdata.trainer.optimizers import Optimizer

# Why not torch.distributed.checkpoint (torch 2.13): its default writer pickles the metadata, and its safetensors writer
# (HuggingFaceStorageWriter) leaves one file per rank, which only torch.distributed reads back. Whole tensors are one file
# that any number of ranks and any tool can read. The price: rank 0 holds 12 bytes per parameter in CPU memory while it
# writes (12 GB for 1B parameters). For larger students, use that writer with save_distributed=True.


TENSORS, STATE = "tensors.safetensors", "state.json"


class Progress(BaseModel):
    """What a run has done so far, over all ranks. waited: seconds of waiting for data."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    target_tokens: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    waited: float = Field(0.0, ge=0, allow_inf_nan=False)
    losses: dict[str, float] = {}


class CheckpointState(BaseModel):
    """state.json. data: see `kdata.trainer.phases.OpenPhase.state_dict`. digest: of everything else in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int = Field(ge=1)
    progress: Progress
    data: dict[str, Any]
    settings: dict[str, Any]
    tensors: FileInfo | None = None  # None and "": written before checkpoints had digests
    digest: str = ""


@contextmanager
def writing(out_dir: Path) -> Iterator[None]:
    """Turn what the disk refuses into a StorageError that names cause and remedy."""
    with storage_errors(out_dir), rust_errors():
        yield


def save_checkpoint(root: Path, model: nn.Module, optimizer: Optimizer, state: CheckpointState, ranks: Ranks) -> Path:
    """Write everything that the next step depends on; return the checkpoint's folder. Every rank must call it.

    Args:
        root: OUT/checkpoints, on a file system that all ranks see.
        state: a checkpoint of its step must not exist yet.
    """
    final = root / f"step-{state.step:08d}"
    tensors = _gathered(model, optimizer, ranks)
    if ranks.is_main:
        root.mkdir(parents=True, exist_ok=True)
        remove_others(root, keep=step_folders(root))  # what a killed run left of another
        aside = root / f".{final.name}.tmp"
        aside.mkdir()
        save_file(tensors, aside / TENSORS)
        content = state.model_copy(update={"tensors": file_info(aside / TENSORS)}).model_dump(exclude={"digest"})
        with new_file(aside / STATE) as file:
            file.write(json_bytes({**content, "digest": digest_of(content)}))
        sync_tree(aside)
        if final.exists():  # it is damaged: the run came from the one before it
            remove_others(root, keep=[p for p in step_folders(root) if p != final], keep_aside=aside)
        os.rename(aside, final)
        sync_directory(root)
        remove_others(root, keep=[final])
    ranks.wait()
    return final


def remove_others(root: Path, *, keep: list[Path], keep_aside: Path | None = None) -> None:
    """Remove all checkpoints but some, and what killed runs left of any. One that is half removed does not look whole."""
    for path in root.glob("step-*"):
        if path not in keep:
            aside = path.with_name(f".{path.name}.old.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
    for path in [path for path in root.glob(".step-*.tmp") if path != keep_aside]:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


def load_checkpoint(
    root: Path,
    model: nn.Module,
    optimizer: Optimizer,
    settings: dict[str, Any],
    ranks: Ranks,
    *,
    last_step: int | None = None,
) -> CheckpointState | None:
    """Restore the newest whole checkpoint into model, optimizer and random state. Every rank must call it.

    A rank without a random state in the checkpoint (there were fewer ranks) keeps its own.

    Args:
        last_step: of the run; None: any.
    Returns:
        The checkpoint's state; None if there is no checkpoint.
    Raises:
        MismatchError: it was written with other settings; the message lists them.
        CorruptError: no checkpoint is whole. The model is as it was.
    """
    damage: CorruptError | None = None
    for path in step_folders(root):
        try:
            state = _read_state(path, last_step)
            difference = settings_difference(state.settings, settings)
            if difference:
                raise MismatchError(
                    f"{root.parent} was begun with other settings (before -> now):\n{difference}\n"
                    "Use the earlier settings to resume, or another output folder for the new ones."
                )
            _load_tensors(path, state, model, optimizer, ranks)
        except CorruptError as error:
            damage = damage or error
            continue
        if damage is not None:
            line = f"warning: {damage}. Training goes on from the checkpoint before it, {path.name}."
            console.print(line, markup=False, soft_wrap=True)
        elif ranks.is_main:
            with writing(root):
                remove_others(root, keep=[path])  # a kill may have left them
        return state
    if damage is not None:
        raise CorruptError(f"{damage}. Restore it from a copy, or remove {root} to train from the start.") from damage
    if ranks.is_main:
        with writing(root):
            remove_others(root, keep=[])
    return None


def step_folders(root: Path) -> list[Path]:
    """Folders of checkpoints, or of kept models, the last step first."""
    paths = [path for path in root.glob("step-*") if re.fullmatch(r"step-[0-9]{8,18}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _read_state(path: Path, last_step: int | None) -> CheckpointState:
    """state.json, compared with its own digest, form and folder. Raises CorruptError."""
    where = path / STATE
    try:
        with open_plain(where) as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
        raw = parse_object(content, finite=False)
        state = CheckpointState.model_validate(raw)
    except ValidationError as error:
        raise CorruptError(f"{where} is damaged: {first_problem(error)}") from error
    except (OSError, ValueError) as error:
        raise CorruptError(f"{where} cannot be read: {error}") from error
    if (state.tensors is None) != (not state.digest) or (state.digest and raw["digest"] != digest_of(raw)):
        raise CorruptError(f"{where} is damaged: it does not match its own digest")
    if state.digest and content != json_bytes(raw):
        raise CorruptError(f"{where} is damaged: it is not as kdata writes it")
    if path.name != f"step-{state.step:08d}" or state.progress.step != state.step:
        raise CorruptError(f"{where} is of step {state.step}, which is not that of its folder or of its own counts")
    if last_step is not None and state.step > last_step:
        raise CorruptError(f"{where} is of step {state.step}, and the run has {last_step} steps")
    return state


def _load_tensors(path: Path, state: CheckpointState, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
    """Check the file of tensors whole, then copy it into model and optimizer. Raises CorruptError."""
    where = path / TENSORS
    try:
        refuse_special(where)
        if state.tensors is not None and not matches(where, state.tensors):
            raise CorruptError(f"{where} is damaged: its SHA-256 or its size is not that in {STATE}")
        with safe_open(where, framework="pt") as tensors:
            _check_tensors(where, tensors, model, optimizer, state.step, ranks)
            _restore(model, optimizer, tensors, ranks)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{where} cannot be read: {error}") from error


def _check_tensors(where: Path, tensors: Any, model: nn.Module, optimizer: Optimizer, step: int, ranks: Ranks) -> None:
    """Raise CorruptError unless each tensor has the name, shape and type that this model asks for, or is a random state."""
    names = set(tensors.keys())
    expected: dict[str, tuple[list[int], str]] = {}
    for name, parameter in _trained(model):
        expected[f"model.{name}"] = list(parameter.shape), _DTYPES[parameter.dtype]
        parts = optimizer.expected(parameter)
        own = [part for part in parts if f"{part}.{name}" in names]
        if own and len(own) < len(parts):
            raise CorruptError(f"{where} has {', '.join(own)} of {name}, and not what goes with it")
        expected |= {f"{part}.{name}": (parts[part][0], _DTYPES[parts[part][1]]) for part in own}
    states = {name for name in names if re.fullmatch(r"rng\.(cpu|cuda)\.[0-9]{1,6}", name)}
    for kind, own_state in _random_state(ranks).items():
        expected |= {name: (list(own_state.shape), "U8") for name in states if name.split(".")[1] == kind}
    if missing := sorted(expected.keys() - names):
        raise CorruptError(f"{where} has no tensor {missing[0]}, which the student asks for")
    if unknown := sorted(names - expected.keys() - states):
        raise CorruptError(f"{where} has a tensor {unknown[0]!r}, which the student does not have")
    for name, (shape, dtype) in expected.items():
        about = tensors.get_slice(name)
        if list(about.get_shape()) != shape or about.get_dtype() != dtype:
            raise CorruptError(
                f"{where}: tensor {name} is {about.get_dtype()} {about.get_shape()}, the student asks for {dtype} {shape}"
            )
        if name.startswith("step.") and not 1 <= float(tensors.get_tensor(name)) <= step:
            raise CorruptError(f"{where}: {name} is {float(tensors.get_tensor(name))}, in a checkpoint of step {step}")


_DTYPES = {  # of safetensors
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
}  # fmt: skip


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name; tied ones appear once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _gathered(model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole and on the CPU of the main rank; empty on other ranks."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        complete = whole(tensor)  # all ranks take part
        if ranks.is_main:
            tensors[name] = complete.cpu().contiguous()

    for name, parameter in _trained(model):
        keep(f"model.{name}", parameter)
        for part, tensor in optimizer.state_of(parameter).items():
            keep(f"{part}.{name}", tensor)
    for kind, own in _random_state(ranks).items():
        for rank, values in enumerate(ranks.gather(own.numpy())):
            keep(f"rng.{kind}.{rank}", torch.from_numpy(values))
    return tensors


@torch.no_grad()
def _restore(model: nn.Module, optimizer: Optimizer, tensors: Any, ranks: Ranks) -> None:
    names = set(tensors.keys())
    for kind in _random_state(ranks):  # first: torch may refuse it, and then the model is as it was
        if f"rng.{kind}.{ranks.rank}" in names:
            own_state = tensors.get_tensor(f"rng.{kind}.{ranks.rank}")
            try:
                torch.cuda.set_rng_state(own_state, ranks.device) if kind == "cuda" else torch.set_rng_state(own_state)
            except RuntimeError as error:
                raise CorruptError(f"torch refuses the random state rng.{kind}.{ranks.rank}: {error}") from error
    for name, parameter in _trained(model):
        parameter.copy_(cut_like(tensors.get_tensor(f"model.{name}"), parameter))
        own = [part for part in optimizer.expected(parameter) if f"{part}.{name}" in names]
        if own:
            optimizer.restore(parameter, {part: tensors.get_tensor(f"{part}.{name}").clone() for part in own})


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state

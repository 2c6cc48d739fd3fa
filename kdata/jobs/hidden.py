"""Read a dataset's tokens with a model and store its hidden states beside them: a sidecar for who trains draft models."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from pydantic import Field

from kdata.config import Strict
from kdata.errors import ConfigError, MismatchError, StorageError, settings_difference
from kdata.format.files import (
    file_info,
    lock_of,
    matches,
    new_file,
    removed_on_failure,
    require_writable,
    settle,
    storage_errors,
)
from kdata.format.schema import ManifestEntry
from kdata.jobs.scoring import open_with
from kdata.observe.progress import Task
from kdata.observe.text import human_bytes
from kdata.store.dataset import Dataset
from kdata.store.hidden import (
    SAFETENSORS,
    HiddenInfo,
    Slot,
    Width,
    bytes_per_token,
    check_part,
    load_hidden_info,
    shard_digest,
    write_hidden_info,
)
from kdata.store.listed import HIDDEN, listed
from kdata.store.queryable import check_new_name
from kdata.teachers.base import StateReading
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_state_reader
from kdata.teachers.model import model_shape

WIDTHS: dict[str, Width] = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "I32": 4, "I64": 8}


class HiddenConfig(Strict):
    """Which model reads, and what of it is stored."""

    model: TeacherConfig
    name: str = Field("states", pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="Name of the hidden states.")
    layers: list[Slot] | None = Field(
        None,
        description="Layers to store: i, the residual stream after i layers, and head, what the head multiplies. Null takes "
        "2, n/2, n-3 and n of n layers, as the speculators project does, and head.",
    )
    dtype: Literal["bf16", "fp8"] = Field("bf16", description="Type of the stored numbers.")


@dataclass(frozen=True)
class HiddenPlan:
    """What storing will take, in bytes. missing: of the parts that are not there yet. free: on the dataset's disk.

    maybe_missing: the same if parts that were written under another name of the model are of another model, too.
    """

    layers: list[Slot]
    num_layers: int
    width: int
    per_token: int
    total: int
    missing: int
    maybe_missing: int
    free: int

    def lines(self) -> list[str]:
        """The plan as text."""
        missing = dict.fromkeys(map(human_bytes, (self.missing, self.maybe_missing)))
        return [
            f"layers {', '.join(map(str, self.layers))} of {self.num_layers}, {self.width:,} numbers each: "
            f"{self.per_token:,} bytes a token",
            f"{human_bytes(self.total)} in all, {' or '.join(missing)} still to write, {human_bytes(self.free)} free",
        ]


def default_layers(num_layers: int) -> list[Slot]:
    """What `speculators` takes of a model with so many layers (resolve_target_layer_ids), its last layer, and head."""
    chosen = {2, num_layers // 2, num_layers - 3, num_layers}
    return [*sorted(layer for layer in chosen if 0 <= layer <= num_layers), "head"]


def plan_hidden(dataset: Dataset, config: HiddenConfig) -> HiddenPlan:
    """What `store_hidden` would write, computed from config.json: nothing is loaded or written.

    Raises:
        ConfigError: the model has no such layer, or a layer is named twice. CorruptError: its config.json is damaged.
        MismatchError: there are hidden states of that name with other settings.
    """
    num_layers, width = model_shape(config.model)
    layers = default_layers(num_layers) if config.layers is None else config.layers
    for layer in layers:
        if layers.count(layer) > 1 or (layer != "head" and not 0 <= layer <= num_layers):
            raise ConfigError(
                f"layer {layer}: name 0 to {num_layers} or head, each once; {config.model.model} has no other"
            )
    per_token = bytes_per_token(len(layers), width, WIDTHS[config.dtype])
    own = {"layers": layers, "num_layers": num_layers, "width": width, "dtype": WIDTHS[config.dtype]}
    before = load_hidden_info(dataset, config.name) if config.name in listed(dataset.path, HIDDEN) else None
    if before is not None:
        _refuse_others(dataset, before, own)
    written = {relative for relative in (before.files if before else ()) if (dataset.path / relative).is_file()}
    missing = sum(entry.tokens for entry in dataset.manifest if HIDDEN.part(config.name, entry.name) not in written)
    free = shutil.disk_usage(dataset.path).free
    named = Path(config.model.model).resolve().name if Path(config.model.model).is_dir() else config.model.model
    maybe = missing if before is None or before.model.model == named else dataset.num_tokens
    total, missing, maybe = (per_token * tokens for tokens in (dataset.num_tokens, missing, maybe))
    return HiddenPlan(layers, num_layers, width, per_token, total, missing, maybe, free)


def _refuse_others(dataset: Dataset, before: HiddenInfo, own: dict[str, object]) -> None:
    """Raise MismatchError where there are hidden states of the name with other settings than these."""
    stored = before.model_dump(include=set(own))
    if difference := settings_difference(stored, own):
        raise MismatchError(
            f"hidden states {before.name!r} exist with other settings (before -> now):\n{difference}\n"
            f"Choose another name, or remove {dataset.path}/hidden/{before.name} and {before.name}.json."
        )


def store_hidden(dataset: Dataset, config: HiddenConfig, *, log: Path | None = None) -> HiddenInfo:
    """Store a model's hidden states of every token as `hidden/NAME/` of a dataset.

    A part that the same call has already written for the same shard, and that is undamaged, is kept.

    Raises:
        MismatchError: the model has another tokenizer, or there are hidden states of that name with other settings.
        ConfigError: there is no such layer, the backend is another than transformers, or a sequence is longer than the
            model's context.
        StorageError: the disk is too small, another process is writing, or the disk refused.
        TeacherError: a state is not finite.
        DependencyError: torch or transformers is not installed.
    """
    with lock_of(dataset.path):
        require_writable(dataset.path / HIDDEN.folder / config.name)
        plan = plan_hidden(dataset, config)
        if plan.missing > plan.free:
            raise StorageError(
                f"the hidden states need {human_bytes(plan.missing)} more ({plan.per_token:,} bytes a token), and "
                f"{dataset.path} has {human_bytes(plan.free)} free; store fewer layers, store fp8, or fewer rows "
                "(kdata split --by plan)"
            )
        return _store(dataset, config, plan, log)


def _store(dataset: Dataset, config: HiddenConfig, plan: HiddenPlan, log: Path | None) -> HiddenInfo:
    with open_with(dataset, config.model, load_state_reader) as (model, own):
        info = _begin(
            dataset,
            HiddenInfo(
                name=config.name,
                model=model.info,
                tokenizer_hash=own.hash,
                dataset_digest=dataset.content_digest,
                dataset_identity=dataset.info.identity_digest,
                layers=plan.layers,
                num_layers=plan.num_layers,
                width=plan.width,
                dtype=WIDTHS[config.dtype],
                head_digest=model.head_digest,
            ),
        )
        title = f"hidden {config.name}: reading"
        with storage_errors(dataset.path), Task(title, dataset.num_tokens, "tokens", log) as task:
            (dataset.path / HIDDEN.folder / config.name).mkdir(parents=True, exist_ok=True)
            for number, entry in enumerate(dataset.manifest):
                relative = HIDDEN.part(config.name, entry.name)
                if relative in info.files:
                    task.skip(entry.tokens)
                    continue
                path = dataset.path / relative
                _write_part(dataset, number, entry, info, model, path)
                info = info.model_copy(update={"files": {**info.files, relative: file_info(path)}})
                write_hidden_info(dataset.path, info)
                task.advance(entry.tokens)
        return info


def _begin(dataset: Dataset, info: HiddenInfo) -> HiddenInfo:
    """Start or continue: with the parts that an earlier call wrote for shards as they are now, undamaged."""
    check_new_name(HIDDEN.noun, info.name, listed(dataset.path, HIDDEN))
    if info.name in listed(dataset.path, HIDDEN):
        before = load_hidden_info(dataset, info.name)
        _refuse_others(dataset, before, info.model_dump(exclude={"files", "dataset_digest", "digest"}))
        good = {}
        for entry in dataset.manifest:
            relative = HIDDEN.part(info.name, entry.name)
            file, path = before.files.get(relative), dataset.path / relative
            if file and path.is_file() and matches(path, file) and check_part(path, info, entry) is None:
                good[relative] = file
        info = info.model_copy(update={"files": good})
    (dataset.path / HIDDEN.folder).mkdir(exist_ok=True)
    write_hidden_info(dataset.path, info)
    return info


def _write_part(
    dataset: Dataset, number: int, entry: ManifestEntry, info: HiddenInfo, model: StateReading, path: Path
) -> None:
    """Write the states of a shard, whole or not at all; in memory are those of one window of the model."""
    sequences = dataset.shard(number)
    ids = [sequences.token_ids[a:b] for a, b in sequences.spans()]
    slots, is_fp8 = len(info.layers), info.dtype == "float8_e4m3fn"
    tensors = {
        "offsets": ("I64", [entry.rows + 1]),
        **({"hidden_states_scales": ("F32", [entry.tokens, slots, 1])} if is_fp8 else {}),
        "token_ids": ("I32", [entry.tokens]),
        "hidden_states": (SAFETENSORS[info.dtype][0], [entry.tokens, slots, info.width]),
    }
    metadata = {"kdata.shard": shard_digest(entry), "kdata.hidden": info.own_digest}
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path), removed_on_failure(temporary):
        with new_file(temporary) as file:
            begins = _reserve(file, tensors, metadata)

            def put(name: str, values: np.ndarray, skipped: int = 0) -> None:
                """Write values of a tensor behind as many of its bytes."""
                file.seek(begins[name] + skipped)
                file.write(np.ascontiguousarray(values).data)

            put("offsets", sequences.offsets.astype("<i8"))
            put("token_ids", sequences.token_ids.astype("<i4"))
            for row, bits_TLD, scales_TL1 in model.stored(ids, info.layers, info.dtype):
                first = int(sequences.offsets[row]) * slots
                put("hidden_states", bits_TLD, first * info.width * bits_TLD.itemsize)
                if scales_TL1 is not None:
                    put("hidden_states_scales", scales_TL1, first * scales_TL1.itemsize)
        settle(temporary, path)


def _reserve(file: BinaryIO, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> dict[str, int]:
    """Begin a safetensors file with room for tensors, which are filled in place; where in the file each begins.

    (safetensors' own writer wants all tensors in memory.) Source of the format: github.com/huggingface/safetensors.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    begins, end = {}, 0
    for name, (kind, shape) in tensors.items():
        begins[name], end = end, end + ITEM_BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}

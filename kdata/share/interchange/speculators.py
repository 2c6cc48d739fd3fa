"""The folder from which the `speculators` project trains draft models (EAGLE-3 and others) offline, of stored hidden states.

    *.arrow, state.json, dataset_info.json   a data set of the library `datasets`: input_ids, loss_mask, seq_len
    hidden_states/hs_I.safetensors           of row I: token_ids int64 [T], hidden_states [T, L, D]; the last slot is the
                                             model's last layer before the final norm, the others are `--target-layer-ids`
    token_freq.pt                            how often each token is a target

float8 states have a third tensor, hidden_states_scales float32 [T, L, 1], which its FP8Transfer multiplies with.

Source: github.com/vllm-project/speculators at c05b95b: src/speculators/train/data.py (ArrowDataset),
hs_connectors/transfer.py (FileTransfer), train/vocab_mapping.py, scripts/prepare_data.py;
hs_connectors/fp8_utils.py at 6494c99.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kdata.errors import DataError, DependencyError, MissingError, StorageError
from kdata.format.files import local_path
from kdata.observe.progress import Task
from kdata.observe.text import human_bytes
from kdata.share.arrange import new_folder
from kdata.store.dataset import Dataset
from kdata.store.hidden import SAFETENSORS, TOKEN_BYTES, HiddenStates


def export_speculators(dataset: Dataset, name: str, target: Path | str) -> list[str]:
    """Write rows and their hidden states as `speculators` reads them; return what the folder does not hold, one line each.

    Args:
        name: of hidden states that have the model's last layer (its number, not `head`), and at least one other.
        target: a folder that does not exist yet, or is empty.
    Raises:
        MissingError: there are no such hidden states, or a layer that is needed is not stored.
        DataError: the dataset has no rows.
        ConfigError: the folder is not free, or `target` is a URL.
        StorageError: the disk is too small, or refused.
        DependencyError: torch, safetensors or datasets is not installed.
    """
    target = local_path(target, "name a folder here, and upload it afterwards")
    try:
        import datasets
        import torch
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise DependencyError(f"this export needs {error.name!r}: pip install 'kdata[train,hub]'") from error
    if not dataset.num_rows:
        raise DataError(f"{dataset.path} has no rows to export; capture or import some first")
    states = dataset.hidden(name)
    slots = _slots(states)
    needed = dataset.num_tokens * (len(slots) * states.info.width * SAFETENSORS[states.info.dtype][1] + TOKEN_BYTES)
    if needed > (free := shutil.disk_usage(target.resolve().parent).free):
        raise StorageError(f"{target} needs {human_bytes(needed)}, {human_bytes(free)} are free; name a larger disk")
    counts: Counter[int] = Counter()

    def samples(folder: Path, task: Task) -> Iterator[dict[str, Any]]:
        for number in range(dataset.num_rows):
            row = dataset[number]
            token_ids, mask = np.asarray(row.token_ids), np.asarray(row.target_mask)
            tensors = {"token_ids": torch.from_numpy(token_ids.astype(np.int64)), **_tensors(states, number, slots)}
            save_file(tensors, folder / "hidden_states" / f"hs_{number}.safetensors")
            counts.update(token_ids[mask].tolist())
            task.advance(len(token_ids))
            yield {"input_ids": token_ids.tolist(), "loss_mask": mask.astype(int).tolist(), "seq_len": len(token_ids)}

    with new_folder(target) as folder, Task("export", dataset.num_tokens, "tokens") as task:
        (folder / "hidden_states").mkdir()
        (folder / "rows").mkdir()  # datasets does not overwrite the folder that it reads
        features = datasets.Features(
            input_ids=datasets.Sequence(datasets.Value("int64")),
            loss_mask=datasets.Sequence(datasets.Value("int64")),
            seq_len=datasets.Value("int64"),
        )
        with datasets.arrow_writer.ArrowWriter(path=str(folder / "rows/rows.arrow"), features=features) as writer:
            for sample in samples(folder, task):
                writer.write(sample)
            writer.finalize()
        rows = datasets.Dataset.from_file(str(folder / "rows/rows.arrow"))
        rows.set_format("torch")
        with _no_bar_of(datasets):
            rows.save_to_disk(folder)
        shutil.rmtree(folder / "rows")
        torch.save(dict(counts), folder / "token_freq.pt")
        lines = losses(dataset, states)
        (folder / "README.md").write_text(_readme(states, lines), "utf-8")
    return lines


@contextmanager
def _no_bar_of(datasets: Any) -> Iterator[None]:
    """Without the progress bar of the library: the command has one of its own."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _slots(states: HiddenStates) -> list[int]:
    """The slots to write: layers in their order, the model's last one behind them. Raises MissingError."""
    last = states.info.num_layers
    others = [layer for layer in states.info.layers if layer not in ("head", last)]
    if last not in states.info.layers or not others:
        raise MissingError(
            f"hidden states {states.info.name!r} have the layers {states.info.layers}; this export needs layer {last}, the "
            "model's last before its final norm, and at least one other: write them with `kdata hidden --layers`"
        )
    return [states.info.slot(layer) for layer in (*others, last)]


def _tensors(states: HiddenStates, row: int, slots: list[int]) -> dict[str, Any]:
    stored = states.stored(row).items()
    return {name: tensor[:, slots].contiguous() for name, tensor in stored if name != "token_ids"}


def losses(dataset: Dataset, states: HiddenStates) -> list[str]:
    """What the folder does not hold, one line each."""
    lines = [
        "the teacher's stored distributions: entries, tail, entropy, the token's log-probability",
        "id, domain, text, source and license of rows; row i of the dataset is sample i",
        "digests: which teacher and head the states are of, and whether a byte has changed",
    ]
    if "head" in states.info.layers:
        lines.append("the slot `head`: speculators applies the model's final norm to the last layer itself")
    return lines


def _readme(states: HiddenStates, lines: list[str]) -> str:
    info = states.info
    layers = [str(layer) for layer in info.layers if layer not in ("head", info.num_layers)]
    return (
        f"# Hidden states of {info.model.model} for speculators\n\n"
        f"Written by `kdata export --format speculators`. Type of the states: {info.dtype}. Train with\n"
        f"`--target-layer-ids {' '.join(layers)}` and this folder as `--data-path`.\n"
        f"The last slot is layer {info.num_layers}.\n\n"
        "Not in it:\n\n" + "".join(f"- {line}\n" for line in lines)
    )

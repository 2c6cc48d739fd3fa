"""Rows of a dataset to what a Hugging Face model takes, with the teacher's side beside it.

    rows     [B, L] as packed; documents are told apart by positions that restart. For sdpa, eager and flex attention.
    flat     [1, T], every document of the batch in one row without padding, with cu_seq_lens. For flash attention.
    padded   [D, longest], one document per row, with an attention mask. For models that cannot read packed rows.

The loss is the same in each, because it is a sum over the same counted tokens.

The teacher's side is one object, `SparseTargets`, and not seven tensors. FSDP2 and DeepSpeed cast every floating-point tensor
that a model's forward pass is called with to bfloat16, which would round the teacher's log-probabilities. An object passes.

Shapes: B rows, L context, D documents, T tokens, M counted positions, K kept entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from kdata.calls import validated
from kdata.errors import ConfigError
from kdata.loader.packing import Place
from kdata.trainer.objectives import Targets

Layout = Literal["rows", "flat", "padded"]
NOT_COUNTED = -100  # the label that Hugging Face models leave out


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's side of the counted tokens of a batch, or of one item.

    predictor_M: int64 [M], flat index into [B * L] of the hidden state that predicts each counted token. targets: see
    `kdata.trainer.objectives.Targets`. place: position of a `RowStream` after the batch; None elsewhere.
    """

    predictor_M: Tensor
    targets: Targets
    place: Place | None = None

    @classmethod
    def empty(cls, temperature: float = 1.0, *, weighted: bool = False) -> SparseTargets:
        """Targets of no token; `weighted` where those of the other items have weights."""
        ids, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        weights = floats if weighted else None
        return cls(
            ids,
            Targets(
                token_ids_C=ids,
                ids_CK=ids.view(0, 1),
                logprobs_CK=floats.view(0, 1),
                log_tail_C=floats,
                temperature=temperature,
                num_exact_C=ids,
                weights_C=weights,
                actual_logprobs_C=floats,
                entropy_C=floats,
                document_C=ids,
                position_C=ids,
            ),
        )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def total_weight(self) -> float:
        """What the loss of these tokens alone is divided by: their number, or the sum of their weights."""
        return self.targets.total_weight

    def to(self, device: torch.device | str, **_: Any) -> SparseTargets:
        """The same on another device. Other arguments of `Tensor.to` are taken and not used; dtypes stay."""
        on = torch.device(device)
        return replace(self, predictor_M=self.predictor_M.to(on, non_blocking=True), targets=self.targets.to(on))

    def pin_memory(self) -> SparseTargets:
        """The same in pinned memory; a DataLoader asks for it."""
        return replace(self, predictor_M=self.predictor_M.pin_memory(), targets=self.targets.each(Tensor.pin_memory))


class Item(TypedDict):
    """One row of a dataset.

    input_ids, position_ids, segment_ids: int64 [L]; segments count documents from 0, free cells at the end are -1.
    targets: `predictor_M` counts from the row's beginning.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    targets: SparseTargets


class Collator:
    """Joins items of `PackedRows` or `Documents` into one batch, a dict.

    Always: input_ids, labels int64 (the token where it counts, else -100, unshifted as Hugging Face models expect them),
    targets (SparseTargets). rows: position_ids. flat: position_ids, cu_seq_lens_q, cu_seq_lens_k int32, max_length_q,
    max_length_k. padded: attention_mask.

    Args:
        layout: see the module.
        pad_token_id: fills free cells; no document and no loss sees it.
        pad_to_multiple_of: of the padded layout's width.
    """

    @validated
    def __init__(self, layout: Layout = "rows", *, pad_token_id: int = 0, pad_to_multiple_of: int = 1) -> None:
        self.layout, self.pad_token_id, self.pad_to_multiple_of = layout, pad_token_id, pad_to_multiple_of

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Raises ConfigError if an item has lost its targets on the way."""
        if not all("targets" in item for item in items):
            raise ConfigError(
                f"items hold {sorted(items[0])} and no targets: something between dataset and collator removed them. With "
                "Hugging Face's Trainer set remove_unused_columns=False, or use DistillTrainer"
            )
        width = max(len(item["input_ids"]) for item in items)
        starts = [number * width for number in range(len(items))]
        targets = join([item["targets"] for item in items], starts)
        grids = [
            torch.stack([_widened(item[key], width, fill) for item in items])  # type: ignore[literal-required]
            for key, fill in (("input_ids", 0), ("position_ids", 0), ("segment_ids", -1))
        ]
        return self.lay_out(grids[0], grids[1], grids[2], targets)

    def lay_out(
        self, input_ids_BL: Tensor, position_ids_BL: Tensor, segment_ids_BL: Tensor, targets: SparseTargets
    ) -> dict[str, Any]:
        """A batch in this layout from packed rows."""
        filled_BL = segment_ids_BL >= 0
        labels_BL = torch.full_like(input_ids_BL, NOT_COUNTED)
        labels_BL.view(-1)[targets.predictor_M + 1] = targets.targets.token_ids_C
        if self.layout == "rows":
            return {
                "input_ids": input_ids_BL.masked_fill(~filled_BL, self.pad_token_id),
                "position_ids": position_ids_BL,
                "labels": labels_BL,
                "targets": targets,
            }
        positions_T = position_ids_BL[filled_BL]
        starts = torch.nonzero(positions_T == 0).flatten()
        lengths = torch.diff(starts, append=torch.tensor([len(positions_T)]))
        longest = int(lengths.max()) if len(lengths) else 1
        cell_T = torch.arange(len(positions_T))
        if self.layout == "padded":
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
            cell_T = (torch.cumsum(positions_T == 0, 0) - 1) * longest + positions_T
        cell_of = torch.full((filled_BL.numel(),), -1)
        cell_of[filled_BL.flatten()] = cell_T
        moved = replace(targets, predictor_M=cell_of[targets.predictor_M])
        shape = (1, max(len(positions_T), 1)) if self.layout == "flat" else (max(len(starts), 1), longest)

        def spread(values_T: Tensor, fill: int) -> Tensor:
            grid = torch.full(shape, fill)
            grid.view(-1)[cell_T] = values_T
            return grid

        batch = {
            "input_ids": spread(input_ids_BL[filled_BL], self.pad_token_id),
            "labels": spread(labels_BL[filled_BL], NOT_COUNTED),
            "targets": moved,
        }
        if self.layout == "padded":
            return {**batch, "attention_mask": spread(torch.ones_like(positions_T), 0)}
        ends = torch.cat([starts, torch.tensor([shape[1]])]) if len(starts) else torch.tensor([0, shape[1]])
        cu_seq_lens = ends.to(torch.int32)
        lengths_of = {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        return {
            **batch, "position_ids": spread(positions_T, 0), **lengths_of, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip


def join(parts: Sequence[SparseTargets], starts: Sequence[int]) -> SparseTargets:
    """Targets of several rows as those of one batch; `starts` are flat indices of the rows' first cells."""
    temperatures = {part.targets.temperature for part in parts}
    if len(temperatures) != 1:
        raise ConfigError(f"items have targets at temperatures {sorted(temperatures)}; a batch has one temperature")
    width = max(part.targets.ids_CK.shape[1] for part in parts)
    each = [part.targets for part in parts]
    document_C, position_C = _places(each)
    targets = Targets(
        token_ids_C=torch.cat([t.token_ids_C for t in each]),
        ids_CK=torch.cat([_widened(t.ids_CK, width, -1) for t in each]),
        logprobs_CK=torch.cat([_widened(t.logprobs_CK, width, -torch.inf) for t in each]),
        log_tail_C=torch.cat([t.log_tail_C for t in each]),
        temperature=temperatures.pop(),
        num_exact_C=_of_all([t.num_exact_C for t in each]),
        weights_C=_joined([t.weights_C for t in each], each, torch.float32),
        chosen_C=_joined([t.chosen_C for t in each], each, torch.bool),
        actual_logprobs_C=_of_all([t.actual_logprobs_C for t in each]),
        entropy_C=_of_all([t.entropy_C for t in each]),
        document_C=document_C,
        position_C=position_C,
    )
    predictor_M = torch.cat([part.predictor_M + start for part, start in zip(parts, starts, strict=True)])
    return SparseTargets(predictor_M, targets)


def _of_all(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors of several items as one; None where an item has none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _places(each: Sequence[Targets]) -> tuple[Tensor | None, Tensor | None]:
    """Documents and positions in them of several items, each with documents of its own; None where an item has none."""
    documents, positions, first = [], [], 0
    for t in each:
        if t.document_C is None or t.position_C is None:
            return None, None
        documents.append(t.document_C - t.document_C[:1] + first)
        positions.append(t.position_C)
        first += int(t.document_C[-1] - t.document_C[0]) + 1 if len(t) else 0
    return torch.cat(documents), torch.cat(positions)


def _joined(parts: Sequence[Tensor | None], each: Sequence[Targets], dtype: torch.dtype) -> Tensor | None:
    """Weights or marks of several items: ones for items that have none; None where no item has any."""
    if all(part is None for part in parts):
        return None
    return torch.cat([torch.ones(len(t), dtype=dtype) if p is None else p for p, t in zip(parts, each, strict=True)])


def refuse_other_labels(batch: Mapping[str, Any]) -> None:
    """Raise ConfigError if the batch's labels count other tokens than the dataset's targets do."""
    labels, targets = batch.get("labels"), batch["targets"]
    if labels is None:
        return
    flat, cells = labels.flatten(), targets.predictor_M.to(labels.device) + 1
    same = len(cells) == 0 or (
        int(cells.max()) < len(flat) and torch.equal(flat[cells], targets.targets.token_ids_C.to(labels.device))
    )
    counted = int((flat != NOT_COUNTED).sum())
    if not same or counted != len(targets):
        raise ConfigError(
            f"labels count {counted} tokens, the dataset's target mask {len(targets)}"
            f"{'' if counted != len(targets) else ', at other positions or of other ids'}; leave the labels to "
            "kdata.trainer.parts.Collator, and choose what counts when the text is captured (`targets`)"
        )


def _widened(values: Tensor, width: int, fill: float) -> Tensor:
    """The same with the last dimension padded at its end."""
    padding = width - values.shape[-1]
    return values if not padding else torch.nn.functional.pad(values, (0, padding), value=fill)

"""A dataset and a plan as `torch.utils.data` datasets, in the order that our own loop has.

    PackedRows   map-style; item n is row n of the stream that `kdata.trainer.train` reads
    Documents    map-style; one document an item, in the same order
    RowStream    iterable; batches of packed rows with an exact state

A trainer that asks a map-style dataset for 0, 1, 2, ... has our order, resumes at any item, and shares items among ranks and
worker processes as it always does. The order is shuffled by the seed already, so no sampler needs to shuffle.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

import kdata
from kdata.calls import validated
from kdata.config import parse_config
from kdata.errors import ConfigError, OutOfRangeError
from kdata.format.positions import ChosenPositions
from kdata.loader.batches import Arrays, Batches, BatchesConfig
from kdata.loader.rows import IndexedRows
from kdata.selection.plan import Plan
from kdata.trainer.loader import Batch, IterableBatches, Loader, tempered, to_torch
from kdata.trainer.objective_config import (
    ObjectiveConfig,
    Tail,
    refuse_adaptive,
    refuse_chunks,
    refuse_elsewhere,
    resolve_tail,
)
from kdata.trainer.parts.collator import Collator, Item, Layout, SparseTargets
from kdata.trainer.phases import (
    plan_of,
    refuse_no_targets,
    refuse_nothing_kept,
    refuse_unknown_entropy,
    refuse_unknown_logprobs,
)

Objective = ObjectiveConfig | Mapping[str, Any]


class Source:
    """What the datasets of this module share: data, objective and how both fit.

    Args:
        dataset: a dataset, or its folder, URL or hf://OWNER/NAME.
        plan: a plan, its name in the dataset, or a plan file; None: every sequence. Where it chooses positions, only those
            count; so do only those with a distribution, where the dataset keeps some positions only.
        objective: settings of the loss, as `ObjectiveConfig` or as its fields. The temperature decides the targets.
        config: how documents are packed and ordered.
    Raises:
        ConfigError: a setting has no possible value; the data cannot serve the objective (its temperature, draws, the tail
            mode); or the objective needs state that only `kdata train` keeps.
        DataError: a document is longer than the context, or no token counts.
        MissingError: dataset or plan does not exist.
    """

    @validated
    def __init__(
        self,
        dataset: kdata.Dataset | Path | str,
        plan: Plan | Path | str | None,
        objective: Objective | None,
        config: BatchesConfig,
    ) -> None:
        self.dataset = dataset if isinstance(dataset, kdata.Dataset) else kdata.open(dataset)
        self.plan = plan if plan is None or isinstance(plan, Plan) else plan_of(self.dataset, plan)
        if not isinstance(objective, ObjectiveConfig):
            objective = parse_config(ObjectiveConfig, {} if objective is None else dict(objective), "objective")
        self.objective = objective
        choice = (None, None) if self.plan is None else self.plan.choice(self.dataset)
        self.planned_rows: np.ndarray | None = choice[0]
        self.positions: ChosenPositions | None = choice[1]
        self.config = config
        info = self.dataset.info
        refuse_no_targets(self.dataset, self.planned_rows)
        refuse_nothing_kept(self.dataset, self.planned_rows, self.positions)
        refuse_unknown_entropy(self.dataset, self.planned_rows, self.objective)
        self.tail: Tail = resolve_tail(
            self.objective, info.tail, info.codec.temperatures, kind=info.codec.kind, token_map=info.codec.token_map
        )
        refuse_unknown_logprobs(self.dataset, self.planned_rows, self.objective)
        refuse_adaptive(self.objective)
        refuse_chunks(self.objective)
        refuse_elsewhere(self.objective, has_positions=self.positions is not None or info.codec.keeps_some_positions)
        self.elsewhere = self.objective.cross_entropy_elsewhere is not None
        self.weighted = self.positions is not None and self.positions.weights is not None

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest document that is read."""
        lengths = self.dataset.index(["num_tokens"])["num_tokens"].to_numpy()
        read = lengths if self.planned_rows is None else lengths[self.planned_rows]
        return int(read.max(initial=0))


class _Indexed(Source, TorchDataset[Item]):
    """Map-style access to the stream."""

    single = False

    @validated
    def __init__(
        self,
        dataset: kdata.Dataset | Path | str,
        plan: Plan | Path | str | None = None,
        *,
        objective: Objective | None = None,
        context_tokens: int = 512,
        seed: int = 0,
        items: int | None = None,
        epochs: int | None = None,
        window_documents: int = 1024,
    ) -> None:
        if (items is None) == (epochs is None) or (items or epochs or 0) < 1:
            raise ConfigError(
                f"items={items}, epochs={epochs}: set one of the two, to 1 or more; it says where the data ends"
            )
        config = BatchesConfig(
            context_tokens=context_tokens, batch_rows=1, seed=seed, window_documents=window_documents
        )
        super().__init__(dataset, plan, objective, config)
        batches = Batches(
            self.dataset, self.planned_rows, config, entry_dtype=np.int64, positions=self.positions,
            elsewhere=self.elsewhere,
        )  # fmt: skip
        self._rows = IndexedRows(batches, single=self.single)
        self.num_items = self._rows.rows_of(epochs or 0) if items is None else items
        self._length = self.num_items

    def __len__(self) -> int:
        return self._length

    @validated
    def filled_to(self, multiple: int) -> Self:
        """The same items and, at the end, empty ones up to a multiple, in which no token counts.

        Samplers that share items evenly among ranks repeat the first items where their number does not come out even.
        Repeated tokens would count twice in the last step; empty items count nothing.
        """
        filled = copy.copy(self)
        filled._length = -(-self.num_items // multiple) * multiple
        return filled

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Several items, which are read together; a DataLoader asks for a batch this way."""
        numbers = [self._number(index) for index in indices]
        real = [number for number in numbers if number < self.num_items]
        read = iter(self._split(self._rows.read(real)) if real else [])
        return [next(read) if number < self.num_items else self._empty() for number in numbers]

    @validated
    def documents(self, index: int) -> np.ndarray:
        """Global dataset rows of the documents of an item, int64; none for an empty item."""
        number = self._number(index)
        return self._rows.documents(number) if number < self.num_items else np.zeros(0, np.int64)

    def _number(self, index: int) -> int:
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise OutOfRangeError(f"item {index} of {len(self)}")
        return number

    def _split(self, arrays: Arrays) -> list[Item]:
        batch = to_torch(
            tempered(arrays, self.objective.temperature, self.dataset.info.codec), self.objective.temperature
        )
        rows, context = batch.input_ids.shape
        bounds = np.searchsorted(batch.predictor_M.numpy(), np.arange(rows + 1) * context).tolist()
        widths = (batch.segment_ids >= 0).sum(1).tolist() if self.single else [context] * rows
        items: list[Item] = []
        for row, width in enumerate(widths):
            part = slice(bounds[row], bounds[row + 1])
            kept = batch.targets.rows(part).each(torch.Tensor.contiguous)
            items.append(
                {
                    "input_ids": batch.input_ids[row, :width],
                    "position_ids": batch.position_ids[row, :width],
                    "segment_ids": batch.segment_ids[row, :width],
                    "targets": SparseTargets(batch.predictor_M[part] - row * context, kept),
                }
            )
        return items

    def _empty(self) -> Item:
        width = 1 if self.single else self.config.context_tokens
        return {
            "input_ids": torch.zeros(width, dtype=torch.int64),
            "position_ids": torch.arange(width),
            "segment_ids": torch.full((width,), -1),
            "targets": SparseTargets.empty(self.objective.temperature, weighted=self.weighted),
        }


class PackedRows(_Indexed):
    """Rows of whole documents, packed and ordered as in `kdata.trainer.train`; a map-style dataset.

    Item n is the n-th row of the endless stream, so an epoch's rows follow those of the epoch before.

    Args:
        dataset, plan, objective: see `Source`.
        context_tokens: tokens of a row; no document may be longer.
        seed: of the order.
        items: number of rows after which the data ends; or
        epochs: passes over the planned documents after which it ends. Set one of the two.
        window_documents: shuffled documents that are packed together.
    Raises:
        ConfigError, DataError, MissingError: see `Source`; ConfigError also unless one of items and epochs is set.
    """


class Documents(_Indexed):
    """Single documents in the order in which `PackedRows` packs them, for models that read one document per row.

    Arguments and errors are those of `PackedRows`; `items` counts documents. Their lengths differ, so use
    `Collator("padded")` or `Collator("flat")`.
    """

    single = True


class RowStream(Source, IterableDataset[dict[str, Any]]):
    """Batches of packed rows without end, or for some epochs, with an exact and small state; an iterable dataset.

        DataLoader(stream, batch_size=None, num_workers=2)

    Each item is a whole batch, as `Collator` gives it. Ranks read equal parts of every batch, workers take batches in turn;
    neither changes the order. Do not have Accelerate divide it once more (`accelerator.prepare`): it is divided already.

    Args:
        dataset, plan, objective: see `Source`.
        config: as for `kdata.loader.batches.Batches`; `batch_rows` counts the rows of all ranks.
        rank, world_size: this process's part of every batch.
        epochs: stop after so many epochs, with a smaller batch at the end; None: never.
        collator: the layout of the batches; None: rows.
    Raises:
        ConfigError, DataError, MissingError: see `Source`; ConfigError also if ranks cannot share a batch evenly.
    """

    @validated
    def __init__(
        self,
        dataset: kdata.Dataset | Path | str,
        plan: Plan | Path | str | None = None,
        *,
        objective: Objective | None = None,
        config: BatchesConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        collator: Collator | None = None,
    ) -> None:
        super().__init__(dataset, plan, objective, config or BatchesConfig())
        self.loader = Loader(
            self.dataset, self.planned_rows, self.config, rank=rank, world_size=world_size,
            temperature=self.objective.temperature, positions=self.positions, elsewhere=self.elsewhere,
        )  # fmt: skip
        self.epochs, self.collator = epochs, collator or Collator()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(partial(_laid_out, self.collator), IterableBatches(self.loader, self.epochs))

    @validated
    def state_dict(self, batch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The place after a batch, and what decides the order; the same on every rank.

        Args:
            batch: the batch that was trained on last. Workers read ahead, so only the batch knows its place. None: the place
                where iteration begins.
        """
        state = self.loader.state_dict()
        if batch is None:
            return state
        place = getattr(batch.get("targets"), "place", None)
        if place is None:
            raise ConfigError("this batch has no place in the stream; give a batch that this RowStream yielded")
        return {**state, **asdict(place)}

    @validated
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin at a saved place. Raises MismatchError if data or order differ, CorruptError for an impossible place."""
        self.loader.load_state_dict(state)


def _laid_out(collator: Collator, batch: Batch) -> dict[str, Any]:
    targets = SparseTargets(batch.predictor_M, batch.targets, batch.place)
    return collator.lay_out(batch.input_ids, batch.position_ids, batch.segment_ids, targets)


__all__ = ["Documents", "Layout", "PackedRows", "RowStream", "Source"]

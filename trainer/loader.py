"""Batches for torch: the arrays of `kdata.loader.batches` as tensors, in the trainer's own loop or in a DataLoader.

Order, packing, memory and resuming are those of `kdata.loader.batches`; nothing is decided here. `Loader` reads in a
background thread, which is enough for one accelerator; `IterableBatches` is for who wants `torch.utils.data` and its workers.

Shapes: B rows, L context, S documents of the batch, M counted positions, K kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kdata.format.schema import CodecInfo
from kdata.format.temper import log_z_of, temper
from kdata.loader.batches import Arrays, Batches, LoaderConfig, ahead
from kdata.loader.packing import Place
from kdata.store.dataset import Dataset
from kdata.trainer.objectives import Targets

__all__ = ["Batch", "IterableBatches", "Loader", "LoaderConfig"]


@dataclass(frozen=True)
class Batch:
    """One grid of packed documents.

    input_ids, position_ids, segment_ids: int64 [B, L]; positions restart at 0 in each document, segments
    count from 0 within a row, free cells are one trailing segment -1 of token 0. predictor_M: int64 [M], flat
    index into [B * L] of the hidden state that predicts each counted token (the cell before it). targets: the
    teacher's view at the loader's temperature, M rows; everything else is at 1. logprob_M float32 and rank_M int32: of
    the actual tokens. entropy_M: float32. document_M: int64 [M], which of `rows` a counted token belongs to. rows: int64 [S],
    global dataset rows. num_tokens: tokens in documents. place: where the stream stands after this batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    predictor_M: Tensor
    targets: Targets
    logprob_M: np.ndarray
    rank_M: np.ndarray
    entropy_M: np.ndarray
    document_M: np.ndarray
    rows: np.ndarray
    num_tokens: int
    place: Place

    @property
    def fill(self) -> float:
        """Share of cells that hold a token."""
        return self.num_tokens / self.input_ids.numel()


class Loader:
    """An endless, resumable stream of batches over a dataset and the rows of a plan.

    Args:
        dataset, rows, config, rank, world_size: see `kdata.loader.batches.Batches`, also for what is raised.
        temperature: of the targets; ConfigError at the first batch where the dataset was not captured for it.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray | None,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self.config, self.temperature = config, temperature
        self.arrays = Batches(dataset, rows, config, rank=rank, world_size=world_size, entry_dtype=np.int64)
        self.identity = self.arrays.identity
        self.lengths = self.arrays.lengths

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the state stands; it moves as batches are taken, not as they are read ahead."""
        batches = map(self.to_batch, self.arrays.read(self.arrays.place))
        for batch in ahead(batches, self.arrays.config.prefetch_batches):
            self.arrays.place = batch.place
            yield batch

    def epoch(self) -> Iterator[Batch]:
        """Every planned document once, from the beginning, for evaluation; the last batch may be smaller."""
        return map(self.to_batch, self.arrays.epoch())

    def to_batch(self, arrays: Arrays) -> Batch:
        """Tensors of one batch, the targets at this loader's temperature."""
        return to_torch(tempered(arrays, self.temperature, self.arrays.dataset.info.codec), self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """Constant-size state: where the stream stands, and what makes its order. It does not depend on the rank."""
        return self.arrays.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader's state stood. Raises MismatchError when data or order differ."""
        self.arrays.load_state_dict(state)


class IterableBatches(IterableDataset):
    """The same stream for `torch.utils.data.DataLoader(IterableBatches(loader), batch_size=None, num_workers=N)`.

    Worker w of N reads batches w, w + N, ..., and a DataLoader asks its workers in turn, so N does not change the order.
    Workers run ahead of the consumer: resume from the batch that was used last, `loader.arrays.place = batch.place`
    before `loader.state_dict()`.

    Args:
        loader: whose data, order and state; its own thread is not used.
        epochs: stop before this epoch; None goes on for ever.
    """

    def __init__(self, loader: Loader, epochs: int | None = None) -> None:
        self.loader, self.epochs = loader, epochs

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        arrays = self.loader.arrays
        return map(self.loader.to_batch, arrays.read(arrays.place, epochs=self.epochs, worker=worker, workers=workers))


def tempered(arrays: Arrays, temperature: float, codec: CodecInfo) -> Arrays:
    """The same batch with `entry_logprobs` and `log_tail` at a temperature (`kdata.format.temper`).

    Raises:
        ConfigError: the dataset was not captured for it.
    """
    if temperature == 1.0:
        return arrays
    kept_MK = arrays.entry_ids >= 0
    logprobs_N, tail_M = temper(
        arrays.num_exact,
        kept_MK.sum(1).astype(np.int32),
        arrays.entry_logprobs[kept_MK],
        None if arrays.draw_logprobs is None else arrays.draw_logprobs[kept_MK],
        arrays.log_tail,
        log_z_of(arrays.log_z, temperature, codec),
    )
    logprobs_MK = np.full_like(arrays.entry_logprobs, -np.inf)
    logprobs_MK[kept_MK] = logprobs_N
    return replace(arrays, entry_logprobs=logprobs_MK, log_tail=tail_M)


def to_torch(arrays: Arrays, temperature: float = 1.0) -> Batch:
    """Tensors of one batch: shares the memory of large arrays, widens the small ones to int64.

    Args:
        temperature: of the arrays' entries and tail.
    """

    def wide(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False))

    targets = Targets(
        token_ids_C=wide(arrays.token_ids),
        ids_CK=wide(arrays.entry_ids),
        logprobs_CK=torch.from_numpy(arrays.entry_logprobs),
        log_tail_C=torch.from_numpy(arrays.log_tail),
        temperature=temperature,
        num_exact_C=wide(arrays.num_exact),
    )
    return Batch(
        input_ids=wide(arrays.input_ids),
        position_ids=wide(arrays.position_ids),
        segment_ids=wide(arrays.segment_ids),
        predictor_M=wide(arrays.predictor),
        targets=targets,
        logprob_M=arrays.logprob,
        rank_M=arrays.rank,
        entropy_M=arrays.entropy,
        document_M=arrays.document,
        rows=arrays.rows,
        num_tokens=arrays.num_tokens,
        place=arrays.place,
    )

"""Batches for torch: the numpy arrays of `kdata.loader.batches` as tensors.

Order, packing, memory and resuming are those of `kdata.loader.batches`; this file decides nothing about them. `Loader` reads
in a background thread, which is enough for one accelerator. `IterableBatches` is for users of `torch.utils.data.DataLoader`
and its worker processes.

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

from kdata.format.positions import ChosenPositions
from kdata.format.schema import CodecInfo, json_digest
from kdata.format.temper import log_z_of, temper
from kdata.loader.batches import Arrays, Batches, BatchesConfig, ahead
from kdata.loader.packing import Place
from kdata.store.dataset import Dataset
from kdata.store.token_map import read_matched
from kdata.trainer.chunks import chunks_of
from kdata.trainer.objective_config import SORTED_OBJECTIVES
from kdata.trainer.objectives import Matched, Targets


@dataclass(frozen=True)
class Batch:
    """One grid of packed documents.

    input_ids, position_ids, segment_ids: int64 [B, L]. Positions restart at 0 in each document, segments count from 0 within
    a row, and the padding at the end of a row is segment -1 of token 0. predictor_M: int64 [M], flat index into [B * L] of
    the hidden state that predicts each counted token (the position before it). targets: the teacher's side of the M
    positions, at the loader's temperature; everything else is at temperature 1. logprob_M float32, rank_M int32: of the
    actual tokens. entropy_M: float32. document_M: int64 [M], index into `rows` of the document of each counted token.
    rows: int64 [S], global dataset rows. first_target_S: int64, see `kdata.loader.batches.Arrays`. num_tokens: tokens of
    documents. place: position of the stream after this batch.
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
    first_target_S: np.ndarray
    num_tokens: int
    place: Place

    @property
    def fill(self) -> float:
        """Share of the grid that holds a token; the rest is padding."""
        return self.num_tokens / self.input_ids.numel()


class Loader:
    """An endless, resumable stream of batches over a dataset and the rows of a plan.

    Args:
        dataset, rows, config, rank, world_size: see `kdata.loader.batches.Batches`, also for the errors.
        temperature: of the targets; ConfigError at the first batch if the dataset was not captured for it.
        order_key: decides the order together with the seed, instead of the data's digest; None: the digest.
        positions: which targets of the rows count; None: all of them.
        elsewhere: have the other targets in the batches too, marked as not chosen.

    Attributes:
        identity: SHA-256 (hex) of what is read, positions included.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray | None,
        config: BatchesConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        temperature: float = 1.0,
        order_key: str | None = None,
        positions: ChosenPositions | None = None,
        elsewhere: bool = False,
    ) -> None:
        self.config, self.temperature, self.positions = config, temperature, positions
        self.arrays = Batches(
            dataset, rows, config, rank=rank, world_size=world_size, entry_dtype=np.int64, positions=positions,
            elsewhere=elsewhere,
        )  # fmt: skip
        self.identity, self.matched = self.arrays.identity, matched_of(dataset)
        if positions is not None:
            self.identity = json_digest([self.identity, positions.digest])
        if order_key is not None:
            self.arrays.identity = order_key
        self.lengths, self.rows = self.arrays.lengths, self.arrays.rows  # of the planned documents, int64

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current place, which moves when a batch is consumed, not when it is read ahead."""
        batches = map(self.to_batch, self.arrays.read(self.arrays.place))
        for batch in ahead(batches, self.arrays.config.prefetch_batches):
            self.arrays.place = batch.place
            yield batch

    def epoch(self) -> Iterator[Batch]:
        """Every planned document once, from the beginning, for evaluation; the last batch may be smaller."""
        return map(self.to_batch, self.arrays.epoch())

    def to_batch(self, arrays: Arrays) -> Batch:
        """Tensors of one batch, the targets at this loader's temperature."""
        at_temperature = tempered(arrays, self.temperature, self.arrays.dataset.info.codec)
        return to_torch(at_temperature, self.temperature, self.matched)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and what decides its order, of constant size. It does not depend on the rank."""
        return self.arrays.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the place of another loader. Raises MismatchError if data or order differ."""
        self.arrays.load_state_dict(state)


class IterableBatches(IterableDataset[Batch]):
    """The same stream for `torch.utils.data.DataLoader(IterableBatches(loader), batch_size=None, num_workers=N)`.

    Worker w of N reads batches w, w + N, ..., and a DataLoader asks its workers in turn, so N does not change the order.
    Workers run ahead of the consumer: to resume, set `loader.arrays.place = batch.place`, with the batch that was consumed
    last, before `loader.state_dict()`.

    Args:
        loader: gives data, order and state; its own thread is not used.
        epochs: stop before this epoch; None: never stop.
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
        ConfigError: the dataset was not captured for this temperature.
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
    if arrays.chosen is not None:
        tail_M = np.where(arrays.chosen, tail_M, np.float32(0))
    return replace(arrays, entry_logprobs=logprobs_MK, log_tail=tail_M)


def matched_of(dataset: Dataset) -> Matched | None:
    """Which tokens teacher and student share, where the dataset was retokenized for `gold`; else None.

    Raises CorruptError where the dataset lacks the file that says it.
    """
    codec = dataset.info.codec
    if codec.token_map != SORTED_OBJECTIVES["gold"]:
        return None
    rule = codec.parameters["positions"]
    is_own_V = torch.from_numpy(read_matched(dataset.tokenizer_dir, dataset.info.vocab_size))
    return Matched(is_own_V, rule["matched"] / rule["num_teacher"])


def to_torch(arrays: Arrays, temperature: float = 1.0, matched: Matched | None = None) -> Batch:
    """Tensors of one batch: shares the memory of large arrays, converts the small ones to int64.

    Args:
        temperature: of the arrays' entries and tail.
        matched: of the dataset, see `matched_of`.
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
        weights_C=None if arrays.weights is None else torch.from_numpy(arrays.weights),
        chosen_C=None if arrays.chosen is None else torch.from_numpy(arrays.chosen),
        rank_C=wide(arrays.rank),
        matched=matched,
        actual_logprobs_C=torch.from_numpy(arrays.logprob),
        chunk_C=chunks_of(wide(arrays.predictor), torch.from_numpy(arrays.logprob)),
        entropy_C=torch.from_numpy(
            arrays.entropy if arrays.chosen is None else np.where(arrays.chosen, arrays.entropy, np.float32(0))
        ),
        document_C=wide(arrays.document),
        position_C=wide(arrays.position_ids.reshape(-1)[arrays.predictor] + 1),
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
        first_target_S=arrays.first_target,
        num_tokens=arrays.num_tokens,
        place=arrays.place,
    )

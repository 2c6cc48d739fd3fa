"""Dataset and plan to batches: rows of several whole documents, and the teacher's view of what counts.

No document is cut, none is dropped, none sees another (positions restart, segments differ). Decoding is
vectorised over a batch and runs in a background thread, so a step waits only when reading is slower than
training. State is constant in size and exact: a resumed loader gives the batches that would have come.

Shapes: B rows, L context, S documents of the batch, T = tokens of the batch, M counted positions, K kept
entries.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdata import Dataset, Sequences
from kdata.errors import DataError, MismatchError
from trainer.objectives import Targets
from trainer.packing import Place, identity_of, row_stream


class LoaderConfig(BaseModel):
    """How documents are packed, ordered and read ahead."""

    model_config = ConfigDict(extra="forbid")

    context_tokens: int = Field(default=512, ge=2, description="Tokens of a row; no document may be longer.")
    batch_rows: int = Field(default=8, ge=1, description="Rows of a batch. Does not change the order of rows.")
    seed: int = Field(default=0, ge=0, description="Seed of the order.")
    window_documents: int = Field(
        default=1024, ge=1, description="Shuffled documents that are packed together; more fills rows better."
    )
    prefetch_batches: int = Field(
        default=4,
        ge=0,
        description="Batches read ahead by a background thread; 0 reads in the caller's thread.",
    )


@dataclass(frozen=True)
class Batch:
    """One grid of packed documents.

    input_ids, position_ids, segment_ids: int64 [B, L]; positions restart at 0 in each document, segments
    count from 0 within a row, free cells are one trailing segment -1 of token 0. predictor_M: int64 [M], flat
    index into [B * L] of the hidden state that predicts each counted token (the cell before it). targets: the
    teacher's view, M rows. logprob_M float32 and rank_M int32: of the actual tokens. entropy_M: float32.
    num_exact_M: int32, kept entries that are no draws. document_M: int64 [M], which of `rows` a counted token
    belongs to. rows: int64 [S], global dataset rows. num_tokens: tokens in documents.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    predictor_M: Tensor
    targets: Targets
    logprob_M: np.ndarray
    rank_M: np.ndarray
    entropy_M: np.ndarray
    num_exact_M: np.ndarray
    document_M: np.ndarray
    rows: np.ndarray
    num_tokens: int

    @property
    def fill(self) -> float:
        """Share of cells that hold a token."""
        return self.num_tokens / self.input_ids.numel()


class Loader:
    """An endless, resumable stream of batches over a dataset and the rows of a plan.

    Args:
        dataset: what is read.
        rows: int64 [R] global rows, repeats expanded (`Plan.rows`); None reads every row once an epoch.
        config: see LoaderConfig.
    Raises:
        DataError: nothing to read, or a document is longer than the context.
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray | None, config: LoaderConfig) -> None:
        self.dataset, self.config = dataset, config
        rows = np.arange(dataset.num_rows, dtype=np.int64) if rows is None else np.asarray(rows, np.int64)
        lengths = dataset.index(["num_tokens"])["num_tokens"].to_numpy().astype(np.int64)[rows]
        self._refuse_long(rows, lengths)
        # A document without tokens has nothing to train on and would never end a row.
        self.rows, self.lengths = rows[lengths > 0], lengths[lengths > 0]
        if not len(self.rows):
            raise DataError(f"{dataset!r}: the plan holds no token; nothing can be trained on it")
        self.identity = identity_of(dataset.fingerprint, self.rows)
        self._place = Place()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where the state stands; it moves as batches are taken, not as they are read ahead."""
        batches = self._batches(self._place)
        if self.config.prefetch_batches:
            batches = _ahead(batches, self.config.prefetch_batches)
        for batch, place in batches:
            self._place = place
            yield batch

    def epoch(self) -> Iterator[Batch]:
        """Every planned document once, from the beginning, for evaluation; the last batch may be smaller."""
        stream = self._stream(Place())
        done = False
        while not done:
            documents: list[list[int]] = []
            while len(documents) < self.config.batch_rows and not done:
                row, place = next(stream)
                documents.append(row)
                done = place.epoch > 0
            yield self._assemble(documents)

    def state_dict(self) -> dict[str, Any]:
        """Constant-size state: where the stream stands, and what makes its order."""
        order = self.config.model_dump(include={"context_tokens", "seed", "window_documents"})
        return {**asdict(self._place), "identity": self.identity, **order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader's state stood. Raises MismatchError when data or order differ."""
        here = self.state_dict()
        different = [k for k in here if k not in ("epoch", "window", "row") and here[k] != state.get(k)]
        if different:
            raise MismatchError(
                f"the loader's state was made with another {', '.join(different)}; resume with the same "
                "dataset, plan and loader settings, or start anew in another folder"
            )
        self._place = Place(state["epoch"], state["window"], state["row"])

    def _refuse_long(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        context = self.config.context_tokens
        too_long = np.flatnonzero(lengths > context)
        if len(too_long):
            name = self.dataset.index(["id"])["id"][int(rows[too_long[0]])].as_py()
            raise DataError(
                f"document {name!r} has {lengths[too_long[0]]} tokens, more than context_tokens={context} "
                f"({len(too_long)} of {len(rows)} are longer). Documents are never cut: set context_tokens "
                f"to {lengths.max()} or more, or train on a plan with num_tokens <= {context}"
            )

    def _stream(self, start: Place) -> Iterator[tuple[list[int], Place]]:
        c = self.config
        return row_stream(self.lengths, self.identity, c.seed, c.context_tokens, c.window_documents, start)

    def _batches(self, start: Place) -> Iterator[tuple[Batch, Place]]:
        stream = self._stream(start)
        while True:
            taken = list(islice(stream, self.config.batch_rows))
            yield self._assemble([documents for documents, _ in taken]), taken[-1][1]

    def _assemble(self, documents: list[list[int]]) -> Batch:
        """Read the documents of each row and lay them out on the grid."""
        context = self.config.context_tokens
        rows = self.rows[np.array([d for row in documents for d in row], np.int64)]
        starts = _document_starts([self.lengths[row] for row in documents], context)
        segments = np.concatenate([np.arange(len(row)) for row in documents])
        return _lay_out(self.dataset.take(rows), rows, starts, segments, (len(documents), context))


def _document_starts(lengths: list[np.ndarray], context: int) -> np.ndarray:
    """Flat cell where each document of a grid begins, row by row."""
    return np.concatenate([r * context + np.cumsum(n) - n for r, n in enumerate(lengths)])


def _lay_out(
    seqs: Sequences, rows: np.ndarray, starts: np.ndarray, segments: np.ndarray, shape: tuple[int, int]
) -> Batch:
    lengths = np.diff(seqs.offsets)
    position_T = np.arange(len(seqs.token_ids)) - np.repeat(seqs.offsets[:-1], lengths)
    cell_T = np.repeat(starts, lengths) + position_T
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segment_ids = np.full(shape, -1, np.int64)
    input_ids.reshape(-1)[cell_T] = seqs.token_ids
    position_ids.reshape(-1)[cell_T] = position_T
    segment_ids.reshape(-1)[cell_T] = np.repeat(segments, lengths)
    free = segment_ids < 0
    position_ids[free] = (np.cumsum(free, axis=1) - 1)[free]

    # Entry t is the prediction of token t, made by the hidden state of the cell before it; entry 0 has none.
    counted_M = np.flatnonzero(seqs.target_mask & (position_T > 0))
    ids_TK, logprobs_TK = seqs.padded()
    targets = Targets(
        token_ids_C=torch.from_numpy(seqs.token_ids[counted_M].astype(np.int64)),
        ids_CK=torch.from_numpy(ids_TK[counted_M].astype(np.int64)),
        logprobs_CK=torch.from_numpy(logprobs_TK[counted_M]),
        log_tail_C=torch.from_numpy(seqs.log_tail[counted_M]),
    )
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        predictor_M=torch.from_numpy(cell_T[counted_M] - 1),
        targets=targets,
        logprob_M=seqs.logprob[counted_M],
        rank_M=seqs.rank[counted_M],
        entropy_M=seqs.entropy[counted_M],
        num_exact_M=seqs.num_exact[counted_M],
        document_M=np.repeat(np.arange(len(rows)), lengths)[counted_M],
        rows=rows,
        num_tokens=len(seqs.token_ids),
    )


def _ahead(source: Iterator[Any], depth: int) -> Iterator[Any]:
    """Run `source` in a thread, at most `depth` items ahead; its exception is raised in its place.

    The thread ends when the consumer stops iterating (the generator is closed or collected).
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def hand_over(item: tuple[Any, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                hand_over((item, None))
                if stop.is_set():
                    return
        except BaseException as error:  # raised again in the consumer's thread
            hand_over((None, error))

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()

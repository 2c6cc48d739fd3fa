"""Score a dataset with another model: the model's NLL of every sequence, and perhaps of every token, stored as a sidecar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from kdata.calls import validated
from kdata.config import Strict
from kdata.errors import ConfigError, TeacherError
from kdata.format.files import lock_of, require_writable, storage_errors
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept
from kdata.format.schema import ManifestEntry
from kdata.jobs.job import UnitCounter
from kdata.observe.progress import Task
from kdata.selection.sidecar import (
    SCORE_SCHEMA,
    ScoreInfo,
    begin_sidecar,
    finish_sidecar,
    has_part,
    write_part,
)
from kdata.store.dataset import Dataset
from kdata.store.index import read_index
from kdata.store.open import AnyDataset, opened
from kdata.store.token_scores import TOKEN_NLL, stored_nll
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.teachers.base import OnTokens, Teacher
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import Work

T = TypeVar("T", bound=Teacher)


class ScoreConfig(Strict):
    """Which model scores, and what the sidecar is called."""

    model: TeacherConfig
    name: str = Field("ref", pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="Name of the sidecar, scores.NAME in SQL.")
    tokens: bool = Field(
        False, description="Store the NLL of each token, too (2 bytes each): nll_NAME of tokens in SQL."
    )
    margins: bool = Field(
        False, description="Store the model's mean margin p1 - p2 over the targets of each row, too: column margin."
    )

    @property
    def columns(self) -> pa.Schema:
        """Columns of the sidecar's parts."""
        own = SCORE_SCHEMA.append(MARGIN) if self.margins else SCORE_SCHEMA
        return own.append(TOKEN_NLL) if self.tokens else own


MARGIN = pa.field("margin", pa.float64(), True)


@validated
def score(dataset: AnyDataset, config: ScoreConfig, *, log: Path | None = None) -> ScoreInfo:
    """Score every sequence of a dataset: mean NLL in nats over the same target positions as the teacher's.

    With `config.tokens` also the NLL of each token, target or not, as float16: off by at most 2^-11 of itself (0.05 %), or
    2^-25 nats where that is more. The mean is of the numbers before that rounding.

    A part that the same model has already written for the same shard is kept.

    Raises:
        MismatchError: the model has another tokenizer, or the sidecar is another model's or has numbers for rows alone.
        ConfigError: a sequence is longer than the model's context.
        TeacherError: the model's log-probabilities are not finite, or with `config.tokens` one is below -65,504 nats.
        StorageError: another process is writing, or the disk refused.
    """
    dataset = opened(dataset)
    with lock_of(dataset.path):
        require_writable(dataset.path / "scores" / config.name)
        return _score(dataset, config, log)


def open_reader(dataset: Dataset, config: TeacherConfig) -> AbstractContextManager[tuple[Teacher, Vocabulary]]:
    """Open a model that can read every sequence of a dataset, and its vocabulary. Raises as `open_with`."""
    return open_with(dataset, config, load_teacher)


@contextmanager
def open_with(dataset: Dataset, config: TeacherConfig, load: Callable[..., T]) -> Iterator[tuple[T, Vocabulary]]:
    """Open a model that can read every sequence of a dataset, and its vocabulary; `load` is called as `load_teacher`.

    Raises:
        MismatchError: the model has another tokenizer.
        ConfigError: a sequence is longer than the model's context.
    """
    tokenizer = load_tokenizer(config.model, config.revision, bos=config.bos)
    own = Vocabulary.of_model(config.model, tokenizer)
    refuse_other_ids(Vocabulary.of_dataset(dataset), own, "name a model of the teacher's tokenizer")
    longest = max(dataset.index(["num_tokens"])["num_tokens"].to_pylist(), default=0)
    model = load(config, max_k=2, work=Work(longest, writes=False))
    try:
        if longest > model.context:
            raise ConfigError(
                f"the dataset has a sequence of {longest:,} tokens, {config.model} reads at most {model.context:,}; "
                "name a model of a longer context"
            )
        yield model, own
    finally:
        model.close()


def _score(dataset: Dataset, config: ScoreConfig, log: Path | None) -> ScoreInfo:
    with open_reader(dataset, config.model) as (model, own):
        info = ScoreInfo(
            name=config.name,
            unit="nats per target token",
            model=model.info,
            tokenizer_hash=own.hash,
            dataset_digest=dataset.content_digest,
            columns=config.columns.names[1:],
            files={},
        )
        with (
            storage_errors(dataset.path),
            Task(f"score {config.name}: reading", dataset.num_tokens, "tokens", log) as task,
        ):
            begin_sidecar(dataset, info)
            for number, entry in enumerate(dataset.manifest):
                if has_part(dataset, config.name, entry):
                    task.skip(entry.tokens)
                    continue
                task.plan(number, entry.tokens, entry.tokens)
                count = UnitCounter(partial(task.under_way, number))
                table = _score_shard(dataset, number, entry, model, count, config.columns)
                write_part(dataset, config.name, entry, table)
                task.advance(entry.tokens, part=number)
            return finish_sidecar(dataset, info)


def _score_shard(
    dataset: Dataset, number: int, entry: ManifestEntry, model: Teacher, on_tokens: OnTokens, schema: pa.Schema
) -> pa.Table:
    sequences = dataset.shard(number)
    ids = [sequences.token_ids[a:b] for a, b in sequences.spans()]
    readouts = model.read(ids, KeepConfig(kind="topk", k=2 if MARGIN.name in schema.names else 1), on_tokens)
    masks = [sequences.target_mask[a:b] for a, b in sequences.spans()]
    nlls = [sequence_nll(readout.logprob, mask_T) for readout, mask_T in zip(readouts, masks, strict=True)]
    names = read_index(dataset.shard_file(entry, "index"), ["id"])["id"]
    columns = {"id": names, "nll": nlls, "num_target_tokens": [int(mask_T.sum()) for mask_T in masks]}
    if MARGIN.name in schema.names:
        columns[MARGIN.name] = [
            sequence_margin(readout.kept, mask_T) for readout, mask_T in zip(readouts, masks, strict=True)
        ]
    if TOKEN_NLL.name in schema.names:
        columns[TOKEN_NLL.name] = [stored_nll(readout.logprob) for readout in readouts]
    return pa.table(columns, schema=schema)


def sequence_margin(kept: Kept, mask_T: np.ndarray) -> float | None:
    """Mean of p1 - p2 over the masked positions, in [0, 1]; None without any.

    Args:
        kept: the two most probable entries of each position that has a distribution.
    """
    if not mask_T.any():
        return None
    starts_T = np.cumsum(kept.num_kept) - kept.num_kept
    p_N = np.exp(kept.logprobs.astype(np.float64))
    first_M = starts_T[mask_T]
    return float((p_N[first_M] - p_N[first_M + 1]).mean())


def sequence_nll(logprob_T: np.ndarray, mask_T: np.ndarray) -> float | None:
    """Mean negative log-probability over the masked positions, nats per token; None without any.

    Raises TeacherError where it is not finite.
    """
    if not mask_T.any():
        return None
    if not np.isfinite(logprob_T[mask_T]).all():
        raise TeacherError("the model gives a token a log-probability that is not finite; are its weights sound?")
    return float(-logprob_T[mask_T].astype(np.float64).mean())

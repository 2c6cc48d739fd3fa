"""Datasets for tests of selection: rows with this id, domain, length and teacher's NLL, and sidecars of these numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

import kdata
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TokenizerInfo
from kdata.selection.sidecar import (
    SCORE_SCHEMA,
    TOKEN_SCORE_SCHEMA,
    ScoreInfo,
    begin_sidecar,
    finish_sidecar,
    write_part,
)
from kdata.store.token_scores import stored_nll
from kdata.store.writer import Writer
from tests.fakes import VOCAB, StandInTeacher

TEACHER = StandInTeacher()


class Row(NamedTuple):
    """One sequence: `nll` in nats per token; None makes a row without a target."""

    id: str
    domain: str = "a"
    tokens: int = 2
    nll: float | None = 1.0
    text: str | None = "text"


def dataset_of(root: Path, rows: Sequence[Row], *, shard_rows: int = 3, source: str = "capture") -> kdata.Dataset:
    """A dataset of these rows in this order, `shard_rows` to a shard; another source adds rows to an existing dataset."""
    info = new_info(
        format_version="1.0",
        vocab_size=VOCAB,
        teacher=TEACHER.info,
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id="plain", version=1, kind="topk", parameters={"k": 1}),
        tail="ghost",
    )
    with Writer(root, info, source, SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        for unit, first in enumerate(range(0, len(rows), shard_rows)):
            writer.commit(UnitResult(unit, [_record(row) for row in rows[first : first + shard_rows]]))
    return kdata.open(root)


def _record(row: Row) -> Record:
    counts = np.ones(row.tokens, np.int32)
    counts[0] = 0
    logprobs = np.full(row.tokens, np.nan if row.nll is None else -row.nll, np.float32)
    logprobs[0] = np.nan
    half = np.full(int(counts.sum()), np.log(0.5), np.float32)
    return Record(
        id=row.id,
        domain=row.domain,
        token_ids=np.arange(row.tokens, dtype=np.int32) % VOCAB,
        target_mask=(counts > 0) & (row.nll is not None),
        logprob=logprobs,
        rank=np.ones(row.tokens, np.int32),
        log_tail=np.where(counts > 0, np.log(0.5), np.nan).astype(np.float32),
        entropy=np.full(row.tokens, np.nan, np.float32),
        kept=Kept(counts, np.zeros_like(counts), np.zeros(len(half), np.int32), half),
        text=row.text,
    )


def score_with(dataset: kdata.Dataset, numbers: Mapping[str, float], name: str = "ref") -> None:
    """A complete sidecar as `kdata score` writes it; an id that is not in `numbers` gets null."""
    info = ScoreInfo(
        name=name, unit="nats per target token", model=TEACHER.info, tokenizer_hash="0" * 64,
        dataset_digest=dataset.content_digest, files={},
    )  # fmt: skip
    begin_sidecar(dataset, info)
    for entry in dataset.manifest:
        ids = dataset.sql(f"select id from rows where shard = '{entry.name}' order by row")["id"].to_pylist()
        columns = {"id": ids, "nll": [numbers.get(i) for i in ids], "num_target_tokens": [1] * len(ids)}
        write_part(dataset, name, entry, pa.table(columns, schema=SCORE_SCHEMA))
    finish_sidecar(dataset, info)


def score_tokens_with(
    dataset: kdata.Dataset,
    name: str,
    *,
    seed: int = 0,
    change: Callable[[dict[str, list[Any]]], None] = lambda columns: None,
) -> dict[str, np.ndarray]:
    """A complete score of tokens as `kdata score --tokens` writes it, of random numbers.

    Args:
        change: changes the columns of each part before they are written.
    Returns:
        The NLL of each token by id, float64 before rounding, NaN at position 0.
    """
    rng = np.random.default_rng(seed)
    info = ScoreInfo(
        name=name, unit="nats per target token", model=TEACHER.info, tokenizer_hash=dataset.info.tokenizer.hash,
        dataset_digest=dataset.content_digest, columns=TOKEN_SCORE_SCHEMA.names[1:], files={},
    )  # fmt: skip
    begin_sidecar(dataset, info)
    exact: dict[str, np.ndarray] = {}
    for number, entry in enumerate(dataset.manifest):
        ids = dataset.shard_index(entry, ["id"])["id"].to_pylist()
        sequences = dataset.shard(number)
        columns: dict[str, list[Any]] = {name: [] for name in TOKEN_SCORE_SCHEMA.names}
        for row_id, (begin, end) in zip(ids, sequences.spans(), strict=True):
            nll = rng.gamma(0.5, 4.0, end - begin)
            nll[:1] = np.nan
            own = nll[sequences.target_mask[begin:end]]
            exact[row_id] = nll
            values = (row_id, own.mean() if len(own) else None, len(own), stored_nll(-nll.astype(np.float32)))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        change(columns)
        write_part(dataset, name, entry, pa.table(columns, schema=TOKEN_SCORE_SCHEMA))
    finish_sidecar(dataset, info)
    return exact

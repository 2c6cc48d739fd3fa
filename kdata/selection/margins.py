"""The teacher's margin of every row, as a score: how far its first choice is ahead of the second, on average."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdata.format.files import lock_of, require_writable, storage_errors
from kdata.observe.progress import Task
from kdata.selection.choose_positions import pieces
from kdata.selection.position_base import Piece
from kdata.selection.position_rules import Margin
from kdata.selection.score_file import ImportedScores
from kdata.selection.sidecar import (
    ScoreInfo,
    begin_sidecar,
    check_score_name,
    finish_sidecar,
    has_part,
    refuse_other_settings,
    write_part,
)
from kdata.store.dataset import Dataset

SCHEMA = pa.schema([pa.field("id", pa.string(), False), pa.field("margin", pa.float64())])


def score_margins(dataset: Dataset, name: str = "margin") -> ImportedScores:
    """Write the sidecar scores/NAME with a column `margin`: the mean of p1 - p2 over a row's target positions, in [0, 1].

    See the rule `margin` of `kdata.selection.position_rules` for what is known of p2. A row is null where a position keeps no
    exact entry, or none is a target. It reads the payload once, some record batches at a time. A part that it has already
    written for the same shard is kept.

    Raises:
        ConfigError: an invalid name.
        MismatchError: a sidecar of that name exists with other settings.
        CorruptError, StorageError: a shard is damaged; the disk refused, or another process is writing.
    """
    check_score_name(name)
    info = ScoreInfo(
        name=name,
        unit="mean of p1 - p2 over the target positions",
        model=None,
        tokenizer_hash=None,
        dataset_digest=dataset.content_digest,
        columns=SCHEMA.names[1:],
        files={},
    )
    rule = Margin(share=1.0)
    with (
        storage_errors(dataset.path),
        lock_of(dataset.path),
        Task("margins", dataset.num_rows, "rows read") as task,
    ):
        refuse_other_settings(dataset, info)
        require_writable(dataset.path / "scores" / name)
        begin_sidecar(dataset, info)
        missing = np.zeros(dataset.num_rows, bool)
        for entry, begin in zip(dataset.manifest, dataset.shard_starts.tolist(), strict=False):
            if has_part(dataset, name, entry):
                task.skip(entry.rows)
            elif not entry.rows:  # no piece comes of it
                write_part(dataset, name, entry, SCHEMA.empty_table())
            else:
                missing[begin : begin + entry.rows] = True
        read = pieces(dataset, rule.COLUMNS, missing, None)
        for shard, own in groupby(read, key=lambda piece: piece.read.shard):
            tables = []
            for piece in own:
                tables.append(_margins(rule, piece))
                task.advance(len(piece.rows))
            write_part(dataset, name, dataset.manifest[shard], pa.concat_tables(tables))
        info = finish_sidecar(dataset, info)
        parts = [pq.read_table(dataset.path / file, columns=["margin"], partitioning=None) for file in info.files]
        return ImportedScores(info, {"margin": sum(len(part) - part["margin"].null_count for part in parts)})


def _margins(rule: Margin, piece: Piece) -> pa.Table:
    rows = len(piece.rows)
    margin_C = rule.numbers(piece)
    count = np.bincount(piece.row_C, minlength=rows)
    mean = np.bincount(piece.row_C, margin_C.astype(np.float64), minlength=rows) / np.maximum(count, 1)
    known = (count > 0) & np.isfinite(mean)
    return pa.table([pa.array(piece.ids, pa.string()), pa.array(mean, mask=~known)], SCHEMA)

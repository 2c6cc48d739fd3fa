"""The teacher's margin of every row, as a score: how far its first choice is ahead of the second, on average."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdata.observe.progress import Task
from kdata.selection.choose_positions import pieces
from kdata.selection.position_rules import Margin
from kdata.selection.score_file import ImportedScores, bring
from kdata.store.dataset import Dataset

SCHEMA = pa.schema([pa.field("id", pa.string(), False), pa.field("margin", pa.float64())])


def score_margins(dataset: Dataset, name: str = "margin") -> ImportedScores:
    """Write the sidecar scores/NAME with a column `margin`: the mean of p1 - p2 over a row's target positions, in [0, 1].

    See the rule `margin` of `kdata.selection.position_rules` for what is known of p2. A row is null where a position keeps no
    exact entry, or none is a target. It reads the whole payload once, some record batches at a time.

    Raises:
        MismatchError: a sidecar of that name exists with other settings.
        CorruptError, StorageError: a shard is damaged; the disk refused, or another process is writing.
    """
    rule = Margin(share=1.0)
    with (
        tempfile.TemporaryDirectory(prefix="kdata-margins-") as folder,
        Task("margins", dataset.num_rows, "rows read") as task,
    ):
        file = Path(folder) / "margins.parquet"
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for piece in pieces(dataset, rule.COLUMNS, np.ones(dataset.num_rows, bool), None):
                rows = len(piece.rows)
                margin_C = rule.numbers(piece)
                count = np.bincount(piece.row_C, minlength=rows)
                mean = np.bincount(piece.row_C, margin_C.astype(np.float64), minlength=rows) / np.maximum(count, 1)
                known = (count > 0) & np.isfinite(mean)
                writer.write_table(pa.table([pa.array(piece.ids, pa.string()), pa.array(mean, mask=~known)], SCHEMA))
                task.advance(rows)
        return bring(dataset, file, name, unit="mean of p1 - p2 over the target positions")

"""Nested lists: `input_ids` [T], `topk_ids` and `topk_logprobs` `[P][K]`, as JSONL or Parquet, as most scripts write them.

List j is about token j (`--aligned with`, as kdata exports it, with an empty first list) or about token j + 1 (`--aligned
after`). Optional columns: id, domain, text, target_mask [T]. K may differ from list to list. Log-probabilities are
natural, at temperature 1, not renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from kdata.errors import DataError
from kdata.format.sequences import Sequences
from kdata.share.interchange.rows import PeerRow, as_ids, as_logprobs, as_mask, flat, nested, spans

COLUMNS = ("input_ids", "topk_ids", "topk_logprobs")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("text", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_mask", pa.list_(pa.bool_())),
        ("topk_ids", pa.list_(pa.list_(pa.int32()))),
        ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
    ]
)


def read_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[PeerRow]:
    """Rows of nested lists. Raises DataError where columns are missing or do not fit each other."""
    for batch in batches:
        missing = [name for name in COLUMNS if name not in batch.schema.names]
        if missing:
            raise DataError(f"the files have no column {missing[0]!r}; plain lists need {', '.join(COLUMNS)}")
        lengths, token_ids = flat(batch.column("input_ids"), as_ids)
        per_row, counts, ids = nested(batch.column("topk_ids"))
        own_rows, own_counts, logprobs = nested(batch.column("topk_logprobs"))
        if not (np.array_equal(per_row, own_rows) and np.array_equal(counts, own_counts)):
            raise DataError(
                "lists of topk_ids and topk_logprobs have different lengths; each id needs one log-probability"
            )
        all_ids = as_ids(ids)
        all_logprobs = as_logprobs(logprobs)
        entries = spans(np.array([counts[part].sum() for part in spans(per_row)], np.int64))
        masks = _masks(batch, lengths)
        parts = zip(about_rows(batch), spans(lengths), spans(per_row), entries, masks, strict=True)
        for about, tokens, lists_of, own, mask in parts:
            counts_P = counts[lists_of].astype(np.int32)
            yield PeerRow(token_ids[tokens], counts_P, all_ids[own], all_logprobs[own], target_mask=mask, **about)


def _masks(batch: pa.RecordBatch, lengths: np.ndarray) -> list[np.ndarray | None]:
    if "target_mask" not in batch.schema.names:
        return [None] * len(lengths)
    column = batch.column("target_mask")
    present = column.is_valid().to_numpy(zero_copy_only=False)
    own, values = flat(column, as_mask)
    if not np.array_equal(own[present], lengths[present]):
        raise DataError("lists of target_mask and input_ids have different lengths; each token needs one mask value")
    return [values[part] if has else None for part, has in zip(spans(own), present, strict=True)]


def about_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Id, domain and text of each row, where the files have these columns."""
    names = [name for name in ("id", "domain", "text") if name in batch.schema.names]
    rows = batch.select(names).to_pylist() if names else [{}] * batch.num_rows
    return [{name: None if value is None else str(value) for name, value in row.items()} for row in rows]


def lists(sequences: Sequences, *, skip_first: bool) -> tuple[pa.ListArray, pa.ListArray, pa.ListArray]:
    """Token ids, and the entries as lists of lists: ids and log-weights, by falling weight within a position.

    Args:
        skip_first: leave out the empty list of each sequence's first token.
    """
    place_N = np.repeat(np.arange(len(sequences.token_ids)), sequences.num_kept)
    order = np.lexsort((-sequences.entry_logprobs, place_N))
    has_list_T = np.ones(len(sequences.token_ids), bool)
    starts = sequences.offsets[:-1][np.diff(sequences.offsets) > 0]
    if skip_first:
        has_list_T[starts] = False
    outer = np.concatenate(([0], np.cumsum(has_list_T)))[sequences.offsets]
    inner = np.concatenate(([0], np.cumsum(sequences.num_kept[has_list_T])))

    def two_deep(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(_offsets(outer), pa.ListArray.from_arrays(_offsets(inner), pa.array(values)))

    token_ids = pa.ListArray.from_arrays(_offsets(sequences.offsets), pa.array(sequences.token_ids))
    return token_ids, two_deep(sequences.entry_ids[order]), two_deep(sequences.entry_logprobs[order])


def _offsets(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.int32())


def table(sequences: Sequences, ids: list[str], domains: list[str], texts: list[str | None]) -> pa.Table:
    """Sequences as nested lists; list j is about token j."""
    token_ids, entry_ids, logprobs = lists(sequences, skip_first=False)
    mask = pa.ListArray.from_arrays(token_ids.offsets, pa.array(sequences.target_mask))
    columns = [pa.array(ids), pa.array(domains), pa.array(texts, pa.string()), token_ids, mask, entry_ids, logprobs]
    return pa.table(columns, schema=SCHEMA)

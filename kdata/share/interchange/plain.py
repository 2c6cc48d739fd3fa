"""Nested lists: `input_ids` [T], `topk_ids` and `topk_logprobs` `[P][K]`, as JSONL or Parquet, as most scripts write them.

List j is about token j (`--aligned with`, as kdata exports it, with an empty first list) or about token j + 1 (`--aligned
after`). Optional columns: id, domain, text, target_mask [T]. K may differ from list to list. Log-probabilities are
natural, at temperature 1, not renormalised.

Other names are read where there is no doubt: one column with lists of lists of integers, one of numbers, and tokens as
input_ids, token_ids or tokens. What the numbers are is read from the column's name, else from the numbers (`kind_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from kdata.errors import DataError
from kdata.format.kept import segment_sum
from kdata.format.sequences import Sequences
from kdata.share.interchange.rows import PeerRow, as_ids, as_logprobs, as_mask, flat, is_list, nested, spans

COLUMNS = ("input_ids", "topk_ids", "topk_logprobs")
ROUNDED_ONE = 1.02  # a sum of probabilities that were rounded to 8 bits
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


Values = Literal["logprobs", "probs", "logits"]
TOKENS = ("input_ids", "token_ids", "tokens")


@dataclass(frozen=True)
class Layout:
    """Which columns hold tokens, ids and values, and what the values are; None: not known by the column's name."""

    tokens: str
    ids: str
    values: str
    kind: Values | None

    @classmethod
    def of(cls, schema: pa.Schema, ids: str | None, values: str | None, kind: Values | None) -> Layout:
        """The layout of some columns: by the names that kdata writes, else the one pair of lists of lists that there is.

        Args:
            ids, values, kind: what was named by a setting.
        Raises DataError where more than one pair is possible, or none.
        """
        names = schema.names
        tokens = next((name for name in TOKENS if name in names), COLUMNS[0])
        inner = {f.name: f.type.value_type.value_type for f in schema if is_list(f.type) and is_list(f.type.value_type)}
        integers = [name for name, of in inner.items() if pa.types.is_integer(of)]
        reals = [name for name, of in inner.items() if pa.types.is_floating(of)]
        ids = ids or _only(COLUMNS[1], names, integers, "ids_column")
        values = values or _only(COLUMNS[2], names, reals, "values_column")
        missing = [name for name in (tokens, ids, values) if name not in names]
        if missing:
            raise DataError(f"the files have no column {missing[0]!r}; plain lists need {', '.join(COLUMNS)}")
        return cls(tokens, ids, values, kind or _kind_by_name(values))


def _only(usual: str, names: list[str], candidates: list[str], setting: str) -> str:
    if usual in names or len(candidates) == 0:
        return usual
    if len(candidates) > 1:
        raise DataError(f"the columns {candidates} could all hold the entries; name one with --set {setting}=NAME")
    return candidates[0]


def _kind_by_name(name: str) -> Values | None:
    low = name.lower().replace("_", "").replace("-", "")
    if "logit" in low:
        return "logits"
    return "logprobs" if "logprob" in low else "probs" if "prob" in low else None


class Reader:
    """Reads rows of nested lists; what the columns and values are is settled by the first batch.

    Args:
        ids, values, kind: settings that name them.
    """

    def __init__(self, ids: str | None = None, values: str | None = None, kind: Values | None = None) -> None:
        self._named = (ids, values, kind)
        self._layout: Layout | None = None

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[PeerRow]:
        """Rows of nested lists. Raises DataError where columns are missing or do not fit each other."""
        for batch in batches:
            layout = self._layout or Layout.of(batch.schema, *self._named)
            yield from self._rows(batch, layout)

    def _rows(self, batch: pa.RecordBatch, layout: Layout) -> Iterator[PeerRow]:
        missing = [name for name in (layout.tokens, layout.ids, layout.values) if name not in batch.schema.names]
        if missing:
            raise DataError(f"the row has no column {missing[0]!r}; plain lists need {', '.join(COLUMNS)}")
        lengths, token_ids = flat(batch.column(layout.tokens), as_ids)
        per_row, counts, ids = nested(batch.column(layout.ids))
        own_rows, own_counts, values = nested(batch.column(layout.values))
        if not (np.array_equal(per_row, own_rows) and np.array_equal(counts, own_counts)):
            raise DataError(
                f"lists of {layout.ids} and {layout.values} have different lengths; each id needs one log-probability"
            )
        all_ids = as_ids(ids)
        numbers = as_logprobs(values)
        layout = replace(layout, kind=layout.kind or kind_of(numbers, counts, layout.values))
        self._layout = layout
        all_logprobs = logprobs_of(numbers, layout)
        entries = spans(np.array([counts[part].sum() for part in spans(per_row)], np.int64))
        masks = _masks(batch, lengths)
        parts = zip(about_rows(batch), spans(lengths), spans(per_row), entries, masks, strict=True)
        for about, tokens, lists_of, own, mask in parts:
            counts_P = counts[lists_of].astype(np.int32)
            yield PeerRow(token_ids[tokens], counts_P, all_ids[own], all_logprobs[own], target_mask=mask, **about)


def kind_of(values_N: np.ndarray, counts_P: np.ndarray, column: str) -> Values:
    """What numbers are, where they leave no doubt. Raises DataError where they do.

    Probabilities lie in [0, 1], and no list sums to more than 1. Logarithms of them are never above 0, and what a top-k keeps
    of a distribution is more than a hundredth of it: in most lists, or the numbers are logits that happen to be low.
    """
    finite_N = values_N[np.isfinite(values_N)]
    filled_P = counts_P > 0
    if len(finite_N) and filled_P.any():
        with np.errstate(over="ignore"):
            sum_P = segment_sum(np.where(np.isfinite(values_N), values_N, 0.0).astype(np.float64), counts_P)[filled_P]
            mass_P = segment_sum(np.exp(np.nan_to_num(values_N.astype(np.float64), nan=-np.inf)), counts_P)[filled_P]
        if (finite_N >= 0).all() and (finite_N <= 1).all() and (sum_P <= ROUNDED_ONE).all() and (finite_N > 0).any():
            return "probs"
        usual = (mass_P > 0.01) & (mass_P <= ROUNDED_ONE)
        if (finite_N <= 0).all() and (finite_N < -1).any() and usual.mean() > 0.5 and (mass_P <= ROUNDED_ONE).all():
            return "logprobs"
    raise DataError(
        f"the numbers of {column!r} do not show whether they are log-probabilities, probabilities or logits; say so with "
        "--values logprobs, probs or logits"
    )


def logprobs_of(values_N: np.ndarray, layout: Layout) -> np.ndarray:
    """Log-probabilities float32 [N] of values of a known kind. Raises DataError for logits, and what is no probability."""
    if layout.kind == "logits":
        raise DataError(
            f"{layout.values!r} holds logits of the top k alone, and no probability follows from these without the "
            "log-sum-exp over the whole vocabulary; write log-probabilities (--format nemo reads logits with their "
            "log_sum_exp_logits)"
        )
    if layout.kind == "probs":
        if (values_N < 0).any() or (values_N > ROUNDED_ONE).any():
            raise DataError(f"{layout.values!r} holds a number that is no probability: below 0, or above 1")
        with np.errstate(divide="ignore"):
            logprobs: np.ndarray = np.log(np.minimum(values_N, 1)).astype(np.float32)
        return logprobs
    return values_N


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

"""The columns that axolotl's KD plug-in reads, in both layouts, beside `input_ids`.

    v1   a column (axolotl sets its name; the importer finds it by its type) of lists of {token: "token_id:N", logprob}
    v2   `logprobs` and `target_token_ids`: lists of lists

The plug-in aligns P lists with the end of T tokens: list j is about token T - P + j, as with a completion whose
log-probabilities a server returned. It has no tail: it renormalises over the entries.

Source: github.com/axolotl-ai-cloud/axolotl, src/axolotl/integrations/kd (chat_template.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdata.errors import DataError, first_line
from kdata.format.sequences import Sequences
from kdata.share.interchange.plain import about_rows, lists
from kdata.share.interchange.rows import PeerRow, as_ids, as_logprobs, flat, nested, spans

V1_COLUMN = "llm_text_generation_vllm_logprobs"
_LISTS = pa.list_(pa.list_(pa.float64()))
SCHEMAS = {
    1: pa.schema(
        [
            ("id", pa.string()),
            ("domain", pa.string()),
            ("input_ids", pa.list_(pa.int64())),
            (V1_COLUMN, pa.list_(pa.list_(pa.struct([("token", pa.string()), ("logprob", pa.float64())])))),
        ]
    ),
    2: pa.schema(
        [
            ("id", pa.string()),
            ("domain", pa.string()),
            ("input_ids", pa.list_(pa.int64())),
            ("logprobs", _LISTS),
            ("target_token_ids", pa.list_(pa.list_(pa.int64()))),
        ]
    ),
}


def read_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[PeerRow]:
    """Rows of either layout. Raises DataError where the columns are of neither."""
    for batch in batches:
        if "input_ids" not in batch.schema.names:
            raise DataError(
                "the files have no column 'input_ids': axolotl tokenizes when it trains, and which token a list is about "
                "depends on that; add the token ids that the teacher read, as input_ids"
            )
        lengths, token_ids = flat(batch.column("input_ids"), as_ids)
        per_row, counts, ids, logprobs = _entries(batch)
        entries = spans(np.array([counts[part].sum() for part in spans(per_row)], np.int64))
        parts = zip(about_rows(batch), spans(lengths), spans(per_row), entries, strict=True)
        for about, tokens, part, own in parts:
            yield PeerRow(token_ids[tokens], counts[part].astype(np.int32), ids[own], logprobs[own], **about)


def _entries(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lists per row, entries per list, ids int32 [N] and logprobs float32 [N] of either layout."""
    for field in batch.schema:
        if str(field.type).startswith("list<") and "token: string" in str(field.type) and "logprob" in str(field.type):
            per_row, counts, values = nested(batch.column(field.name))
            return per_row, counts, _token_ids(values.field("token")), as_logprobs(values.field("logprob"))
    if {"logprobs", "target_token_ids"} <= set(batch.schema.names):
        per_row, counts, values = nested(batch.column("logprobs"))
        id_rows, id_counts, ids = nested(batch.column("target_token_ids"))
        if not (np.array_equal(per_row, id_rows) and np.array_equal(counts, id_counts)):
            raise DataError(
                "lists of logprobs and target_token_ids have different lengths; each id needs one log-probability"
            )
        return per_row, counts, as_ids(ids), as_logprobs(values)
    raise DataError(
        f"none of the columns {batch.schema.names} holds axolotl's entries; it needs lists of {{token, logprob}} (v1), or "
        "logprobs and target_token_ids (v2)"
    )


def _token_ids(names: pa.Array) -> np.ndarray:
    """Ids out of "token_id:N"."""
    try:
        ids = pc.cast(pc.replace_substring(names, "token_id:", ""), pa.int32())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"an entry's token is not of the form 'token_id:N' ({first_line(error)}), and a token's text does not "
            "determine its id; let the server return ids (vLLM: --return-tokens-as-token-ids)"
        ) from error
    token_ids: np.ndarray = ids.to_numpy(zero_copy_only=False)
    return token_ids


def table(sequences: Sequences, ids: list[str], domains: list[str], version: int) -> pa.Table:
    """Sequences in axolotl's columns: one list per token but the first, by falling weight."""
    token_ids, entry_ids, logprobs = lists(sequences, skip_first=True)
    columns = {"id": pa.array(ids), "domain": pa.array(domains), "input_ids": token_ids.cast(pa.list_(pa.int64()))}
    if version == 2:
        columns |= {"logprobs": logprobs.cast(_LISTS), "target_token_ids": entry_ids}
        return pa.table(columns).cast(SCHEMAS[2])
    inner = logprobs.values
    names = pc.binary_join_element_wise("token_id", pc.cast(entry_ids.values.values, pa.string()), ":")
    structs = pa.StructArray.from_arrays([names, inner.values.cast(pa.float64())], ["token", "logprob"])
    columns[V1_COLUMN] = pa.ListArray.from_arrays(logprobs.offsets, pa.ListArray.from_arrays(inner.offsets, structs))
    return pa.table(columns).cast(SCHEMAS[1])

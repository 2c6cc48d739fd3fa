"""NeMo-Aligner's JSON lines with the teacher's top-k logits: what its script compute_topk_logits.py appends.

    tokens [P]                what the model read: a conversation without its last token, padded
    labels [P]                the token after each of them
    loss_mask [P]             1 where the label counts
    topk_logits, topk_token_ids [P][K]   list j is about labels[j]
    log_sum_exp_logits [P]    over the whole vocabulary, so that topk_logits - log_sum_exp_logits are log-probabilities

Padding behind the last label that counts is left out: no earlier prediction depends on it.

Source: github.com/NVIDIA/NeMo-Aligner, examples/nlp/synthetic_data_gen/compute_topk_logits.py at 249c3f6 (write_generations).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from kdata.errors import DataError
from kdata.share.interchange.plain import about_rows
from kdata.share.interchange.rows import PeerRow, as_ids, as_logprobs, flat, nested, spans

COLUMNS = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")


def read_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[PeerRow]:
    """Rows of such files. Raises DataError where columns are missing or do not fit each other."""
    for batch in batches:
        missing = [name for name in COLUMNS if name not in batch.schema.names]
        if missing:
            raise DataError(f"the files have no column {missing[0]!r}; NeMo-Aligner's files have {', '.join(COLUMNS)}")
        lengths, tokens = flat(batch.column("tokens"), as_ids)
        parts = {name: flat(batch.column(name), as_logprobs) for name in ("labels", "loss_mask", "log_sum_exp_logits")}
        per_row, counts, ids = nested(batch.column("topk_token_ids"))
        own_rows, own_counts, logits = nested(batch.column("topk_logits"))
        same = all(np.array_equal(own, lengths) for own, _ in parts.values()) and np.array_equal(per_row, lengths)
        if not (same and np.array_equal(per_row, own_rows) and np.array_equal(counts, own_counts)):
            raise DataError("the lists of a row have different lengths; NeMo-Aligner writes one of each for each token")
        labels = flat(batch.column("labels"), as_ids)[1]
        mask, log_sums = parts["loss_mask"][1], parts["log_sum_exp_logits"][1]
        logprobs = as_logprobs(logits) - np.repeat(log_sums, counts)
        entries = spans(np.array([counts[part].sum() for part in spans(per_row)], np.int64))
        all_ids, abouts = as_ids(ids), about_rows(batch)
        index = batch.column("index").to_pylist() if "index" in batch.schema.names else [None] * batch.num_rows
        for about, number, part, own in zip(abouts, index, spans(lengths), entries, strict=True):
            counted = np.flatnonzero(mask[part] > 0)
            used = int(counted[-1]) + 1 if len(counted) else 0
            kept = int(counts[part][:used].sum())
            if about.get("id") is None and number is not None:
                about["id"] = f"index-{number}"
            yield PeerRow(
                np.concatenate([tokens[part][: min(used, 1)], labels[part][:used]]),
                counts[part][:used].astype(np.int32),
                all_ids[own][:kept],
                logprobs[own][:kept],
                target_mask=np.concatenate([np.zeros(min(used, 1), bool), mask[part][:used] > 0]),
                **about,
            )

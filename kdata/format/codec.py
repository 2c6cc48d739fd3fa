"""How the kept entries of a distribution become Arrow columns and come back.

A codec is described by `CodecInfo` in dataset.json and in each shard's own metadata: id, version, kind, parameters.
Its error is measured while a shard is written (`measure_error`), and stored probabilities never sum to more than 1 at any
position.

Three codecs:
    packed   the default. Log-probabilities of exact entries as gaps on a grid of 1/16 nat, 2.6 bits each, normalised by the
             tail mass; draws as counts. Ids by how common they are in their shard (`common_ids`), and a byte for each number
             beside the entries (`coded`); in versions 1 and 2 ids as byte planes, and those numbers whole. Measured in
             tests/benchmarks/codec.py.
    plain    ids as int32, log-probabilities as float16: four times the size, readable by eye.
    verbatim for imported rows: the numbers of another tool as they are, with its errors.

Shapes: T tokens, K kept entries of one position, N kept entries in all, D draws in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kdata.errors import DataError, FormatError, ShapeError
from kdata.format import packed
from kdata.format.coded import round_tail
from kdata.format.kept import Kept, segment_sum
from kdata.format.schema import CodecError, CodecInfo, known_codecs

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Positions:
    """What a decoder needs beside the entry columns: int32 num_exact [T], int32 num_drawn [T], float32 log_tail [T]."""

    num_exact: np.ndarray
    num_drawn: np.ndarray
    log_tail: np.ndarray


@dataclass(frozen=True)
class Codec:
    """Encoder and decoder of one codec id.

    `encode(kept, log_tail [T], info)` gives flat columns, each with one value per entry, per exact entry or per draw;
    `decode(columns, positions, info)` gives the entries back.
    """

    encode: Callable[[Kept, np.ndarray, CodecInfo], Columns]
    decode: Callable[[Columns, Positions, CodecInfo], Kept]


# ------------------------------------------------------------------------------------------------------------ plain


def _plain_encode(kept: Kept, log_tail_T: np.ndarray, info: CodecInfo) -> Columns:
    """Ids as int32; log-probabilities as float16, rounded towards minus infinity."""
    half = kept.logprobs.astype(np.float16)
    _round_down(half, kept.logprobs)
    _cap_mass(half, kept.num_kept)
    return {"entry_ids": kept.ids, "entry_logprobs": half}


def _round_down(half: np.ndarray, exact: np.ndarray) -> None:
    """Replace each float16 value that was rounded up by the next lower float16, in place."""
    above = half.astype(np.float64) > exact
    half[above] = np.nextafter(half[above], np.float16(-np.inf))


def _cap_mass(half_N: np.ndarray, counts_T: np.ndarray) -> None:
    """Lower the first entry of each position whose sum still exceeds 1, in place.

    A float32 softmax of a certain model sums to 1 + 1e-7 now and then; rounding down does not help where p = 1.
    """
    mass_T = segment_sum(np.exp(half_N.astype(np.float64)), counts_T)
    first_M = (np.cumsum(counts_T) - counts_T)[mass_T > 1]
    top_M = np.exp(half_N[first_M].astype(np.float64))
    lowered_M = np.log1p(-(mass_T[mass_T > 1] - top_M))
    capped_M = lowered_M.astype(np.float16)
    _round_down(capped_M, lowered_M)
    half_N[first_M] = capped_M


def _plain_decode(columns: Columns, positions: Positions, info: CodecInfo) -> Kept:
    return Kept(
        positions.num_exact,
        positions.num_drawn,
        columns["entry_ids"],
        _finite(columns["entry_logprobs"].astype(np.float32)),
    )


def _finite(logprobs_N: np.ndarray) -> np.ndarray:
    if not np.isfinite(logprobs_N).all():
        raise ShapeError("a kept log-probability is not a finite number")
    return logprobs_N


# --------------------------------------------------------------------------------------------------------- verbatim


def _verbatim_encode(kept: Kept, log_tail_T: np.ndarray, info: CodecInfo) -> Columns:
    """Ids as int32, log-probabilities as float32, unchanged."""
    return {"entry_ids": kept.ids, "entry_logprobs": kept.logprobs}


def _verbatim_decode(columns: Columns, positions: Positions, info: CodecInfo) -> Kept:
    return Kept(positions.num_exact, positions.num_drawn, columns["entry_ids"], _finite(columns["entry_logprobs"]))


# ----------------------------------------------------------------------------------------------------------- packed


def counts_draws(info: CodecInfo) -> bool:
    """True where a draw's weight is its count times an N-th of the tail; else a weight is stored for each draw."""
    return info.parameters.get("tau", 1.0) == 1.0 and info.kind != "combined"


def _packed_encode(kept: Kept, log_tail_T: np.ndarray, info: CodecInfo) -> Columns:
    draws = kept.is_draw
    id_bytes = info.parameters["id_bytes"]
    exact_ids, draw_ids = kept.ids[~draws], kept.ids[draws]
    columns = {"exact_ids": exact_ids} if info.is_coded else packed.planes("exact_id", exact_ids, id_bytes)
    columns["exact_gaps"] = packed.encode_gaps(kept.logprobs[~draws], kept.num_exact)
    if info.most_draws:
        steps = packed.steps_up(draw_ids, kept.num_drawn)
        columns |= {"draw_ids": draw_ids} if info.is_coded else packed.planes("draw_id", steps, id_bytes)
        if counts_draws(info):
            columns["draw_counts"] = packed.encode_counts(
                kept.logprobs[draws], kept.num_drawn, log_tail_T, info.parameters.get("num_draws")
            )
        else:
            rounded_T = stored_tail(log_tail_T, kept.num_exact, info)
            with np.errstate(invalid="ignore"):  # a position without a tail has no draws
                change_T = rounded_T.astype(np.float64) - log_tail_T
            columns["draw_weights"] = (kept.logprobs[draws] + np.repeat(change_T, kept.num_drawn)).astype(np.float16)
        if info.parameters.get("temperatures"):
            own = kept.draw_logprobs if draws.any() else np.zeros(0, np.float32)  # a unit may hold rejects only
            if own is None:
                raise DataError("draws at further temperatures need the log-probability of each draw")
            columns["draw_logprobs"] = own.astype(np.float16)
    return columns


def _packed_decode(columns: Columns, positions: Positions, info: CodecInfo) -> Kept:
    exact = packed.decode_gaps(columns["exact_gaps"], positions.num_exact, positions.log_tail)
    exact_ids = columns["exact_ids"] if info.is_coded else packed.join_planes("exact_id", columns)
    if not {"draw_ids", "draw_id_0"} & columns.keys():
        return Kept(positions.num_exact, positions.num_drawn, exact_ids, exact)
    if "draw_weights" in columns:
        weights = _finite(columns["draw_weights"].astype(np.float32))
    else:
        weights = packed.decode_counts(
            columns["draw_counts"], positions.num_drawn, positions.log_tail, info.parameters.get("num_draws")
        )
    draw_ids = columns.get("draw_ids")
    if draw_ids is None:
        draw_ids = packed.sum_steps(packed.join_planes("draw_id", columns), positions.num_drawn)
    ids = packed.interleaved(exact_ids, draw_ids, positions.num_exact, positions.num_drawn)
    logprobs = packed.interleaved(exact, weights, positions.num_exact, positions.num_drawn)
    raw = columns.get("draw_logprobs")
    if raw is not None and len(raw) != len(draw_ids):
        raise ShapeError("draws and their log-probabilities differ in number")
    return Kept(
        positions.num_exact,
        positions.num_drawn,
        ids,
        logprobs,
        None if raw is None else raw.astype(np.float32),
    )


CODECS: dict[str, Codec] = {
    "packed": Codec(_packed_encode, _packed_decode),
    "plain": Codec(_plain_encode, _plain_decode),
    "verbatim": Codec(_verbatim_encode, _verbatim_decode),
}


def codec_of(info: CodecInfo) -> Codec:
    """Return the codec that `info` names.

    Raises:
        FormatError: the id is unknown, or its version is newer than this kdata.
    """
    version = known_codecs().get(info.id)
    if version is None or info.id not in CODECS:
        raise FormatError(f"codec {info.id!r} is unknown to this kdata (it knows {sorted(CODECS)}); upgrade kdata")
    if info.version > version:
        raise FormatError(f"codec {info.id} has version {info.version}, this kdata reads up to {version}; upgrade")
    return CODECS[info.id]


@dataclass(frozen=True)
class Comparison:
    """How the teacher's numbers and the stored ones differ.

    error: None where nothing is kept. true_mass, stored_mass: float64 [T], probability mass of the exact entries.
    """

    error: CodecError | None
    true_mass: np.ndarray
    stored_mass: np.ndarray


def compare(true: Kept, stored: Kept, info: CodecInfo) -> Comparison:
    """Compare exact entries as the teacher returned them with what will be read back.

    KL is over the exact entries plus one bucket for the rest, with each side's own rest. Draws have no error, because their
    counts are integers.
    """
    sums = packed.compare_entries(true.logprobs, stored.logprobs, true.num_exact, true.num_drawn)
    positions = int((true.num_kept > 0).sum())
    if positions == 0:
        return Comparison(None, sums.true_mass, sums.stored_mass)
    # Draw weights that are not counts sum to the tail only on average (tau), or within rounding (combined).
    sum_T = sums.stored_sum if counts_draws(info) else sums.stored_mass
    error = CodecError(
        mean_nats=sums.error_sum / max(int(true.num_exact.sum()), 1),
        max_nats=sums.error_max,
        kl_nats=max(sums.kl_sum / positions, 0.0),
        max_sum=float(sum_T.max()),
        sums_over_one=int((sum_T > 1).sum()),
    )
    return Comparison(error, sums.true_mass, sums.stored_mass)


def measure_error(true: Kept, stored: Kept, info: CodecInfo) -> CodecError | None:
    """The error alone, see `compare`."""
    return compare(true, stored, info).error


def stored_tail(log_tail_T: np.ndarray, num_exact_T: np.ndarray, info: CodecInfo) -> np.ndarray:
    """log_tail float32 [T] as it will be read: what the weights of entries are computed from."""
    return round_tail(log_tail_T, num_exact_T) if info.is_coded else log_tail_T


def to_columns(
    kept: Kept, log_tail_T: np.ndarray, row_offsets: np.ndarray, info: CodecInfo
) -> tuple[dict[str, pa.Array], Kept]:
    """Encode the entries of all sequences of a shard, as `stored.readable_schema` has them; also return what will be read.

    Args:
        kept: entries of T tokens.
        log_tail_T: float32 [T], the teacher's.
        row_offsets: int64 [S+1], token offsets of the S sequences.
        info: the codec.
    """
    codec = codec_of(info)
    flat = codec.encode(kept, log_tail_T, info)
    per = {"entry": kept.num_kept, "exact": kept.num_exact, "draw": kept.num_drawn}
    ends = {name: np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))[row_offsets] for name, counts in per.items()}
    arrays = {
        name: pa.ListArray.from_arrays(
            pa.array(ends[name.split("_")[0]], pa.int32()), pa.array(values), type=_list_type(values)
        )
        for name, values in flat.items()
    }
    tail_T = stored_tail(log_tail_T, kept.num_exact, info)
    return arrays, codec.decode(flat, Positions(kept.num_exact, kept.num_drawn, tail_T), info)


def _list_type(values: np.ndarray) -> pa.DataType:
    return pa.list_(pa.field("item", pa.from_numpy_dtype(values.dtype), nullable=False))


def from_columns(columns: Columns, positions: Positions, info: CodecInfo) -> Kept:
    """Decode flat columns. Raises FormatError for an unknown codec."""
    return codec_of(info).decode(columns, positions, info)

"""How the kept entries of a distribution become Arrow columns and come back.

A codec is described by `CodecInfo` in dataset.json and in each shard's own metadata: id, version, kind, parameters.
Whatever it does to a number is measured while a shard is written (`measure_error`), and what is stored never sums to
more than 1 at any position.

Shapes: T tokens, K kept entries of one position, N kept entries in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kdata.errors import FormatError, ShapeError
from kdata.schema import CodecError, CodecInfo, known_codecs


@dataclass(frozen=True)
class Kept:
    """Ragged kept entries of T positions.

    num_kept: int32 [T]; ids: int32 [N]; logprobs: float32 [N], nats, not renormalised, falling within a position.
    """

    num_kept: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray

    def __post_init__(self) -> None:
        total = int(self.num_kept.sum())
        if len(self.ids) != total or len(self.logprobs) != total:
            raise ShapeError(
                f"num_kept sums to {total}, but there are {len(self.ids)} ids and {len(self.logprobs)} logprobs"
            )

    @staticmethod
    def concatenate(parts: list[Kept]) -> Kept:
        """Join the positions of several parts in order."""
        if not parts:
            return Kept(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return Kept(
            np.concatenate([p.num_kept for p in parts]),
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.logprobs for p in parts]),
        )

    @staticmethod
    def top(ids_TK: np.ndarray, logprobs_TK: np.ndarray, recorded_T: np.ndarray) -> Kept:
        """Keep all K entries at each position where `recorded_T` is true, nothing elsewhere."""
        width = ids_TK.shape[1]
        return Kept(
            np.where(recorded_T, width, 0).astype(np.int32),
            ids_TK[recorded_T].reshape(-1).astype(np.int32, copy=False),
            logprobs_TK[recorded_T].reshape(-1).astype(np.float32, copy=False),
        )

    def mass(self) -> np.ndarray:
        """Sum of kept probabilities at each position, float64 [T]."""
        return segment_sum(np.exp(self.logprobs.astype(np.float64)), self.num_kept)


def segment_sum(values_N: np.ndarray, counts_T: np.ndarray) -> np.ndarray:
    """Sum `counts_T[t]` consecutive values for each t; float64 [T], 0 for an empty segment.

    `reduceat` sums each segment on its own, so that a long array loses no precision to a running total.
    """
    sums_T = np.zeros(len(counts_T))
    filled = counts_T > 0
    if filled.any():
        starts = (np.cumsum(counts_T) - counts_T)[filled]
        sums_T[filled] = np.add.reduceat(values_N.astype(np.float64), starts)
    return sums_T


def log_tail(mass_T: np.ndarray) -> np.ndarray:
    """Natural log of 1 - mass, float32 [T]; -inf where nothing is left, never above 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.clip(1.0 - mass_T, 0.0, 1.0)).astype(np.float32)


@dataclass(frozen=True)
class Codec:
    """Encoder and decoder of one codec id: `encode(kept, info) -> columns [N]`, `decode(columns, num_kept, info)`."""

    encode: Callable[[Kept, CodecInfo], dict[str, np.ndarray]]
    decode: Callable[[dict[str, np.ndarray], np.ndarray, CodecInfo], Kept]


def _plain_encode(kept: Kept, info: CodecInfo) -> dict[str, np.ndarray]:
    """Ids as int32; log-probabilities as float16, rounded towards minus infinity."""
    half = kept.logprobs.astype(np.float16)
    _round_down(half, kept.logprobs)
    _cap_mass(half, kept.num_kept)
    return {"entry_ids": kept.ids, "entry_logprobs": half}


def _round_down(half: np.ndarray, exact: np.ndarray) -> None:
    """Step float16 values that were rounded upwards one float16 down, in place."""
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


def _plain_decode(columns: dict[str, np.ndarray], num_kept: np.ndarray, info: CodecInfo) -> Kept:
    return Kept(
        num_kept.astype(np.int32), columns["entry_ids"], columns["entry_logprobs"].astype(np.float32)
    )


CODECS: dict[str, Codec] = {"plain": Codec(_plain_encode, _plain_decode)}


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


def measure_error(true: Kept, stored: Kept) -> CodecError | None:
    """Compare what the teacher returned with what will be read back; None where nothing is kept.

    KL is over the kept entries plus one bucket for the rest, with each side's own rest.
    """
    if len(true.ids) == 0:
        return None
    log_p, log_q = true.logprobs.astype(np.float64), stored.logprobs.astype(np.float64)
    counts = true.num_kept
    mass_p, mass_q = segment_sum(np.exp(log_p), counts), segment_sum(np.exp(log_q), counts)
    tail_p, tail_q = np.clip(1 - mass_p, 0, 1), np.clip(1 - mass_q, 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ghost = np.where(tail_p > 0, tail_p * (np.log(tail_p) - np.log(tail_q)), 0.0)
    kl = segment_sum(np.exp(log_p) * (log_p - log_q), counts) + ghost
    filled = counts > 0
    error = np.abs(log_p - log_q)
    return CodecError(
        mean_nats=float(error.mean()),
        max_nats=float(error.max()),
        kl_nats=float(max(kl[filled].mean(), 0.0)),
        max_sum=float(mass_q.max()),
    )


def to_columns(kept: Kept, row_offsets: np.ndarray, info: CodecInfo) -> tuple[dict[str, pa.Array], Kept]:
    """Encode the entries of all sequences of a shard; also return what a reader will see.

    Args:
        kept: entries of T tokens.
        row_offsets: int64 [S+1], token offsets of the S sequences.
        info: the codec.
    """
    codec = codec_of(info)
    flat = codec.encode(kept, info)
    entry_offsets = np.concatenate(([0], np.cumsum(kept.num_kept, dtype=np.int64)))[row_offsets]
    arrays = {
        name: pa.ListArray.from_arrays(
            pa.array(entry_offsets, pa.int32()), pa.array(values), type=_list_type(values)
        )
        for name, values in flat.items()
    }
    return arrays, codec.decode(flat, kept.num_kept, info)


def _list_type(values: np.ndarray) -> pa.DataType:
    return pa.list_(pa.field("item", pa.from_numpy_dtype(values.dtype), nullable=False))


def from_columns(columns: dict[str, np.ndarray], num_kept: np.ndarray, info: CodecInfo) -> Kept:
    """Decode flat columns [N] with `num_kept` [T]. Raises FormatError for an unknown codec."""
    return codec_of(info).decode(columns, num_kept, info)

"""DistillKit's compressed Parquet: bit-packed ids, and log-probabilities as exact values, a curve and residuals.

A row has `input_ids` [T], and for each of P = T - 1 or T positions the bytes `bytepacked_indices` and
`compressed_logprobs`; list j is about token j + 1. `compression_config.yaml` beside the files says how to decode:

    ids       k unsigned numbers of ceil(log2 d) bits, most significant bit first, sorted by the teacher's probability
    logprobs  exact_k values as they are, then coefficients of a curve over the other k - exact_k ranks, then for each bin
              a scale and its residuals as signed numbers of element_bits; ranks that no bin covers have no residual. With
              delta_encoding every value but the first is a difference to the one before it.

The curve is a sum of terms over t = 0 ... n - 1, or over [0, 1] with normalize_t: powers, square root, exponential. On the
unscaled axis a fit of high powers fails numerically in float32, and the tail is wrong by a nat and more. The file holds this
error, and no reader can repair it.

Written from the format's documentation and behaviour (github.com/arcee-ai/DistillKit, distillkit/compression);
tests/kdata/share/test_interchange.py compares it with what DistillKit's own decoder returns.

Shapes: P positions, B bytes, k entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from kdata.config import Strict, parse_config, read_yaml
from kdata.errors import DataError, MissingError
from kdata.share.interchange.rows import PeerRow, as_ids, flat, nested, spans

Real = Literal["float16", "bfloat16", "float32", "float64"]
BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CONFIG_NAME = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")


class Bin(Strict):
    """Residuals of some ranks."""

    scale_dtype: Real
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1, le=65535)


class Compression(Strict):
    """compression_config.yaml."""

    d: int = Field(gt=1, lt=2**31, description="Vocabulary size.")
    k: int = Field(ge=1, le=65535, description="Entries of a position.")
    exact_k: int = Field(ge=0, description="Of these stored as they are.")
    exact_dtype: Real = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Real = "float32"
    residual_bins: list[Bin]
    delta_encoding: bool = True
    error_diffusion: bool = Field(False, description="Of the encoder only.")
    normalize_t: bool = False

    @model_validator(mode="after")
    def _sane(self) -> Compression:
        if self.exact_k > self.k or sum(b.num_elements for b in self.residual_bins) > self.k - self.exact_k:
            raise ValueError(f"exact_k and the bins cover more than k={self.k} entries")
        return self

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return math.ceil(math.log2(self.d))

    @property
    def num_bytes(self) -> int:
        """Bytes of a position's log-probabilities."""
        bins = sum(BYTES[b.scale_dtype] + -(-b.num_elements * b.element_bits // 8) for b in self.residual_bins)
        terms = len(self.polynomial_terms or ()) * BYTES[self.term_dtype]
        return self.exact_k * BYTES[self.exact_dtype] + terms + bins

    def notes(self) -> list[str]:
        """Known errors of such files."""
        curved = self.k - self.exact_k - sum(b.num_elements for b in self.residual_bins)
        highest = max((t for t in self.polynomial_terms or () if isinstance(t, int)), default=0)
        if curved <= 0 or not self.polynomial_terms:
            return []
        if self.normalize_t or highest < 3:
            return [f"{curved} of {self.k} log-probabilities of a position come from a fitted curve and are not stored"]
        return [
            f"{curved} of {self.k} log-probabilities of a position come from a curve of degree {highest} that was fitted on "
            "an unscaled axis (normalize_t is false); such a fit is wrong by a nat and more, and nothing was repaired"
        ]


def read_compression(source: Path, named: Path | None) -> Compression:
    """The YAML beside the files, or the one that is named. Raises MissingError or ConfigError."""
    path = named or (source if source.is_dir() else source.parent) / CONFIG_NAME
    if not path.is_file():
        raise MissingError(
            f"{path} does not exist; it describes how the files are compressed: name it with --compression"
        )
    return parse_config(Compression, read_yaml(path), str(path))


def read_rows(batches: Iterator[pa.RecordBatch], compression: Compression) -> Iterator[PeerRow]:
    """Decode rows. Raises DataError where the columns are not DistillKit's, or have other sizes than the YAML says."""
    for batch in batches:
        missing = [name for name in COLUMNS if name not in batch.schema.names]
        if missing:
            raise DataError(f"the files have no column {missing[0]!r}; DistillKit's files have {', '.join(COLUMNS)}")
        lengths, token_ids = flat(batch.column("input_ids"), as_ids)
        per_row, sizes, values = nested(batch.column("compressed_logprobs"))
        id_rows, id_sizes, id_values = nested(batch.column("bytepacked_indices"))
        if not np.array_equal(per_row, id_rows):
            raise DataError(
                "a row has different numbers of compressed_logprobs and bytepacked_indices; the file is damaged"
            )
        logprobs_PB = _grid(values, sizes, compression.num_bytes, "compressed_logprobs")
        ids_PB = _grid(id_values, id_sizes, -(-compression.k * compression.id_bits // 8), "bytepacked_indices")
        for tokens, lists in zip(spans(lengths), spans(per_row), strict=True):
            ids_PK = unpack(ids_PB[lists], compression.id_bits, compression.k).astype(np.int32)
            yield PeerRow(
                token_ids=token_ids[tokens],
                counts=np.full(len(ids_PK), compression.k, np.int32),
                ids=ids_PK.reshape(-1),
                logprobs=decode_logprobs(logprobs_PB[lists], compression).reshape(-1),
            )


def _grid(values: pa.Array, sizes: np.ndarray, width: int, name: str) -> np.ndarray:
    if len(sizes) and (sizes != width).any():
        actual = int(sizes[sizes != width][0])
        raise DataError(
            f"{name} has {actual} bytes at a position, but the compression YAML means {width}; name the YAML of these files"
        )
    numbers = values.to_numpy(zero_copy_only=False)
    if len(numbers) and not ((numbers >= 0) & (numbers <= 255)).all():
        raise DataError(f"{name} holds a number that is not a byte (0 to 255); name the files that DistillKit wrote")
    grid: np.ndarray = numbers.astype(np.uint8).reshape(len(sizes), width)
    return grid


def unpack(packed_PB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unsigned numbers of `bits` bits from bytes uint8 [P, B], most significant bit first: uint64 [P, count]."""
    each_PNb = np.unpackbits(packed_PB, axis=1)[:, : count * bits].reshape(len(packed_PB), count, bits)
    numbers_PN = np.zeros((len(packed_PB), count), np.uint64)
    for place in range(bits):
        numbers_PN = (numbers_PN << np.uint64(1)) | each_PNb[:, :, place]
    return numbers_PN


def decode_logprobs(packed_PB: np.ndarray, compression: Compression) -> np.ndarray:
    """Log-probabilities float32 [P, k] from bytes uint8 [P, B], in the teacher's order.

    The curve is summed in float64 and rounded once; DistillKit's own float32 sum differs from it by rounding.
    """
    c, at = compression, 0

    def next_bytes(count: int) -> np.ndarray:
        nonlocal at
        at += count
        return np.ascontiguousarray(packed_PB[:, at - count : at])

    exact_PK = _reals(next_bytes(c.exact_k * BYTES[c.exact_dtype]), c.exact_dtype)
    terms = c.polynomial_terms or []
    coefficients_PC = _reals(next_bytes(len(terms) * BYTES[c.term_dtype]), c.term_dtype)
    rest = c.k - c.exact_k
    residual_PK = np.zeros((len(packed_PB), rest))
    filled = 0
    for part in c.residual_bins:
        scale_P = _reals(next_bytes(BYTES[part.scale_dtype]), part.scale_dtype).astype(np.float64)
        codes_PN = unpack(
            next_bytes(-(-part.num_elements * part.element_bits // 8)), part.element_bits, part.num_elements
        )
        residual_PK[:, filled : filled + part.num_elements] = _signed(codes_PN, part.element_bits) * scale_P
        filled += part.num_elements
    values_PK = _rounded(residual_PK, c.exact_dtype)
    if terms:
        axis = np.linspace(0, 1, rest) if c.normalize_t else np.arange(rest, dtype=np.float64)
        curve_PK = sum(
            coefficients_PC[:, n, None].astype(np.float64) * _rounded(_term(term, axis), c.term_dtype)
            for n, term in enumerate(terms)
        )
        values_PK = values_PK + _rounded(np.asarray(curve_PK), c.term_dtype)
    logprobs_PK: np.ndarray = np.concatenate([exact_PK.astype(np.float64), values_PK], 1)
    if c.delta_encoding:
        return _rounded(np.cumsum(logprobs_PK, 1), c.exact_dtype).astype(np.float32)
    return logprobs_PK.astype(np.float32)


def _term(term: int | str, axis: np.ndarray) -> np.ndarray:
    values: np.ndarray = axis**term if isinstance(term, int) else np.sqrt(axis) if term == "sqrt" else np.exp(axis)
    return values


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as signed numbers; codes of one bit mean -1 and 1."""
    return codes.astype(np.float64) * 2 - 1 if bits == 1 else codes.astype(np.float64) - 2.0 ** (bits - 1)


def _reals(packed_PB: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers [P, n] from their little-endian bytes uint8 [P, B]."""
    if dtype == "bfloat16":
        return (packed_PB.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return packed_PB.view(np.dtype(dtype).newbyteorder("<"))


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to the nearest that this type holds (ties to even), as float64."""
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float64)
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))
    return (even & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)

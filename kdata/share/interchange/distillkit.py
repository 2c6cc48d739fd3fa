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

An older layout has `packed_indices`, `exact_values` and `coeffs` (its legacy.py); see `LegacyCompression`.

Written from the format's documentation and behaviour (github.com/arcee-ai/DistillKit, distillkit/compression);
tests/kdata/share/test_interchange.py compares it with what DistillKit's own decoder returns.

Shapes: P positions, B bytes, k entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from kdata.config import Strict, parse_config, parse_yaml, read_yaml
from kdata.errors import ConfigError, DataError, MissingError
from kdata.share.interchange.rows import PeerRow, as_ids, flat, nested, spans
from kdata.share.interchange.source import Source

Real = Literal["float16", "bfloat16", "float32", "float64"]
BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CONFIG_NAME = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
LEGACY_COLUMNS = ("input_ids", "packed_indices", "exact_values", "coeffs")
BLOCK = re.compile(r"^```(?:ya?ml|json)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)  # code of a page


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


class LegacyCompression(Strict):
    """legacy_logit_compression of DistillKit's training files: half-precision values, then a polynomial in the rank."""

    vocab_size: int = Field(gt=1, lt=2**31)
    k: int = Field(ge=1, le=65535)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    with_sqrt_term: bool = False
    term_dtype: Real = "float32"
    invert_polynomial: bool = True

    @property
    def d(self) -> int:
        """Vocabulary size."""
        return self.vocab_size

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return math.ceil(math.log2(self.vocab_size))

    def notes(self) -> list[str]:
        """Known errors of such files."""
        curved = self.k - self.exact_k
        return [f"{curved} of {self.k} log-probabilities of a position come from a fitted curve"] if curved else []


AnyCompression = Compression | LegacyCompression
FirstBatch = Callable[[], pa.RecordBatch | None]


def find_compression(source: Source, named: str | None, first: FirstBatch) -> AnyCompression:
    """How the files are compressed: by the file that is named, by compression_config.yaml, or by another file beside them.

    DistillKit's own script writes compression_config.yaml. Sets on the Hub may have the settings elsewhere, as people train
    with them: in a YAML or JSON file, or in a block of code of the page. Of these the ones that fit the bytes of the first
    rows count, and where two different ones do, the user decides.

    Raises:
        MissingError: there are none, or none fits. ConfigError: what is named is no compression; several fit.
    """
    if named is not None:
        return _settings_of(read_yaml(Path(named)), named)
    own = [file for file in source.beside(CONFIG_NAME) if file.name.rpartition("/")[2] == CONFIG_NAME]
    if own:
        with own[0].open() as file:
            content = file.read()
        try:
            values = parse_yaml(content)
        except ConfigError as error:
            raise ConfigError(f"{own[0].place} is not YAML: {error}") from error
        return _settings_of(values, own[0].place)
    batch, fitting = first(), []
    for text, place in _pages(source):
        with suppress(ConfigError):
            candidate = _settings_of(parse_yaml(text), place)
            if batch is not None and _fits(batch, candidate) and candidate not in fitting:
                fitting.append(candidate)
    if len(fitting) == 1:
        return fitting[0]
    where = f"{source.place}/{CONFIG_NAME}"
    if fitting:
        raise ConfigError(
            f"several compression settings beside the files fit them; name the right one with --compression: {where}"
        )
    raise MissingError(f"{where} does not exist; it describes how the files are compressed: name it with --compression")


def _pages(source: Source) -> Iterator[tuple[str, str]]:
    """Texts beside the files that may hold settings, and where each is."""
    for file in source.beside(".yaml", ".yml", ".json", ".md"):
        with file.open() as content:
            text = content.read().decode("utf-8", "replace")
        if file.suffix == ".md":
            yield from ((block, file.place) for block in BLOCK.findall(text))
        else:
            yield text, file.place


def _settings_of(content: object, place: str) -> AnyCompression:
    """The settings in what a file holds: at its top, or below the keys of DistillKit's training files. Raises ConfigError."""
    value = content if isinstance(content, dict) else {}
    teacher = value.get("teacher")
    for outer in (value, teacher if isinstance(teacher, dict) else {}):
        if isinstance(outer.get("legacy_logit_compression"), dict):
            return parse_config(LegacyCompression, outer["legacy_logit_compression"], place)
        if isinstance(outer.get("logprob_compressor"), dict):
            return parse_config(Compression, outer["logprob_compressor"], place)
    if "polynomial_degree" in value:
        return parse_config(LegacyCompression, value, place)
    return parse_config(Compression, value, place)


def _fits(batch: pa.RecordBatch, compression: AnyCompression) -> bool:
    """Whether rows can be decoded with these settings, and no id lies outside the vocabulary."""
    try:
        return all((row.ids < compression.d).all() for row in read_rows(iter([batch.slice(0, 4)]), compression))
    except (DataError, ValueError):
        return False


def read_rows(batches: Iterator[pa.RecordBatch], compression: AnyCompression) -> Iterator[PeerRow]:
    """Decode rows. Raises DataError where the columns are not DistillKit's, or have other sizes than the settings say."""
    if isinstance(compression, LegacyCompression):
        return _read_legacy(batches, compression)
    return _read_packed(batches, compression)


def _read_legacy(batches: Iterator[pa.RecordBatch], c: LegacyCompression) -> Iterator[PeerRow]:
    terms = c.polynomial_degree + 1 + c.with_sqrt_term
    per_long = 64 // c.id_bits
    for batch in batches:
        _refuse_missing(batch, LEGACY_COLUMNS)
        lengths, token_ids = flat(batch.column("input_ids"), as_ids)
        widths = (-(-c.k // per_long), c.exact_k, terms if c.exact_k < c.k else 0)
        grids, per_row = [], None
        for name, width in zip(LEGACY_COLUMNS[1:], widths, strict=True):
            own, sizes, values = nested(batch.column(name))
            if (sizes != width).any() or (per_row is not None and not np.array_equal(own, per_row)):
                raise DataError(
                    f"{name} has other lists than the settings mean ({width} values at a position, one list for each); name "
                    "the settings of these files with --compression"
                )
            grids.append(values.to_numpy(zero_copy_only=False).reshape(len(sizes), width))
            per_row = own
        ids_PK = _unpack_longs(grids[0], c.id_bits, c.k)
        logprobs_PK = np.concatenate([grids[1].astype(np.float32), _legacy_curve(grids[2], c)], 1)
        for tokens, lists in zip(spans(lengths), spans(per_row if per_row is not None else lengths), strict=True):
            count = len(ids_PK[lists])
            yield PeerRow(
                token_ids=token_ids[tokens],
                counts=np.full(count, c.k, np.int32),
                ids=ids_PK[lists].reshape(-1).astype(np.int32),
                logprobs=logprobs_PK[lists].reshape(-1),
            )


def _unpack_longs(longs_PB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers uint64 [P, count]: as many as fit into each long, least significant first (pack_tensor of its legacy.py)."""
    longs_PB = longs_PB.astype(np.uint64)
    places = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)
    each_PBn = (longs_PB[:, :, None] >> places) & np.uint64((1 << bits) - 1)
    numbers: np.ndarray = each_PBn.reshape(len(longs_PB), -1)[:, :count]
    return numbers


def _legacy_curve(coefficients_PC: np.ndarray, c: LegacyCompression) -> np.ndarray:
    """Values float32 [P, k - exact_k] of the polynomial over ranks 1, 2, ...; inverted: in 1 / rank."""
    rest = c.k - c.exact_k
    if not rest:
        return np.zeros((len(coefficients_PC), 0), np.float32)
    axis = np.arange(1, rest + 1, dtype=np.float64)
    powers = [axis ** (-power if c.invert_polynomial else power) for power in range(c.polynomial_degree + 1)]
    terms_CK = np.stack(powers + ([np.sqrt(axis)] if c.with_sqrt_term else []))
    values: np.ndarray = (coefficients_PC.astype(np.float64) @ terms_CK).astype(np.float32)
    return values


def _refuse_missing(batch: pa.RecordBatch, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in batch.schema.names]
    if missing:
        raise DataError(f"the files have no column {missing[0]!r}; DistillKit's files have {', '.join(columns)}")


def _read_packed(batches: Iterator[pa.RecordBatch], compression: Compression) -> Iterator[PeerRow]:
    for batch in batches:
        _refuse_missing(batch, COLUMNS)
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
